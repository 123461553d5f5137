"""Time to first token of one client, beside another that fills the queue with long sequences.

    python benchmarks/fair_share.py --sequences 60

The scheduler of `gpt2 serve` runs a randomly initialized GPT-2 of 124M parameters. Prints the median and the longest
time, without the other client and beside it.
"""

import argparse
import asyncio
import statistics
import time

from gpt2.generation.engine import GenerationRequest, SampledToken
from gpt2.generation.inference import prepare_for_inference
from gpt2.generation.sampling import Sampling
from gpt2.model import GPT, GPTConfig
from gpt2.serve.scheduler import Scheduler

LONG = 10**6  # new tokens: runs until it is cancelled


async def first_token_seconds(scheduler: Scheduler, prompt: list[int]) -> float:
    """The time from a request of client B to its first token. The request is cancelled then."""
    start = time.perf_counter()
    handle = scheduler.submit("B", [GenerationRequest(prompt, Sampling(), 20)])
    while not isinstance((await handle.events.get())[1], SampledToken):
        pass
    seconds = time.perf_counter() - start
    scheduler.cancel(handle)
    return seconds


async def measure(scheduler: Scheduler, prompt: list[int], sequences: int, rounds: int) -> None:
    """Print the times without and with the load of client A."""
    for number in (0, sequences):
        load = [scheduler.submit("A", [GenerationRequest(prompt, Sampling(), LONG, i)]) for i in range(number)]
        await asyncio.sleep(20 if load else 0)  # the slots are full
        times = []
        for _ in range(rounds):
            times.append(await first_token_seconds(scheduler, prompt))
            await asyncio.sleep(0.5)
        print(f"beside {number} sequences: median {statistics.median(times):.3f} s, longest {max(times):.3f} s")
        for handle in load:
            scheduler.cancel(handle)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=60)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    prompt = list(range(args.prompt_tokens))
    model = prepare_for_inference(GPT(GPTConfig()).eval(), args.dtype)
    scheduler = Scheduler(model, args.slots, max_waiting=512, per_client=args.sequences + 1)
    scheduler.start()
    asyncio.run(measure(scheduler, prompt, args.sequences, args.rounds))
    scheduler.stop()


if __name__ == "__main__":
    main()

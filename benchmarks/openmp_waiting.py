"""Training steps and decoded tokens per second of small models, by how OpenMP's threads wait (GNU's libgomp).

    python benchmarks/openmp_waiting.py [--busy 4] [--seconds 5] [--rounds 3]

Each setting runs in a process of its own, in turn. --busy starts that many processes that only compute beside it.
"""

import argparse
import hashlib
import os
import statistics
import subprocess
import sys
import time

SETTINGS = {
    "libgomp's default": {},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    "OMP_NUM_THREADS=1": {"OMP_NUM_THREADS": "1"},
}
SIZES = {  # layers, heads, width, context, batch, vocabulary
    "tiny, 2 x 64": (2, 2, 64, 64, 8, 256),
    "quickstart, 3 x 128": (3, 4, 128, 64, 32, 1024),
    "race, 2 x 128": (2, 4, 128, 64, 48, 257),
}


def train(name: str, seconds: float) -> None:
    """Print the steps per second, and the digest of the losses of the first ten steps."""
    import torch

    from gpt2.model import GPT, GPTConfig

    layers, heads, width, context, batch, vocabulary = SIZES[name]
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=layers, n_head=heads, n_embd=width, block_size=context, vocab_size=vocabulary))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    tokens = torch.randint(vocabulary, (batch, context + 1))
    losses: list[float] = []

    def step() -> None:
        logits = model.lm_head(model.hidden_states(tokens[:, :-1]))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    for _ in range(10):
        step()
    digest = hashlib.sha256(str(losses).encode()).hexdigest()[:8]
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        step()
        count += 1
    print(count / (time.perf_counter() - start), digest)


def decode(seconds: float) -> None:
    """Print the tokens per second of the native decoder: a 4 x 256 model, one sequence."""
    import torch

    from gpt2.generation.engine import Engine, GenerationRequest
    from gpt2.generation.inference import prepare_for_inference
    from gpt2.model import GPT, GPTConfig

    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=4, n_head=4, n_embd=256, block_size=256, vocab_size=4096)).eval()
    engine = Engine(prepare_for_inference(model), 1)
    engine.submit(GenerationRequest([1], max_new_tokens=10**6))
    for _ in range(20):
        engine.step()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        engine.step()
        count += 1
    print(count / (time.perf_counter() - start), "-")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        decode(args.seconds) if args.work == "decode, 4 x 256" else train(args.work, args.seconds)
        return
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(args.busy)]
    try:
        for work in (*SIZES, "decode, 4 x 256"):
            rates: dict[str, list[float]] = {name: [] for name in SETTINGS}
            digests = set()
            for _ in range(args.rounds):
                for name, variables in SETTINGS.items():
                    command = [sys.executable, __file__, "--work", work, "--seconds", str(args.seconds)]
                    output = subprocess.check_output(command, env=os.environ | variables, text=True).split()
                    rates[name].append(float(output[0]))
                    digests.add(output[1])
            print(f"{work}: {len(digests)} different results")
            for name, found in rates.items():
                print(f"  {name}: {statistics.median(found):.1f}/s ({min(found):.1f} to {max(found):.1f})", flush=True)
    finally:
        for process in busy:
            process.kill()


if __name__ == "__main__":
    main()

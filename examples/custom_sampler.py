"""A sampler of your own, on top of the KV cache: python examples/custom_sampler.py MODEL PROMPT

The rule is that of Mirostat (Basu et al. 2021), simplified: keep the surprise of the text near a target by moving a
threshold after each token.
"""

import math
import sys

import torch

import gpt2


@torch.no_grad()
def sample(model: gpt2.GPT, tokens: list[int], count: int, target: float, seed: int) -> list[int]:
    """`count` new token ids whose mean surprise is near `target`, in nats."""
    random = torch.Generator().manual_seed(seed)
    cache = model.make_cache(1)
    logits = model(torch.tensor([tokens]), cache)[0, -1]  # prefill: (V,)
    threshold, chosen = 2 * target, []
    for _ in range(count):
        logprobs = logits.log_softmax(-1)
        kept = logprobs.masked_fill(-logprobs > max(threshold, -float(logprobs.max())), -math.inf)
        token = int(torch.multinomial(kept.softmax(-1), 1, generator=random))
        threshold += 0.1 * (target - float(-logprobs[token]))
        chosen.append(token)
        logits = model(torch.tensor([[token]]), cache)[0, -1]  # decode: one position
    return chosen


def main(ref: str, prompt: str = "The") -> None:
    """Three targets: the higher, the more surprising the text."""
    model, tokenizer = gpt2.load(ref)
    if tokenizer is None:
        raise SystemExit("the model has no tokenizer")
    for target in (1.0, 2.0, 3.0):
        tokens = sample(model, tokenizer.encode(prompt), 40, target, seed=1)
        print(f"--- {target} nats\n{prompt}{tokenizer.decode(tokens)}")


if __name__ == "__main__":
    main(*sys.argv[1:])

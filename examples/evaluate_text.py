"""Bits per byte of a text, and its most surprising tokens: python examples/evaluate_text.py MODEL FILE"""

import math
import sys
from pathlib import Path

import torch

import gpt2


@torch.no_grad()
def main(ref: str, file: str, count: str = "5") -> None:
    """Score the text in windows of the context, without overlap. `gpt2 eval MODEL --data FILE` has more."""
    model, tokenizer = gpt2.load(ref)
    if tokenizer is None:
        raise SystemExit("the model has no tokenizer")
    text = Path(file).read_text(encoding="utf-8")
    tokens = torch.tensor([tokenizer.end_of_text, *tokenizer.encode(text)])
    surprises = []
    for start in range(0, len(tokens) - 1, model.config.block_size):
        window = tokens[start : start + model.config.block_size + 1]
        logprobs = model(window[None, :-1]).log_softmax(-1)[0]
        surprises.append(-logprobs.gather(1, window[1:, None])[:, 0])
    surprise = torch.cat(surprises)  # nats, one for each token of the text
    print(f"{float(surprise.sum()) / math.log(2) / len(text.encode()):.3f} bits per byte")
    for i in surprise.topk(min(int(count), len(surprise))).indices.tolist():
        print(f"{float(surprise[i]):6.2f} nats  {tokenizer.decode([int(tokens[i + 1])])!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Print text while it is generated: python examples/stream.py MODEL PROMPT"""

import sys

import gpt2


def main(ref: str, prompt: str = "The") -> None:
    """`gpt2.stream` yields (sample, text) for every new piece, always whole characters."""
    model, tokenizer = gpt2.load(ref)
    print(prompt, end="", flush=True)
    sampling = gpt2.Sampling(temperature=0.8, top_p=0.95)
    for _, piece in gpt2.stream(model, tokenizer, prompt, sampling, max_new_tokens=60, stop=["\n\n"], seed=1):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    main(*sys.argv[1:])

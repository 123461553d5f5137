"""Hooks on the residual stream, and what each layer would predict: python examples/activations.py MODEL PROMPT

TransformerLens and nnsight take models of `transformers`: `GPT2LMHeadModel.from_pretrained("folder")`.
"""

import sys

import torch
from torch import Tensor, nn

import gpt2


@torch.no_grad()
def main(ref: str, prompt: str = "The with statement") -> None:
    """The logit lens: apply the final norm and the head after every block."""
    model, tokenizer = gpt2.load(ref)
    if tokenizer is None:
        raise SystemExit("the model has no tokenizer")
    stream: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        stream.append(output)  # (1, T, C): the residual stream after a block

    hooks = [block.register_forward_hook(keep) for block in model.transformer.h]
    logits = model(torch.tensor([tokenizer.encode(prompt)]))
    for hook in hooks:
        hook.remove()
    for layer, x in enumerate(stream):
        probabilities = model.lm_head(model.transformer.ln_f(x))[0, -1].softmax(-1)
        best = int(probabilities.argmax())
        norm = float(x[0, -1].norm())
        print(f"after block {layer}: norm {norm:6.2f}, {tokenizer.decode([best])!r} {float(probabilities[best]):.1%}")
    assert torch.allclose(model.lm_head(model.transformer.ln_f(stream[-1])), logits, atol=1e-5)


if __name__ == "__main__":
    main(*sys.argv[1:])

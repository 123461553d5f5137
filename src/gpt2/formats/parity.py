"""Does a converted model give what the original gives? Logits and greedy tokens on three prompts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt2.errors import UserError
from gpt2.model import GPT
from gpt2.tokenizer import Tokenizer

PROMPTS = ("Hello, I'm a language model,", "The capital of France is", "def fibonacci(n):\n    ")
NEW_TOKENS, PROMPT_TOKENS = 50, 16

Runner = Callable[[list[int], int], Tensor]
"""Token ids (T,) and a position p: the logits of the positions from p on, (T - p, vocab_size) or more, in float32. Log-
probabilities do as well, and NaN where a program does not give all."""


@dataclass(frozen=True)
class Parity:
    """What was found.

    program:    what ran the converted model.
    difference: the largest of a logit, on the prompts and the tokens after them.
    scale:      the largest logit of the original, without their mean at a position.
    tolerance:  the largest difference / scale that passes.
    same:       greedy tokens, of `tokens`, before the first that differs; summed over the prompts.
    """

    program: str
    difference: float
    scale: float
    tolerance: float
    same: int
    tokens: int

    @property
    def passed(self) -> bool:
        return self.difference <= self.tolerance * self.scale

    def __str__(self) -> str:
        return (
            f"largest logit difference {self.difference:.2g} (tolerance {self.tolerance * self.scale:.2g}), "
            f"{self.same} of {self.tokens} greedy tokens the same, run by {self.program}"
        )


@torch.inference_mode()
def compare(model: GPT, tokenizer: Tokenizer | None, run: Runner, program: str, tolerance: float) -> Parity:
    """Run the original and the converted model on the same tokens: a prompt, and what the original adds greedily.

    Where they agree on the tokens up to a position, so do their greedy continuations. Raises UserError when the
    converted model gives something that is not a number.
    """
    difference = scale = 0.0
    same = tokens = 0
    for prompt in prompts_of(model, tokenizer):
        ids, start = _greedy(model, prompt), len(prompt) - 1
        expected = model(torch.tensor([ids[:-1]], device=model.device))[0, start:].float().cpu()  # (new, V)
        got = run(ids[:-1], start)[-len(expected) :, : expected.size(1)].float()
        known = ~got.isnan()
        if not known.any() or got.isinf().any():
            raise UserError(f"the converted model gives no numbers when {program} runs it")
        expected, got = _centered(expected, known), _centered(got, known)
        difference = max(difference, (expected - got)[known].abs().max().item())
        scale = max(scale, expected[known].abs().max().item())
        agree = (got.masked_fill(~known, -torch.inf).argmax(-1) == torch.tensor(ids[len(prompt) :])).tolist()
        if all(agree[: (rows := int(known.any(-1).sum()))]):  # fewer rows than asked for where the text has ended
            same, tokens = same + rows, tokens + rows
        else:
            same, tokens = same + agree.index(False), tokens + len(agree)
    return Parity(program, difference, scale, tolerance, same, tokens)


def prompts_of(model: GPT, tokenizer: Tokenizer | None) -> list[list[int]]:
    """Three prompts of at most 16 tokens, and of half the context; without a tokenizer, random ones."""
    most = max(1, min(PROMPT_TOKENS, model.config.block_size // 2))
    drawn = torch.randint(model.config.vocab_size, (3, most), generator=torch.Generator().manual_seed(0)).tolist()
    if tokenizer is None:
        return drawn
    try:
        return [tokenizer.encode(text)[:most] for text in PROMPTS]
    except UserError:  # characters that its alphabet does not have
        return drawn


def _centered(logits: Tensor, known: Tensor) -> Tensor:
    """Less the mean at each position: logits that differ by a constant mean the same, as do log-probabilities."""
    sums = logits.masked_fill(~known, 0.0).sum(-1, keepdim=True)
    return logits - sums / known.sum(-1, keepdim=True).clamp_min(1)


def _greedy(model: GPT, prompt: Sequence[int]) -> list[int]:
    ids = list(prompt)
    cache = model.make_cache(1)
    step = torch.tensor([ids], device=model.device)
    for _ in range(min(NEW_TOKENS, model.config.block_size - len(prompt))):
        ids.append(int(model(step, cache)[0, -1].argmax()))
        step = torch.tensor([ids[-1:]], device=model.device)
    return ids

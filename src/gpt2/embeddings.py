"""More tokens for a model that has learned others."""

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from gpt2.errors import UserError
from gpt2.model import GPT


def extend_vocabulary(model: GPT, vocab_size: int, known: int | None = None) -> GPT:
    """A copy of `model` with rows for `vocab_size` tokens in its embedding and its head.

    known: how many of its rows stand for tokens (all, by default): those after them, with which a vocabulary was
           filled up, are made anew too.

    A new row is the mean of the known ones, plus noise of a tenth of their spread in each channel, from torch's global
    random state. The mean's logit is the mean logit, so the new tokens take little from the known ones (Hewitt 2021,
    "Initializing New Word Embeddings for Pretrained Language Models"), whose own logits stay; the noise makes no two
    alike. Raises UserError for fewer tokens than there are known ones.
    """
    old_size = model.config.vocab_size
    known = old_size if known is None else known
    if not 1 <= known <= min(vocab_size, old_size):
        raise UserError(f"a model of {old_size:,} tokens, {known:,} of them known, cannot have {vocab_size:,}")
    extended = copy.deepcopy(model)
    vocab_size = max(vocab_size, old_size)
    extended.config = replace(model.config, vocab_size=vocab_size)
    wte, head = extended.transformer.wte, extended.lm_head
    wte.num_embeddings = head.out_features = vocab_size
    tied = head.weight is wte.weight
    wte.weight = _extended(wte.weight, vocab_size, known)
    if not tied:
        head.weight = _extended(head.weight, vocab_size, known)
    extended.tie_weights()
    return extended


@torch.no_grad()
def _extended(weight: Tensor, size: int, known: int) -> nn.Parameter:
    """(known or more, C) -> (size, C)"""
    rows = weight[:known].float()
    noise = torch.randn(size - known, weight.size(1)).to(weight.device)
    new: Tensor = rows.mean(0) + 0.1 * rows.std(0, correction=0) * noise  # (size - known, C)
    return nn.Parameter(torch.cat([weight[:known], new.to(weight.dtype)]), requires_grad=weight.requires_grad)

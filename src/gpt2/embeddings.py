"""Extend the vocabulary of a trained model."""

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from gpt2.errors import ConfigError
from gpt2.model import GPT


def extend_vocabulary(model: GPT, vocab_size: int, num_known_tokens: int | None = None) -> GPT:
    """A copy of `model` with rows for `vocab_size` tokens in its embedding and its head.

    num_known_tokens: the number of rows that stand for tokens (all, by default). Padding rows after them are
                      initialized again.

    A new row is the mean of the known rows plus noise of a tenth of their standard deviation in each channel, from
    torch's global random state. The logit of the mean row is the mean logit, so the new tokens take little probability
    from the known ones (Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models"), whose logits
    are unchanged; the noise makes the new rows differ. Raises ConfigError for fewer tokens than there are known ones.
    """
    old_size = model.config.vocab_size
    num_known_tokens = old_size if num_known_tokens is None else num_known_tokens
    if not 1 <= num_known_tokens <= min(vocab_size, old_size):
        raise ConfigError(
            f"a model of {old_size:,} tokens, {num_known_tokens:,} of them known, cannot have {vocab_size:,}"
        )
    extended = copy.deepcopy(model)
    vocab_size = max(vocab_size, old_size)
    extended.config = replace(model.config, vocab_size=vocab_size)
    wte, head = extended.transformer.wte, extended.lm_head
    wte.num_embeddings = head.out_features = vocab_size
    tied = head.weight is wte.weight
    wte.weight = _extend_rows(wte.weight, vocab_size, num_known_tokens)
    if not tied:
        head.weight = _extend_rows(head.weight, vocab_size, num_known_tokens)
    extended.tie_weights()
    return extended


@torch.no_grad()
def _extend_rows(weight: Tensor, size: int, num_known: int) -> nn.Parameter:
    """(num_known or more, C) -> (size, C)."""
    rows = weight[:num_known].float()
    noise = torch.randn(size - num_known, weight.size(1)).to(weight.device)
    new: Tensor = rows.mean(0) + 0.1 * rows.std(0, correction=0) * noise  # (size - num_known, C)
    return nn.Parameter(torch.cat([weight[:num_known], new.to(weight.dtype)]), requires_grad=weight.requires_grad)

"""Packed documents: the model computes each as if it were alone."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2.errors import UserError
from gpt2.loss import IGNORE_INDEX
from gpt2.model import GPT, GPTConfig
from gpt2.packing import Packing
from gpt2.runtime import apply_activation_checkpointing
from tests.helpers.transformers_reference import random_model

CONFIG = GPTConfig(vocab_size=61, block_size=24, n_layer=2, n_head=2, n_embd=16)


def document_ids(lengths: list[list[int]]) -> torch.Tensor:
    """Document ids for rows of documents of these lengths."""
    rows = [torch.cat([torch.full((n,), i) for i, n in enumerate(row)]) for row in lengths]
    return torch.stack(rows)


def test_positions_and_mask_of_packed_documents() -> None:
    packing = Packing.of_documents(torch.tensor([[5, 5, 0, 0, 0, 5], [1, 1, 1, 1, 1, 1]]))
    assert packing.positions.tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5]]
    assert packing.mask.shape == (2, 1, 6, 6)
    assert packing.mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],  # the same number as the first document, but not adjacent
    ]
    assert torch.equal(packing.mask[1, 0], torch.ones(6, 6, dtype=torch.bool).tril())


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(1, 9), min_size=1, max_size=6), attention=st.sampled_from(["sdpa", "plain"]))
def test_a_packed_row_equals_its_documents_alone(cuts: list[int], attention: str) -> None:
    length = sum(cuts)
    model = random_model(replace(CONFIG, block_size=max(length, 1), attention=attention))
    tokens = torch.randint(61, (1, length), generator=torch.Generator().manual_seed(length))
    packed = model.lm_head(model.hidden_states(tokens, documents=document_ids([cuts])))
    alone = torch.cat([model(part) for part in tokens.split(cuts, dim=1)], dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_a_packed_batch_equal_those_of_its_documents(checkpointing: bool) -> None:
    model = random_model(CONFIG)
    cuts = [[7, 3, 14], [24]]
    tokens, targets = torch.randint(61, (2, 2, 24), generator=torch.Generator().manual_seed(1))
    targets[0, :4] = IGNORE_INDEX
    count = float((targets != IGNORE_INDEX).sum())
    for row, lengths in enumerate(cuts):
        for part, part_targets in zip(tokens[row].split(lengths), targets[row].split(lengths), strict=True):
            model.loss(part[None], part_targets[None], count).backward()
    apart = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    if checkpointing:
        apply_activation_checkpointing(model.transformer.h)
    model.loss(tokens, targets, documents=document_ids(cuts)).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, apart[name], rtol=1e-4, atol=1e-6, msg=name)


def test_one_document_per_row_equals_the_plain_model() -> None:
    model = random_model(CONFIG)
    tokens = torch.randint(61, (3, 20), generator=torch.Generator().manual_seed(2))
    one = torch.tensor([[4], [4], [9]]).expand(3, 20)
    torch.testing.assert_close(model.hidden_states(tokens, documents=one), model.hidden_states(tokens))


def test_a_packed_row_longer_than_the_context_is_refused() -> None:
    with pytest.raises(UserError, match="25 tokens do not fit the model's context of 24"):
        GPT(CONFIG).hidden_states(torch.zeros(1, 25, dtype=torch.int64), documents=torch.arange(25)[None])

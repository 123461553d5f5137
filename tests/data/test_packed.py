"""Packing loses no token, is a pure function of (data, seed, step), and does not change the loss of a document."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2.data.packed import (
    PackedLoader,
    PackedRows,
    Spans,
    TokenizedDocuments,
    pack_best_fit,
    packed_evaluation_batches,
    truncate_documents,
)
from gpt2.errors import UserError
from gpt2.loss import IGNORE_INDEX
from gpt2.model import GPT, GPTConfig

PADDING = 10**6  # not a token of any document

lengths = st.lists(st.tuples(st.integers(0, 12), st.integers(1, 12)), min_size=1, max_size=30)  # prompt, answer
widths = st.integers(1, 20)


def make_documents(shapes: Sequence[tuple[int, int]]) -> TokenizedDocuments:
    """Documents with these numbers of prompt and answer tokens, and an end token each; all tokens are different."""
    in_loss, sizes = [], []
    for prompt, answer in shapes:
        in_loss += [False] * prompt + [True] * (answer + 1)
        sizes.append(prompt + answer + 1)
    offsets = np.concatenate(([0], np.cumsum(sizes)))
    loss_mask = np.array(in_loss)
    loss_mask[offsets[:-1]] = False
    return TokenizedDocuments(
        np.arange(len(in_loss), dtype=np.int32), loss_mask, offsets, np.array([p for p, _ in shapes])
    )


def truncated(documents: TokenizedDocuments, index: int, block_size: int) -> list[int]:
    """The tokens of a document after truncation, computed one at a time."""
    tokens = list(range(documents.offsets[index], documents.offsets[index + 1]))
    first_kept = tokens[max(0, documents.answer_starts[index] - 1)]
    while len(tokens) > block_size + 1:
        tokens = tokens[1:] if tokens[0] < first_kept else tokens[:-1]
    return tokens


def everything(documents: TokenizedDocuments) -> np.ndarray:
    return np.arange(len(documents))


@given(shapes=lengths, block_size=widths)
@settings(deadline=None)
def test_truncation_removes_the_oldest_tokens_and_keeps_the_last_answer(
    shapes: list[tuple[int, int]], block_size: int
) -> None:
    documents = make_documents(shapes)
    read, cut = truncate_documents(documents, everything(documents), block_size)
    expected = [truncated(documents, i, block_size) for i in range(len(documents))]
    assert [list(range(start, stop)) for start, stop in zip(*read, strict=True)] == expected
    lost = [set(range(*documents.offsets[i : i + 2])) - set(tokens) for i, tokens in enumerate(expected)]
    assert cut.documents == sum(map(bool, lost))
    assert cut.tokens == sum(map(len, lost))
    whole = Spans(documents.offsets[:-1], documents.offsets[1:])
    assert cut.targets == (whole.num_targets(documents) - read.num_targets(documents)).sum()
    assert list(read.num_targets(documents)) == [sum(documents.loss_mask[t] for t in tokens[1:]) for tokens in expected]
    assert (read.num_targets(documents) > 0).all()


@given(shapes=lengths, block_size=widths, seed=st.integers(0, 3))
@settings(deadline=None)
def test_every_document_is_packed_once_and_separately(
    shapes: list[tuple[int, int]], block_size: int, seed: int
) -> None:
    documents = make_documents(shapes)
    read, _ = truncate_documents(documents, everything(documents), block_size)
    rows = PackedRows(documents, read, block_size, PADDING, seed)
    batch = rows.batch(np.arange(len(rows)))
    assert batch.documents is not None
    found, padding = [], 0
    for tokens, targets, numbers in zip(*(tensor.tolist() for tensor in batch if tensor is not None), strict=True):
        assert numbers == sorted(numbers)  # equal numbers are neighbours
        for number in set(numbers):
            places = [place for place, other in enumerate(numbers) if other == number]
            if tokens[places[0]] == PADDING:
                assert all(tokens[place] == PADDING and targets[place] == IGNORE_INDEX for place in places)
                padding += len(places)
            else:
                found.append(([tokens[place] for place in places], [targets[place] for place in places]))
    assert padding == rows.num_padding
    expected = [truncated(documents, i, block_size) for i in range(len(documents))]
    assert sorted(found) == [
        (tokens[:-1], [t if documents.loss_mask[t] else IGNORE_INDEX for t in tokens[1:]]) for tokens in expected
    ]


@given(sizes=st.lists(st.integers(1, 9), max_size=40))
@settings(deadline=None)
def test_each_document_goes_to_the_row_with_the_least_room(sizes: list[int]) -> None:
    row_of, count = pack_best_fit(np.array(sizes, np.int64), 9)
    room: list[int] = []
    for size, row in zip(sizes, row_of.tolist(), strict=True):
        fitting = [left for left in room if left >= size]
        if row == len(room):
            assert not fitting
            room.append(9)
        else:
            assert room[row] == min(fitting)
        room[row] -= size
    assert count == len(room)


def test_padding_is_small_and_small_documents_are_mixed() -> None:
    lengths = np.random.Generator(np.random.Philox(1)).integers(2, 30, 2000)
    documents = make_documents([(0, int(n)) for n in np.sort(lengths)])
    read, _ = truncate_documents(documents, everything(documents), 256)
    rows = PackedRows(documents, read, 256, PADDING)
    assert rows.num_padding / (256 * len(rows)) < 0.01
    sizes = [
        (rows.spans.stops - rows.spans.starts)[a:b]
        for a, b in zip(rows.row_offsets, rows.row_offsets[1:], strict=False)
    ]
    assert np.median([np.ptp(some) for some in sizes]) > 20  # neighbours in the data have similar lengths


def loader(documents: TokenizedDocuments, batch_size: int, block_size: int, seed: int) -> PackedLoader:
    read, _ = truncate_documents(documents, everything(documents), block_size)
    return PackedLoader(PackedRows(documents, read, block_size, PADDING, seed), batch_size, seed)


@given(shapes=lengths, batch_size=st.integers(1, 5), seed=st.integers(0, 2**70))
@settings(deadline=None, max_examples=30)
def test_an_epoch_is_every_row_once_and_a_batch_depends_on_seed_and_step_only(
    shapes: list[tuple[int, int]], batch_size: int, seed: int
) -> None:
    documents = make_documents(shapes)
    one = loader(documents, batch_size, 20, seed)
    epochs = 3
    steps = -(-epochs * one.windows_per_epoch // batch_size)
    batches = [one.batch(step) for step in range(steps)]
    line = torch.cat([batch.tokens for batch in batches])[: epochs * one.windows_per_epoch]
    every_row = sorted(one.packed_rows.batch(np.arange(one.windows_per_epoch)).tokens.tolist())
    for epoch in line.split(one.windows_per_epoch):
        assert sorted(epoch.tolist()) == every_row
    other = loader(documents, batch_size, 20, seed)
    for step in reversed(range(steps)):
        parts = [other.rows(step, row, row + 1) for row in range(batch_size)]
        for whole, *pieces in zip(batches[step], *parts, strict=True):
            assert whole is not None
            assert torch.equal(whole, torch.cat(pieces))


def test_each_epoch_and_each_seed_has_its_own_order() -> None:
    documents = make_documents([(3, 10)] * 40)
    rows = loader(documents, 40, 14, 0).packed_rows  # one document per row
    orders = [PackedLoader(rows, 40, seed).batch(step).tokens[:, 0].tolist() for seed in (0, 1) for step in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert len({tuple(sorted(order)) for order in orders}) == 1
    with pytest.raises(ValueError, match="outside a batch of 40"):
        loader(documents, 40, 14, 0).rows(0, 0, 41)


@given(shapes=lengths, block_size=widths, rows=st.integers(1, 4), data=st.data())
@settings(deadline=None)
def test_evaluation_has_every_target_once_or_the_first_max_tokens(
    shapes: list[tuple[int, int]], block_size: int, rows: int, data: st.DataObject
) -> None:
    documents = make_documents(shapes)
    read, _ = truncate_documents(documents, everything(documents), block_size)
    expected = [
        t for i in range(len(documents)) for t in truncated(documents, i, block_size)[1:] if documents.loss_mask[t]
    ]
    max_tokens = data.draw(st.none() | st.integers(1, len(expected) + 2))
    batches = list(packed_evaluation_batches(documents, read, rows, block_size, PADDING, max_tokens))
    assert all(len(batch.tokens) <= rows and batch.tokens.size(1) <= block_size for batch in batches)
    found = [t for batch in batches for t in batch.targets.flatten().tolist() if t != IGNORE_INDEX]
    assert sorted(found) == expected[:max_tokens]


def test_no_target_is_an_error() -> None:
    documents = make_documents([(1, 1)])
    with pytest.raises(UserError, match="nothing to evaluate on"):
        list(packed_evaluation_batches(documents, Spans(np.array([0]), np.array([3])), 1, 4, PADDING, 0))


def test_loss_and_gradients_of_a_packed_batch_equal_those_of_separate_documents() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=400, block_size=24, n_layer=2, n_head=2, n_embd=16)).double()
    documents = make_documents([(3, 4), (0, 6), (10, 2), (1, 1), (7, 9), (2, 30), (30, 3)])
    read, cut = truncate_documents(documents, everything(documents), 24)
    assert cut.documents == 2
    rows = PackedRows(documents, read, 24, pad_token=399)
    batch = rows.batch(np.arange(len(rows)))
    loss = model.loss(batch.tokens, batch.targets, documents=batch.documents)
    loss.backward()
    packed = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for start, stop in zip(*read, strict=True):
        tokens = torch.arange(int(start), int(stop))
        in_loss = torch.from_numpy(documents.loss_mask[start:stop])
        targets = tokens.where(in_loss, IGNORE_INDEX)
        total += model.loss(tokens[None, :-1], targets[None, 1:], divisor=float(batch.num_targets))
    total.backward()
    assert torch.allclose(loss, total, rtol=1e-12)
    alone = [p.grad for p in model.parameters() if p.grad is not None]
    for one, other in zip(packed, alone, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-14)

"""A batch is a pure function of (data, seed, step), and an epoch is every window once."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpt2.data.loader import TokenLoader, evaluation_batches
from gpt2.errors import UserError


class Counting:
    """Token i of the data is i, so a batch shows its position."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def read(self, start: int, stop: int) -> np.ndarray:
        assert 0 <= start < stop <= self.length
        return np.arange(start, stop, dtype=np.uint16)


@st.composite
def loaders(draw: st.DrawFn) -> TokenLoader:
    block_size = draw(st.integers(1, 8))
    length = draw(st.integers(block_size + 1, 120))
    return TokenLoader(Counting(length), draw(st.integers(1, 40)), block_size, draw(st.integers(-(2**40), 2**40)))


def starts(loader: TokenLoader, first: int, last: int) -> list[int]:
    """The first tokens of rows [first, last), numbered over all steps."""
    size = loader.batch_size
    rows = torch.cat([loader.batch(step)[0][:, 0] for step in range(first // size, -(-last // size))])
    return rows[first % size :][: last - first].tolist()


@given(loader=loaders(), epoch=st.integers(0, 5))
def test_an_epoch_visits_each_window_once(loader: TokenLoader, epoch: int) -> None:
    count, block_size, length = loader.windows_per_epoch, loader.block_size, len(loader.tokens)
    assert count == max(1, (length - block_size) // block_size)
    found = sorted(starts(loader, epoch * count, (epoch + 1) * count))
    assert np.diff(found).tolist() == [block_size] * (count - 1)
    assert found[0] >= 0
    assert found[-1] + block_size + 1 <= length


@given(loader=loaders(), step=st.integers(0, 100))
def test_targets_are_the_tokens_that_follow(loader: TokenLoader, step: int) -> None:
    tokens, targets, documents = loader.batch(step)
    assert documents is None
    assert tokens.shape == targets.shape == (loader.batch_size, loader.block_size)
    assert tokens.dtype == targets.dtype == torch.int64
    assert tokens.is_contiguous()
    assert targets.is_contiguous()
    assert torch.equal(targets, tokens + 1)
    assert torch.equal(tokens, tokens[:, :1] + torch.arange(loader.block_size))


@given(loader=loaders(), steps=st.lists(st.integers(0, 60), min_size=1, max_size=8))
def test_a_batch_does_not_depend_on_earlier_calls(loader: TokenLoader, steps: list[int]) -> None:
    for step in steps:
        fresh = TokenLoader(loader.tokens, loader.batch_size, loader.block_size, loader.seed)
        for found, expected in zip(loader.batch(step)[:2], fresh.batch(step)[:2], strict=True):
            assert torch.equal(found, expected)


@given(loader=loaders(), step=st.integers(0, 60), data=st.data())
def test_rows_are_slices_of_the_batch(loader: TokenLoader, step: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, loader.batch_size))
    stop = data.draw(st.integers(start, loader.batch_size))
    for part, all_rows in zip(loader.rows(step, start, stop)[:2], loader.batch(step)[:2], strict=True):
        assert torch.equal(part, all_rows[start:stop])


def test_the_rows_do_not_depend_on_the_batch_size() -> None:
    one, many = (TokenLoader(Counting(1000), size, 8, seed=5) for size in (1, 7))
    assert starts(one, 0, 700) == starts(many, 0, 700)


def test_seeds_and_epochs_have_different_orders_and_offsets() -> None:
    loader = TokenLoader(Counting(10_000), 4, 32, seed=1)
    count = loader.windows_per_epoch
    epochs = [starts(loader, epoch * count, (epoch + 1) * count) for epoch in range(40)]
    assert len({epoch[0] for epoch in epochs}) > 30
    offsets = {min(epoch) for epoch in epochs}
    assert len(offsets) > 20  # each epoch has other windows
    other = TokenLoader(Counting(10_000), 4, 32, seed=2)
    assert starts(other, 0, count) != epochs[0]
    assert sorted(epochs[0]) != epochs[0]


def test_every_offset_starts_a_window_in_some_epoch() -> None:
    loader = TokenLoader(Counting(61), 1, 4, seed=0)
    assert set(starts(loader, 0, 14 * 200)) == set(range(61 - 4))


def test_neighbouring_seeds_of_any_size_differ() -> None:
    seeds = (0, 1, -1, 2**63, 2**63 + 1, 2**64 - 2)
    orders = {tuple(starts(TokenLoader(Counting(10_000), 4, 32, seed), 0, 300)) for seed in seeds}
    assert len(orders) == len(seeds)


def test_data_shorter_than_a_block_is_refused() -> None:
    assert TokenLoader(Counting(1025), 1, 1024, 0).batch(3)[0].tolist() == [list(range(1024))]
    with pytest.raises(UserError, match=r"the data has 1,024 tokens, and a block size of 1,024 needs 1,025: use more"):
        TokenLoader(Counting(1024), 1, 1024, 0)
    with pytest.raises(ValueError, match="outside a batch of 4"):
        TokenLoader(Counting(100), 4, 8, 0).rows(0, 2, 5)


@given(
    length=st.integers(2, 100),
    batch_size=st.integers(1, 5),
    block_size=st.integers(1, 30),
    max_tokens=st.none() | st.integers(1, 120),
)
def test_evaluation_has_each_token_as_a_target_once(
    length: int, batch_size: int, block_size: int, max_tokens: int | None
) -> None:
    targets_seen: list[int] = []
    for tokens, targets, _ in evaluation_batches(Counting(length), batch_size, block_size, max_tokens):
        assert tokens.shape == targets.shape
        assert tokens.shape[0] <= batch_size
        assert tokens.shape[1] <= block_size
        assert tokens.dtype == targets.dtype == torch.int64
        real = targets != -100
        assert torch.equal(tokens[real] + 1, targets[real])
        assert not tokens[~real].any()
        assert real.any(dim=1).all()
        targets_seen += targets[real].tolist()
    total = length - 1 if max_tokens is None else min(length - 1, max_tokens)
    assert targets_seen == list(range(1, total + 1))


def test_a_split_shorter_than_a_block_shortens_the_block() -> None:
    ((tokens, targets, _),) = evaluation_batches(Counting(5), 8, 1024)
    assert tokens.tolist() == [[0, 1, 2, 3]]
    assert targets.tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize(("length", "max_tokens"), [(0, None), (1, None), (10, 0)])
def test_a_split_without_targets_is_refused(length: int, max_tokens: int | None) -> None:
    with pytest.raises(UserError, match=rf"nothing to evaluate on: the split has {length} token\(s\)"):
        next(evaluation_batches(Counting(length), 1, 8, max_tokens))

"""Mixtures: rows by weight, a pure function of (seed, step), one tokenizer."""

from fractions import Fraction
from pathlib import Path

import pytest
import torch

from gpt2.data.mixture import MixtureDataset, find_mixture
from gpt2.data.prepare import open_mixture as open_mixture_data
from gpt2.data.prepare import prepare
from gpt2.data.resolve import resolve_data
from gpt2.data.sources import Document, Texts
from gpt2.errors import UserError
from gpt2.tokenizer import ByteTokenizer


@pytest.fixture
def mixture(tmp_path: Path) -> str:
    """Two folders of shards, of a's and of b's, 0.8 and 0.2 of the rows."""
    for name, size in (("a", 9000), ("b", 500)):
        text = "".join(f"{name}{i % 97} " for i in range(size))
        prepare(Texts(name, (Document(name, text.encode()),)), ByteTokenizer(), tmp_path / name)
    return f"{tmp_path}/a:8,{tmp_path}/b:2"


def open_mixture(ref: str, tokenizer: str | None = None) -> MixtureDataset:
    found = find_mixture(ref)
    assert found is not None
    return open_mixture_data(found, tokenizer)


def part_of(row: torch.Tensor) -> str:
    return "b" if (row == ord("b")).any() else "a"


def test_every_1024_rows_have_the_shares_and_each_part_goes_epoch_by_epoch(mixture: str) -> None:
    data = open_mixture(mixture)
    loader = data.loader(64, 16, seed=3)
    rows = torch.cat([loader.batch(step).tokens for step in range(64)])
    found = [part_of(row) for row in rows]
    for start in range(0, len(rows), 1024):
        assert abs(found[start : start + 1024].count("b") - 204.8) <= 1
    assert found.count("b") == loader._rows_before(1, len(rows))
    assert found[:1024] != found[1024:2048]
    starts = [tuple(row.tolist()) for row, name in zip(rows, found, strict=True) if name == "b"]
    alone = data.parts[1].loader(1, 16, seed=4)
    assert starts == [tuple(alone.batch(i).tokens[0].tolist()) for i in range(len(starts))]
    assert loader.epochs(4096)[1] == pytest.approx(len(starts) / alone.windows_per_epoch)


def test_a_batch_does_not_depend_on_the_ranks_the_order_or_what_was_read_before(mixture: str) -> None:
    loader = open_mixture(mixture).loader(24, 16, seed=3)
    for step in (100, 3, 57):
        whole = open_mixture(mixture).loader(24, 16, seed=3).batch(step)
        ranks = [loader.rows(step, start, start + 8) for start in (16, 0, 8)]
        assert torch.equal(torch.cat([ranks[1].tokens, ranks[2].tokens, ranks[0].tokens]), whole.tokens)
        assert torch.equal(whole.tokens[:, 1:], whole.targets[:, :-1])
    assert not torch.equal(open_mixture(mixture).loader(24, 16, seed=4).batch(3).tokens, loader.batch(3).tokens)


def test_validation_has_the_shares_and_everything_is_counted_once(mixture: str) -> None:
    data = open_mixture(mixture)
    assert data.val_tokens == sum(part.val_tokens or 0 for part in data.parts)
    targets = sum(batch.num_targets for batch in data.validation_batches(4, 16, 100))
    assert targets == 100
    counts = data.token_counts(10_000)
    assert 0.1 < counts[ord("b")] / counts[ord("a")] < 0.4
    assert len(data.prompts(3)) == 3
    assert data.fingerprint != open_mixture(mixture.replace(":8", ":7")).fingerprint
    assert data.train_tokens == sum(part.train_tokens for part in data.parts)


def test_references(mixture: str, tmp_path: Path) -> None:
    found = find_mixture("fineweb-edu-10B:0.8, notes/:0.2")
    assert found is not None
    assert found.parts == (("fineweb-edu-10B", Fraction(4, 5)), ("notes/", Fraction(1, 5)))
    assert found.name == "fineweb-edu-10B:0.8,notes/:0.2"
    hub = find_mixture("hf://a/b:train:1,c:3")
    assert hub is not None
    assert hub.parts[0] == ("hf://a/b:train", Fraction(1, 4))
    assert find_mixture("notes.txt") is None
    assert find_mixture("a,b.txt") is None
    assert find_mixture("hf://a/b:1") is None
    with pytest.raises(UserError, match=r"'b' in the mixture a:1,b needs a weight over 0, as in b:0\.2"):
        find_mixture("a:1,b")
    with pytest.raises(UserError, match="needs a weight over 0"):
        resolve_data("a:1,b:0")
    (tmp_path / "notes.txt").write_text("some other text " * 50)
    with pytest.raises(UserError, match=r"the parts of a mixture need one tokenizer: .*notes\.txt has bpe"):
        open_mixture(f"python-docs:1,{tmp_path}/notes.txt:1", "bpe:300")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl are prompts and answers"):
        open_mixture(f"python-docs:1,{tmp_path}/rows.jsonl:1", "bytes")

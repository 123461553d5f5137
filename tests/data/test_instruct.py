"""Supervised fine-tuning data: the loss counts the answers, which start where the prompt of generation ends."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt2.data.instruct import InstructDataset, open_instruct, tokenize_rows
from gpt2.data.prepare import prepare
from gpt2.data.resolve import Rows, Shards, resolve_data
from gpt2.data.rows import Columns
from gpt2.data.sources import Document, Texts
from gpt2.errors import UserError
from gpt2.loss import IGNORE_INDEX
from gpt2.templates import ChatTemplate, get_template
from gpt2.tokenizer import ByteTokenizer, Tokenizer, train_bpe, with_special_tokens
from tests.helpers.cli_helpers import run_cli
from tests.helpers.tokenizer_samples import SENTENCES

WORDS = [
    "it",
    "isn't",
    "the",
    "lazy dog",
    "  two spaces ",
    "don't!",
    "1024",
    "naïve",
    "<|endoftext|>",
    "<|im_end|>",
    "a\nb",
]


def pairs(count: int) -> list[dict[str, Any]]:
    return [
        {"prompt": f"{i}: {WORDS[i % len(WORDS)]}", "answer": WORDS[-i % len(WORDS)] + str(i)} for i in range(count)
    ]


def written(folder: Path, rows: Sequence[Any], name: str = "rows.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def open_rows(folder: Path, rows: Sequence[Any]) -> Rows:
    """Rows written to a file and resolved."""
    data = resolve_data(written(folder, rows))
    assert isinstance(data, Rows)
    return data


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return with_special_tokens(train_bpe([*SENTENCES, *WORDS], 320), ["<|im_start|>", "<|im_end|>"])


def document(data: InstructDataset, index: int) -> tuple[list[int], list[bool]]:
    span = slice(*data.documents.offsets[index : index + 2])
    return data.documents.tokens[span].tolist(), data.documents.loss_mask[span].tolist()


@pytest.mark.parametrize("name", ["plain", "raw", "chatml"])
def test_prompt_tokens_equal_those_of_generation(name: str, bpe: Tokenizer, tmp_path: Path) -> None:
    template, rows = get_template(name), pairs(22)
    data = open_instruct(open_rows(tmp_path, rows), bpe, template)
    assert len(data.documents) == 22
    for i, row in enumerate(rows):
        tokens, in_loss = document(data, i)
        question = [("user", row["prompt"])]
        prompt = template.encode_prompt(bpe, question)
        assert data.documents.answer_starts[i] == len(prompt)
        assert tokens[: len(prompt)] == prompt
        assert tokens[-1] == bpe.end_of_text
        assert not any(in_loss[: len(prompt)])
        targets = [token for token, is_target in zip(tokens, in_loss, strict=True) if is_target]
        end = [bpe.special_tokens["<|im_end|>"]] if name == "chatml" else []
        assert targets[len(targets) - len(end) - 1 :] == [*end, bpe.end_of_text]
        assert bpe.decode(targets[: len(targets) - len(end) - 1]).strip() == row["answer"].strip()
        assert bpe.decode(tokens[:-1]) == template.render([*question, ("assistant", row["answer"])])


def test_every_answer_of_a_conversation_counts_in_the_loss_and_nothing_else(bpe: Tokenizer, tmp_path: Path) -> None:
    chat = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Yes?"), ("user", "Who?"), ("assistant", "Me.")]
    row = {"messages": [{"role": role, "content": text} for role, text in chat]}
    row["messages"].append({"role": "user", "content": "Never answered"})
    template = get_template("plain")
    data = open_instruct(open_rows(tmp_path, [row]), bpe, template)
    tokens, in_loss = document(data, 0)
    assert bpe.decode(tokens) == template.render(chat) + "<|endoftext|>"
    runs = "".join(bpe.decode([token]) if counts else "⁂" for token, counts in zip(tokens, in_loss, strict=True))
    assert [piece for piece in runs.split("⁂") if piece] == [" Yes?", " Me.<|endoftext|>"]
    assert data.documents.answer_starts[0] == len(template.encode_prompt(bpe, chat[:-1]))


def test_without_prompt_mask_every_token_counts(bpe: Tokenizer, tmp_path: Path) -> None:
    path = open_rows(tmp_path, pairs(5))
    masked, whole = (open_instruct(path, bpe, ChatTemplate(), mask_prompt=mask) for mask in (True, False))
    assert np.array_equal(masked.documents.tokens, whole.documents.tokens)
    assert whole.documents.loss_mask.sum() == len(whole.documents.tokens) - 5  # nothing precedes the first token
    assert masked.fingerprint != whole.fingerprint


@pytest.mark.parametrize(
    ("count", "fraction", "held_out"),
    [(25, 0.1, [9, 19]), (10, 0.1, [9]), (9, 0.1, [8]), (2, 0.1, [1]), (1, 0.1, []), (8, 0.25, [3, 7]), (30, 0, [])],
)
def test_every_tenth_row_is_held_out(count: int, fraction: float, held_out: list[int], tmp_path: Path) -> None:
    data = open_instruct(open_rows(tmp_path, pairs(count)), ByteTokenizer(), ChatTemplate(), val_fraction=fraction)
    assert data.val_indices.tolist() == held_out
    assert sorted([*data.train_indices.tolist(), *held_out]) == list(range(count))
    assert (data.val_tokens is None) == (not held_out)
    assert list(data.validation_batches(4, 64, None)) == [] or held_out


def test_overlap_of_train_and_validation_rows_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("WARNING", "gpt2")
    rows = pairs(30)
    open_instruct(open_rows(tmp_path, rows), ByteTokenizer(), ChatTemplate())
    assert not caplog.text
    rows[9] = rows[29] = rows[3]
    open_instruct(open_rows(tmp_path, rows), ByteTokenizer(), ChatTemplate())
    assert "rows: 2 of the 3 held-out rows are training rows, too" in caplog.text


def test_batches_contain_every_target_of_their_split(bpe: Tokenizer, tmp_path: Path) -> None:
    data = open_instruct(open_rows(tmp_path, pairs(40)), bpe, ChatTemplate())
    loader = data.loader(2, 64, seed=3)
    rows = loader.packed_rows.batch(np.arange(loader.windows_per_epoch))
    held_out = list(data.validation_batches(2, 64, None))
    for chosen, batches, total in (
        (data.train_indices, [rows], data.train_tokens),
        (data.val_indices, held_out, data.val_tokens),
    ):
        found = sorted(t for batch in batches for t in batch.targets.flatten().tolist() if t != IGNORE_INDEX)
        both = [zip(*document(data, i), strict=True) for i in chosen.tolist()]
        assert found == sorted(token for pair in both for token, in_loss in pair if in_loss)
        assert len(found) == total
    counts = data.token_counts(10**9)
    assert counts.dtype == np.int64
    assert counts.tolist() == np.bincount(rows.targets[rows.targets != IGNORE_INDEX], minlength=bpe.vocab_size).tolist()
    assert 0 < data.token_counts(20).sum() <= 20


def test_long_rows_are_truncated_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        {"prompt": "p" * 100, "answer": "short"},
        {"prompt": "p", "answer": "a" * 100},
        {"prompt": "p", "answer": "b"},
    ]
    data = open_instruct(open_rows(tmp_path, rows), ByteTokenizer(), get_template("raw"), val_fraction=0)
    loader = data.loader(1, 20, seed=0)
    assert data.truncation(20) == (2, (106 - 21) + (102 - 21), 101 - 20)
    assert (
        "rows: 2 of 3 documents are longer than a row of 20 tokens and were truncated: 166 tokens are lost, 81"
        in caplog.text
    )
    batch = loader.packed_rows.batch(np.arange(len(loader.packed_rows)))
    rows_of_text = sorted(ByteTokenizer().decode(t for t in row if t != IGNORE_INDEX) for row in batch.targets.tolist())
    assert rows_of_text == ["a" * 20, "b<|endoftext|>", "short<|endoftext|>"]
    assert data.truncation(200) == (0, 0, 0)


def test_name_prompts_bytes_per_token_and_fingerprint(bpe: Tokenizer, tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "answer": f"answer {i}"} for i in range(20)]
    path = open_rows(tmp_path, rows)
    data = open_instruct(path, ByteTokenizer(), ChatTemplate())
    assert data.name == "rows"
    assert data.prompts(1) == [("User: p9\nAssistant:", "answer 9")]
    assert data.prompts(9)[1:] == [("User: p19\nAssistant:", "answer 19")]
    assert data.bytes_per_token == 19 / 21  # " answer 9" and " answer 19", and an end-of-text token each
    chatml = open_instruct(path, bpe, get_template("chatml"), val_fraction=0)
    assert chatml.prompts(1) == [("<|im_start|>user\np0<|im_end|>\n<|im_start|>assistant\n", "answer 0")]
    assert chatml.bytes_per_token is None
    fingerprints = [
        data.fingerprint,
        open_instruct(path, bpe, ChatTemplate()).fingerprint,
        open_instruct(path, ByteTokenizer(), get_template("raw")).fingerprint,
        open_instruct(path, ByteTokenizer(), ChatTemplate(), val_fraction=0.2).fingerprint,
        open_instruct(open_rows(tmp_path, rows[:-1]), ByteTokenizer(), ChatTemplate()).fingerprint,
    ]
    assert len(set(fingerprints)) == 5
    assert all(len(fingerprint) == 16 for fingerprint in fingerprints)
    assert open_instruct(open_rows(tmp_path, rows), ByteTokenizer(), ChatTemplate()).fingerprint == data.fingerprint


def test_rows_of_answers_are_distinguished_from_text_and_shards(tmp_path: Path) -> None:
    pair_columns = Columns(prompt="prompt", answer="answer")
    data = resolve_data(written(tmp_path, pairs(2)))
    assert data == Rows("rows", (tmp_path / "rows.jsonl",), pair_columns)
    text = written(tmp_path, [{"text": "a", "prompt": "b", "reply": "c"}], "text.jsonl")
    assert isinstance(resolve_data(text), Texts)
    data = resolve_data(text, "prompt=prompt,answer=reply")
    assert data == Rows("text", (tmp_path / "text.jsonl",), Columns(prompt="prompt", answer="reply"))
    assert isinstance(resolve_data("python-docs"), Texts)
    with pytest.raises(UserError, match="no file, folder or corpus"):
        resolve_data(str(tmp_path / "nowhere"))
    prepare(Texts("s", (Document("d", b"text" * 10),)), ByteTokenizer(), tmp_path / "shards")
    assert resolve_data(str(tmp_path / "shards")) == Shards(tmp_path / "shards")


class WithoutAnswers(ChatTemplate):
    """A template with no segment of the assistant."""

    def encode(self, tokenizer: Tokenizer, messages: Sequence[tuple[str, str]]) -> list[tuple[list[int], bool]]:
        return [(tokenizer.encode(self.render(messages)), False)]


class Refusing(ChatTemplate):
    def encode(self, tokenizer: Tokenizer, messages: Sequence[tuple[str, str]]) -> list[tuple[list[int], bool]]:
        raise UserError("this template is refused")


@pytest.mark.parametrize(
    ("row", "template", "message"),
    [
        ({"prompt": "a", "answer": ""}, ChatTemplate(), r"rows\.jsonl line 2: 'answer' is empty"),
        ({"prompt": "a"}, ChatTemplate(), r"rows\.jsonl line 2 has no 'answer'"),
        (
            {"prompt": "a", "answer": "b"},
            WithoutAnswers(),
            r"line 1: with this template the row has no answer to train on",
        ),
        ({"prompt": "a", "answer": "b"}, Refusing(), r"line 1: this template is refused"),
    ],
)
def test_a_row_without_an_answer_to_train_on_is_named(
    row: dict[str, Any], template: ChatTemplate, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        open_instruct(open_rows(tmp_path, [*pairs(1), row]), ByteTokenizer(), template)


def test_a_large_vocabulary_is_stored_as_int32() -> None:
    class Large(ByteTokenizer):
        def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
            return [66_000 + token for token in super().encode(text)]

    tokenizer = Large()
    tokenizer.vocab_size = 70_000
    rows = iter([("line 1", {"prompt": "a", "answer": "b"})])
    documents = tokenize_rows(rows, Columns(prompt="prompt", answer="answer"), tokenizer, get_template("raw"))
    assert documents.tokens.tolist() == [66_097, 66_098, 256]


# gpt2 data inspect


def test_inspect_shows_the_loss_mask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(
        tmp_path, [{"prompt": "Hi" if i != 9 else "Ho", "answer": "né\n" if i else "x" * 60} for i in range(12)]
    )
    code, out, err = run_cli(
        capsys, "data", "inspect", path, "--tokenizer", "bytes", "--block-size", "40", "--rows", "2"
    )
    assert (code, err) == (0, "")
    facts, first, second = out.split("\n--- ")
    assert "rows:       12: 11 for training, 1 held out\n" in facts
    assert "tokens:     356, of which 128 are loss targets (36.0%)\n" in facts
    assert "truncated:  1 of the training rows lose 40 tokens, 22 of them targets\n" in facts
    assert first.startswith("row 1\n")
    assert first.count("│x") == 60
    prompt = "│".join("User: Hi⏎Assistant:").replace("⏎", "⏎\n")
    assert second == f"row 2\n{prompt}⟦ │n│\\xc3│\\xa9│⏎\n│<|endoftext|>⟧\n"


def test_inspect_of_text_shows_it_as_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, [{"text": f"ab{i}" + "c" * 500 * (i > 0)} for i in range(12)])
    code, out, _ = run_cli(capsys, "data", "inspect", path, "--tokenizer", "bytes", "--rows", "2")
    assert code == 0
    facts, first, second = out.split("\n--- ")
    assert "documents:  12, 5,538 bytes\n" in facts
    assert "tokens:     5,046 for training, 504 held out\n" in facts
    assert first == "rows text 1\n⟦a│b│0│<|endoftext|>⟧\n"
    assert second.endswith("│c⟧ … and 103 more tokens\n")


def test_inspect_in_color(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    from gpt2.commands.data import print_tokens

    console = Console(force_terminal=True, color_system="standard", width=200)
    with console.capture() as capture:
        print_tokens(console, ByteTokenizer(), [65, 66, 27], [False, True, True])
    assert capture.get() == "\x1b[2mA│\x1b[0m\x1b[32mB│\\x1b│\x1b[0m\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tokenizer", "bpe:300"], "--tokenizer is gpt2, bytes, or a folder"),
        (["--template", "plane"], "no chat template 'plane'"),
        (["--columns", "answer=reply"], "must name text, or messages, or prompt and answer"),
        (["--columns", "prompt=prompt,answer=reply"], "line 1 has no 'reply'"),
        (["--block-size", "0"], "must be an integer of at least 1"),
    ],
)
def test_inspect_errors_are_one_line(
    argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = argv if "--tokenizer" in argv else [*argv, "--tokenizer", "bytes"]
    code, _, err = run_cli(capsys, "data", "inspect", written(tmp_path, pairs(3)), *arguments)
    assert (code, err.count("\n")) == (2, 1)
    assert message in err

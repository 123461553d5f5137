"""Which parts of rows are learned: weights, tool calls, bad rows, columns."""

from pathlib import Path
from typing import Any

import pytest

from gpt2.data.instruct import InstructDataset, open_instruct
from gpt2.data.resolve import Rows, resolve_data
from gpt2.errors import UserError
from gpt2.templates import ChatTemplate, get_template
from gpt2.tokenizer import ByteTokenizer, Tokenizer
from tests.data.test_instruct import bpe, document, open_rows, pairs, written

__all__ = ["bpe"]  # a fixture


# Answers that are excluded from the loss


def learned(data: InstructDataset, tokenizer: Tokenizer, index: int = 0) -> list[str]:
    """The runs of tokens that are loss targets."""
    tokens, in_loss = document(data, index)
    runs = "".join(tokenizer.decode([t]) if counts else "⁂" for t, counts in zip(tokens, in_loss, strict=True))
    return [piece for piece in runs.split("⁂") if piece]


@pytest.mark.parametrize("excluded", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}])
@pytest.mark.parametrize("mask_prompt", [True, False])
def test_weight_0_and_train_false_exclude_an_answer_from_the_loss(
    excluded: dict[str, Any], mask_prompt: bool, bpe: Tokenizer, tmp_path: Path
) -> None:
    turns = [("user", "q"), ("assistant", "one"), ("user", "q"), ("assistant", "two"), ("user", "q")]
    messages: list[dict[str, Any]] = [
        {"role": role, "content": text} for role, text in [*turns, ("assistant", "three")]
    ]
    messages[1] |= excluded
    messages[3] |= {"weight": 1, "train": True}
    messages[5] |= excluded
    data = open_instruct(
        open_rows(tmp_path, [{"messages": messages}]), bpe, get_template("plain"), mask_prompt=mask_prompt
    )
    text = "".join(learned(data, bpe))
    assert "two<|endoftext|>" in text
    assert "one" not in text
    assert "three" not in bpe.decode(document(data, 0)[0]), "a conversation ends with the last answer that counts"
    assert ("User" in text) == (not mask_prompt)
    assert bpe.decode(document(data, 0)[0]) == "User: q\nAssistant: one\nUser: q\nAssistant: two<|endoftext|>"


@pytest.mark.parametrize("weight", [0.5, "0", [1], -1])
def test_a_weight_other_than_0_and_1_is_refused(weight: object, tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": "a", "weight": weight}
    row = {"messages": [{"role": "user", "content": "q"}, answer]}
    with pytest.raises(UserError, match=r"line 1, message 2: 'weight' is .*; only 0, 1, true and false"):
        open_instruct(open_rows(tmp_path, [row]), ByteTokenizer(), ChatTemplate())
    answer["weight"] = 0
    with pytest.raises(UserError, match="line 1: every message of the assistant is excluded from training"):
        open_instruct(open_rows(tmp_path, [row]), ByteTokenizer(), ChatTemplate())


def test_the_last_answer_after_a_tool_call_is_learned(tmp_path: Path) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function"}]},
        {"role": "tool", "tool_call_id": "1", "content": "sunny"},
        {"role": "assistant", "content": "It is sunny."},
    ]
    data = open_instruct(open_rows(tmp_path, [{"messages": messages}]), ByteTokenizer(), get_template("chatml"))
    assert "".join(learned(data, ByteTokenizer())) == "It is sunny.<|im_end|><|endoftext|>"
    assert "<|im_start|>tool\nsunny<|im_end|>" in ByteTokenizer().decode(document(data, 0)[0])


def test_bad_rows_are_skipped_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = Path(written(tmp_path, [*pairs(20), {"prompt": "a", "answer": ""}, {"prompt": 1, "answer": "x"}]))
    path.write_bytes(path.read_bytes() + b'{"prompt": \n{"prompt": "\xff", "answer": "b"}\n[1]\n')
    with pytest.raises(UserError, match=r"line 21: 'answer' is empty"):
        open_instruct(resolve_rows(path, "error"), ByteTokenizer(), ChatTemplate())
    data = open_instruct(resolve_rows(path, "skip"), ByteTokenizer(), ChatTemplate())
    assert len(data.documents) == 20
    assert "rows: 5 of 25 rows are bad (" in caplog.text
    for part in ("line 21: 'answer' is empty", "line 22: 'prompt' is a number", "line 23 is not JSON", "and 2 more"):
        assert part in caplog.text
    written(tmp_path, [*pairs(1), {"prompt": "a"}, {"prompt": "b"}])
    with pytest.raises(UserError, match=r"rows: 2 of 3 rows are bad \(.*\): too many to skip") as caught:
        open_instruct(resolve_rows(path, "skip"), ByteTokenizer(), ChatTemplate())
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="--bad-rows is error or skip, not 'drop'"):
        resolve_data(str(path), bad_rows="drop")


def resolve_rows(path: Path, bad_rows: str) -> Rows:
    data = resolve_data(str(path), bad_rows=bad_rows)
    assert isinstance(data, Rows)
    return data


def test_columns_of_later_rows_count_and_those_not_read_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "c", "input": "d", "output": "e", "history": []}]
    data = open_instruct(open_rows(tmp_path, rows), ByteTokenizer(), ChatTemplate(), val_fraction=0)
    assert ByteTokenizer().decode(document(data, 1)[0]) == "User: c\n\nd\nAssistant: e<|endoftext|>"
    assert "rows.jsonl: columns that are not read: history\n" in caplog.text
    caplog.clear()
    talk = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    data = open_instruct(
        open_rows(tmp_path, [{"conversations": talk}, {"conversations": talk, "system": "s"}]),
        *(ByteTokenizer(), get_template("chatml")),
        val_fraction=0,
    )
    assert ByteTokenizer().decode(document(data, 1)[0]).startswith("<|im_start|>system\ns<|im_end|>\n<|im_start|>user")
    assert not caplog.text
    squad = [{"question": "Who?", "context": "It was me.", "answer": "me", "id": 1}]
    data = open_instruct(open_rows(tmp_path, squad), ByteTokenizer(), ChatTemplate(), val_fraction=0)
    assert ByteTokenizer().decode(document(data, 0)[0]).startswith("User: Who?\n\nIt was me.\nAssistant: me")
    assert "columns that are not read: id\n" in caplog.text

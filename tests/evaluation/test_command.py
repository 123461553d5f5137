"""`gpt2 eval` as it is typed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpt2.cli import main
from gpt2.model import GPT
from gpt2.tokenizer import BPETokenizer
from gpt2.weights import save

ROWS = [{"query": "the dog", "choices": ["runs", "sleeps", "is"], "gold": i % 3} for i in range(12)]


@pytest.fixture
def folder(model: GPT, words: BPETokenizer, tmp_path: Path) -> Path:
    return save(model, words, tmp_path / "model")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    return path


def run(*arguments: Any) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["eval", *map(str, arguments)])
    return caught.value.code if isinstance(caught.value.code, int) else 0


def test_the_json_has_every_number_with_its_protocol(folder: Path, rows: Path, tmp_path: Path) -> None:
    text, out = tmp_path / "notes.txt", tmp_path / "out.json"
    text.write_text("the dog runs to the sea. " * 20)
    assert run(folder, "--task-file", rows, "--data", text, "--stride", 16, "--limit", 9, "--json", out) == 0
    found = json.loads(out.read_text())
    assert found["model"] == str(folder)
    mine, notes = found["results"][str(rows)], found["results"][str(text)]
    assert set(mine["metrics"]) == {"acc", "acc_norm"} == set(mine["stderr"])
    assert mine["rows"] == 9
    assert set(notes["metrics"]) >= {"loss", "token_perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte"}
    for result in (mine, notes):
        assert result["protocol"]
        assert len(result["data"]) == 64


def test_models_side_by_side(folder: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, folder, "--task-file", rows, "--json", tmp_path / "out.json") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["task", "metric", str(folder), str(folder)]
    assert [model["model"] for model in json.loads((tmp_path / "out.json").read_text())["models"]] == [str(folder)] * 2


def test_without_network_the_default_set_says_what_is_left_out(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert run(folder, "--limit", 2) == 0
    told = capsys.readouterr()
    assert [line.split(":")[1].split()[1] for line in told.err.splitlines()] == ["hellaswag", "lambada", "wikitext2"]
    assert "python-docs" in told.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "needs a MODEL"),
        (("{model}", "--tasks", "helaswag"), "there is no task 'helaswag' (did you mean 'hellaswag'?)"),
        (("{model}", "--tasks", ","), "--tasks names no task"),
        (("{model}", "--tasks", "piqa", "--task-data", "piqa"), "--task-data must be TASK=FILE"),
        (("{model}", "--tasks", "piqa", "--task-data", "copa=x"), "--tasks has no such task (piqa)"),
        (("{model}", "--tasks", "published"), "this model has another shape"),
        (("{model}", "--task-file", "{bad}"), "bad.jsonl line 2 has no 'gold'"),
        (("{model}", "--task-file", "{long}"), "tokens to score do not fit the model's context of 48"),
        (("{model}", "--data", "{model}/nothing.txt"), "no file, folder or corpus"),
        (("{bare}", "--task-file", "{rows}"), "has no tokenizer"),
        (("{model}", "--dtype", "int9"), "dtype 'int9' is not one of"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: tuple[str, ...],
    message: str,
    folder: Path,
    rows: Path,
    model: GPT,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "bad.jsonl").write_text(json.dumps(ROWS[0]) + '\n{"query": "a", "choices": ["b", "c"]}\n')
    (tmp_path / "long.jsonl").write_text(json.dumps({"query": "a", "choices": ["the dog " * 60, "b"], "gold": 0}))
    names = {"model": folder, "bare": save(model, None, tmp_path / "bare"), "rows": rows}
    names |= {"bad": tmp_path / "bad.jsonl", "long": tmp_path / "long.jsonl"}
    assert run(*(argument.format(**names) for argument in arguments)) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


def test_a_missing_extra_says_which(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpt2.evaluation.harness.simple_evaluate", None)
    assert run(folder, "--lm-eval", "piqa") == 2
    assert "needs lm-eval, which is not installed: pip install 'plain-gpt2[eval]'" in capsys.readouterr().err


def test_list_names_every_task(capsys: pytest.CaptureFixture[str]) -> None:
    from gpt2.evaluation.tasks import TASKS

    assert run("--list") == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line]
    assert listed[1 : len(TASKS) + 1] == list(TASKS)


@pytest.mark.slow  # compiles the kernel
def test_int8_through_the_kernel(folder: Path, rows: Path, tmp_path: Path) -> None:
    assert run(folder, "--task-file", rows, "--dtype", "int8", "--json", tmp_path / "out.json") == 0
    found = json.loads((tmp_path / "out.json").read_text())["results"][str(rows)]
    assert found["rows"] == len(ROWS)
    assert found["settings"]["dtype"] == "int8"


@pytest.mark.slow
def test_torchrun_gives_the_same_numbers(folder: Path, rows: Path, tmp_path: Path) -> None:
    outs = []
    for ranks in (1, 2):
        out = tmp_path / f"{ranks}.json"
        command = ["eval", str(folder), "--task-file", str(rows), "--json", str(out)]
        launch = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "-m"]
        subprocess.run([sys.executable, *launch, "gpt2", *command], check=True, capture_output=True, timeout=300)
        outs.append(json.loads(out.read_text()))
    assert outs[0] == outs[1]

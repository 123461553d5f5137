"""`gpt2 finetune` as it is typed."""

import json
from pathlib import Path

import pytest

import gpt2
from gpt2.commands.finetune import finetune_settings, main
from gpt2.commands.train import resolve_config
from gpt2.config import read_toml
from gpt2.errors import UserError
from gpt2.model import GPT, GPTConfig
from gpt2.terminal import escape_controls
from gpt2.tokenizer import get_tokenizer


@pytest.fixture
def base(tmp_path: Path) -> str:
    model = GPT(GPTConfig(vocab_size=257, block_size=48, n_layer=1, n_head=2, n_embd=16))
    return str(gpt2.save(model, get_tokenizer("bytes"), tmp_path / "base"))


@pytest.fixture
def rows(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}?", "answer": str(i)}) + "\n" for i in range(40)))
    return str(path)


def test_finetune_writes_a_run_folder_and_a_comparison(
    base: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data", rows, "--out-dir", str(tmp_path / "runs"), "--batch-size", "4", "--sample-tokens", "4"]
    assert main([base, *flags, "--epochs", "2", "--lora-rank", "2", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    folder = tmp_path / "runs" / "finetune"
    assert out == f"{folder}\n"
    config = read_toml(folder / "config.toml")
    assert (config.lr, config.epochs, config.keep_best, config.init_from) == (5e-4, 2.0, True, base)
    assert "of them trainable" in err
    comparison = err[err.index("## Before and after") :].strip()
    assert comparison in escape_controls((folder / "report.md").read_text())
    assert "| rows, held out |" in comparison
    assert "User: 9?\nAssistant:" in comparison
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["adapter", "checkpoints", "model"]
    assert main(["--resume", str(folder), "--max-steps", str(config.max_steps + 1)]) == 0
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == config.max_steps + 1


def test_print_config_trains_nothing(base: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([base, "--data", rows, "--out-dir", str(tmp_path / "runs"), "--print-config"]) == 0
    (tmp_path / "printed.toml").write_text(capsys.readouterr().out)
    config = read_toml(tmp_path / "printed.toml")
    assert (config.lr, config.separate_documents, config.init_from) == (5e-5, True, base)
    assert not (tmp_path / "runs").exists()


def test_missing_and_conflicting_arguments(base: str, rows: str, tmp_path: Path) -> None:
    for argv, message in (
        ([], "needs a MODEL"),
        ([base], "needs --data"),
        ([base, "--resume", str(tmp_path)], "leave MODEL out"),
        ([base, "--data", rows, "--n-layer", "3"], "there is no --n-layer"),
    ):
        with pytest.raises(UserError, match=message):
            main(argv)
    settings = finetune_settings(base, {"data": rows, "max_steps": 7, "name": "x"})
    assert resolve_config("finetune", settings).epochs == 0.0

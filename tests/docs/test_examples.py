"""The scripts and the notebook of examples/ run on a small model."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

import gpt2

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a small byte-level model in runs/quickstart, and a text."""
    torch.manual_seed(0)
    tokenizer = gpt2.get_tokenizer("bytes")
    config = gpt2.GPTConfig(vocab_size=tokenizer.vocab_size, block_size=64, n_layer=2, n_head=2, n_embd=32)
    gpt2.save(gpt2.GPT(config), tokenizer, tmp_path / "runs" / "quickstart")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("The cat sat on the mat, and the dog sat on the log. " * 40)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.mark.parametrize("name", ["stream.py", "custom_sampler.py", "activations.py"])
def test_script_on_a_model(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, name, "runs/quickstart", "The cat")
    assert {"activations.py": "after block 1"}.get(name, "The cat") in capsys.readouterr().out


def test_lora_lowers_the_loss_and_its_adapter_loads(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "lora.py", "runs/quickstart", "texts/a.txt", "adapter", "15")
    before, after = (float(word) for word in capsys.readouterr().out.split() if word[0].isdigit())
    assert after < before - 0.1
    base, tokenizer = gpt2.load("runs/quickstart")
    adapted, _ = gpt2.load("runs/quickstart", adapter="adapter")
    assert tokenizer is not None
    tokens = torch.tensor([tokenizer.encode("The cat sat on the mat")])
    assert adapted.loss(tokens[:, :-1], tokens[:, 1:]) < base.loss(tokens[:, :-1], tokens[:, 1:])


def test_evaluate_text_agrees_with_the_uniform_baseline(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "evaluate_text.py", "runs/quickstart", "texts/a.txt")
    out = capsys.readouterr().out
    assert float(out.split()[0]) == pytest.approx(8.0, abs=0.2)  # log2(257), by an untrained model
    assert out.count("nats") == 5


@pytest.mark.slow
def test_train_on_a_folder(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "train_on_a_folder.py", "texts", "out", "20")
    assert (folder / "out" / "folder" / "report.md").is_file()
    assert "The" in capfd.readouterr().out


def test_notebook(folder: Path) -> None:
    notebook = json.loads((EXAMPLES / "python_api.ipynb").read_text(encoding="utf-8"))
    namespace: dict[str, object] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            exec(compile("".join(cell["source"]), "python_api.ipynb", "exec"), namespace)
    import matplotlib.pyplot as plt

    assert len(plt.get_fignums()) == 3
    plt.close("all")
    assert (folder / "my-model" / "model.safetensors").is_file()

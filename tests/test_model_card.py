"""--push uploads a model folder with a card made from the run, by the hub's own client."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import gpt2
from gpt2.model import GPTConfig
from gpt2.tokenizer import get_tokenizer
from tests.helpers.transformers_reference import random_model
from tests.helpers.upload_hub import TOKEN, UploadHub, serve_uploads

TINY = GPTConfig(vocab_size=257, block_size=32, n_layer=1, n_head=2, n_embd=16)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[UploadHub]:
    with serve_uploads(tmp_path / "uploaded") as served:
        yield served


def push(address: str, token: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    settings = {"HF_ENDPOINT": address, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    settings |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-m", "gpt2", "convert", *arguments]
    return subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, timeout=120)


def test_a_run_is_uploaded_with_its_card(hub: UploadHub, tmp_path: Path) -> None:
    run = tmp_path / "run"
    model = random_model(TINY)
    gpt2.save(model, get_tokenizer("bytes"), run / "model")
    (run / "config.toml").write_text('data = "/somewhere/secret/poems.txt"\nmax_steps = 20\nlr = 0.001\n')
    rows = [{"step": 10, "val_loss": 3.5}, {"step": 20, "val_loss": 3.25, "loss": 3.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "loss.png").write_bytes(b"picture")
    arguments = (str(run), str(tmp_path / "out"), "--to", "hf", "--push", "someone/model")
    refused = push(hub.address, "hf_wrong", *arguments)
    assert refused.returncode == 2
    assert "cannot upload" in refused.stderr.splitlines()[-1]
    done = push(hub.address, TOKEN, *arguments)
    assert (done.returncode, done.stdout) == (0, f"{hub.address}/someone/model\n"), done.stderr
    for ours, theirs in zip(gpt2.load(hub.folder)[0].parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    card = (hub.folder / "README.md").read_text()
    assert "# someone/model" in card
    assert "| data | poems.txt |" in card
    assert "secret" not in card
    assert "Validation loss 3.2500 at step 20, lowest 3.2500 at step 20" in card
    assert (hub.folder / "loss.png").read_bytes() == b"picture"
    assert len(hub.lfs_objects) == 2  # the weights and the image


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "gguf", "--push", "a/b"], "it needs --to hf, not gguf"),
        (["--to", "hf", "--push", "model"], "must be owner/name"),
        (["--to", "hf", "--push", "a b/c"], "is no name of a repository"),
    ],
)
def test_a_wrong_name_is_told_before_anything_is_written(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.helpers.cli_helpers import run_cli

    source = gpt2.save(random_model(TINY), None, tmp_path / "m")
    code, _, err = run_cli(capsys, "convert", str(source), str(tmp_path / "x.gguf"), *arguments)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "x.gguf").exists()

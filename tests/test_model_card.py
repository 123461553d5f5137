"""--push uploads a model folder with a card made from the run, by the hub's own client."""

import base64
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

import gpt2
from gpt2.model import GPTConfig
from gpt2.tokenizer import get_tokenizer
from tests.helpers.transformers_reference import random_model

TINY = GPTConfig(vocab_size=257, block_size=32, n_layer=1, n_head=2, n_embd=16)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A server of the hub's upload API; it writes the files of a commit to a folder."""
    uploaded = tmp_path / "uploaded"
    uploaded.mkdir()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Authorization") != "Bearer hf_test":
                return self.reply(401, {"error": "a token is needed"})
            if self.path == "/api/repos/create":
                return self.reply(200, {"url": f"{address}/someone/model", "name": json.loads(body)["name"]})
            if "/preupload/" in self.path:
                files = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]]
                return self.reply(200, {"files": [{**f, "shouldIgnore": False, "oid": None} for f in files]})
            if "/commit/" in self.path:
                for entry in map(json.loads, body.splitlines()):
                    if entry["key"] == "file":
                        content = base64.b64decode(entry["value"]["content"])
                        (uploaded / entry["value"]["path"]).write_bytes(content)
                commit = {"commitUrl": f"{address}/someone/model/commit/0", "commitOid": "0" * 40}
                return self.reply(200, {**commit, "hookOutput": "", "pullRequestUrl": None})
            return self.reply(200, {})

        def do_GET(self) -> None:
            info = {"id": "someone/model", "sha": "0" * 40, "siblings": [], "private": False, "downloads": 0}
            self.reply(200, {**info, "tags": [], "likes": 0})

        def reply(self, code: int, value: object) -> None:
            content = json.dumps(value).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield address, uploaded
    server.shutdown()
    server.server_close()


def push(address: str, token: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    import os

    settings = {"HF_ENDPOINT": address, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    settings |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-m", "gpt2", "convert", *arguments]
    return subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, timeout=120)


def test_a_run_is_uploaded_with_its_card(hub: tuple[str, Path], tmp_path: Path) -> None:
    address, uploaded = hub
    run = tmp_path / "run"
    model = random_model(TINY)
    gpt2.save(model, get_tokenizer("bytes"), run / "model")
    (run / "config.toml").write_text('data = "/somewhere/secret/poems.txt"\nmax_steps = 20\nlr = 0.001\n')
    rows = [{"step": 10, "val_loss": 3.5}, {"step": 20, "val_loss": 3.25, "loss": 3.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "loss.png").write_bytes(b"picture")
    arguments = (str(run), str(tmp_path / "out"), "--to", "hf", "--push", "someone/model")
    refused = push(address, "hf_wrong", *arguments)
    assert refused.returncode == 2
    assert "cannot upload" in refused.stderr.splitlines()[-1]
    done = push(address, "hf_test", *arguments)
    assert (done.returncode, done.stdout) == (0, f"{address}/someone/model\n"), done.stderr
    for ours, theirs in zip(gpt2.load(uploaded)[0].parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    card = (uploaded / "README.md").read_text()
    assert "# someone/model" in card
    assert "| data | poems.txt |" in card
    assert "secret" not in card
    assert "Validation loss 3.2500 at step 20, lowest 3.2500 at step 20" in card
    assert (uploaded / "loss.png").read_bytes() == b"picture"


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

"""A small Hugging Face hub on loopback, for the real client."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve_hub(repositories: dict[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """Serve folders as model repositories. Yields the address and the (growing) list of downloaded files."""
    fetched: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            path = urlparse(self.path).path
            for name, folder in repositories.items():
                files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
                if path.startswith((f"/api/models/{name}/", f"/api/models/{name}")):
                    return self.reply(200, repository_info(name, files, tree="/tree/" in path), body)
                name_in_repo = path.removeprefix(f"/{name}/resolve/{COMMIT}/")
                if name_in_repo in files:
                    if body:
                        fetched.append(name_in_repo)
                    return self.reply(
                        200, files[name_in_repo], body, ETag=f'"{sha256(files[name_in_repo]).hexdigest()}"'
                    )
            return self.reply(404, b"{}", body, **{"X-Error-Code": "RepoNotFound"})

        def reply(self, code: int, content: bytes, body: bool, **headers: str) -> None:
            self.send_response(code)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("X-Repo-Commit", COMMIT)
            for key, value in headers.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", fetched
    finally:
        server.shutdown()
        thread.join()


def repository_info(name: str, files: dict[str, bytes], tree: bool) -> bytes:
    """The response of the hub's API for a repository: its file list, or its id, commit and file list."""
    if tree:
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": sha256(content).hexdigest()}
            for path, content in files.items()
        ]
        return json.dumps(entries).encode()
    return json.dumps({"id": name, "sha": COMMIT, "siblings": [{"rfilename": path} for path in files]}).encode()


def load_from_hub(ref: str, tmp_path: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """`gpt2.load` in a process of its own: huggingface_hub reads its switches once, when it is imported."""
    code = (
        "import sys, gpt2, torch\n"
        "from gpt2.cli import run_and_exit\n"
        "def main():\n"
        "    model, tokenizer = gpt2.load(sys.argv[1])\n"
        "    print(model(torch.arange(9)[None]).sum().item(), tokenizer and tokenizer.name)\n"
        "run_and_exit(main)\n"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment = clean | {"HF_HOME": str(tmp_path / "hf-home"), "HF_HUB_DISABLE_TELEMETRY": "1"} | env
    return subprocess.run(
        [sys.executable, "-c", code, ref], capture_output=True, text=True, env=environment, timeout=120
    )

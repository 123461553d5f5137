"""A small Hugging Face hub on loopback, for the real client to talk to."""

import json
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
    """Serve folders as model repositories. Yields the address and the list, growing, of files that were fetched."""
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
                asked = path.removeprefix(f"/{name}/resolve/{COMMIT}/")
                if asked in files:
                    if body:
                        fetched.append(asked)
                    return self.reply(200, files[asked], body, ETag=f'"{sha256(files[asked]).hexdigest()}"')
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
    """What the hub's API says of a repository: the list of its files, or who it is and the same."""
    if tree:
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": sha256(content).hexdigest()}
            for path, content in files.items()
        ]
        return json.dumps(entries).encode()
    return json.dumps({"id": name, "sha": COMMIT, "siblings": [{"rfilename": path} for path in files]}).encode()

"""Data sets of a Hugging Face hub on loopback: info, tree and resolve, with commits, LFS, ranges, gates."""

import io
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse

import pyarrow as pa
import pyarrow.parquet as pq


@dataclass
class Repository:
    """A data set: its files by revision name, and the card's configs."""

    revisions: dict[str, dict[str, bytes]] = field(default_factory=dict)
    configs: list[dict[str, Any]] = field(default_factory=list)
    gated: bool = False

    def commit(self, revision: str) -> str | None:
        """The commit of a branch or of itself."""
        commits = {
            name: sha1(repr(sorted(files.items())).encode()).hexdigest() for name, files in self.revisions.items()
        }
        return commits.get(revision) or (revision if revision in commits.values() else None)

    def files(self, revision: str) -> dict[str, bytes]:
        return next(files for name, files in self.revisions.items() if self.commit(name) == self.commit(revision))


@dataclass
class DatasetHub:
    """The server. Large files are at another address, as those of the real hub are.

    damaged: paths that are sent with a wrong byte, each once; broken: whose connection ends half way; stated: digests
    that are sent instead of the right ones.
    """

    address: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    fetched: list[str] = field(default_factory=list)
    damaged: set[str] = field(default_factory=set)
    broken: set[str] = field(default_factory=set)
    stated: dict[str, str] = field(default_factory=dict)

    def add(
        self, name: str, files: dict[str, bytes], configs: Sequence[dict[str, Any]] = (), revision: str = "main"
    ) -> None:
        """Add a data set, or a revision of one."""
        repository = self.repositories.setdefault(name, Repository())
        repository.revisions[revision] = files
        repository.configs = list(configs) or repository.configs


def parquet(texts: Sequence[str | None], column: str = "text", rows_per_group: int = 50) -> bytes:
    """A Parquet file of one text column and an id."""
    out = io.BytesIO()
    table = pa.table({"id": list(range(len(texts))), column: pa.array(texts, pa.string())})
    pq.write_table(table, out, row_group_size=rows_per_group)
    return out.getvalue()


def _is_large(path: str) -> bool:
    return path.endswith((".parquet", ".bin"))


@contextmanager
def serve_datasets() -> Iterator[DatasetHub]:
    """Run the server."""
    hub = DatasetHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: DatasetHub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        is_elsewhere, path = path.startswith("/cdn/"), path.removeprefix("/cdn")
        for name, repository in self.hub.repositories.items():
            if repository.gated and name in path:
                return self.reply(403, b"{}", **{"X-Error-Code": "GatedRepo"})
            if path == f"/api/datasets/{name}" or path.startswith(f"/api/datasets/{name}/revision/"):
                return self.info(name, repository, path.partition("/revision/")[2] or "main")
            if path.startswith(f"/api/datasets/{name}/tree/"):
                return self.tree(repository, path.removeprefix(f"/api/datasets/{name}/tree/"))
            if path.startswith(f"/datasets/{name}/resolve/"):
                revision, _, file = path.removeprefix(f"/datasets/{name}/resolve/").partition("/")
                if repository.commit(revision) is None or file not in repository.files(revision):
                    break
                content = repository.files(revision)[file]
                if _is_large(file) and not is_elsewhere:
                    digest = self.hub.stated.get(file, sha256(content).hexdigest())
                    return self.reply(302, b"", **{"Location": f"/cdn{self.path}", "X-Linked-ETag": f'"{digest}"'})
                return self.file(content, file)
        return self.reply(404, b"{}", **{"X-Error-Code": "RepoNotFound"})

    def info(self, name: str, repository: Repository, revision: str) -> None:
        commit = repository.commit(revision)
        if commit is None:
            return self.reply(404, b"{}", **{"X-Error-Code": "RevisionNotFound"})
        card = {"configs": repository.configs} if repository.configs else {}
        return self.reply(200, json.dumps({"id": name, "sha": commit, "cardData": card}).encode())

    def tree(self, repository: Repository, revision: str) -> None:
        entries = []
        for path, content in repository.files(revision).items():
            blob = sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
            lfs = {"oid": sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
            entry = {"type": "file", "path": path, "size": len(content), "oid": blob}
            entries.append(entry | ({"lfs": lfs} if _is_large(path) else {}))
        self.reply(200, json.dumps(entries).encode())

    def file(self, content: bytes, path: str) -> None:
        if self.command == "HEAD":
            return self.reply(200, content)
        self.hub.fetched.append(path)
        if path in self.hub.damaged:
            self.hub.damaged.remove(path)
            content = content[: len(content) // 2] + b"X" + content[len(content) // 2 + 1 :]
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        if path in self.hub.broken:
            self.hub.broken.remove(path)
            self.start(206 if start else 200, len(content) - start)
            self.wfile.write(content[start : len(content) // 2])
            self.close_connection = True
            return None
        self.start(206 if start else 200, len(content) - start)
        self.wfile.write(content[start:])
        return None

    def start(self, code: int, length: int, **headers: str) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(length))
        for key, value in ({"Accept-Ranges": "bytes"} | headers).items():
            self.send_header(key, value)
        self.end_headers()

    def reply(self, code: int, content: bytes, **headers: str) -> None:
        self.start(code, len(content), **headers)
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass

"""A small server of the hub's upload API on loopback, for the real client."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

TOKEN = "hf_test"
REPOSITORY = "someone/model"


@dataclass
class UploadHub:
    """The server of one repository. The files of a commit are written to `folder`.

    As on the real hub, text is in the commit, and weights and images are uploaded before it, by LFS: lfs_objects has
    their contents by sha256.
    """

    folder: Path
    address: str = ""
    lfs_objects: dict[str, bytes] = field(default_factory=dict)

    def write(self, entry: dict[str, Any]) -> None:
        """One line of a commit."""
        value = entry["value"]
        if entry["key"] == "file":
            (self.folder / value["path"]).write_bytes(base64.b64decode(value["content"]))
        elif entry["key"] == "lfsFile":
            (self.folder / value["path"]).write_bytes(self.lfs_objects[value["oid"]])


@contextmanager
def serve_uploads(folder: Path) -> Iterator[UploadHub]:
    """Run the server."""
    folder.mkdir()
    hub = UploadHub(folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: UploadHub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.reply(401, {"error": "a token is needed"})
        if self.path == "/api/repos/create":
            return self.reply(200, {"url": f"{self.hub.address}/{REPOSITORY}", "name": json.loads(body)["name"]})
        if "/preupload/" in self.path:
            return self.reply(200, {"files": [_upload_mode(file["path"]) for file in json.loads(body)["files"]]})
        if self.path == f"/{REPOSITORY}.git/info/lfs/objects/batch":
            objects = json.loads(body)["objects"]
            for each in objects:
                each["actions"] = {"upload": {"href": f"{self.hub.address}/lfs/{each['oid']}"}}
            return self.reply(200, {"transfer": "basic", "objects": objects})
        if "/commit/" in self.path:
            for entry in map(json.loads, body.splitlines()):
                self.hub.write(entry)
            commit = {"commitUrl": f"{self.hub.address}/{REPOSITORY}/commit/0", "commitOid": "0" * 40}
            return self.reply(200, {**commit, "hookOutput": "", "pullRequestUrl": None})
        return self.reply(200, {})

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        oid = self.path.removeprefix("/lfs/")
        if sha256(content).hexdigest() != oid:
            return self.reply(400, {"error": "the content has another sha256"})
        self.hub.lfs_objects[oid] = content
        return self.reply(200, {})

    def do_GET(self) -> None:
        info = {"id": REPOSITORY, "sha": "0" * 40, "siblings": [], "private": False, "downloads": 0}
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


def _upload_mode(path: str) -> dict[str, Any]:
    mode = "lfs" if path.endswith((".safetensors", ".png")) else "regular"
    return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": None}

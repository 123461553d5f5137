"""A download is complete or not there, and its errors name the fix; $GPT2_HOME is the cache."""

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from gpt2.data.resolve import resolve_texts
from gpt2.downloads import download
from gpt2.errors import UserError
from gpt2.files import cache_home

CONTENT = b"the quick brown fox\n" * 10_000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
STOP = threading.Event()


class Handler(BaseHTTPRequestHandler):
    """/good is CONTENT, /short ends early, /hang stops halfway until STOP is set; anything else is missing."""

    def do_GET(self) -> None:
        if self.path not in ("/good", "/short", "/hang"):
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT if self.path == "/good" else CONTENT[:1000])
        if self.path == "/hang":
            self.wfile.flush()
            STOP.wait(60)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    STOP.set()
    server.shutdown()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


def test_a_download_is_complete_and_made_once(server: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "file.txt"
    assert download(f"{server}/good", path, SHA256) == path
    assert path.read_bytes() == CONTENT
    assert download("http://127.0.0.1:9/never-requested", path, SHA256) == path
    assert list(path.parent.iterdir()) == [path]
    assert capfd.readouterr() == ("", "")  # the progress bar is for terminals only


@pytest.mark.parametrize(
    ("place", "sha256", "reason"),
    [
        ("/missing", SHA256, r"HTTP 404 Not Found"),
        ("/short", SHA256, r"IncompleteRead(1000 bytes read, 199000 more expected)"),
        ("/good", "0" * 64, rf"its sha256 is {SHA256[:12]}…, not 000000000000…"),
        ("/hang", SHA256, r"timed out"),
    ],
)
def test_a_failed_download_names_address_reason_and_path(
    server: str, place: str, sha256: str, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "file.txt"
    with pytest.raises(UserError) as caught:
        download(server + place, path, sha256, timeout=0.3)
    assert str(caught.value) == f"cannot download {place[1:]} from {server}{place} ({reason}): put it at {path} by hand"
    assert not list(tmp_path.glob(".*"))
    assert not path.exists()


def test_a_download_without_network_names_the_reason(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot download file\.txt from .* \(.*refused\): put it at"):
        download("http://127.0.0.1:9/file.txt", tmp_path / "file.txt", SHA256)


def test_leftovers_of_a_killed_download_are_removed(server: str, tmp_path: Path) -> None:
    left = tmp_path / ".file.txt.0123abcd.partial"
    left.mkdir()
    (left / "file.txt").write_bytes(CONTENT[:100])
    download(f"{server}/good", tmp_path / "file.txt", SHA256)
    assert [path.name for path in tmp_path.glob("*file*")] == ["file.txt"]


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "gpt2-home"
    home.write_text("a file where the folder should be")
    monkeypatch.setenv("GPT2_HOME", str(home))
    with pytest.raises(UserError, match=r"cannot write .*gpt2-home.*: set GPT2_HOME to a writable folder"):
        resolve_texts("shakespeare")


def test_gpt2_home_sets_the_cache_folder(monkeypatch: pytest.MonkeyPatch, gpt2_home: Path) -> None:
    assert cache_home() == gpt2_home
    monkeypatch.delenv("GPT2_HOME")
    assert cache_home() == Path.home() / ".cache" / "gpt2"

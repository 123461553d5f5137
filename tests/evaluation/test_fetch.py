"""Task data arrives whole from the hub's layout, once, or one line says what to do."""

import io
import json
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gpt2.errors import UserError
from gpt2.evaluation.evaluate import evaluate_tasks
from gpt2.evaluation.fetch import Origin, fetch, open_task_file
from gpt2.evaluation.records import read_bytes, rows_of
from gpt2.evaluation.tasks import TASKS
from gpt2.model import GPT
from gpt2.tokenizer import BPETokenizer

ROWS = [
    {"sentence": f"the man saw the dog so _ ran {i}.", "option1": "he", "option2": "it", "answer": "12"[i % 2]}
    for i in range(6)
]


def parquet(rows: list[dict[str, str]]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


class Hub:
    """Files by path. `stated` replaces the checksum that is stated of a file; `asked` lists what was fetched."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.stated: dict[str, str] = {}
        self.asked: list[str] = []
        self.address = ""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A small hub on loopback, whose large files are elsewhere, as those of the real one are."""
    served = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            content = served.files.get(self.path.removeprefix("/cdn"))
            if content is None:
                self.send_response(404)
                self.send_header("Content-Length", "0")
                self.end_headers()
            elif not self.path.startswith("/cdn"):
                self.send_response(302)
                self.send_header("Location", f"/cdn{self.path}")
                digest = served.stated.get(self.path, sha256(content).hexdigest())
                self.send_header("X-Linked-ETag", f'"{digest}"')
                self.send_header("Content-Length", "0")
                self.end_headers()
            else:
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if body:
                    served.asked.append(self.path)
                    self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    served.address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", served.address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield served
    server.shutdown()


def path_on_hub(origin: Origin) -> str:
    return f"/datasets/{origin.repo}/resolve/{origin.revision}/{origin.path}"


def test_a_task_from_the_hub_at_its_revision(hub: Hub, model: GPT, words: BPETokenizer, tmp_path: Path) -> None:
    origin = TASKS["winogrande"].origin
    hub.files[path_on_hub(origin)] = parquet(ROWS)
    first = evaluate_tasks(model, words, ["winogrande"])["winogrande"]
    again = evaluate_tasks(model, words, ["winogrande"])["winogrande"]
    assert hub.asked == [f"/cdn{path_on_hub(origin)}"]  # the second time it was in the cache
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    given = evaluate_tasks(model, words, ["winogrande"], task_data={"winogrande": str(rows)})["winogrande"]
    assert first == again == given
    assert first.rows == len(ROWS)


def test_what_is_not_the_pinned_file_is_refused(hub: Hub) -> None:
    origin = TASKS["winogrande"].origin
    hub.files[path_on_hub(origin)] = parquet(ROWS)
    hub.stated[path_on_hub(origin)] = "0" * 64
    with pytest.raises(UserError, match=r"what came has sha256 .*put it at .*winogrande\.parquet by hand"):
        fetch(origin)
    assert not origin.place.exists()
    pinned = TASKS["hellaswag"].origin
    hub.files[path_on_hub(pinned)] = b"something else"
    with pytest.raises(UserError, match="what came has sha256"):
        fetch(pinned)
    pinned.place.parent.mkdir(parents=True, exist_ok=True)
    pinned.place.write_bytes(b"something else")
    with pytest.raises(UserError, match=r"hellaswag\.parquet is not the file from http.*: remove it"):
        fetch(pinned)


def test_a_missing_file_says_where_it_is_had_and_where_to_put_it(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    origin = TASKS["winogrande"].origin
    with pytest.raises(UserError) as caught:
        fetch(origin)
    assert str(caught.value) == (
        f"cannot download winogrande.parquet from {hub.address}{path_on_hub(origin)} (HTTP 404): "
        f"put it at {origin.place} by hand"
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as caught:
        fetch(origin)
    assert str(caught.value) == (
        f"winogrande.parquet is not in the cache and HF_HUB_OFFLINE is set: download {hub.address}"
        f"{path_on_hub(origin)} and put it at {origin.place}"
    )
    with pytest.raises(UserError, match=r"there is no file .*rows\.jsonl: it was to be had from http"):
        open_task_file(origin, "rows.jsonl")


def test_archives_and_labels_of_publishers(hub: Hub, model: GPT, words: BPETokenizer) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        row = {"goal": "see the dog", "sol1": "go", "sol2": "stay"}
        archive.writestr("physicaliqa-train-dev/dev.jsonl", f"{json.dumps(row)}\n{json.dumps(row)}\n")
        archive.writestr("physicaliqa-train-dev/dev-labels.lst", "0\n1\n")
    place = TASKS["piqa"].origin.place.parent / "piqa.zip"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(out.getvalue())
    found = evaluate_tasks(model, words, ["piqa"], task_data={"piqa": str(place)})["piqa"]
    assert found.rows == 2
    assert found.metrics["acc"] == 0.5  # the same row with either label


def test_the_published_childrens_book_test(model: GPT, words: BPETokenizer, tmp_path: Path) -> None:
    lines = [f"{i} the dog runs ." for i in range(1, 21)] + ["21 the XXXXX sleeps .\tdog\t\tman|dog|sea"]
    text = ("\n".join(lines) + "\n\n").encode() * 2
    path = tmp_path / "CBTest.tgz"
    with tarfile.open(path, "w:gz") as archive:
        info = tarfile.TarInfo("CBTest/data/cbtest_CN_test_2500ex.txt")
        info.size = len(text)
        archive.addfile(info, io.BytesIO(text))
    from dataclasses import replace

    wide = GPT(replace(model.config, block_size=256)).eval()
    found = evaluate_tasks(wide, words, ["cbt-cn"], task_data={"cbt-cn": str(path)})["cbt-cn"]
    assert found.rows == 2
    with pytest.raises(UserError, match=r"CBTest\.tgz holds no cbtest_NE_test_2500ex\.txt"):
        evaluate_tasks(wide, words, ["cbt-ne"], task_data={"cbt-ne": str(path)})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\nno', "rows line 2 is not JSON"),
        (b"[1, 2]", "rows row 1 is a number, not an object with fields"),
        (b"PAR1 broken", "rows is not a readable Parquet file"),
        (b"\xff\xfe", "rows is not UTF-8 text: bad byte at offset 0"),
    ],
)
def test_broken_files(content: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(rows_of(content, "rows"))


def test_a_damaged_gz_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(b"\x1f\x8b\x08\x00broken")
    with pytest.raises(UserError, match=r"cannot read .*rows\.jsonl\.gz"):
        read_bytes(path)

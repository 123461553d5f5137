"""Task data arrives whole from the hub's layout, once, or one line says what to do."""

import io
import json
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gpt2.errors import UserError
from gpt2.evaluation.evaluate import evaluate_tasks
from gpt2.evaluation.fetch import DatasetFile, fetch, open_task_file
from gpt2.evaluation.records import read_bytes, rows_of
from gpt2.evaluation.tasks import TASKS
from gpt2.model import GPT
from gpt2.tokenizer import BPETokenizer
from tests.helpers.dataset_hub import DatasetHub

ROWS = [
    {"sentence": f"the man saw the dog so _ ran {i}.", "option1": "he", "option2": "it", "answer": "12"[i % 2]}
    for i in range(6)
]


def parquet(rows: list[dict[str, str]]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


def put(hub: DatasetHub, data_file: DatasetFile, content: bytes) -> None:
    """Put the file of a task on the hub, at its revision."""
    hub.add(str(data_file.repo), {str(data_file.path): content}, revision=str(data_file.revision))


def test_a_task_from_the_hub_at_its_revision(hub: DatasetHub, model: GPT, words: BPETokenizer, tmp_path: Path) -> None:
    data_file = TASKS["winogrande"].data_file
    put(hub, data_file, parquet(ROWS))
    first = evaluate_tasks(model, words, ["winogrande"])["winogrande"]
    again = evaluate_tasks(model, words, ["winogrande"])["winogrande"]
    assert hub.fetched == [data_file.path]  # the second time it was in the cache
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    given = evaluate_tasks(model, words, ["winogrande"], task_data={"winogrande": str(rows)})["winogrande"]
    assert first == again == given
    assert first.rows == len(ROWS)


def test_what_is_not_the_pinned_file_is_refused(hub: DatasetHub) -> None:
    data_file = TASKS["winogrande"].data_file
    put(hub, data_file, parquet(ROWS))
    hub.stated[str(data_file.path)] = "0" * 64
    with pytest.raises(UserError, match=r"its sha256 is .*put it at .*winogrande\.parquet by hand"):
        fetch(data_file)
    assert not data_file.cache_path.exists()
    pinned = TASKS["hellaswag"].data_file
    put(hub, pinned, b"something else")
    with pytest.raises(UserError, match="its sha256 is "):
        fetch(pinned)
    pinned.cache_path.parent.mkdir(parents=True, exist_ok=True)
    pinned.cache_path.write_bytes(b"something else")
    with pytest.raises(UserError, match=r"hellaswag\.parquet is not the file from http.*: remove it"):
        fetch(pinned)


def test_a_missing_file_says_where_it_is_had_and_where_to_put_it(
    hub: DatasetHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_file = TASKS["winogrande"].data_file
    url = f"{hub.address}/datasets/{data_file.repo}/resolve/{data_file.revision}/{data_file.path}"
    with pytest.raises(UserError) as caught:
        fetch(data_file)
    assert str(caught.value) == (
        f"cannot download winogrande.parquet from {url} (HTTP 404): save it as {data_file.cache_path}"
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as caught:
        fetch(data_file)
    assert str(caught.value) == (
        f"winogrande.parquet is not in the cache and HF_HUB_OFFLINE is set: download {url} "
        f"and save it as {data_file.cache_path}"
    )
    with pytest.raises(UserError, match=r"there is no file .*rows\.jsonl; its download URL is http"):
        open_task_file(data_file, "rows.jsonl")


def test_archives_and_labels_of_publishers(hub: DatasetHub, model: GPT, words: BPETokenizer) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        row = {"goal": "see the dog", "sol1": "go", "sol2": "stay"}
        archive.writestr("physicaliqa-train-dev/dev.jsonl", f"{json.dumps(row)}\n{json.dumps(row)}\n")
        archive.writestr("physicaliqa-train-dev/dev-labels.lst", "0\n1\n")
    place = TASKS["piqa"].data_file.cache_path.parent / "piqa.zip"
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

"""Texts are read exactly and in bounded chunks; errors are one line."""

import hashlib
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from gpt2.data.resolve import resolve_texts
from gpt2.data.sources import BUILTIN_SOURCES, Document, Texts, split_documents
from gpt2.errors import UserError
from gpt2.files import cache_home


def whole(document: Document, chunk_bytes: int = 1 << 20) -> str:
    return "".join(document.iter_chunks(chunk_bytes=chunk_bytes))


# Sources


def test_builtin_sources_have_one_line_each() -> None:
    assert {"shakespeare", "tiny_shakespear", "super_tiny_shakespear", "python-docs"} == set(BUILTIN_SOURCES)
    assert all(line and "\n" not in line for line in BUILTIN_SOURCES.values())


@pytest.fixture
def shakespeare_in_cache(shakespeare_file: Path, gpt2_home: Path) -> Path:
    path = gpt2_home / "tinyshakespeare" / "input.txt"
    path.parent.mkdir(parents=True)
    path.write_bytes(shakespeare_file.read_bytes())
    return path


def test_shakespeare_from_the_cache_has_the_usual_split(shakespeare_in_cache: Path) -> None:
    for name in ("shakespeare", "tiny_shakespear"):
        source = resolve_texts(name)
        assert source.name == "shakespeare"
        ((document, start, boundary),), (val,) = split_documents(source)
        assert (start, boundary, document.size) == (0, 1_003_854, 1_115_394)
        assert val == (document, 1_003_854, 1_115_394)
    (document,) = resolve_texts("super_tiny_shakespear").documents
    assert whole(document) == shakespeare_in_cache.read_text()[:1000]


def test_a_wrong_file_in_the_cache_is_named_and_not_overwritten(gpt2_home: Path) -> None:
    path = gpt2_home / "tinyshakespeare" / "input.txt"
    path.parent.mkdir(parents=True)
    path.write_text("a file of the user")
    with pytest.raises(UserError, match=r"input\.txt is not the file from .*: remove it") as caught:
        resolve_texts("shakespeare")
    assert hashlib.sha256(path.read_bytes()).hexdigest()[:12] in str(caught.value)
    assert path.read_text() == "a file of the user"


def test_python_docs_do_not_overlap_between_splits() -> None:
    first, second = resolve_texts("python-docs"), resolve_texts("python-docs")
    assert first == second
    assert sum(document.size for document in first.documents) > 300_000
    assert [d.name for d in first.documents] == sorted(d.name for d in first.documents)
    for document in first.documents:
        title, underline = whole(document).split("\n")[:2]
        assert title
        assert set(underline) == {"*"}
    train, val = split_documents(first)
    assert len(val) == len(first.documents) // 10 > 3
    seen = {p for document, _, _ in train for p in whole(document).split("\n\n") if len(p) > 40}
    held_out = [p for document, _, _ in val for p in whole(document).split("\n\n") if len(p) > 40]
    assert sum(p in seen for p in held_out) < len(held_out) / 10


def test_a_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "my notes.log"
    path.write_text("hello\n")
    source = resolve_texts(str(path))
    assert source.name == "my notes"
    assert [whole(document) for document in source.documents] == ["hello\n"]


def test_a_folder_resolves_to_its_text_files_in_order(tmp_path: Path) -> None:
    for name in (
        "b.txt",
        "a.md",
        "sub/c.RST",
        "sub/d.text",
        ".hidden.txt",
        ".git/e.txt",
        "image.png",
        "empty.txt",
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("" if name == "empty.txt" else name)
    source = resolve_texts(str(tmp_path))
    assert source.name == tmp_path.name
    assert [whole(document) for document in source.documents] == ["a.md", "b.txt", "sub/c.RST", "sub/d.text"]


def test_a_pattern_resolves_to_the_files_that_match(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "sub/c.txt", "sub/d.log", "empty.txt", "odd[1].txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("" if name == "empty.txt" else name)
    for pattern, names in (
        ("*.txt", ["a.txt", "b.txt", "odd[1].txt"]),
        ("**/[cd].*", ["sub/c.txt", "sub/d.log"]),
        ("odd[1].txt", ["odd[1].txt"]),  # an existing file, not a pattern
    ):
        source = resolve_texts(f"{tmp_path}/{pattern}")
        assert [whole(document) for document in source.documents] == names
        assert source.name == (tmp_path.name if "*" in pattern else "odd[1]")
    for pattern, message in (("nothing*", "no file, folder or corpus"), ("e*.txt", "every text file in .* is empty")):
        with pytest.raises(UserError, match=message):
            resolve_texts(f"{tmp_path}/{pattern}")


def test_rows_beside_text_files_are_skipped_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("WARNING", "gpt2")
    for name in ("notes.md", "settings.json", "table.csv"):
        (tmp_path / name).write_text("{}")
    assert len(resolve_texts(str(tmp_path)).documents) == 1
    assert f"{tmp_path}: skipped {tmp_path}/settings.json (rows, not text) and 1 more" in caplog.text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no file, folder or corpus '.*': the corpora are shakespeare, "),
        (lambda path: path.write_bytes(b""), "is empty$"),
        (
            lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n\0\0"),
            "is not a text file: it has a zero byte at offset 8",
        ),
        (lambda path: path.mkdir(), r"no text files in .*: files ending in \.txt, "),
        (lambda path: (path.mkdir(), (path / "a.txt").touch()), "every text file in .* is empty"),
        (lambda path: (path.mkdir(), (path / "a.txt").write_bytes(b"a\0")), r"a\.txt is not a text file"),
    ],
)
def test_data_that_is_not_text_is_refused(make: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    make(tmp_path / "thing")
    with pytest.raises(UserError, match=message) as caught:
        resolve_texts(str(tmp_path / "thing"))
    assert str(tmp_path / "thing") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pipes_sockets_and_devices_are_refused_without_blocking(tmp_path: Path, gpt2_home: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.txt"))
        for ref in (tmp_path / "pipe.txt", tmp_path / "socket.txt", Path(os.devnull)):
            with pytest.raises(UserError, match="is not a regular file"):
                resolve_texts(str(ref))
    (gpt2_home / "tinyshakespeare").mkdir(parents=True)
    os.mkfifo(gpt2_home / "tinyshakespeare" / "input.txt")
    with pytest.raises(UserError, match=r"input\.txt is not a regular file"):
        resolve_texts("shakespeare")


def test_training_output_in_a_folder_is_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    caplog.set_level("WARNING", "gpt2")
    assert len(resolve_texts(str(tmp_path)).documents) == 1
    assert not caplog.text
    for name in (
        *("runs/one/config.toml", "runs/one/metrics.jsonl", "runs/one/samples.txt", "runs/one/model/merges.txt"),
        *("out/config.json", "out/model.safetensors", "out/merges.txt"),
        *("shards/meta.json", "shards/train_000000.bin", "shards/merges.txt"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("not mine")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    (tmp_path / "link.txt").symlink_to("notes.txt")
    source = resolve_texts(str(tmp_path))
    assert [document.name for document in source.documents] == [str(tmp_path / n) for n in ("link.txt", "notes.txt")]
    assert f"{tmp_path}: skipped {tmp_path}/loop.txt (not a regular file) and 4 more" in caplog.text
    for name in ("runs/one", "out", "shards"):
        with pytest.raises(UserError, match=f"{name} is a .*, not text to train on"):
            resolve_texts(str(tmp_path / name))


def test_an_unknown_home_folder_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for use in (lambda: resolve_texts("~nobody-of-this-name/x"), cache_home):
        monkeypatch.setenv("GPT2_HOME", "~nobody-of-this-name")
        with pytest.raises(UserError, match=r"~nobody-of-this-name\S* cannot be found: could not determine home"):
            use()


def test_a_misspelled_name_gets_a_suggestion() -> None:
    with pytest.raises(UserError, match=r"'shakespare' \(did you mean 'shakespeare'\?\)"):
        resolve_texts("shakespare")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "secret.txt"
    path.write_text("secret")
    path.chmod(0)
    for ref in (path, tmp_path):
        with pytest.raises(UserError, match=r"cannot read .*secret\.txt \(Permission denied\)"):
            resolve_texts(str(ref))


def test_a_deleted_file_is_named(tmp_path: Path) -> None:
    document = Document("gone", tmp_path / "gone.txt")
    for use in (lambda: document.size, lambda: whole(document)):
        with pytest.raises(UserError, match=r"cannot read .*gone\.txt \(No such file or directory\)"):
            use()


# Splits


def documents(count: int) -> Texts:
    return Texts("many", tuple(Document(str(i), b"0123456789" * (i + 1)) for i in range(count)))


def test_ten_documents_or_more_are_held_out_whole() -> None:
    train, val = split_documents(documents(25))
    assert [part.document.name for part in val] == ["9", "19"]
    assert sorted(train + val, key=lambda part: int(part.document.name)) == [
        (document, 0, document.size) for document in documents(25).documents
    ]


def test_with_fewer_documents_the_last_tenth_of_each_is_held_out() -> None:
    train, val = split_documents(documents(9))
    assert [(start, stop) for _, start, stop in train] == [(0, 9 * n) for n in range(1, 10)]
    assert [(start, stop) for _, start, stop in val] == [(9 * n, 10 * n) for n in range(1, 10)]


def test_the_validation_fraction_can_be_set() -> None:
    assert [len(parts) for parts in split_documents(documents(8), 0.25)] == [6, 2]
    assert [len(parts) for parts in split_documents(documents(8), 0)] == [8, 0]
    assert split_documents(documents(1), 0.5)[0][0].stop == 5
    for fraction in (-0.1, 0.6, float("nan")):
        with pytest.raises(UserError, match=r"must be 0 to 0\.5"):
            split_documents(documents(1), fraction)


# Cloned data sets, and loops


@pytest.mark.parametrize("name", ["train.jsonl", "data/train.csv", "data/train.json"])
def test_a_cloned_data_set_is_its_rows_not_its_readme(name: str, tmp_path: Path) -> None:
    content = {"l": '{"text": "row"}\n', "v": "text\nrow\n", "n": '[{"text": "row"}]'}[name[-1]]
    for path, text in (
        (name, content),
        ("README.md", "# A card"),
        ("LICENSE.txt", "MIT"),
        ("dataset_infos.json", "{}"),
    ):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    assert ["".join(document.iter_chunks()) for document in resolve_texts(str(tmp_path)).documents] == ["row"]


def test_a_folder_of_rows_and_other_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "row"}\n')
    (tmp_path / "book.txt").write_text("text")
    with pytest.raises(UserError, match=r"has both rows \(.*train\.jsonl\) and text \(.*book\.txt\): name one kind"):
        resolve_texts(str(tmp_path))
    assert len(resolve_texts(f"{tmp_path}/*.txt").documents) == 1


@pytest.mark.parametrize("pattern", ["**", "**/*.txt", "*"])
def test_patterns_do_not_follow_loops_of_links(pattern: str, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "sub" / "b.txt").write_text("b")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    found = [document.name for document in resolve_texts(f"{tmp_path}/{pattern}").documents]
    expected = ["a.txt"] if pattern == "*" else ["a.txt", "sub/b.txt"]
    assert found == [f"{tmp_path}/{name}" for name in expected]

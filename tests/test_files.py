"""Staging folders and locks, paths, and kinds of folders."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from gpt2.errors import UserError
from gpt2.files import LockFile, check_regular_file, expand_path, known_folder_kind, safetensors_header, staging_folder

HOLDS = """
import sys, time
from pathlib import Path
from gpt2.files import staging_folder
with staging_folder(Path(sys.argv[1])) as folder:
    (folder / "half.bin").write_bytes(b"half")
    print(folder, flush=True)
    time.sleep(60)
"""


def test_a_staging_folder_is_removed_unless_it_was_renamed(tmp_path: Path) -> None:
    target = tmp_path / "new" / "thing"
    with staging_folder(target) as folder:
        (folder / "file").write_text("x")
    assert not list(target.parent.iterdir())
    with staging_folder(target) as folder:
        (folder / "file").write_text("x")
        folder.rename(target)
    assert [path.name for path in target.parent.rglob("*")] == ["thing", "file"]


def test_the_staging_folder_of_another_process_is_kept_until_it_is_killed(tmp_path: Path) -> None:
    target = tmp_path / "a[b]*"
    process = subprocess.Popen([sys.executable, "-c", HOLDS, str(target)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    theirs = Path(process.stdout.readline().strip())
    try:
        with staging_folder(target) as ours:
            assert ours != theirs
        assert (theirs / "half.bin").exists()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert (theirs / "half.bin").exists()
    with staging_folder(tmp_path / "a"):
        assert theirs.exists(), "another target's"
    with staging_folder(target) as ours:
        assert sorted(tmp_path.iterdir()) == [ours, ours.with_name(f"{ours.name}.lock")]
    assert not list(tmp_path.iterdir())


def test_concurrent_staging_folders_lose_no_file(tmp_path: Path) -> None:
    lost: list[int] = []

    def work(number: int) -> None:
        for _ in range(30):
            with staging_folder(tmp_path / "thing") as folder:
                (folder / "file").write_text(str(number))
                if (folder / "file").read_text() != str(number):
                    lost.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not lost
    assert not list(tmp_path.glob(".thing*"))


def test_a_lock_is_exclusive_and_its_file_is_removed(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    lock = LockFile(path)
    with pytest.raises(BlockingIOError):
        LockFile(path)
    (tmp_path / "moved").mkdir()
    moved = path.rename(tmp_path / "moved" / ".lock")
    other = LockFile(path)
    lock.release(path)  # is another file now
    assert path.exists()
    assert moved.exists()
    other.release(path)
    assert not path.exists()


def test_without_locks_nothing_is_taken_for_abandoned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert not LockFile(tmp_path / ".lock").is_held
    with staging_folder(tmp_path / "thing") as first, staging_folder(tmp_path / "thing"):
        assert first.exists()
    assert not list(tmp_path.glob(".thing*"))


def test_home_folders_are_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand_path("~/x") == tmp_path / "x"
    assert expand_path("a/~") == Path("a/~")
    with pytest.raises(UserError, match="nobody-of-this-name/x cannot be found: could not determine home"):
        expand_path("~nobody-of-this-name/x")


def test_folders_and_pipes_are_not_regular_files(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    check_regular_file(tmp_path / "file")
    check_regular_file(tmp_path / "not there, which is another error")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path(os.devnull)):
        with pytest.raises(UserError, match="is not a regular file"):
            check_regular_file(path)


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        ("config.toml metrics.jsonl", "a run folder"),
        ("config.toml checkpoints", "a run folder"),
        ("config.json model-00001-of-00002.safetensors", "a model folder"),
        ("meta.json fineweb_val_000000.bin", "a folder of token shards"),
        ("config.toml notes.txt", None),
        ("config.json notes.txt", None),
        ("meta.json picture.bin", None),
        ("", None),
    ],
)
def test_known_folders_are_recognized_by_their_files(names: str, kind: str | None) -> None:
    assert known_folder_kind(names.split()) == kind


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "is no whole safetensors file"),
        (b"\xff" * 8, "its header has"),
        ((2**23).to_bytes(8, "little"), "its header has"),
        ((2).to_bytes(8, "little") + b"{}x", "it has 11 bytes instead of 10"),
        ((2).to_bytes(8, "little") + b"[]", "its header does not describe tensors"),
        ((8).to_bytes(8, "little") + b'{"a":{}}', "its header does not describe tensors"),
    ],
)
def test_the_header_of_a_broken_safetensors_file(data: bytes, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"model.safetensors.*{complaint}"):
        safetensors_header(path)


def test_a_safetensors_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library reports it as missing."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    error = PermissionError(errno.EACCES, "Permission denied", str(path))
    monkeypatch.setattr(Path, "open", lambda *given: (_ for _ in ()).throw(error))
    with pytest.raises(UserError, match=r"cannot read .*model\.safetensors \(Permission denied\)"):
        safetensors_header(path)

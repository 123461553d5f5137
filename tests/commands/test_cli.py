"""The command line itself: help, spellings of flags, exit codes, and streams that fail."""

import argparse
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gpt2
from gpt2.cli import Parser, run_and_exit
from gpt2.train.recipes import RECIPES
from tests.helpers.cli_helpers import run_cli


def test_help_imports_nothing_but_the_standard_library() -> None:
    """So that it answers at once, on any machine."""
    code = """
import sys
before = set(sys.modules)
from gpt2.cli import main
try:
    main(["--help"])
except SystemExit as stop:
    assert stop.code == 0
names = {name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
print(sorted(names))
"""
    out = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert all(f"  {verb} " in out for verb in ("train", "sample", "export", "data"))
    assert out.splitlines()[-1] == "['gpt2']"


def test_every_module_imports_with_the_core_alone() -> None:
    """Every module imports when the optional packages are hidden."""
    code = """
import importlib, pkgutil, sys
for name in ("matplotlib", "transformers", "fastapi", "uvicorn", "datasets", "pyarrow", "peft", "pytest", "hypothesis"):
    sys.modules[name] = None
import gpt2
found = [m.name for m in pkgutil.walk_packages(gpt2.__path__, "gpt2.")]
names = [name for name in found if name != "gpt2.__main__" and not name.startswith("gpt2.serve.")]
for name in names:
    importlib.import_module(name)
for name in gpt2.__all__:
    getattr(gpt2, name)
print(len(names))
"""
    assert int(subprocess.check_output([sys.executable, "-c", code], text=True)) > 15


def test_help_lists_every_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run_cli(capsys, "train", "--help")
    assert code == 0
    assert all(name in out for name in RECIPES)
    assert "--batch-size" in out
    assert "--batch_size" not in out


@pytest.mark.parametrize("spelling", ["--no-fast-mode", "--no_fast_mode", "--no-fast_mode", "--no_fast-mode"])
def test_every_spelling_of_a_flag(spelling: str) -> None:
    parser = Parser(prog="x")
    parser.add_flag("compile", action=argparse.BooleanOptionalAction, default=None)
    parser.add_flag("fast-mode", action=argparse.BooleanOptionalAction, default=None)
    parser.add_flag("two-words", default="")
    parser.add_argument("rest", nargs="*")
    assert vars(parser.parse_args([spelling, "--no_compile", "--two_words=--a_b", "c_d"])) == {
        "fast_mode": False,
        "compile": False,
        "two_words": "--a_b",
        "rest": ["c_d"],
    }
    assert parser.parse_args(["--fast_mode", "--compile"]).fast_mode is True
    assert "_" not in parser.format_help().replace("two_words", "").replace("TWO_WORDS", "")
    with pytest.raises(gpt2.UserError, match=r"there is no --no_fast_node \(did you mean '--no-fast-mode'\?\)"):
        parser.parse_args(["--no_fast_node"])


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("CUDA error: out of memory"),
        None,
    ],
)
def test_out_of_memory_is_one_line_with_advice(error: Exception | None, capsys: pytest.CaptureFixture[str]) -> None:
    """The last case is torch's own error: two exbibytes requested from the CPU allocator."""

    def program() -> None:
        if error is not None:
            raise error
        torch.empty(2**61, dtype=torch.uint8)

    with pytest.raises(SystemExit) as stop:
        run_and_exit(program)
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert err.startswith("gpt2: this needs more memory than there is: for training, lower --micro-batch-size")
    assert err.count("\n") == 1


@pytest.mark.parametrize("link", ["__cause__", "__context__", "inner_exception"])
def test_a_full_disk_under_the_compiler_is_one_line(link: str, capsys: pytest.CaptureFixture[str]) -> None:
    """torch raises a RuntimeError of its own, with the OSError behind it."""
    error = RuntimeError("backend='inductor' raised:\nOSError: No space left on device")
    setattr(error, link, OSError(errno.ENOSPC, "No space left on device", "/tmp/x/main.cpp"))
    with pytest.raises(SystemExit) as stop:
        run_and_exit(lambda: (_ for _ in ()).throw(error))
    assert (stop.value.code, capsys.readouterr().err) == (2, "gpt2: /tmp/x/main.cpp: No space left on device\n")


def test_a_failure_of_the_cpp_compiler_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    fatal = "main.cpp:209:1: fatal error: error writing to /tmp/c.s: No space"
    output = f"main.cpp:188: warning: unused\n{fatal}\n\n}}".encode()
    error = RuntimeError("CppCompileError: C++ compile error")
    error.__cause__ = subprocess.CalledProcessError(1, ["g++"], output)
    with pytest.raises(SystemExit) as stop:
        run_and_exit(lambda: (_ for _ in ()).throw(error))
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert err.startswith(f"gpt2: torch.compile failed ({fatal}): TMPDIR and ")
    assert err.count("\n") == 1


def test_any_other_runtime_error_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="a bug of ours"):
        run_and_exit(lambda: (_ for _ in ()).throw(RuntimeError("a bug of ours")))


OUTPUT = r"""
import sys
from gpt2.cli import run_and_exit
def main():
    print("déjà vu α \udcff")
    print("naïve", file=sys.stderr)
run_and_exit(main)
"""


@pytest.mark.parametrize(
    ("encoding", "out"),
    [("ascii", rb"d\xe9j\xe0 vu \u03b1 \udcff"), ("latin-1", b"d\xe9j\xe0 vu " + rb"\u03b1 \udcff"), ("utf-8", None)],
)
def test_unencodable_characters_are_escaped(encoding: str, out: bytes | None) -> None:
    env = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", OUTPUT], capture_output=True, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (out or "déjà vu α \\udcff".encode()) + b"\n"
    assert done.stderr


LOUD = """
import logging, sys
from gpt2.cli import run_and_exit
from rich.console import Console
def main():
    sys.stdin.readline()
    for i in range(3):
        print("step", file=sys.stderr, flush=True)
        logging.getLogger("gpt2").warning("talk")
        Console(stderr=True).print("more talk")
    open(sys.argv[1], "w").write("all done")
run_and_exit(main)
"""


@pytest.mark.parametrize("closed", [True, False])
def test_a_program_continues_when_stderr_is_closed(closed: bool, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", LOUD, str(tmp_path / "done")],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    if closed:
        process.stderr.close()
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.close()
        process.wait(60)
    else:
        _, err = process.communicate("go\n", timeout=60)
        assert err == "step\ngpt2: talk\nmore talk\n" * 3
    assert process.returncode == 0
    assert (tmp_path / "done").read_text() == "all done"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_under_standard_output_is_one_line() -> None:
    with open("/dev/full", "w") as full:  # noqa: PTH123
        done = subprocess.run(
            [sys.executable, "-m", "gpt2", "data", "list"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 2
    assert done.stderr == "gpt2: No space left on device\n"

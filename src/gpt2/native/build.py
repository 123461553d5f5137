"""Compile `kernel.cpp` for this machine, cache the library, and load it."""

import ctypes
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from gpt2.errors import UserError
from gpt2.files import cache_home, file_sha256
from gpt2.native.structs import check_struct_sizes

KERNEL_SOURCE = Path(__file__).with_name("kernel.cpp")
COMPILER_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-ffp-contract=fast")
log = logging.getLogger("gpt2")


@cache
def load_library() -> ctypes.CDLL | None:
    """The compiled kernel; None, with a warning that says why, where it cannot be compiled or loaded.

    Compiling takes a few seconds, once. The library is in `$GPT2_HOME/native`; its name is a hash of the source, the
    compiler, its flags and the processor. A library whose checksum is wrong is compiled again, and one in a folder
    that other users can write is not loaded. Raises RuntimeError if its structs differ from those of `native.structs`.
    """
    if sys.platform != "linux":
        return _warn_unavailable("it supports Linux only")
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        return _warn_unavailable("there is no C++ compiler (g++)")
    try:
        path = cache_home() / "native" / f"{_build_key(compiler)}.so"
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if problem := _find_unsafe_folder(path.parent):
            return _warn_unavailable(problem)
        if not _is_complete(path):
            _compile(compiler, path)
        library = ctypes.CDLL(str(path))
    except UserError as error:  # there is no folder for it
        return _warn_unavailable(str(error))
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None) or str(error)
        return _warn_unavailable(next((line for line in output.splitlines() if "error" in line), output.strip()[:200]))
    check_struct_sizes(library)
    return library


def _warn_unavailable(reason: str) -> None:
    log.warning("the CPU kernel cannot be used (%s): torch's own operations are used, which is slower", reason)


def _find_unsafe_folder(folder: Path) -> str | None:
    """Why others could replace the files of a folder; None if only its owner, who is this user, can."""
    status = folder.stat()
    if status.st_uid not in (os.getuid(), 0):
        return f"{folder} belongs to another user"
    if status.st_mode & 0o022:
        return f"other users can write {folder}: run chmod 700 on it, and remove what is in it"
    return None


def _hash_path(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _is_complete(path: Path) -> bool:
    """Whether the library is there and has the checksum that was written beside it."""
    try:
        return file_sha256(path) == _hash_path(path).read_text(encoding="ascii")
    except (FileNotFoundError, ValueError):
        return False


def _build_key(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    parts = (KERNEL_SOURCE.read_text(), version, " ".join(COMPILER_FLAGS), _cpu_features(), str(_find_openmp_library()))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _cpu_features() -> str:
    """The processor features that -march=native depends on."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    found = re.search(r"^(flags|Features)\s*:.*$", text, re.MULTILINE)
    return f"{platform.machine()} {found[0] if found else ''}"


def _find_openmp_library() -> Path | None:
    """The OpenMP library that torch has loaded: the kernel links to it, so that both share one thread pool."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    found = re.search(r"/.*/lib(?:gomp|iomp5|omp)[^/\n]*\.so[^/\n]*$", maps, re.MULTILINE)
    return Path(found[0]) if found else None


def _compile(compiler: str, path: Path) -> None:
    log.warning("compiling the CPU kernel for this machine (once, a few seconds)")
    openmp = _find_openmp_library()
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as folder:
        compiled, linked = Path(folder, "kernel.o"), Path(folder, "kernel.so")
        flags = [flag for flag in COMPILER_FLAGS if flag != "-shared"]
        compile_command = [compiler, *flags, "-c", KERNEL_SOURCE, "-o", compiled]
        link_command = [compiler, "-shared", compiled, "-o", linked, *([openmp] if openmp else ["-fopenmp"])]
        for command in (compile_command, link_command):
            subprocess.run(command, capture_output=True, text=True, check=True)
        checksum = Path(folder, "kernel.sha256")
        checksum.write_text(file_sha256(linked), encoding="ascii")
        linked.replace(path)  # atomic: several processes may compile the same library
        checksum.replace(_hash_path(path))

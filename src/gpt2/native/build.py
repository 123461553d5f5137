"""From `kernel.cpp` to a library in this process: compiled once for this machine, kept in the cache folder."""

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

from gpt2.files import cache_home

KERNEL_SOURCE = Path(__file__).with_name("kernel.cpp")
COMPILER_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-ffp-contract=fast")
log = logging.getLogger("gpt2")


@cache
def load_library() -> ctypes.CDLL | None:
    """The compiled kernel, or None, with the reason in the log, where it cannot be had.

    Compiling takes some seconds, once; the result lies in `$GPT2_HOME/native`, named after the source, the compiler,
    its flags and the processor.
    """
    if sys.platform != "linux":
        return _warn_unavailable("it is made for Linux")
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        return _warn_unavailable("there is no C++ compiler (g++)")
    path = cache_home() / "native" / f"{_build_key(compiler)}.so"
    try:
        if not path.is_file():
            _compile(compiler, path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        told = getattr(error, "stderr", None) or str(error)
        return _warn_unavailable(next((line for line in told.splitlines() if "error" in line), told.strip()[:200]))


def _warn_unavailable(reason: str) -> None:
    log.warning("the CPU kernel cannot be used (%s): text is made by torch's own operations, which is slower", reason)


def _build_key(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    parts = (KERNEL_SOURCE.read_text(), version, " ".join(COMPILER_FLAGS), _cpu_features(), str(_find_openmp_library()))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _cpu_features() -> str:
    """What -march=native depends on."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    told = re.search(r"^(flags|Features)\s*:.*$", text, re.MULTILINE)
    return f"{platform.machine()} {told[0] if told else ''}"


def _find_openmp_library() -> Path | None:
    """The OpenMP library that torch has loaded: with one pool of threads for both, none waits for the other's."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    found = re.search(r"/.*/lib(?:gomp|iomp5|omp)[^/\n]*\.so[^/\n]*$", maps, re.MULTILINE)
    return Path(found[0]) if found else None


def _compile(compiler: str, path: Path) -> None:
    log.warning("compiling the CPU kernel for this machine, once (some seconds)")
    path.parent.mkdir(parents=True, exist_ok=True)
    openmp = _find_openmp_library()
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as folder:
        compiled, linked = Path(folder, "kernel.o"), Path(folder, "kernel.so")
        flags = [flag for flag in COMPILER_FLAGS if flag != "-shared"]
        subprocess.run(
            [compiler, *flags, "-c", KERNEL_SOURCE, "-o", compiled], capture_output=True, text=True, check=True
        )
        link = [compiler, "-shared", compiled, "-o", linked, *([openmp] if openmp else ["-fopenmp"])]
        subprocess.run(link, capture_output=True, text=True, check=True)
        linked.replace(path)  # at once: of several processes that compile, the last wins, with the same library

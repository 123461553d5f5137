"""What all benchmarks share: the timed training workload, timing, subprocess runners, and the environment record."""

import contextlib
import datetime
import importlib
import json
import multiprocessing
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from gpt2.errors import ConfigError, DataError, UserError, as_memory_error, did_you_mean
from gpt2.files import source_commit, source_tree
from gpt2.model import GPTConfig
from gpt2.optimizers import parameter_groups
from gpt2.runtime import synchronize

T = TypeVar("T")
Batch = tuple[Tensor, Tensor]
ProgressFn = Callable[[str], None]  # takes one line of progress
RunFn = Callable[..., Any]  # `run_in_subprocess` or `run_in_process`

OURS = "gpt2"  # this program's name among the contestants
SOURCE_TREE = source_tree()
CONTEXT_LENGTH = 1024  # GPT-2's: the length of the position table, also for shorter sequences


@dataclass(frozen=True)
class Workload:
    """The training steps that are timed: the model's shape, the batch, and the number of steps.

    `warmup` untimed steps come first. All variants train on the same batches.
    """

    device: str
    config: GPTConfig
    batch_size: int
    block_size: int  # tokens in a row; the model's context may be longer
    steps: int = 20
    warmup: int = 3
    lr: float = 3e-4
    seed: int = 1337

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("block_size", 1), ("steps", 1), ("warmup", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, not {getattr(self, name)}", field=name)

    @property
    def tokens(self) -> int:
        """Tokens per step."""
        return self.batch_size * self.block_size

    def batches(self) -> list[Batch]:
        """Inputs and targets of every step, int64 (B, T) each, on the device. The same seed gives the same batches.

        Token frequencies follow Zipf's law (the r-th most frequent has a probability of about 1/r), so that the loss
        falls within a few steps.
        """
        generator = torch.Generator().manual_seed(self.seed)
        frequency = 1 / torch.arange(1, self.config.vocab_size + 1, dtype=torch.float64)
        shape = (self.warmup + self.steps, self.batch_size, self.block_size + 1)
        drawn = torch.multinomial(frequency, torch.Size(shape).numel(), replacement=True, generator=generator)
        rows = drawn.view(shape).to(self.device)
        return [(row[:, :-1].contiguous(), row[:, 1:].contiguous()) for row in rows]


def no_progress(line: str) -> None:
    """A `ProgressFn` that prints nothing."""


def parse_names(kind: str, flag: str, text: str, known: Sequence[str]) -> list[str]:
    """Parse a comma-separated list of known names, or "all". Raises UserError for an unknown name or an empty list."""
    names = known if text == "all" else [name.strip() for name in text.split(",") if name.strip()]
    available = f"there are {', '.join(known)}"
    if not names:
        raise ConfigError(f"{flag} is empty: {available}", field=flag.strip("-"))
    if unknown := next((name for name in names if name not in known), None):
        raise ConfigError(f"there is no {kind} '{unknown}'{did_you_mean(unknown, known)}: {available}")
    return list(dict.fromkeys(names))


class BenchmarkError(Exception):
    """A measurement that could not run; the message is the reason, in one line."""

    def __init__(self, reason: str, out_of_memory: bool = False) -> None:
        super().__init__(reason, out_of_memory)
        self.reason, self.out_of_memory = reason, out_of_memory

    def __str__(self) -> str:
        return self.reason


def adamw(model: nn.Module, lr: float, **kernels: bool) -> AdamW:
    """GPT-2's AdamW, with weight decay on matrices only. kernels: torch's `fused` or `foreach`."""
    return AdamW(parameter_groups(model.parameters(), 0.1), lr=lr, betas=(0.9, 0.95), **kernels)


def backward_and_step(loss: Tensor, model: nn.Module, optimizer: AdamW) -> Tensor:
    """The second half of a training step: backward, gradient clipping to 1.0, update. Returns the detached loss."""
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def timed(function: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """Seconds until `function` is done, on the device too, and its result."""
    synchronize(device)
    start = time.perf_counter()
    result = function()
    synchronize(device)
    return time.perf_counter() - start, result


def quartiles_ms(seconds: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of times, in milliseconds: ``{"median": ..., "low": ..., "high": ...}``."""
    low, median, high = statistics.quantiles([*seconds] * (2 if len(seconds) < 2 else 1), n=4, method="inclusive")
    return {"median": 1e3 * median, "low": 1e3 * low, "high": 1e3 * high}


def run_in_process(function: Callable[..., T], *arguments: Any) -> T:
    """Return ``function(*arguments)``; errors such as too little memory or no compiler become `BenchmarkError`."""
    try:
        return function(*arguments)
    except (RuntimeError, MemoryError, UserError, ImportError) as error:
        text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        out_of_memory = as_memory_error(error) is not None
        raise BenchmarkError(f"out of memory: {text}" if out_of_memory else text[:200], out_of_memory) from error


class InProcessRunner:
    """An object made by ``make(*arguments)``, whose methods are called by name: see `SubprocessRunner`."""

    def __init__(self, make: Callable[..., Any], *arguments: Any) -> None:
        self._object = run_in_process(make, *arguments)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *rest: object) -> None:
        pass

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the object. Raises BenchmarkError with the reason if it cannot run."""
        return run_in_process(getattr(self._object, method), *arguments)


class SubprocessRunner(InProcessRunner):
    """The same in a new Python process, with its own memory, compiled code and settings.

    `make` must be a function or class of a module, and arguments and results must be picklable.
    Raises BenchmarkError with the reason if a call cannot run, also if the process was killed.
    """

    def __init__(self, make: Callable[..., Any], *arguments: Any) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve_calls, args=(theirs, make, arguments))
        with _without_ctrl_c():
            self._process.start()
        theirs.close()
        try:
            self._receive()
        except BaseException as error:
            self.__exit__(type(error))
            raise

    def __exit__(self, kind: type[BaseException] | None = None, *rest: object) -> None:
        self._pipe.close()  # then an idle process exits by itself, and cleans up
        self._process.join(0 if kind is KeyboardInterrupt else 5)
        self._process.kill()
        self._process.join()

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the object in the subprocess. Raises BenchmarkError as in `InProcessRunner`."""
        with contextlib.suppress(OSError):  # the process has exited: `_receive` raises with the reason
            self._pipe.send((method, arguments))
        return self._receive()

    def _receive(self) -> Any:
        try:
            answer = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            raise BenchmarkError(*_exit_reason(self._process.exitcode or 0)) from None
        if isinstance(answer, BenchmarkError):
            raise answer
        return answer


@contextlib.contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """A process that starts in the block does not receive Ctrl-C, also before it runs our code; this one waits."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # its start, by the first process, would unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve_calls(pipe: Connection, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """In the new process: make the object, and call its methods until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends this process; on Windows
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    try:
        made = InProcessRunner(make, *arguments)
    except BenchmarkError as failure:
        pipe.send(failure)
        return
    pipe.send(None)
    with contextlib.suppress(EOFError):
        while True:
            method, given = pipe.recv()
            try:
                answer = made.call(method, *given)
            except BenchmarkError as failure:
                answer = failure
            pipe.send(answer)


class _FunctionHolder:
    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function


def run_in_subprocess(function: Callable[..., T], *arguments: Any) -> T:
    """Return ``function(*arguments)``, computed in a new Python process: see `SubprocessRunner`."""
    with SubprocessRunner(_FunctionHolder, function) as runner:
        return runner.call("function", *arguments)


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _exit_reason(exit_code: int) -> tuple[str, bool]:
    """Why a process exited without an answer, and whether memory ran out."""
    if exit_code >= 0:
        return f"the process exited with code {exit_code} (see above)", False
    name = signal.Signals(-exit_code).name
    if name == "SIGKILL":
        return "out of memory: the system killed the process (SIGKILL)", True
    return f"the process was killed by {name}", False


def environment() -> dict[str, Any]:
    """Date, commit, versions and threads, for a result file."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": source_commit(SOURCE_TREE),
        "torch": torch.__version__,
        "python": ".".join(map(str, sys.version_info[:3])),
        "threads": torch.get_num_threads(),
    }


def load_benchmark(name: str, purpose: str) -> ModuleType:
    """Import benchmarks/NAME.py of the source tree: peers and load tests are not part of the package.

    Raises UserError that names the `purpose`, if this program does not run from a source tree.
    """
    if not (SOURCE_TREE / "benchmarks" / f"{name}.py").is_file():
        raise UserError(f"{purpose} needs a clone of the source tree, installed by `pip install -e .`: not found")
    if str(SOURCE_TREE) not in sys.path:
        sys.path.insert(0, str(SOURCE_TREE))  # inherited by subprocesses, which import the module too
    return importlib.import_module(f"benchmarks.{name}")


def read_result(path: Path, *kinds: str) -> dict[str, Any]:
    """Read a result that `gpt2 bench` wrote. Raises UserError for any other file, or another kind of result."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not isinstance(result, dict) or result.get("kind") not in kinds:
        raise DataError(f"{path} is not a result of {' or '.join(f'gpt2 {kind}' for kind in kinds)} --json")
    return result

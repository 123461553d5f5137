"""What every benchmark shares: the work that is timed, the clock, a process of its own, and where it ran."""

import contextlib
import datetime
import json
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from gpt2.errors import UserError
from gpt2.model import GPTConfig
from gpt2.optimizers import parameter_groups
from gpt2.runtime import synchronize

T = TypeVar("T")
Batch = tuple[Tensor, Tensor]
ProgressFn = Callable[[str], None]  # takes one line about how far we are
RunFn = Callable[..., Any]  # `in_fresh_process`, or `in_this_process`

CONTEXT_LENGTH = 1024  # GPT-2's own: the position table is this long however short the sequences are


@dataclass(frozen=True)
class Workload:
    """The training step that is timed: a model's shape, a batch, and how often.

    `warmup` steps come first and are not timed; both kinds are updates of the same model, on the same batches for all.
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
                raise UserError(f"{name} must be at least {least}, not {getattr(self, name)}")

    @property
    def tokens(self) -> int:
        """Tokens in a step."""
        return self.batch_size * self.block_size

    def batches(self) -> list[Batch]:
        """Inputs and targets of every step, int64 (B, T) each, on the device: the same for the same seed.

        Tokens are drawn as words are, the r-th most frequent with a probability of about 1/r (Zipf), so that there is
        something to learn in a few steps: first of all which tokens are frequent.
        """
        generator = torch.Generator().manual_seed(self.seed)
        frequency = 1 / torch.arange(1, self.config.vocab_size + 1, dtype=torch.float64)
        shape = (self.warmup + self.steps, self.batch_size, self.block_size + 1)
        drawn = torch.multinomial(frequency, torch.Size(shape).numel(), replacement=True, generator=generator)
        rows = drawn.view(shape).to(self.device)
        return [(row[:, :-1].contiguous(), row[:, 1:].contiguous()) for row in rows]


def no_progress(line: str) -> None:
    """A `Say` that says nothing."""


class BenchmarkError(Exception):
    """Something that was to be measured could not run; the message is the reason, in one line."""

    def __init__(self, reason: str, out_of_memory: bool = False) -> None:
        super().__init__(reason, out_of_memory)
        self.reason, self.out_of_memory = reason, out_of_memory

    def __str__(self) -> str:
        return self.reason


def adamw(model: nn.Module, lr: float, **kernels: bool) -> AdamW:
    """GPT-2's AdamW, decay on matrices only. kernels: torch's `fused` or `foreach`."""
    return AdamW(parameter_groups(model.parameters(), 0.1), lr=lr, betas=(0.9, 0.95), **kernels)


def backward_and_step(loss: Tensor, model: nn.Module, optimizer: AdamW) -> Tensor:
    """The second half of a training step: backward, gradients clipped to 1.0, one step. Returns the loss, detached."""
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def timed(function: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """Seconds until `work` is done on the device too, and its result."""
    synchronize(device)
    began = time.perf_counter()
    result = function()
    synchronize(device)
    return time.perf_counter() - began, result


def quartiles_ms(seconds: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of raw times, in milliseconds: ``{"median": ..., "low": ..., "high": ...}``."""
    low, median, high = statistics.quantiles([*seconds] * (2 if len(seconds) < 2 else 1), n=4, method="inclusive")
    return {"median": 1e3 * median, "low": 1e3 * low, "high": 1e3 * high}


def run_in_process(function: Callable[..., T], *arguments: Any) -> T:
    """``work(*arguments)``, with what stops it told as `Failed`: no memory, no compiler, a kernel that is missing."""
    try:
        return function(*arguments)
    except (RuntimeError, MemoryError, UserError, ImportError) as error:
        text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        no_memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in text
        raise BenchmarkError(f"out of memory: {text}" if no_memory else text[:200], no_memory) from error


class InProcessRunner:
    """What ``make(*arguments)`` gives, called by the names of its methods, as in `Elsewhere`, but in this process."""

    def __init__(self, make: Callable[..., Any], *arguments: Any) -> None:
        self._object = run_in_process(make, *arguments)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *rest: object) -> None:
        pass

    def call(self, method: str, *arguments: Any) -> Any:
        """The method's result. Raises Failed with the reason when there is none."""
        return run_in_process(getattr(self._object, method), *arguments)


class SubprocessRunner(InProcessRunner):
    """The same in a new Python, so that memory, compiled code and settings are its own.

    `make` has to be a function or class of a module, and everything that goes in or comes out picklable.
    Raises Failed with the reason when something could not be done, also when the process was killed.
    """

    def __init__(self, make: Callable[..., Any], *arguments: Any) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve_calls, args=(theirs, make, arguments))
        self._process.start()
        theirs.close()
        try:
            self._receive()
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *rest: object) -> None:
        self._pipe.close()  # there are no more calls: an idle process ends by itself, and cleans up
        self._process.join(5)
        self._process.kill()
        self._process.join()

    def call(self, method: str, *arguments: Any) -> Any:
        with contextlib.suppress(OSError):  # the process is gone: the answer says why
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


def _serve_calls(pipe: Connection, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """In the new process: make the object, and answer the calls of its methods until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to both: the parent ends us
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
        self.do = function


def run_in_subprocess(function: Callable[..., T], *arguments: Any) -> T:
    """``work(*arguments)`` in a new Python: see `Elsewhere`."""
    with SubprocessRunner(_FunctionHolder, function) as other:
        return other.call("do", *arguments)


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _exit_reason(exit_code: int) -> tuple[str, bool]:
    """Why a process that gave no answer ended, and whether for want of memory."""
    if exit_code >= 0:
        return f"its process ended with code {exit_code} (see above)", False
    name = signal.Signals(-exit_code).name
    if name == "SIGKILL":
        return "out of memory: the system killed the process (SIGKILL)", True
    return f"its process was ended by {name}", False


def environment() -> dict[str, Any]:
    """What a result needs to be understood later: date, commit, versions, threads."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "torch": torch.__version__,
        "python": ".".join(map(str, sys.version_info[:3])),
        "threads": torch.get_num_threads(),
    }


def _commit() -> str | None:
    """The checkout's commit, with "-dirty" where the program was changed; None for an installed package."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None
    try:
        commit, changed = (
            subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
            for command in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "src"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}-dirty" if changed else commit


def read_result(path: Path, *kinds: str) -> dict[str, Any]:
    """A result that `gpt2 bench` wrote. Raises UserError for a file that is none, or of another kind than these."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(result, dict) or result.get("kind") not in kinds:
        raise UserError(f"{path} is no result of {' or '.join(f'gpt2 {kind}' for kind in kinds)} --json")
    return result

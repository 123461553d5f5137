"""User errors: one exception type with a few subclasses, one clear line each."""

import difflib
from collections.abc import Iterable

from gpt2.terminal import shorten

MAX_MESSAGE_CHARACTERS = 1000  # what a message quotes of a file or a request may have any length


class UserError(Exception):
    """A mistake that the user can fix: a wrong name, a broken file, a machine without what was requested.

    The message is one line of bounded length (`shorten`) that names the thing and, where there is one, the fix. The
    command line prints it without a traceback and exits with `exit_code`; the server sends it with `field` and `code`.

    field: the setting, flag or request field that is at fault, if there is exactly one.
    code:  what kind of mistake it is, for programs: each subclass has its own default.
    """

    exit_code = 2
    code: str | None = None

    def __init__(self, message: str = "", *, field: str | None = None, code: str | None = None) -> None:
        super().__init__(shorten(message, MAX_MESSAGE_CHARACTERS))
        self.field = field
        if code is not None:
            self.code = code


class ConfigError(UserError):
    """A setting or flag has a value that is not supported."""

    code = "invalid_config"


class DataError(UserError):
    """A data file, row or shard cannot be used."""

    code = "invalid_data"


class ModelFilesError(UserError):
    """A model folder, tokenizer, template, adapter or checkpoint cannot be used."""

    code = "invalid_model_files"


class UnsupportedTokenizer(ModelFilesError):
    """A tokenizer that is not broken, but of a kind that is not supported: the model can be used without text."""


class NonFiniteLogitsError(ModelFilesError):
    """The model computes nan or inf: its weights are damaged, or too large for its dtype."""

    code = "non_finite_logits"


class RequestError(UserError):
    """A generation request that the engine cannot serve: wrong type, out of range, or too long."""

    code = "invalid_request"


class InsufficientMemoryError(UserError):
    """The device or the machine does not have the memory that is needed."""

    code = "out_of_memory"


class ReportedByOtherRank(UserError):
    """A UserError that another rank of the run reports: this rank exits silently."""


class RankFailure(UserError):
    """Other ranks of the run are lost or hang: the run can be resumed from its last checkpoint."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h, "try again"


OUT_OF_MEMORY_ADVICE = (
    "this needs more memory than there is: for training, lower --micro-batch-size or add --activation-checkpointing "
    "(gpt2 plan estimates what a run needs); for sampling, lower --num-samples"
)
OUT_OF_MEMORY_MARKS = (  # how torch, cuBLAS and the CPU allocator report it, where the exception type does not
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
)


def as_memory_error(error: BaseException) -> InsufficientMemoryError | None:
    """Return an InsufficientMemoryError for an error of Python or torch that reports too little memory, else None.

    Most of torch's allocators raise a plain RuntimeError, so this is the one place that reads error messages.
    """
    is_marked = isinstance(error, RuntimeError) and any(mark in str(error) for mark in OUT_OF_MEMORY_MARKS)
    return InsufficientMemoryError(OUT_OF_MEMORY_ADVICE) if isinstance(error, MemoryError) or is_marked else None


def compiler_failure(error: BaseException) -> str | None:
    """A message if an OSError, such as a full disk, or the C++ compiler made torch fail; None otherwise."""
    import subprocess

    compiles = type(error).__module__.startswith(("torch._inductor", "torch._dynamo"))
    advice = ": TMPDIR and TORCHINDUCTOR_CACHE_DIR name other folders, and --no-compile does without it"
    seen: list[BaseException] = []
    pending: list[BaseException | None] = [error]
    while pending:
        one = pending.pop()
        if isinstance(one, OSError):
            return f"torch.compile failed ({describe_os_error(one)}){advice}" if compiles else describe_os_error(one)
        if isinstance(one, subprocess.CalledProcessError):
            return f"torch.compile failed ({_compiler_message(one.output)}){advice}"
        if one is not None and one not in seen:
            seen.append(one)
            pending += [one.__cause__, one.__context__, getattr(one, "inner_exception", None)]
    return None


def describe_os_error(error: OSError) -> str:
    """The file, if there is one, and the reason."""
    return ": ".join(str(part) for part in (error.filename, error.strerror or error) if part is not None)


def _compiler_message(output: bytes | str | None) -> str:
    """The line of a C++ compiler's output that names the error, or the last one."""
    text = output.decode(errors="replace") if isinstance(output, bytes) else output or ""
    lines = [line for line in text.splitlines() if line.strip()] or ["the C++ compiler ended with an error"]
    return next((line for line in lines if "error: " in line), lines[-1])


SYNONYMS = {  # names in other programs, and ours
    "learning-rate": "lr",
    "fp16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
    "fp32": "float32",
    "precision": "dtype",
    "steps": "max-steps",
    "max-iters": "max-steps",
    "num-train-epochs": "epochs",
    "output-dir": "out-dir",
    "output": "out-dir",
    "dataset": "data",
    "context-length": "block-size",
    "max-seq-length": "block-size",
    "max-length": "max-new-tokens",
    "max-tokens": "max-new-tokens",
    "gradient-accumulation-steps": "micro-batch-size",
    "per-device-train-batch-size": "micro-batch-size",
    "gradient-checkpointing": "activation-checkpointing",
    "lora-r": "lora-rank",
}


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """The tail of an error message: `` (did you mean 'adamw'?)``, or the empty string when nothing is close.

    Names that other programs have for a choice count as close: see SYNONYMS.
    """
    known = list(choices)
    other = SYNONYMS.get(_normalized(word))
    same = [choice for choice in known if _normalized(choice) == other]
    close = same or difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f" (did you mean '{close[0]}'?)" if close else ""


def _normalized(name: str) -> str:
    return name.lstrip("-").replace("_", "-").lower()


def missing_extra(package: str, extra: str, purpose: str) -> UserError:
    """The error for an optional dependency that is not installed."""
    return UserError(f"{purpose} needs {package}, which is not installed: pip install 'plain-gpt2[{extra}]'")

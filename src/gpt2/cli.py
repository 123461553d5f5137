"""The command line: one subcommand per verb. Each verb lives in `gpt2/commands/`, and is imported when it is chosen."""

import argparse
import importlib
import io
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from gpt2.errors import UserError, did_you_mean

NO_MEMORY = (
    "this needs more memory than there is: for training, lower --micro-batch-size or add --recompute (gpt2 plan tells "
    "what a run will need); for sampling, lower --num-samples"
)
TORCHS_MEMORY_ERRORS = (
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
)


class Parser(argparse.ArgumentParser):
    """argparse that takes --batch-size and --batch_size alike, and says what is wrong in one line."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def flag(self, name: str, **kwargs: Any) -> None:
        """Add ``--name-with-dashes``, which may also be spelled with underscores, as may its ``--no-`` form."""
        self.add_argument(f"--{name}", **kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([self._dashed(word) for word in words], namespace)

    def _dashed(self, arg: str) -> str:
        """`arg`, with dashes if it is a flag of ours spelled with underscores."""
        name, equals, value = arg.partition("=")
        dashed = name.replace("_", "-")
        return dashed + equals + value if dashed.startswith("--") and dashed in self._flags() else arg

    def _flags(self) -> list[str]:
        return [option for action in self._actions for option in action.option_strings if option.startswith("--")]

    def error(self, message: str) -> NoReturn:
        name = message.removeprefix("unrecognized arguments: ")
        if name != message:
            unknown = (name.split() or [name])[0].partition("=")[0]
            message = f"there is no {unknown}{did_you_mean(unknown.replace('_', '-'), self._flags())}"
        raise UserError(f"{message} (see {self.prog} --help)")


def counting(text: str) -> int:
    """The type of a flag that counts something, a whole number of at least 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text}")
    return number


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run `gpt2 VERB ...` and exit: 0 done, 2 a user's mistake in one line, 128 + n stopped by signal n."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    exit_after(lambda: _run(arguments))


def exit_after(program: Callable[[], int | None]) -> NoReturn:
    """Run a program and exit with its code; what the user did wrong becomes one line on standard error and code 2."""
    _harden_streams()
    first = os.environ.get("RANK", "0") == "0"  # the other ranks of a run would say the same
    logging.basicConfig(format="gpt2: %(message)s", level=logging.WARNING if first else logging.ERROR)
    try:
        code = program() or 0
        if sys.stdout is not None:
            sys.stdout.flush()
        sys.exit(code)
    except UserError as error:
        _fail(str(error), error.exit_code)
    except MemoryError:
        _fail(NO_MEMORY)
    except RuntimeError as error:  # which is how torch tells of it
        if not any(words in str(error) for words in TORCHS_MEMORY_ERRORS):
            raise
        _fail(NO_MEMORY)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # whoever read our output has seen enough
        _let_go_of_output()
        sys.exit(141)
    except OSError as error:  # a full disk, a name too long: the system says what is wrong, and with which file
        _let_go_of_output()
        _fail(": ".join(str(part) for part in (error.filename, error.strerror or error) if part is not None))


def _fail(message: str, code: int = 2) -> NoReturn:
    """Say it, if there is anything to say, in one line with nothing in it that a terminal could obey, and exit."""
    line = "".join(c if c.isprintable() else " " if c.isspace() else ascii(c)[1:-1] for c in message)
    if line and sys.stderr is not None:
        print(f"gpt2: {line}", file=sys.stderr)
    sys.exit(code)


def _let_go_of_output() -> None:
    """Write what is left for standard output, or forget it, so that Python does not stumble over it on its way out."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _harden_streams() -> None:
    """Let no character and no reader that went away be the end of a program.

    What standard output has no letters for is written as an escape, as Python does on standard error. What cannot be
    written to standard error, because its reader or its terminal is gone, is dropped: hours of training are worth
    more than the talk about them.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if isinstance(sys.stderr, io.TextIOWrapper) and sys.stderr is sys.__stderr__:
        raw = _Droppable(sys.stderr.fileno(), "w", closefd=False)
        sys.stderr = io.TextIOWrapper(
            io.BufferedWriter(raw), sys.stderr.encoding, "backslashreplace", line_buffering=True
        )


class _Droppable(io.FileIO):
    """A file that takes all, whether or not there is still somebody who reads it."""

    def write(self, data: Any) -> int:
        try:
            written = super().write(data)
        except OSError:
            written = None
        return len(data) if written is None else written


def _run(arguments: list[str]) -> int | None:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return None
    if arguments[0] == "--version":
        from gpt2 import __version__

        print(f"gpt2 {__version__}")
        return None
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        raise UserError(f"there is no command '{verb}'{did_you_mean(verb, VERBS)}: see gpt2 --help")
    return importlib.import_module(f"gpt2.commands.{verb}").main(rest)


def _overview() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:{width}}  {about}" for verb, about in VERBS.items())
    return f"""GPT-2 in plain PyTorch.

usage: gpt2 COMMAND ...

{verbs}

A MODEL is a run folder, a model folder, or a name on the hub: gpt2, gpt2-medium, gpt2-large, gpt2-xl, owner/name.
A checkpoint of another program is one, too: gpt2 convert --list.
gpt2 COMMAND --help says more."""


VERBS = {
    "train": "train a model on text, from nothing or from another model",
    "finetune": "teach a model your text, or your prompts and answers",
    "sample": "continue a prompt",
    "chat": "talk with a model",
    "serve": "answer OpenAI's API, and show the playground",
    "convert": "write a model for other programs: transformers, llama.cpp, ONNX and more",
    "export": "the old name of convert",
    "data": "prepare token shards, and look into them",
    "bench": "measure: training, generation, and peers side by side",
    "plan": "memory, time and cost before you spend them",
}

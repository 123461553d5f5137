"""The command line: one subcommand per verb. Each verb is a module in `gpt2/commands/`, imported when it is chosen."""

import argparse
import importlib
import io
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from gpt2.errors import UserError, as_memory_error, did_you_mean


class Parser(argparse.ArgumentParser):
    """argparse that accepts --batch-size and --batch_size, and raises UserError with one line for a wrong flag."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def add_flag(self, *names: str, **kwargs: Any) -> None:
        """Add ``--name-with-dashes`` and its aliases; they and their ``--no-`` forms also take underscores."""
        self.add_argument(*(f"--{name}" for name in names), **kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([self._with_dashes(word) for word in words], namespace)

    def _with_dashes(self, arg: str) -> str:
        """Return `arg` with dashes if it is a known flag spelled with underscores, else unchanged."""
        name, equals, value = arg.partition("=")
        dashed = name.replace("_", "-")
        return dashed + equals + value if dashed.startswith("--") and dashed in self._flags() else arg

    def _flags(self) -> list[str]:
        return [option for action in self._actions for option in action.option_strings if option.startswith("--")]

    def error(self, message: str) -> NoReturn:
        arguments = message.removeprefix("unrecognized arguments: ")
        if arguments != message:
            unknown = (arguments.split() or [arguments])[0].partition("=")[0]
            message = f"there is no {unknown}{did_you_mean(unknown.replace('_', '-'), self._flags())}"
        raise UserError(f"{message} (see {self.prog} --help)")


def positive_int(text: str) -> int:
    """Parse the value of a flag that counts something: an integer of at least 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, not {text}")
    return number


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run `gpt2 VERB ...` and exit with 0 for success, 2 for a user error, 128 + n for a stop by signal n."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    run_and_exit(lambda: _run_command(arguments))


def run_and_exit(program: Callable[[], int | None]) -> NoReturn:
    """Run a program and exit with its code. A user error becomes one line on standard error and exit code 2."""
    _configure_streams()
    is_main_process = os.environ.get("RANK", "0") == "0"  # the other ranks would repeat its warnings
    logging.basicConfig(format="gpt2: %(message)s", level=logging.WARNING if is_main_process else logging.ERROR)
    try:
        code = program() or 0
        if sys.stdout is not None:
            sys.stdout.flush()
        sys.exit(code)
    except UserError as error:
        _exit_with_error(str(error), error.exit_code)
    except (MemoryError, RuntimeError) as error:
        memory_error = as_memory_error(error)
        if memory_error is None:
            raise
        _exit_with_error(str(memory_error))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of standard output, such as `head`, has exited
        _flush_or_discard_stdout()
        sys.exit(141)
    except OSError as error:  # such as a full disk or a file name that is too long
        _flush_or_discard_stdout()
        _exit_with_error(": ".join(str(part) for part in (error.filename, error.strerror or error) if part is not None))


def _exit_with_error(message: str, code: int = 2) -> NoReturn:
    """Print a nonempty message as one line on standard error, with control characters escaped, and exit."""
    line = "".join(c if c.isprintable() else " " if c.isspace() else ascii(c)[1:-1] for c in message)
    if line and sys.stderr is not None:
        print(f"gpt2: {line}", file=sys.stderr)
    sys.exit(code)


def _flush_or_discard_stdout() -> None:
    """Flush standard output. If that fails, discard its buffer, so that Python's own flush at exit does not fail."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _configure_streams() -> None:
    """Make the standard streams robust.

    Characters that standard output cannot encode are written as escapes, as Python does on standard error. Log lines
    that cannot be written to standard error, because its reader or terminal is gone, are dropped, so that a long
    training run goes on.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if isinstance(sys.stderr, io.TextIOWrapper) and sys.stderr is sys.__stderr__:
        raw = _LossyFile(sys.stderr.fileno(), "w", closefd=False)
        sys.stderr = io.TextIOWrapper(
            io.BufferedWriter(raw), sys.stderr.encoding, "backslashreplace", line_buffering=True
        )


class _LossyFile(io.FileIO):
    """A file whose writes never fail: data that cannot be written is dropped."""

    def write(self, data: Any) -> int:
        try:
            written = super().write(data)
        except OSError:
            written = None
        return len(data) if written is None else written


def _run_command(arguments: list[str]) -> int | None:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return None
    if arguments[0] == "--version":
        from gpt2 import __version__

        print(f"gpt2 {__version__}")
        return None
    verb, rest = arguments[0], arguments[1:]
    if verb not in COMMANDS:
        raise UserError(f"there is no command '{verb}'{did_you_mean(verb, COMMANDS)}: see gpt2 --help")
    return importlib.import_module(f"gpt2.commands.{verb}").main(rest)


def _usage() -> str:
    width = max(map(len, COMMANDS))
    verbs = "\n".join(f"  {verb:{width}}  {description}" for verb, description in COMMANDS.items())
    return f"""GPT-2 in plain PyTorch.

usage: gpt2 COMMAND ...

{verbs}

A MODEL is a run folder, a model folder, or a name on the hub: gpt2, gpt2-medium, gpt2-large, gpt2-xl, owner/name.
A checkpoint of another program works, too: gpt2 convert --list.
gpt2 COMMAND --help lists the flags of a command."""


COMMANDS = {
    "train": "train a model on text, from random weights or from another model",
    "finetune": "fine-tune a model on your text, or on prompts and answers",
    "eval": "evaluate a model on standard tasks, with stated protocols",
    "sample": "generate text from a prompt",
    "chat": "chat with a model",
    "serve": "serve the OpenAI API and a playground",
    "convert": "write a model for other programs: transformers, llama.cpp, ONNX and more",
    "export": "the old name of convert",
    "data": "prepare token shards and inspect data",
    "bench": "measure the speed of training, generation and serving, and compare it with peers",
    "plan": "estimate memory, time and cost of a training run",
}

"""The command line: one subcommand per verb. Each verb is a module in `gpt2/commands/`, imported when it is chosen."""

import argparse
import importlib
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from gpt2.errors import (
    MAX_MESSAGE_CHARACTERS,
    ConfigError,
    UserError,
    as_memory_error,
    compiler_failure,
    describe_os_error,
    did_you_mean,
)
from gpt2.terminal import escape_controls, shorten, single_line

COMMON_FLAGS: dict[str, dict[str, Any]] = {
    "quiet": {"action": "store_true", "help": "print results and errors only"},
    "verbose": {"action": "store_true", "help": "print more, and where an error was raised"},
    "threads": {"metavar": "INT", "help": "CPU threads [all cores, or $OMP_NUM_THREADS]"},
}
_COUNT_SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


class Parser(argparse.ArgumentParser):
    """argparse that accepts --batch-size and --batch_size, and raises UserError with one line for a wrong flag.

    examples: command lines that the help shows.
    advice:   flags that this command does not have, and what to do instead.
    stray:    what to do with an argument too many, with {} for it, such as "use --data {}".
    """

    def __init__(
        self, *, examples: Sequence[str] = (), advice: Mapping[str, str] | None = None, stray: str = "", **kwargs: Any
    ) -> None:
        shown = "\n".join(["examples:", *(f"  {example}" for example in examples)]) if examples else ""
        parts = [kwargs.pop("epilog", None), shown]
        text = "\n\n".join(part for part in parts if part)
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=text or None, **kwargs
        )
        self._advice, self._stray = dict(advice or {}), stray
        self._section: argparse._ActionsContainer = self
        if self.prog.startswith("gpt2 "):
            for name, settings in COMMON_FLAGS.items():
                self.add_flag(name, default=argparse.SUPPRESS, **settings)

    def section(self, title: str) -> None:
        """Show the flags that are added from now on under this title."""
        self._section = self.add_argument_group(title)

    def add_flag(self, *names: str, **kwargs: Any) -> None:
        """Add ``--name-with-dashes`` and its aliases; they and their ``--no-`` forms also take underscores."""
        kind = kwargs.get("type")
        if kind in (int, float, positive_int):
            kwargs.setdefault("metavar", "FLOAT" if kind is float else "INT")
        self._section.add_argument(*(f"--{name}" for name in names), **kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([self._with_dashes(word) for word in words], namespace)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        found, extra = self.parse_known_args(args, namespace)
        self._reject(extra)
        return found

    def parse_intermixed_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        found, extra = self.parse_known_intermixed_args(args, namespace)
        self._reject(extra)
        return found

    def _reject(self, extra: list[str]) -> None:
        """Raise UserError for the first argument that the parser does not know."""
        if not extra:
            return
        unknown = extra[0].partition("=")[0]
        dashed = unknown.replace("_", "-")
        if not unknown.startswith("-"):
            self.error(
                f"unexpected argument '{extra[0]}'" + (f": {self._stray.format(extra[0])}" if self._stray else "")
            )
        if dashed in self._advice:
            self.error(f"there is no {unknown}: {self._advice[dashed]}")
        choices = [flag for flag in self._flags() if flag != "--help"]
        self.error(f"there is no {unknown}{did_you_mean(dashed, choices)}")

    def _with_dashes(self, arg: str) -> str:
        """Return `arg` with dashes if it is a known flag spelled with underscores, else unchanged."""
        name, equals, value = arg.partition("=")
        dashed = name.replace("_", "-")
        return dashed + equals + value if dashed.startswith("--") and dashed in self._flags() else arg

    def _flags(self) -> list[str]:
        """The flags that the help shows, and their other spellings."""
        return [option for action in self._actions for option in action.option_strings if option.startswith("--")]

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


class SubcommandParser(Parser):
    """The parser of a subcommand, whose errors name and suggest its own flags."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, extra = super().parse_known_args(args, namespace)
        self._reject(extra)
        return found, extra


class FlagRule(NamedTuple):
    """Flags that have an effect only with some values of other flags.

    flags:     names of the flags, with underscores.
    applies:   whether they have an effect, from the values of all flags.
    otherwise: the error if they have none, with {} for the flag: "{} needs --num-beams".
    """

    flags: tuple[str, ...]
    applies: Callable[[Any], bool]
    otherwise: str


def given_flags(args: argparse.Namespace) -> list[str]:
    """The names of the flags that were given, of a parser whose defaults are None, False, [] or ""."""
    return [name for name, value in vars(args).items() if value not in (None, [], "") and value is not False]


def reject_unused_flags(given: Iterable[str], values: Any, rules: Iterable[FlagRule]) -> None:
    """Raise ConfigError for the first flag that was given and would have no effect.

    given:  names of the flags on the command line, with underscores.
    values: an object with the value of every flag as an attribute: the parsed arguments, or a TrainConfig.
    """
    names = set(given)
    for rule in rules:
        unused = next((name for name in rule.flags if name in names), None)
        if unused is not None and not rule.applies(values):
            raise ConfigError(rule.otherwise.format("--" + unused.replace("_", "-")), field=unused)


def is_help(argv: Iterable[str]) -> bool:
    """Whether the arguments ask for the help, which must not wait for torch to be imported."""
    return any(word in ("-h", "--help") for word in argv)


def parse_count(text: str) -> int:
    """Parse "10B", "500M", "2.5k" or "1e9" as an integer of at least 1."""
    parts = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)([kmbt]?)", text.lower().replace(",", "").replace("_", ""))
    try:
        number = int(float(parts[1]) * _COUNT_SUFFIXES[parts[2]]) if parts else 0
    except (ValueError, OverflowError):
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of at least 1, such as 500M or 10B")
    return number


def positive_int(text: str) -> int:
    """Parse the value of a flag that counts something: an integer of at least 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, not {text}")
    return number


def parse_size(text: str) -> int:
    """Parse a size such as "4 MiB", "500kB" or "4194304" as bytes, at least 1."""
    parts = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?(?:([kmg])(i?))?b?", text.strip().lower())
    number = 0
    if parts:
        base = 1024 if parts[3] else 1000
        number = int(float(parts[1]) * base ** (" kmg".index(parts[2]) if parts[2] else 0))
    if number < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a size such as 500 kB or 4 MiB")
    return number


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run `gpt2 VERB ...` and exit with 0 for success, 2 for a user error, 128 + n for a stop by signal n."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    run_and_exit(lambda: _run_command(_take_common_flags(arguments)))


def run_and_exit(program: Callable[[], int | None]) -> NoReturn:
    """Run a program and exit with its code. A user error becomes one line on standard error and exit code 2."""
    _configure_streams()
    configure_openmp()
    is_main_process = os.environ.get("RANK", "0") == "0"  # the other ranks would repeat its warnings
    handler = logging.StreamHandler()
    handler.setFormatter(_LogFormatter("gpt2: %(message)s"))
    logging.basicConfig(handlers=[handler])
    set_log_level(NORMAL if is_main_process else QUIET)
    try:
        code = program() or 0
        if sys.stdout is not None:
            sys.stdout.flush()
        sys.exit(code)
    except UserError as error:
        logging.getLogger("gpt2").debug("where the error was raised", exc_info=error)
        _exit_with_error(str(error), error.exit_code)
    except (MemoryError, RuntimeError) as error:
        if (memory_error := as_memory_error(error)) is not None:
            _exit_with_error(str(memory_error))
        if (failure := compiler_failure(error)) is not None:
            _exit_with_error(failure)
        raise
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of standard output, such as `head`, has exited
        _flush_or_discard_stdout()
        sys.exit(141)
    except OSError as error:  # such as a full disk or a file name that is too long
        _flush_or_discard_stdout()
        _exit_with_error(describe_os_error(error))


def _exit_with_error(message: str, code: int = 2) -> NoReturn:
    """Print a nonempty message as one line on standard error, with control characters escaped, and exit."""
    line = shorten(message, MAX_MESSAGE_CHARACTERS)
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


def configure_openmp() -> None:
    """Let waiting OpenMP threads sleep early, unless the user chose otherwise. Has an effect before torch is imported.

    GNU's OpenMP lets them spin for so long that a step of a tiny model beside other processes takes 6 to 35 times as
    long (docs/lab-notes.md). It changes no result.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def _configure_streams() -> None:
    """Make the standard streams robust.

    Characters that standard output cannot encode are written as escapes, as Python does on standard error. Log lines
    that cannot be written to standard error, because its reader or terminal is gone, are dropped, so that a long
    training run continues.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if isinstance(sys.stderr, io.TextIOWrapper) and sys.stderr is sys.__stderr__:
        raw = _LossyFile(sys.stderr.fileno(), "w", closefd=False)
        sys.stderr = io.TextIOWrapper(
            io.BufferedWriter(raw), sys.stderr.encoding, "backslashreplace", line_buffering=True
        )


class _LogFormatter(logging.Formatter):
    """A message is one line, whatever names are in it; only a traceback has several."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return single_line(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        return escape_controls(super().formatException(ei))


class _LossyFile(io.FileIO):
    """A file whose writes never fail: data that cannot be written is dropped."""

    def write(self, data: Any) -> int:
        try:
            written = super().write(data)
        except OSError:
            written = None
        return len(data) if written is None else written


NORMAL, QUIET, VERBOSE = "normal", "quiet", "verbose"
LOG_LEVELS = {  # of the loggers: all, those of gpt2, and those of gpt2 that tell how far a command is
    QUIET: (logging.ERROR, logging.ERROR, logging.ERROR),
    NORMAL: (logging.WARNING, logging.WARNING, logging.INFO),
    VERBOSE: (logging.INFO, logging.DEBUG, logging.DEBUG),
}
PROGRESS_LOGGERS = ("gpt2.data", "gpt2.progress")


def set_log_level(name: str) -> None:
    """Log what --quiet or --verbose asks for. The level of the logger "gpt2" decides about progress bars, too."""
    everything, ours, progress = LOG_LEVELS[name]
    logging.getLogger().setLevel(everything)
    logging.getLogger("gpt2").setLevel(ours)
    for logger in PROGRESS_LOGGERS:
        logging.getLogger(logger).setLevel(progress)


def _take_common_flags(arguments: Sequence[str]) -> list[str]:
    """The arguments without the COMMON_FLAGS, which have their effect here: before torch is imported."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    remaining: list[str] = []
    words = iter(arguments[:end])
    for word in words:
        name, equals, value = word.partition("=")
        if word in ("--quiet", "--verbose"):
            set_log_level(word.removeprefix("--"))
        elif name == "--threads":
            _set_threads(value if equals else next(words, ""))
        else:
            remaining.append(word)
    return [*remaining, *arguments[end:]]


def _set_threads(text: str) -> None:
    try:
        os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(positive_int(text))
    except argparse.ArgumentTypeError as error:
        raise UserError(f"--threads {error}") from None


def _run_command(arguments: list[str]) -> int | None:
    if len(arguments) > 1 and arguments[0] == "help":
        arguments = [*arguments[1:], "--help"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return None
    if arguments[0] == "--version":
        from gpt2 import __version__
        from gpt2.files import source_commit, source_tree

        commit = source_commit(source_tree())
        print(f"gpt2 {__version__}" + (f" ({commit})" if commit else ""))
        return None
    verb, rest = arguments[0], arguments[1:]
    if verb not in COMMANDS:
        raise UserError(f"there is no command '{verb}'{did_you_mean(verb, COMMANDS)}: see gpt2 --help")
    return command_module(verb).main(rest)


def command_module(verb: str) -> Any:
    """The module of a command: `main(argv)` runs it, and `make_parser()` is its parser, with those of subcommands."""
    return importlib.import_module(f"gpt2.commands.{verb}")


def _usage() -> str:
    width = max(map(len, COMMANDS))
    verbs = "\n".join(f"  {verb:{width}}  {description}" for verb, description in COMMANDS.items())
    return f"""GPT-2 in plain PyTorch.

usage: gpt2 COMMAND ...

{verbs}

A MODEL is a run folder, a model folder, or a name on the hub: gpt2, gpt2-medium, gpt2-large, gpt2-xl, owner/name.
A checkpoint of another program works, too: gpt2 convert --list.
gpt2 COMMAND --help, or gpt2 help COMMAND, lists the flags of a command. All take --quiet (results and errors only),
--verbose, and --threads INT, the number of CPU threads [all cores, or $OMP_NUM_THREADS]; sums may round differently
with another number.

examples:
  gpt2 train quickstart
  gpt2 sample runs/quickstart --prompt "The"
  gpt2 finetune gpt2 --data questions.jsonl --lora-rank 8"""


COMMANDS = {
    "train": "train a model on text, from random weights or from another model",
    "finetune": "fine-tune a model on your text, or on prompts and answers",
    "eval": "evaluate a model on standard tasks, with stated protocols",
    "sample": "generate text from a prompt",
    "chat": "chat with a model",
    "info": "show the shape, tokenizer, template and files of a model or a run",
    "serve": "serve the OpenAI API and a playground",
    "convert": "write a model for other programs: transformers, llama.cpp, ONNX and more",
    "export": "the old name of convert",
    "data": "prepare token shards and inspect data",
    "bench": "measure the speed of training, generation and serving, and compare it with peers",
    "sweep": "search for the best learning rate and other settings of a recipe",
    "plan": "estimate memory, time and cost of a training run",
    "completion": "print the completion of commands and flags for a shell",
}

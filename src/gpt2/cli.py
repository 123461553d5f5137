"""The command line: one subcommand per verb. Each verb lives in `gpt2/commands/`, and is imported when it is chosen."""

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from gpt2.errors import UserError, did_you_mean


class Parser(argparse.ArgumentParser):
    """argparse that takes --batch-size and --batch_size alike, and says what is wrong in one line."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def flag(self, name: str, **kwargs: Any) -> None:
        """Add ``--name-with-dashes``, and its spelling with underscores out of sight of the help."""
        dashed, underscored = f"--{name}", f"--{name.replace('-', '_')}"
        action = self.add_argument(dashed, **kwargs)
        if underscored != dashed:
            for option in [o for o in action.option_strings if "-" in o.strip("-")]:
                prefix = "--no-" if option.startswith("--no-") else "--"
                spelled = prefix + option.removeprefix(prefix).replace("-", "_")
                self._option_string_actions[spelled] = action

    def error(self, message: str) -> NoReturn:
        name = message.removeprefix("unrecognized arguments: ")
        if name != message:
            unknown = name.split()[0].partition("=")[0]
            known = [flag for flag in self._option_string_actions if flag.startswith("--") and "_" not in flag]
            message = f"there is no {unknown}{did_you_mean(unknown.replace('_', '-'), known)}"
        raise UserError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run `gpt2 VERB ...` and exit: 0 done, 2 a user's mistake in one line, 128 + n stopped by signal n."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    exit_after(lambda: _run(arguments))


def exit_after(program: Callable[[], int | None]) -> NoReturn:
    """Run a program and exit with its code; what the user did wrong becomes one line on standard error and code 2."""
    logging.basicConfig(format="gpt2: %(message)s", level=logging.WARNING)
    try:
        code = program() or 0
        if sys.stdout is not None:
            sys.stdout.flush()
        sys.exit(code)
    except UserError as error:
        _fail(str(error))
    except MemoryError:
        _fail("this needs more memory than there is")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)
    except OSError as error:  # a full disk, a name too long: the system says what is wrong, and with which file
        _fail(": ".join(str(part) for part in (error.filename, error.strerror or error) if part is not None))


def _fail(message: str) -> NoReturn:
    line = " ".join(message.split("\n")).encode("utf-8", "backslashreplace").decode()
    print(f"gpt2: {line}", file=sys.stderr)
    sys.exit(2)


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
gpt2 COMMAND --help says more."""


VERBS = {
    "train": "train a model on text, from nothing or from another model",
    "sample": "continue a prompt",
    "export": "write a model for other programs",
    "data": "prepare token shards, and look into them",
}

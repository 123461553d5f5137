"""gpt2 chat MODEL"""

import shlex
import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from gpt2.cli import Parser
from gpt2.commands.decoding import (
    DEFAULTS,
    NUMBERS,
    add_model_flags,
    add_sampling_flags,
    bad_words,
    load_from,
    logit_biases,
    sampling_from,
    shown,
    template_from,
)
from gpt2.errors import UserError, did_you_mean
from gpt2.files import path_of
from gpt2.generation.chat import Conversation
from gpt2.generation.text import check_stop
from gpt2.templates import ASSISTANT, USER

DESCRIPTION = f"""\
Talk with a model, in a terminal or through a pipe (each line of standard input is a turn).

GPT-2 was never taught to answer: it continues a transcript of lines that begin with "{USER}" and "{ASSISTANT}",
until it would speak for the user. A model that was taught a chat template is asked by that instead, and ends an answer
as it was taught. With --plain there are no roles: what you write begins a new line of one text, or goes on in the last
one if it begins with a space; an empty line lets the model go on. /help, once inside, says more."""

HELP = r"""/temperature 0.7      change a setting; so /top-p 0.9, /max-new-tokens 50, ..., or /set NAME VALUE
                      (/logit-bias ID=BIAS ID=BIAS, /bad-words "TEXT" "TEXT", /stop "\nTEXT"; none for none)
/temperature          say what it is
/settings             say what they all are
/seed N               the same seed, the same answers
/system TEXT          what the transcript begins with; nothing, if there is no TEXT
/retry                another answer to what was said last
/undo                 take back what was said last, and its answer
/reset                forget all that was said
/save FILE            write the transcript
/help                 say this
/quit                 leave, as Ctrl-D does

Ctrl-C stops an answer. A line that begins with a space is no command."""


def main(argv: list[str]) -> None:
    parser = Parser(prog="gpt2 chat", description=DESCRIPTION)
    parser.add_argument("model", metavar="MODEL", help="a run folder, a model folder, or a hub name")
    parser.flag("plain", action="store_true", help="no roles: you write, it goes on")
    parser.flag("system", default="", metavar="TEXT", help="what the transcript begins with")
    add_sampling_flags(parser, max_new_tokens=100)
    add_model_flags(parser)
    args = parser.parse_args(argv)
    Session(_conversation(args), args.bad_word).run()


def _conversation(args: Namespace) -> Conversation:
    """What the flags say; what is wrong with them is found before the model is loaded where it can be."""
    _check_utf8(args.system, "--system")
    length, sampling = _length(args.max_new_tokens), sampling_from(args)
    model, tokenizer = load_from(args, args.model)
    sampling = replace(sampling, bad_words=bad_words(tokenizer, args.bad_word))
    sampling.check_ids(model.config.vocab_size)
    return Conversation(
        model,
        tokenizer,
        sampling,
        max_new_tokens=length,
        stop=args.stop,
        seed=args.seed,
        system=args.system,
        roles=not args.plain,
        template=None if args.plain else template_from(args, args.model),
    )


class Session:
    """A conversation and who sits in front of it. Answers go to standard output, all other talk to standard error.

    On a terminal there are prompts, and Ctrl-C stops an answer; through a pipe there is neither.
    """

    def __init__(self, conversation: Conversation, bad_texts: list[str]) -> None:
        self.conversation = conversation
        self.interactive = all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))
        self._commands: dict[str, Callable[[str], None]] = {
            "help": lambda _: _tell(HELP),
            "set": self._set,
            "settings": self._show_settings,
            "seed": self._reseed,
            "system": self._open_with,
            "retry": lambda _: self._print_answer(self.conversation.retry()),
            "undo": lambda _: _tell(f"taken back: {self.conversation.undo().said}"),
            "reset": self._reset,
            "save": self._save,
            "quit": self._quit,
            "exit": self._quit,
        }
        self._bad_texts = bad_texts  # as they were typed
        self._saved: set[Path] = set()
        self._interrupted = self._over = False

    def run(self) -> None:
        """Do what the lines say, until there are no more or one says /quit."""
        if self.interactive:
            with suppress(ImportError):  # on Windows, whose terminal does it by itself
                import readline  # noqa: F401  (with which `input` edits lines, and remembers them)
            _tell("/help says what can be done here, Ctrl-D leaves")
        while not self._over:
            try:
                self._do(_line_of_terminal(self._prompt) if self.interactive else _line_of_pipe())
            except EOFError:
                self._over = True
            except UserError as error:
                _tell(str(error))
            except KeyboardInterrupt:  # at the prompt
                if not self.interactive:
                    raise
                _tell("\n/quit or Ctrl-D leaves")

    @property
    def _prompt(self) -> str:
        return f"{USER} " if self.conversation.roles else "> "

    def _do(self, line: str) -> None:
        _check_utf8(line, "that line")
        if line.startswith("/"):
            name, _, value = line[1:].strip().partition(" ")
            self._command(name.replace("_", "-"), value.strip())
        elif not self.conversation.roles:
            self._print_answer(self.conversation.say(line))
        elif line.strip():
            self._print_answer(self.conversation.say(line.strip()))

    def _command(self, name: str, value: str) -> None:
        settings = self._settings()
        if name in self._commands:
            self._commands[name](value)
        elif name in settings:
            self._set(f"{name} {value}")
        else:
            hint = did_you_mean(f"/{name}", [f"/{known}" for known in (*self._commands, *settings)])
            raise UserError(f"there is no /{name}{hint}: /help says what there is")

    def _print_answer(self, pieces: Generator[str, None, None]) -> None:
        """Write the answer as it comes, until it ends or Ctrl-C ends it."""
        forgotten, roles, opening = self.conversation.forgotten, self.conversation.roles, self.conversation.opening
        colon = opening == " "  # which the label ends with, too
        with self._noting_interrupts(), closing(pieces):
            first = next(pieces, "")
            if self.conversation.forgotten > forgotten:
                dropped = f"{self.conversation.forgotten} of the turns before this one"
                _tell(f"(the context is full: the model no longer reads {dropped}, the oldest)")
            if self.interactive and roles:
                print(ASSISTANT, end="" if colon else " ")
            trim = roles and not (self.interactive and colon)
            try:
                for piece in chain([first], pieces):
                    text = piece.lstrip(opening) if trim else piece
                    trim = trim and not text
                    print(shown(text, sys.stdout), end="", flush=True)
                    if self._interrupted:
                        break
            finally:
                print(flush=True)
        if self._interrupted:
            _tell("(stopped)")

    @contextmanager
    def _noting_interrupts(self) -> Iterator[None]:
        """On a terminal, Ctrl-C is only noted: it could come in the midst of a layer."""
        self._interrupted = False
        if not self.interactive:
            yield
            return
        before = signal.signal(signal.SIGINT, self._note_interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _note_interrupt(self, *_: object) -> None:
        self._interrupted = True

    def _settings(self) -> dict[str, str]:
        """All that can be set, by name, and what it is."""
        talk = self.conversation
        numbers = {name.replace("_", "-"): f"{getattr(talk.sampling, name):g}" for name in NUMBERS}
        biases = " ".join(f"{token}={bias:g}" for token, bias in dict(talk.sampling.logit_bias).items())
        words, stop = (shlex.join(texts) for texts in (self._bad_texts, [_escaped(text) for text in talk.stop]))
        lists = {"logit-bias": biases or "none", "bad-words": words or "none", "stop": stop or "none"}
        return {"max-new-tokens": str(talk.max_new_tokens), **numbers, **lists}

    def _show_settings(self, _: str) -> None:
        talk = self.conversation
        rows = self._settings() | {"seed": str(talk.seed), "system": talk.system or "none"}
        rows["context"] = f"{talk.length:,} of {talk.model.config.block_size:,} tokens taken"
        _tell("\n".join(f"{name:<22}{value}" for name, value in rows.items()))

    def _set(self, text: str) -> None:
        """NAME VALUE: change it. NAME: say what it is."""
        name, _, value = text.partition(" ")
        name, value = name.replace("_", "-"), value.strip()
        settings = self._settings()
        if name not in settings:
            raise UserError(f"there is no setting '{name}'{did_you_mean(name, settings)}: /settings says what there is")
        if value:
            self._change(name, value)
        _tell(f"{name} {self._settings()[name]}")

    def _change(self, name: str, value: str) -> None:
        talk = self.conversation
        if name == "max-new-tokens":
            talk.max_new_tokens = _length(value)
        elif name == "stop":
            stop = [_unescaped(text) for text in _texts(name, value)]
            check_stop(stop)
            talk.stop = tuple(stop)
        elif name == "bad-words":
            texts = _texts(name, value)
            talk.sampling = replace(talk.sampling, bad_words=bad_words(talk.tokenizer, texts))
            self._bad_texts = texts
        else:
            field = name.replace("-", "_")
            parsed = logit_biases(_texts(name, value)) if name == "logit-bias" else _number(name, value)
            sampling = replace(talk.sampling, **{field: parsed})
            sampling.check_ids(talk.model.config.vocab_size)
            talk.sampling = sampling

    def _reseed(self, value: str) -> None:
        if value:
            try:
                self.conversation.seed = int(value)
            except ValueError:
                raise UserError(f"the seed must be a whole number, not {value}") from None
        _tell(f"seed {self.conversation.seed}")

    def _open_with(self, value: str) -> None:
        self.conversation.system = value
        _tell(f"the transcript begins with: {value}" if value else "the transcript begins with what you say")

    def _reset(self, _: str) -> None:
        self.conversation.reset()
        _tell("all forgotten")

    def _save(self, name: str) -> None:
        """Write the transcript; a file that this session did not write stays as it is."""
        if not name:
            raise UserError("/save needs the name of a file")
        path = path_of(name)
        try:
            with path.open("w" if path in self._saved else "x", encoding="utf-8") as file:
                file.write(self.conversation.transcript + "\n")
        except FileExistsError:
            raise UserError(f"{path} is there already: name another file") from None
        except (OSError, ValueError) as error:
            raise UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None
        self._saved.add(path)
        _tell(f"written to {path}")

    def _quit(self, _: str) -> None:
        self._over = True


def _tell(text: str) -> None:
    if sys.stderr is not None:
        print(shown(text, sys.stderr), file=sys.stderr, flush=True)


def _line_of_terminal(prompt: str) -> str:
    try:
        return input(prompt)
    except EOFError:
        print(flush=True)  # the shell's prompt is to have a line of its own
        raise
    except UnicodeError:
        raise UserError("that line is not UTF-8 text") from None


def _line_of_pipe() -> str:
    line = sys.stdin.buffer.readline() if sys.stdin is not None else b""
    if not line:
        raise EOFError
    try:
        return line.decode().removesuffix("\n").removesuffix("\r")
    except UnicodeError:
        raise UserError("that line is not UTF-8 text") from None


def _check_utf8(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeError:
        raise UserError(f"{what} is not UTF-8 text") from None


def _length(value: Any) -> int:
    """The length of an answer, from a flag or as it was typed."""
    length = _number("max-new-tokens", value)
    if length < 1:
        raise UserError(f"max-new-tokens must be at least 1, not {length}")
    return length


def _number(name: str, value: Any) -> Any:
    kind = type(DEFAULTS.get(name.replace("-", "_"), 0))
    try:
        return kind(value)
    except ValueError:
        raise UserError(f"{name} must be a {'whole ' if kind is int else ''}number, not {value}") from None


def _texts(name: str, value: str) -> list[str]:
    """Words or "quoted texts", or none."""
    try:
        return [] if value == "none" else shlex.split(value)
    except ValueError as error:
        raise UserError(f"{name}: {str(error)[:1].lower()}{str(error)[1:]}") from None


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n")


def _unescaped(text: str) -> str:
    return text.replace(r"\\", "\0").replace(r"\n", "\n").replace("\0", "\\")

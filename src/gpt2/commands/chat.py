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
from gpt2.commands.generation_args import (
    NUMERIC_SETTINGS,
    SAMPLING_DEFAULTS,
    add_model_flags,
    add_sampling_flags,
    encode_bad_words,
    escape_for_terminal,
    load_inference_model,
    parse_logit_biases,
    sampling_from_args,
    template_from_args,
)
from gpt2.errors import UserError, did_you_mean
from gpt2.files import expand_path
from gpt2.generation.chat import Conversation
from gpt2.generation.text import check_stop_strings
from gpt2.templates import ASSISTANT_PREFIX, USER_PREFIX

DESCRIPTION = f"""\
Talk with a model, in a terminal or through a pipe (each line of standard input is a turn).

GPT-2 was never taught to answer: it continues a transcript of lines that begin with "{USER_PREFIX}" and "{ASSISTANT_PREFIX}",
until it would speak for the user. A model that was taught a chat template is asked by that instead, and ends an answer
as it was taught. With --plain there are no roles: what you write begins a new line of one text, or goes on in the last
one if it begins with a space; an empty line lets the model go on. /help, once inside, says more."""

COMMANDS_HELP = r"""/temperature 0.7      change a setting; so /top-p 0.9, /max-new-tokens 50, ..., or /set NAME VALUE
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
    parser.add_flag("plain", action="store_true", help="no roles: you write, it goes on")
    parser.add_flag("system", default="", metavar="TEXT", help="what the transcript begins with")
    add_sampling_flags(parser, max_new_tokens=100)
    add_model_flags(parser)
    args = parser.parse_args(argv)
    ChatSession(_make_conversation(args), args.bad_word).run()


def _make_conversation(args: Namespace) -> Conversation:
    """What the flags say; what is wrong with them is found before the model is loaded where it can be."""
    _check_utf8(args.system, "--system")
    length, sampling = _parse_max_new_tokens(args.max_new_tokens), sampling_from_args(args)
    model, tokenizer = load_inference_model(args, args.model)
    sampling = replace(sampling, bad_words=encode_bad_words(tokenizer, args.bad_word))
    sampling.check_token_ids(model.config.vocab_size)
    return Conversation(
        model,
        tokenizer,
        sampling,
        max_new_tokens=length,
        stop=args.stop,
        seed=args.seed,
        system=args.system,
        roles=not args.plain,
        template=None if args.plain else template_from_args(args, args.model),
    )


class ChatSession:
    """A conversation and who sits in front of it. Answers go to standard output, all other talk to standard error.

    On a terminal there are prompts, and Ctrl-C stops an answer; through a pipe there is neither.
    """

    def __init__(self, conversation: Conversation, bad_texts: list[str]) -> None:
        self.conversation = conversation
        self.interactive = all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))
        self._commands: dict[str, Callable[[str], None]] = {
            "help": lambda _: _print_to_stderr(COMMANDS_HELP),
            "set": self._set_or_show,
            "settings": self._show_settings,
            "seed": self._set_seed,
            "system": self._set_system,
            "retry": lambda _: self._print_answer(self.conversation.retry()),
            "undo": lambda _: _print_to_stderr(f"taken back: {self.conversation.undo().user_text}"),
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
            _print_to_stderr("/help says what can be done here, Ctrl-D leaves")
        while not self._over:
            try:
                self._handle_line(_read_terminal_line(self._prompt) if self.interactive else _read_stdin_line())
            except EOFError:
                self._over = True
            except UserError as error:
                _print_to_stderr(str(error))
            except KeyboardInterrupt:  # at the prompt
                if not self.interactive:
                    raise
                _print_to_stderr("\n/quit or Ctrl-D leaves")

    @property
    def _prompt(self) -> str:
        return f"{USER_PREFIX} " if self.conversation.roles else "> "

    def _handle_line(self, line: str) -> None:
        _check_utf8(line, "that line")
        if line.startswith("/"):
            name, _, value = line[1:].strip().partition(" ")
            self._run_command(name.replace("_", "-"), value.strip())
        elif not self.conversation.roles:
            self._print_answer(self.conversation.send(line))
        elif line.strip():
            self._print_answer(self.conversation.send(line.strip()))

    def _run_command(self, name: str, value: str) -> None:
        settings = self._settings()
        if name in self._commands:
            self._commands[name](value)
        elif name in settings:
            self._set_or_show(f"{name} {value}")
        else:
            hint = did_you_mean(f"/{name}", [f"/{known}" for known in (*self._commands, *settings)])
            raise UserError(f"there is no /{name}{hint}: /help says what there is")

    def _print_answer(self, pieces: Generator[str, None, None]) -> None:
        """Write the answer as it comes, until it ends or Ctrl-C ends it."""
        forgotten, roles, opening = (
            self.conversation.num_dropped_turns,
            self.conversation.roles,
            self.conversation.answer_prefix,
        )
        colon = opening == " "  # which the label ends with, too
        with self._catch_interrupts(), closing(pieces):
            first = next(pieces, "")
            if self.conversation.num_dropped_turns > forgotten:
                dropped = f"{self.conversation.num_dropped_turns} of the turns before this one"
                _print_to_stderr(f"(the context is full: the model no longer reads {dropped}, the oldest)")
            if self.interactive and roles:
                print(ASSISTANT_PREFIX, end="" if colon else " ")
            trim = roles and not (self.interactive and colon)
            try:
                for piece in chain([first], pieces):
                    text = piece.lstrip(opening) if trim else piece
                    trim = trim and not text
                    print(escape_for_terminal(text, sys.stdout), end="", flush=True)
                    if self._interrupted:
                        break
            finally:
                print(flush=True)
        if self._interrupted:
            _print_to_stderr("(stopped)")

    @contextmanager
    def _catch_interrupts(self) -> Iterator[None]:
        """On a terminal, Ctrl-C is only noted: it could come in the midst of a layer."""
        self._interrupted = False
        if not self.interactive:
            yield
            return
        before = signal.signal(signal.SIGINT, self._on_interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _on_interrupt(self, *_: object) -> None:
        self._interrupted = True

    def _settings(self) -> dict[str, str]:
        """All that can be set, by name, and what it is."""
        talk = self.conversation
        numbers = {name.replace("_", "-"): f"{getattr(talk.sampling, name):g}" for name in NUMERIC_SETTINGS}
        biases = " ".join(f"{token}={bias:g}" for token, bias in dict(talk.sampling.logit_bias).items())
        words, stop = (shlex.join(texts) for texts in (self._bad_texts, [_escape(text) for text in talk.stop]))
        lists = {"logit-bias": biases or "none", "bad-words": words or "none", "stop": stop or "none"}
        return {"max-new-tokens": str(talk.max_new_tokens), **numbers, **lists}

    def _show_settings(self, _: str) -> None:
        talk = self.conversation
        rows = self._settings() | {"seed": str(talk.seed), "system": talk.system or "none"}
        rows["context"] = f"{talk.num_prompt_tokens:,} of {talk.model.config.block_size:,} tokens taken"
        _print_to_stderr("\n".join(f"{name:<22}{value}" for name, value in rows.items()))

    def _set_or_show(self, text: str) -> None:
        """NAME VALUE: change it. NAME: say what it is."""
        name, _, value = text.partition(" ")
        name, value = name.replace("_", "-"), value.strip()
        settings = self._settings()
        if name not in settings:
            raise UserError(f"there is no setting '{name}'{did_you_mean(name, settings)}: /settings says what there is")
        if value:
            self._apply_setting(name, value)
        _print_to_stderr(f"{name} {self._settings()[name]}")

    def _apply_setting(self, name: str, value: str) -> None:
        talk = self.conversation
        if name == "max-new-tokens":
            talk.max_new_tokens = _parse_max_new_tokens(value)
        elif name == "stop":
            stop = [_unescape(text) for text in _split_texts(name, value)]
            check_stop_strings(stop)
            talk.stop = tuple(stop)
        elif name == "bad-words":
            texts = _split_texts(name, value)
            talk.sampling = replace(talk.sampling, bad_words=encode_bad_words(talk.tokenizer, texts))
            self._bad_texts = texts
        else:
            field = name.replace("-", "_")
            parsed = (
                parse_logit_biases(_split_texts(name, value)) if name == "logit-bias" else _parse_number(name, value)
            )
            sampling = replace(talk.sampling, **{field: parsed})
            sampling.check_token_ids(talk.model.config.vocab_size)
            talk.sampling = sampling

    def _set_seed(self, value: str) -> None:
        if value:
            try:
                self.conversation.seed = int(value)
            except ValueError:
                raise UserError(f"the seed must be a whole number, not {value}") from None
        _print_to_stderr(f"seed {self.conversation.seed}")

    def _set_system(self, value: str) -> None:
        self.conversation.system = value
        _print_to_stderr(f"the transcript begins with: {value}" if value else "the transcript begins with what you say")

    def _reset(self, _: str) -> None:
        self.conversation.reset()
        _print_to_stderr("all forgotten")

    def _save(self, name: str) -> None:
        """Write the transcript; a file that this session did not write stays as it is."""
        if not name:
            raise UserError("/save needs the name of a file")
        path = expand_path(name)
        try:
            with path.open("w" if path in self._saved else "x", encoding="utf-8") as file:
                file.write(self.conversation.transcript + "\n")
        except FileExistsError:
            raise UserError(f"{path} is there already: name another file") from None
        except (OSError, ValueError) as error:
            raise UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None
        self._saved.add(path)
        _print_to_stderr(f"written to {path}")

    def _quit(self, _: str) -> None:
        self._over = True


def _print_to_stderr(text: str) -> None:
    if sys.stderr is not None:
        print(escape_for_terminal(text, sys.stderr), file=sys.stderr, flush=True)


def _read_terminal_line(prompt: str) -> str:
    try:
        return input(prompt)
    except EOFError:
        print(flush=True)  # the shell's prompt is to have a line of its own
        raise
    except UnicodeError:
        raise UserError("that line is not UTF-8 text") from None


def _read_stdin_line() -> str:
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


def _parse_max_new_tokens(value: Any) -> int:
    """The length of an answer, from a flag or as it was typed."""
    length = _parse_number("max-new-tokens", value)
    if length < 1:
        raise UserError(f"max-new-tokens must be at least 1, not {length}")
    return length


def _parse_number(name: str, value: Any) -> Any:
    kind = type(SAMPLING_DEFAULTS.get(name.replace("-", "_"), 0))
    try:
        return kind(value)
    except ValueError:
        raise UserError(f"{name} must be a {'whole ' if kind is int else ''}number, not {value}") from None


def _split_texts(name: str, value: str) -> list[str]:
    """Words or "quoted texts", or none."""
    try:
        return [] if value == "none" else shlex.split(value)
    except ValueError as error:
        raise UserError(f"{name}: {str(error)[:1].lower()}{str(error)[1:]}") from None


def _escape(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n")


def _unescape(text: str) -> str:
    return text.replace(r"\\", "\0").replace(r"\n", "\n").replace("\0", "\\")

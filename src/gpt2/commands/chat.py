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
from typing import TYPE_CHECKING, Any

from gpt2.cli import FlagRule, Parser, given_flags, reject_unused_flags
from gpt2.commands.generation_args import (
    MODEL_HELP,
    NUMERIC_SETTINGS,
    SAMPLING_DEFAULTS,
    add_model_flags,
    add_sampling_flags,
    encode_bad_words,
    load_inference_model,
    parse_logit_biases,
    resolve_from_args,
    sampling_from_args,
)
from gpt2.errors import UserError, did_you_mean
from gpt2.files import expand_path
from gpt2.templates import ASSISTANT_PREFIX, USER_PREFIX
from gpt2.terminal import escape_controls, escape_for_terminal

if TYPE_CHECKING:
    from gpt2.generation.chat import Conversation

DESCRIPTION = f"""\
Chat with a model, in a terminal or through a pipe (each line of standard input is a turn).

The pretrained GPT-2 is not a chat model: it continues a transcript of lines that begin with "{USER_PREFIX}" and
"{ASSISTANT_PREFIX}", until it starts a line of the user. A model that was fine-tuned on a chat template is prompted
with that template, and its end-of-turn token ends an answer. With --plain there are no roles: your text begins a new
line of one document, or continues its last line if it begins with a space; after an empty line the model continues.
See also /help."""

COMMANDS_HELP = r"""/temperature 0.7      change a setting; also /top-p 0.9, /max-new-tokens 50, ..., or /set NAME VALUE
                      (/logit-bias ID=BIAS ID=BIAS, /bad-words "TEXT" "TEXT", /stop "\nTEXT"; "none" clears a list)
/temperature          show a setting
/settings             show all settings
/seed N               the same seed gives the same answers
/system TEXT          set the first lines of the transcript; without TEXT there are none
/retry                generate another answer to the last message
/undo                 remove the last message and its answer
/reset                clear the conversation
/save FILE            write the transcript
/help                 show this help
/quit                 quit, as Ctrl-D does

Ctrl-C stops an answer. A line that begins with a space is not a command."""


RULES = (FlagRule(("system",), lambda args: not args.plain, "--plain has no roles: {} has no effect"),)


def main(argv: list[str]) -> None:
    """Run `gpt2 chat`: answers on standard output, everything else on standard error."""
    args = make_parser().parse_args(argv)
    reject_unused_flags(given_flags(args), args, RULES)
    ChatSession(_make_conversation(args), args.bad_word).run()


def make_parser() -> Parser:
    """The parser of `gpt2 chat`."""
    parser = Parser(
        prog="gpt2 chat",
        description=DESCRIPTION,
        examples=("gpt2 chat gpt2 --temperature 0.7", "gpt2 chat runs/finetune --max-new-tokens 300"),
        stray="each line of standard input is a turn",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_flag("plain", action="store_true", help="no roles: the model continues your text")
    parser.add_flag("system", default="", metavar="TEXT", help="the first lines of the transcript")
    add_sampling_flags(parser)
    add_model_flags(parser)
    return parser


def _make_conversation(args: Namespace) -> "Conversation":
    """The conversation that the flags ask for. Flags are checked before the model is loaded where possible."""
    from gpt2.generation.chat import Conversation

    _check_utf8(args.system, "--system")
    length, sampling = _parse_max_new_tokens(args.max_new_tokens), sampling_from_args(args)
    resolved = resolve_from_args(args, args.model)
    model, tokenizer = load_inference_model(args, resolved)
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
        template=None if args.plain else resolved.template,
    )


class ChatSession:
    """A conversation and its user interface. Answers go to standard output, everything else to standard error.

    On a terminal prompts are shown, and Ctrl-C stops an answer; through a pipe it ends the program.
    """

    def __init__(self, conversation: "Conversation", bad_texts: list[str]) -> None:
        self.conversation = conversation
        self.interactive = all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))
        self._commands: dict[str, Callable[[str], None]] = {
            "help": lambda _: _print_to_stderr(COMMANDS_HELP),
            "set": self._set_or_show,
            "settings": self._show_settings,
            "seed": self._set_seed,
            "system": self._set_system,
            "retry": lambda _: self._print_answer(self.conversation.retry()),
            "undo": lambda _: _print_to_stderr(f"removed: {self.conversation.undo().user_text}"),
            "reset": self._reset,
            "save": self._save,
            "quit": self._quit,
            "exit": self._quit,
        }
        self._bad_texts = bad_texts  # as they were typed
        self._saved: set[Path] = set()
        self._interrupted = self._done = False

    def run(self) -> None:
        """Handle lines until end of file or /quit."""
        if self.interactive:
            with suppress(ImportError):  # on Windows, where the terminal edits lines by itself
                import readline  # noqa: F401  (gives `input` line editing and history)
            _print_to_stderr("/help lists the commands, Ctrl-D quits")
        while not self._done:
            try:
                self._handle_line(_read_terminal_line(self._prompt) if self.interactive else _read_stdin_line())
            except EOFError:
                self._done = True
            except UserError as error:
                _print_to_stderr(str(error))
            except KeyboardInterrupt:  # at the prompt
                if not self.interactive:
                    raise
                _print_to_stderr("\n/quit or Ctrl-D quits")

    @property
    def _prompt(self) -> str:
        return f"{USER_PREFIX} " if self.conversation.roles else "> "

    def _handle_line(self, line: str) -> None:
        _check_utf8(line, "the line")
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
            raise UserError(f"there is no /{name}{hint}: /help lists the commands")

    def _print_answer(self, pieces: Generator[str, None, None]) -> None:
        """Stream the answer until it ends or Ctrl-C stops it."""
        conversation = self.conversation
        num_dropped, prefix = conversation.num_dropped_turns, conversation.answer_prefix
        after_label = prefix == " "  # the answer's own space separates it from the label
        with self._catch_interrupts(), closing(pieces):
            first = next(pieces, "")
            if conversation.num_dropped_turns > num_dropped:
                _print_to_stderr(
                    "(the context is full: "
                    f"the {conversation.num_dropped_turns} oldest turns are no longer in the prompt)"
                )
            if self.interactive and conversation.roles:
                print(ASSISTANT_PREFIX, end="" if after_label else " ")
            trim = conversation.roles and not (self.interactive and after_label)
            try:
                for piece in chain([first], pieces):
                    text = piece.lstrip(prefix) if trim else piece
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
        """On a terminal, Ctrl-C only sets a flag, so that it never interrupts a forward pass."""
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
        """The current value of every setting, by name."""
        conversation = self.conversation
        numbers = {name.replace("_", "-"): f"{getattr(conversation.sampling, name):g}" for name in NUMERIC_SETTINGS}
        biases = " ".join(f"{token}={bias:g}" for token, bias in dict(conversation.sampling.logit_bias).items())
        words, stop = (shlex.join(texts) for texts in (self._bad_texts, [_escape(text) for text in conversation.stop]))
        lists = {"logit-bias": biases or "none", "bad-words": words or "none", "stop": stop or "none"}
        return {"max-new-tokens": str(conversation.max_new_tokens), **numbers, **lists}

    def _show_settings(self, _: str) -> None:
        conversation = self.conversation
        rows = self._settings() | {"seed": str(conversation.seed), "system": conversation.system or "none"}
        rows["context"] = f"{conversation.num_prompt_tokens:,} of {conversation.model.config.block_size:,} tokens used"
        _print_to_stderr("\n".join(f"{name:<22}{value}" for name, value in rows.items()))

    def _set_or_show(self, text: str) -> None:
        """Change a setting for "NAME VALUE", and show it for "NAME"."""
        name, _, value = text.partition(" ")
        name, value = name.replace("_", "-"), value.strip()
        settings = self._settings()
        if name not in settings:
            raise UserError(f"there is no setting '{name}'{did_you_mean(name, settings)}: /settings lists them")
        if value:
            self._apply_setting(name, value)
        _print_to_stderr(f"{name} {self._settings()[name]}")

    def _apply_setting(self, name: str, value: str) -> None:
        conversation = self.conversation
        if name == "max-new-tokens":
            conversation.max_new_tokens = _parse_max_new_tokens(value)
        elif name == "stop":
            stop = [_unescape(text) for text in _split_texts(name, value)]
            from gpt2.generation.text import check_stop_strings

            check_stop_strings(stop)
            conversation.stop = tuple(stop)
        elif name == "bad-words":
            texts = _split_texts(name, value)
            conversation.sampling = replace(
                conversation.sampling, bad_words=encode_bad_words(conversation.tokenizer, texts)
            )
            self._bad_texts = texts
        else:
            field = name.replace("-", "_")
            biases = name == "logit-bias"
            parsed = parse_logit_biases(_split_texts(name, value)) if biases else _parse_number(name, value)
            sampling = replace(conversation.sampling, **{field: parsed})
            sampling.check_token_ids(conversation.model.config.vocab_size)
            conversation.sampling = sampling

    def _set_seed(self, value: str) -> None:
        if value:
            try:
                self.conversation.seed = int(value)
            except ValueError:
                raise UserError(f"the seed must be an integer, not {value}") from None
        _print_to_stderr(f"seed {self.conversation.seed}")

    def _set_system(self, value: str) -> None:
        self.conversation.system = value
        _print_to_stderr(f"the transcript begins with: {value}" if value else "the transcript begins with your message")

    def _reset(self, _: str) -> None:
        self.conversation.reset()
        _print_to_stderr("the conversation is cleared")

    def _save(self, name: str) -> None:
        """Write the transcript. Raises UserError for a file that this session did not write."""
        if not name:
            raise UserError("/save needs a file name")
        path = expand_path(name)
        try:
            with path.open("w" if path in self._saved else "x", encoding="utf-8") as file:
                file.write(self.conversation.transcript + "\n")
        except FileExistsError:
            raise UserError(f"{path} exists already: name another file") from None
        except (OSError, ValueError) as error:
            raise UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None
        self._saved.add(path)
        _print_to_stderr(f"written to {path}")

    def _quit(self, _: str) -> None:
        self._done = True


def _print_to_stderr(text: str) -> None:
    if sys.stderr is not None:
        print(escape_controls(text), file=sys.stderr, flush=True)


def _read_terminal_line(prompt: str) -> str:
    try:
        return input(prompt)
    except EOFError:
        print(flush=True)  # so that the shell's prompt starts on a new line
        raise
    except UnicodeError:
        raise UserError("the line is not UTF-8 text") from None


def _read_stdin_line() -> str:
    line = sys.stdin.buffer.readline() if sys.stdin is not None else b""
    if not line:
        raise EOFError
    try:
        return line.decode().removesuffix("\n").removesuffix("\r")
    except UnicodeError:
        raise UserError("the line is not UTF-8 text") from None


def _check_utf8(text: str, name: str) -> None:
    try:
        text.encode()
    except UnicodeError:
        raise UserError(f"{name} is not UTF-8 text") from None


def _parse_max_new_tokens(value: Any) -> int:
    """The maximum length of an answer, from a flag or a command."""
    length = _parse_number("max-new-tokens", value)
    if length < 1:
        raise UserError(f"max-new-tokens must be at least 1, not {length}")
    return length


def _parse_number(name: str, value: Any) -> Any:
    kind = type(SAMPLING_DEFAULTS.get(name.replace("-", "_"), 0))
    try:
        return kind(value)
    except ValueError:
        raise UserError(f"{name} must be {'an integer' if kind is int else 'a number'}, not {value}") from None


def _split_texts(name: str, value: str) -> list[str]:
    """Split words and "quoted texts"; "none" is the empty list."""
    try:
        return [] if value == "none" else shlex.split(value)
    except ValueError as error:
        raise UserError(f"{name}: {str(error)[:1].lower()}{str(error)[1:]}") from None


def _escape(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n")


def _unescape(text: str) -> str:
    return text.replace(r"\\", "\0").replace(r"\n", "\n").replace("\0", "\\")

"""`gpt2 chat`: through a pipe and on a terminal; its commands, settings and Ctrl-C."""

import errno
import io
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Never

import pytest

import gpt2
from gpt2.generation.sampling import Sampling
from gpt2.model import GPTConfig
from gpt2.templates import get_template, save_template
from gpt2.tokenizer import get_tokenizer, with_special_tokens
from tests.helpers.cli_helpers import run_cli
from tests.helpers.transformers_reference import random_model

CONFIG = GPTConfig(vocab_size=257, block_size=4096, n_layer=1, n_head=2, n_embd=16)
BYTES = get_tokenizer("bytes")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model folder: a small random model with a byte tokenizer and a long context."""
    model = random_model(CONFIG)
    return str(gpt2.save(model, BYTES, tmp_path_factory.mktemp("model") / "model_folder"))


def piped(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, lines: str | bytes, *argv: str
) -> tuple[int, str, str]:
    """`gpt2 chat ARGV` with `lines` on its standard input."""
    data = lines.encode() if isinstance(lines, str) else lines
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    return run_cli(capsys, "chat", *argv)


def test_through_a_pipe_each_line_is_a_turn_and_only_answers_are_printed(
    model_folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--max-new-tokens", "8", "--temperature", "0", "--logit-bias", "65=1000"]
    code, out, err = piped(capsys, monkeypatch, "Hello\n\n  Again  \r\nlast", model_folder, *flags)
    assert (code, out, err) == (0, "AAAAAAAA\n" * 3, "")
    code, out, err = piped(capsys, monkeypatch, "Hello\n\n", model_folder, "--plain", *flags)
    assert (code, out, err) == (0, "AAAAAAAA\n" * 2, "")
    assert piped(capsys, monkeypatch, "", model_folder)[:2] == (0, "")


def test_the_space_after_the_label_is_not_printed(
    model_folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--max-new-tokens", "6", "--temperature", "0", "--logit-bias", "32=1000", "--logit-bias", "65=999.99"]
    code, out, _ = piped(capsys, monkeypatch, "Hi\n", model_folder, *flags, "--presence-penalty", "1", "--seed", "1")
    assert code == 0
    assert out.startswith("A")
    code, out, _ = piped(capsys, monkeypatch, "Hi\n", model_folder, *flags, "--presence-penalty", "1", "--plain")
    assert out.startswith(" A")


VALUES = {"logit-bias": "65=2 66=-1", "bad-words": "'a b' c", "stop": r"'\nX' b", "max-new-tokens": "7"}


@pytest.mark.parametrize(
    "name", [field.name.replace("_", "-") for field in fields(Sampling)] + ["stop", "max-new-tokens"]
)
def test_every_setting_can_be_changed_and_shown(
    name: str, model_folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    value = VALUES.get(name, "3" if name in ("top-k", "no-repeat-ngram-size", "min-new-tokens") else "0.25")
    lines = f"/{name} {value}\n/{name}\n/set {name.replace('-', '_')} {value}\n/settings\n/{name} x'y\n/settings\n"
    code, out, err = piped(capsys, monkeypatch, lines, model_folder)
    messages = err.splitlines()
    assert (code, out) == (0, "")
    assert messages[:3] == [f"{name} {value}"] * 3
    shown = [line for line in messages if line.startswith(f"{name} ") and line.endswith(f" {value}")]
    assert len(shown) == 5  # twice in /settings, unchanged by the wrong value


def test_changed_settings_are_used(
    model_folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "/logit-bias 66=1000\n/max-new-tokens 5\nHello\n/stop BBB\n/retry\n"
    lines += "/logit_bias none\n/bad-words B\nHello\n/undo\n"
    code, out, err = piped(capsys, monkeypatch, lines, model_folder, "--seed", "3")
    assert code == 0
    assert out.startswith("BBBBB\n\n")
    assert "B" not in out[7:]
    assert "removed: Hello" in err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/temprature 0.7", "there is no /temprature (did you mean '/temperature'?): /help lists the commands"),
        ("/qiut", "there is no /qiut (did you mean '/quit'?)"),
        ("/", "there is no /: /help lists"),
        ("/set tempo 1", "there is no setting 'tempo'"),
        ("/set", "there is no setting ''"),
        ("/temperature hot", "temperature must be a number, not hot"),
        ("/temperature -1", "temperature must be 0 or more"),
        ("/temperature nan", "temperature must be 0 or more"),
        ("/top-p 0", "top-p must be over 0"),
        ("/top-k 2.5", "top-k must be an integer, not 2.5"),
        ("/max-new-tokens 0", "max-new-tokens must be at least 1, not 0"),
        ("/logit-bias 65", "logit-bias must be ID=BIAS, as 50256=-100, not 65"),
        ("/logit-bias 999=1", "token 999 is not in the model's vocabulary of 257"),
        ("/bad-words ''", "a bad word must have at least one character"),
        ("/bad-words don't", "bad-words: no closing quotation"),
        ("/stop ''", "a stop string must have at least one character"),
        ("/seed x", "the seed must be an integer, not x"),
        ("/save", "/save needs a file name"),
        ("/save {model_folder}", "exists already: name another file"),
        ("/save {model_folder}/no/file", "cannot write"),
        ("/save \0", "cannot write"),
        ("/undo", "there is no turn yet"),
        ("/retry", "there is no turn yet"),
        ("x" * 5000, "tokens do not fit the model's context of 4096"),
    ],
)
def test_invalid_lines_are_one_line_and_the_session_continues(
    line: str, message: str, model_folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = f"{line.format(model_folder=model_folder)}\n/seed 5\n"
    code, out, err = piped(capsys, monkeypatch, lines, model_folder)
    first, second = err.splitlines()
    assert (code, out, second) == (0, "", "seed 5")
    assert message in first


def test_a_line_that_is_not_utf8(
    model_folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = piped(capsys, monkeypatch, b"\xff\xfe\n/seed 5\n", model_folder)
    assert (code, out, err) == (0, "", "the line is not UTF-8 text\nseed 5\n")


def test_through_a_pipe_ctrl_c_ends_the_program(
    model_folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def hidden_states(tokens: object, cache: object) -> Never:
        raise KeyboardInterrupt

    model = random_model(CONFIG)
    monkeypatch.setattr(model, "hidden_states", hidden_states)
    monkeypatch.setattr("gpt2.commands.chat.load_inference_model", lambda args, resolved: (model, BYTES))
    code, out, err = piped(capsys, monkeypatch, "Who's there?\nWho?\n", model_folder)
    assert (code, out, err) == (130, "", "")


def test_save_writes_the_transcript_and_overwrites_only_its_own_file(
    model_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--max-new-tokens", "3", "--logit-bias", "65=1000"]
    file = tmp_path / "talk.txt"
    lines = f"/system Be brief.\nHi\n/save {file}\nAgain\n/save {file}\n/quit\nnever\n"
    code, out, _ = piped(capsys, monkeypatch, lines, model_folder, *flags)
    assert (code, out) == (0, "AAA\nAAA\n")
    assert file.read_text() == "Be brief.\n\nUser: Hi\nAssistant:AAA\nUser: Again\nAssistant:AAA\n"
    _, _, err = piped(capsys, monkeypatch, f"/save {file}\n", model_folder)
    assert "exists already" in err


def test_dropped_turns_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = gpt2.save(random_model(replace(CONFIG, block_size=64)), BYTES, tmp_path / "small")
    code, out, err = piped(capsys, monkeypatch, "one\ntwo\nthree\n", str(folder), "--max-new-tokens", "8")
    assert code == 0
    assert out
    assert err == "(the context is full: the 2 oldest turns are no longer in the prompt)\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("{model_folder} --top-p 0", "top-p must be over 0"),
        ("{model_folder} --max-new-tokens 0", "max-new-tokens must be at least 1, not 0"),
        ("{model_folder} --system \udcff", "--system is not UTF-8 text"),
        ("{model_folder} --logit-bias 300=1", "token 300 is not in the model's vocabulary of 257"),
        ("{model_folder} --bad-word=", "a bad word must have at least one character"),
        ("{model_folder} --stop=", "a stop string must have at least one character"),
        ("{model_folder} --plian", "there is no --plian (did you mean '--plain'?)"),
        ("./nowhere", "there is no model folder nowhere"),
    ],
)
def test_bad_flags_are_one_line_and_code_2(
    argv: str, message: str, model_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run_cli(capsys, "chat", *argv.format(model_folder=model_folder).split())
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_the_models_own_template_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The template of the model folder is used, but not with --plain."""
    tokenizer = with_special_tokens(BYTES, get_template("chatml").special_tokens)
    folder = gpt2.save(random_model(replace(CONFIG, vocab_size=259)), tokenizer, tmp_path / "own")
    save_template(get_template("chatml"), folder)
    flags = ["--max-new-tokens", "3", "--temperature", "0", "--logit-bias", "32=1000"]
    saved = [tmp_path / name for name in ("own.txt", "plain.txt")]
    code, out, _ = piped(capsys, monkeypatch, f"/system S\nHi\n/save {saved[0]}\n", str(folder), *flags)
    assert (code, out) == (0, "   \n")  # without a label, leading spaces are kept
    turns = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n   <|im_end|>\n"
    assert saved[0].read_text() == f"<|im_start|>system\nS<|im_end|>\n{turns}\n"
    assert piped(capsys, monkeypatch, f"Hi\n/save {saved[1]}\n", str(folder), "--plain", *flags)[0] == 0
    assert saved[1].read_text() == "Hi   \n"
    flags[-1] = "258=1000"  # <|im_end|>, at once
    assert piped(capsys, monkeypatch, "Hi\n", str(folder), *flags)[:2] == (0, "\n")
    (folder / "chat_template.jinja").write_text("{% if %}")
    code, out, err = piped(capsys, monkeypatch, "Hi\n", str(folder))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "chat template cannot be read" in err


# A real terminal

ON_ITS_TERMINAL = """
import fcntl, os, sys, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, "-m", "gpt2", *sys.argv[1:]])
"""


class Terminal:
    """A program on a pseudo-terminal: sends keys, and reads the screen."""

    def __init__(self, *argv: str) -> None:
        import pty

        self._own, theirs = pty.openpty()
        env = os.environ | {"TERM": "dumb", "OMP_NUM_THREADS": "1", "INPUTRC": os.devnull, "CXX": "none"}
        command = [sys.executable, "-c", ON_ITS_TERMINAL, *argv]
        self.process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env)
        os.close(theirs)
        self.screen = ""

    def type(self, text: str) -> None:
        os.write(self._own, text.encode())

    def wait_for(self, pattern: str, seconds: float = 240) -> str:
        """Return the screen since the last call, up to the pattern."""
        end = time.monotonic() + seconds
        while (found := re.search(pattern, self.screen)) is None:
            assert self._read(end - time.monotonic()), f"no {pattern!r} in {self.screen!r}"
        before, self.screen = self.screen[: found.end()], self.screen[found.end() :]
        return before

    def wait_until_it_sleeps(self) -> None:
        """Wait until the main thread sleeps in readline's `select`, where a system shows that.

        A signal that arrives between two keys, before that call, is noticed by Python at the next key only.
        """
        thread = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/stat")
        while thread.exists() and thread.read_text().rpartition(")")[2].split()[0] != "S":
            time.sleep(0.01)

    def rest(self) -> str:
        """Return all output until the program exits."""
        while self._read(240):
            pass
        self.process.wait(60)
        return self.screen

    def _read(self, seconds: float) -> bool:
        if not select.select([self._own], [], [], max(0, seconds))[0]:
            return False
        try:
            data = os.read(self._own, 65536)
        except OSError as error:
            if error.errno != errno.EIO:  # raised when the other end of the terminal is closed
                raise
            data = b""
        self.screen += data.decode(errors="replace")
        return bool(data)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._own)


@pytest.fixture
def terminals() -> Iterator[list[Terminal]]:
    opened: list[Terminal] = []
    yield opened
    for terminal in opened:
        terminal.close()


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
def test_on_a_terminal(model_folder: str, terminals: list[Terminal]) -> None:
    """Typing, streaming, Ctrl-C during an answer and at the prompt, settings, escaped characters, Ctrl-D."""
    terminal = Terminal("chat", model_folder, "--logit-bias", "27=1000", "--max-new-tokens", "4000", "--seed", "1")
    terminals.append(terminal)
    terminal.wait_for("User: $")
    terminal.type("Hello\n")
    assert "Assistant:" in terminal.wait_for(r"(\\x1b){20}")  # the stream of escaped ESC characters
    terminal.type("\x03")
    stopped = terminal.wait_for(r"\(stopped\)\s+User: $")
    assert stopped.count("\\x1b") < 3500
    terminal.type("/temperature 0.7\n")
    assert "temperature 0.7" in terminal.wait_for("User: $")
    terminal.type("/top-p 7\n")
    assert "top-p must be over 0 and at most 1, not 7.0" in terminal.wait_for("User: $")
    terminal.type("/max-new-tokens 5\n")
    terminal.wait_for("User: $")
    terminal.type("/logit-bias 65=1000\n")
    terminal.wait_for("User: $")
    terminal.type("Again?\x7f!\n")  # a line can be edited
    assert "Assistant:AAAAA\r\n" in terminal.wait_for("User: $")
    terminal.type("/undo\n")
    assert "removed: Again!" in terminal.wait_for("User: $")
    terminal.type("half a line")
    terminal.wait_for("half a line")
    terminal.wait_until_it_sleeps()
    terminal.type("\x03")
    assert "/quit or Ctrl-D quits" in terminal.wait_for("User: $")
    terminal.type("\x10\n")  # history: the previous line, "/undo"
    assert "removed: Hello" in terminal.wait_for("User: $")  # the stopped answer was kept
    terminal.type("\x04")
    assert "Traceback" not in terminal.rest()
    assert terminal.process.returncode == 0
    assert "\x1b" not in stopped

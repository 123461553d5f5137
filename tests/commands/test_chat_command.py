"""`gpt2 chat`: through a pipe and on a terminal, what its lines do, and who may interrupt."""

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
def talker(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a small model that speaks bytes, and a long context."""
    model = random_model(CONFIG)
    return str(gpt2.save(model, BYTES, tmp_path_factory.mktemp("model") / "talker"))


def piped(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, lines: str | bytes, *argv: str
) -> tuple[int, str, str]:
    """`gpt2 chat ARGV` with `lines` on its standard input."""
    data = lines.encode() if isinstance(lines, str) else lines
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    return run_cli(capsys, "chat", *argv)


def test_through_a_pipe_each_line_is_a_turn_and_only_answers_come_out(
    talker: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--max-new-tokens", "8", "--temperature", "0", "--logit-bias", "65=1000"]
    code, out, err = piped(capsys, monkeypatch, "Hello\n\n  Again  \r\nlast", talker, *flags)
    assert (code, out, err) == (0, "AAAAAAAA\n" * 3, "")
    code, out, err = piped(capsys, monkeypatch, "Hello\n\n", talker, "--plain", *flags)
    assert (code, out, err) == (0, "AAAAAAAA\n" * 2, "")
    assert piped(capsys, monkeypatch, "", talker)[:2] == (0, "")


def test_the_space_after_the_colon_is_not_shown(
    talker: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--max-new-tokens", "6", "--temperature", "0", "--logit-bias", "32=1000", "--logit-bias", "65=999.99"]
    code, out, _ = piped(capsys, monkeypatch, "Hi\n", talker, *flags, "--presence-penalty", "1", "--seed", "1")
    assert code == 0
    assert out.startswith("A")
    code, out, _ = piped(capsys, monkeypatch, "Hi\n", talker, *flags, "--presence-penalty", "1", "--plain")
    assert out.startswith(" A")


VALUES = {"logit-bias": "65=2 66=-1", "bad-words": "'a b' c", "stop": r"'\nX' b", "max-new-tokens": "7"}


@pytest.mark.parametrize(
    "name", [field.name.replace("_", "-") for field in fields(Sampling)] + ["stop", "max-new-tokens"]
)
def test_every_setting_can_be_changed_and_shown(
    name: str, talker: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    value = VALUES.get(name, "3" if name in ("top-k", "no-repeat-ngram-size", "min-new-tokens") else "0.25")
    lines = f"/{name} {value}\n/{name}\n/set {name.replace('-', '_')} {value}\n/settings\n/{name} x'y\n/settings\n"
    code, out, err = piped(capsys, monkeypatch, lines, talker)
    said = err.splitlines()
    assert (code, out) == (0, "")
    assert said[:3] == [f"{name} {value}"] * 3
    shown = [line for line in said if line.startswith(f"{name} ") and line.endswith(f" {value}")]
    assert len(shown) == 5  # and twice among all settings, the wrong value between them having changed nothing


def test_a_setting_is_used(talker: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "/logit-bias 66=1000\n/max-new-tokens 5\nHello\n/stop BBB\n/retry\n"
    lines += "/logit_bias none\n/bad-words B\nHello\n/undo\n"
    code, out, err = piped(capsys, monkeypatch, lines, talker, "--seed", "3")
    assert code == 0
    assert out.startswith("BBBBB\n\n")
    assert "B" not in out[7:]
    assert "taken back: Hello" in err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/temprature 0.7", "there is no /temprature (did you mean '/temperature'?): /help says what there is"),
        ("/qiut", "there is no /qiut (did you mean '/quit'?)"),
        ("/", "there is no /: /help says"),
        ("/set tempo 1", "there is no setting 'tempo'"),
        ("/set", "there is no setting ''"),
        ("/temperature hot", "temperature must be a number, not hot"),
        ("/temperature -1", "temperature must be 0 or more"),
        ("/temperature nan", "temperature must be 0 or more"),
        ("/top-p 0", "top-p must be over 0"),
        ("/top-k 2.5", "top-k must be a whole number, not 2.5"),
        ("/max-new-tokens 0", "max-new-tokens must be at least 1, not 0"),
        ("/logit-bias 65", "logit-bias must be ID=BIAS, as 50256=-100, not 65"),
        ("/logit-bias 999=1", "token 999 is not in the model's vocabulary of 257"),
        ("/bad-words ''", "a bad word must have at least one character"),
        ("/bad-words don't", "bad-words: no closing quotation"),
        ("/stop ''", "a stop string must have at least one character"),
        ("/seed x", "the seed must be a whole number, not x"),
        ("/save", "/save needs the name of a file"),
        ("/save {talker}", "is there already: name another file"),
        ("/save {talker}/no/file", "cannot write"),
        ("/save \0", "cannot write"),
        ("/undo", "nothing has been said yet"),
        ("/retry", "nothing has been said yet"),
        ("x" * 5000, "tokens do not fit the model's context of 4096"),
    ],
)
def test_what_cannot_be_is_one_line_and_the_session_goes_on(
    line: str, message: str, talker: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = f"{line.format(talker=talker)}\n/seed 5\n"
    code, out, err = piped(capsys, monkeypatch, lines, talker)
    first, second = err.splitlines()
    assert (code, out, second) == (0, "", "seed 5")
    assert message in first


def test_a_line_that_is_not_utf8(
    talker: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = piped(capsys, monkeypatch, b"\xff\xfe\n/seed 5\n", talker)
    assert (code, out, err) == (0, "", "that line is not UTF-8 text\nseed 5\n")


def test_through_a_pipe_ctrl_c_ends_the_program(
    talker: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def hidden_states(tokens: object, cache: object) -> Never:
        raise KeyboardInterrupt

    model = random_model(CONFIG)
    monkeypatch.setattr(model, "hidden_states", hidden_states)
    monkeypatch.setattr("gpt2.commands.chat.load_inference_model", lambda args, name: (model, BYTES))
    code, out, err = piped(capsys, monkeypatch, "Who's there?\nWho?\n", talker)
    assert (code, out, err) == (130, "", "")


def test_save_writes_the_transcript_and_writes_over_nothing_but_its_own(
    talker: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--max-new-tokens", "3", "--logit-bias", "65=1000"]
    file = tmp_path / "talk.txt"
    lines = f"/system Be brief.\nHi\n/save {file}\nAgain\n/save {file}\n/quit\nnever\n"
    code, out, _ = piped(capsys, monkeypatch, lines, talker, *flags)
    assert (code, out) == (0, "AAA\nAAA\n")
    assert file.read_text() == "Be brief.\n\nUser: Hi\nAssistant:AAA\nUser: Again\nAssistant:AAA\n"
    _, _, err = piped(capsys, monkeypatch, f"/save {file}\n", talker)
    assert "is there already" in err


def test_it_says_that_turns_are_dropped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = gpt2.save(random_model(replace(CONFIG, block_size=64)), BYTES, tmp_path / "small")
    code, out, err = piped(capsys, monkeypatch, "one\ntwo\nthree\n", str(folder), "--max-new-tokens", "8")
    assert code == 0
    assert out
    assert err == "(the context is full: the model no longer reads 2 of the turns before this one, the oldest)\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("{talker} --top-p 0", "top-p must be over 0"),
        ("{talker} --max-new-tokens 0", "max-new-tokens must be at least 1, not 0"),
        ("{talker} --system \udcff", "--system is not UTF-8 text"),
        ("{talker} --logit-bias 300=1", "token 300 is not in the model's vocabulary of 257"),
        ("{talker} --bad-word=", "a bad word must have at least one character"),
        ("{talker} --stop=", "a stop string must have at least one character"),
        ("{talker} --plian", "there is no --plian (did you mean '--plain'?)"),
        ("./nowhere", "there is no model folder nowhere"),
    ],
)
def test_bad_flags_are_one_line_and_code_2(
    argv: str, message: str, talker: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run_cli(capsys, "chat", *argv.format(talker=talker).split())
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_the_models_own_template_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From its folder, but not with --plain."""
    tokenizer = with_special_tokens(BYTES, get_template("chatml").special_tokens)
    folder = gpt2.save(random_model(replace(CONFIG, vocab_size=259)), tokenizer, tmp_path / "own")
    save_template(get_template("chatml"), folder)
    flags = ["--max-new-tokens", "3", "--temperature", "0", "--logit-bias", "32=1000"]
    saved = [tmp_path / name for name in ("own.txt", "plain.txt")]
    code, out, _ = piped(capsys, monkeypatch, f"/system S\nHi\n/save {saved[0]}\n", str(folder), *flags)
    assert (code, out) == (0, "   \n")  # no colon, so these spaces are words
    said = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n   <|im_end|>\n"
    assert saved[0].read_text() == f"<|im_start|>system\nS<|im_end|>\n{said}\n"
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
    """A program on a pseudo-terminal: what is typed, and what is on the screen."""

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

    def wait_for(self, pattern: str, seconds: float = 60) -> str:
        """What was on the screen since the last call, up to the pattern."""
        end = time.monotonic() + seconds
        while (found := re.search(pattern, self.screen)) is None:
            assert self._read(end - time.monotonic()), f"no {pattern!r} in {self.screen!r}"
        before, self.screen = self.screen[: found.end()], self.screen[found.end() :]
        return before

    def rest(self) -> str:
        """All that comes until the program has gone."""
        while self._read(60):
            pass
        self.process.wait(60)
        return self.screen

    def _read(self, seconds: float) -> bool:
        if not select.select([self._own], [], [], max(0, seconds))[0]:
            return False
        try:
            data = os.read(self._own, 65536)
        except OSError as error:
            if error.errno != errno.EIO:  # which is how a terminal tells that nobody is there any more
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
def test_on_a_terminal(talker: str, terminals: list[Terminal]) -> None:
    """Typing, streaming, Ctrl-C in mid-answer and at the prompt, settings, escapes that are shown, Ctrl-D."""
    terminal = Terminal("chat", talker, "--logit-bias", "27=1000", "--max-new-tokens", "4000", "--seed", "1")
    terminals.append(terminal)
    terminal.wait_for("User: $")
    terminal.type("Hello\n")
    assert "Assistant:" in terminal.wait_for(r"(\\x1b){20}")  # it streams, and says ESC again and again
    terminal.type("\x03")
    said = terminal.wait_for(r"\(stopped\)\s+User: $")
    assert said.count("\\x1b") < 3500
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
    assert "taken back: Again!" in terminal.wait_for("User: $")
    terminal.type("half a line\x03")
    assert "/quit or Ctrl-D leaves" in terminal.wait_for("User: $")
    terminal.type("\x10\n")  # a line can be had again: "/undo"
    assert "taken back: Hello" in terminal.wait_for("User: $")  # what was stopped had stayed
    terminal.type("\x04")
    assert "Traceback" not in terminal.rest()
    assert terminal.process.returncode == 0
    assert "\x1b" not in said

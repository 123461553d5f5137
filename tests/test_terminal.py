"""Names and messages that come from outside do not control the terminal, whichever command prints them."""

import io
import logging
from pathlib import Path

import pytest

from gpt2.cli import _LogFormatter, run_and_exit
from gpt2.commands import data, export, info
from gpt2.errors import MAX_MESSAGE_CHARACTERS, DataError, RequestError, UserError
from gpt2.evaluation.report import ModelReport, checks_table, table
from gpt2.model import GPT, GPTConfig
from gpt2.progress import print_status
from gpt2.reporting.metrics import MetricsLogger
from gpt2.terminal import UNSAFE_CHARACTERS, escape_controls, path_for_stream, shorten, single_line
from gpt2.tokenizer import get_tokenizer
from gpt2.weights import save

EVIL = "na\nme\x1b[2J\x9b\u2028\u202e\u2066z"
SHOWN = r"na me\x1b[2J\x9b \u202e\u2066z"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def check_lines(output: str) -> None:
    assert SHOWN in output
    assert not UNSAFE_CHARACTERS.search(output)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder with such a name and such a template."""
    small = GPT(GPTConfig(vocab_size=257, block_size=8, n_layer=1, n_head=1, n_embd=8))
    folder = save(small, get_tokenizer("bytes"), tmp_path / EVIL)
    (folder / "chat_template.jinja").write_text(f"{{{{ '{EVIL}' }}}}\nsecond", encoding="utf-8")
    return folder


def test_the_three_forms() -> None:
    assert single_line(EVIL) == SHOWN
    assert escape_controls("a\tb\n\x1b\udc80") == "a\tb\n\\x1b\\udc80"
    assert path_for_stream(Path(EVIL), io.StringIO()) == EVIL
    assert path_for_stream(Path(EVIL), Terminal()) == SHOWN


def test_info(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    info.main([str(model)])
    output = capsys.readouterr().out
    check_lines(output)
    assert "second" in output


def test_a_result_on_a_terminal(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = Terminal()
    monkeypatch.setattr("sys.stdout", output)
    export.main([str(model), str(tmp_path / f"{EVIL}2")])
    check_lines(output.getvalue())
    assert output.getvalue().count("\n") == 1


def test_the_names_of_documents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("a", EVIL):
        (folder / f"{name}.txt").write_text(EVIL * 20, encoding="utf-8")
    data.main(["inspect", str(folder), "--tokenizer", "bytes"])
    check_lines(capsys.readouterr().out)


def test_the_names_of_models_in_a_table() -> None:
    check_lines(table([ModelReport(EVIL, None)]))
    check_lines(checks_table(ModelReport(EVIL, None)))


def test_the_log(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    print_status(f"serving {EVIL}")
    with MetricsLogger(tmp_path, 0, 1) as logger:
        logger.log_message(f"run folder: {EVIL}")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"gpt2: serving {SHOWN}", f"run folder: {SHOWN}"]
    formatter = _LogFormatter("gpt2: %(message)s")
    try:
        raise ValueError(EVIL)
    except ValueError as error:
        raised = (type(error), error, error.__traceback__)
        record = logging.LogRecord("gpt2", logging.ERROR, "", 1, "prompt %s", (EVIL,), raised)
    first, *traceback = formatter.format(record).split("\n")
    assert first == f"gpt2: prompt {SHOWN}"
    assert not UNSAFE_CHARACTERS.search("".join(traceback))


def test_long_text_is_shortened_in_the_middle() -> None:
    assert shorten("a" * 100) == "a" * 100
    assert shorten(f"{'a' * 100}{'b' * 100}", 20) == f"{'a' * 13}...{'b' * 4}"
    assert all(len(shorten("a" * 500, limit)) == limit for limit in range(4, 400))
    assert shorten(10**200, 10) == "100000...0"


def test_escapes_count_as_characters_of_shortened_text() -> None:
    assert shorten(EVIL) == SHOWN
    assert shorten("\x1b" * 500, 20) == "\\x1b\\x1b\\x1b\\...\\x1b"
    assert len(shorten("\U000e0001" * 10**6, 200)) == 200


@pytest.mark.parametrize("error", [UserError, DataError, RequestError])
def test_the_message_of_an_error_is_one_line_of_bounded_length(error: type[UserError]) -> None:
    assert str(error(f"config.json: {EVIL} is wrong")) == f"config.json: {SHOWN} is wrong"
    message = str(error(f"config.json has {'x' * 10**6}: remove it"))
    assert len(message) == MAX_MESSAGE_CHARACTERS
    assert message.startswith("config.json has xxx")
    assert message.endswith("xxx: remove it")


def test_an_operating_system_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    name = EVIL * 1000
    with pytest.raises(SystemExit):
        run_and_exit(lambda: Path(name).chmod(0o600))
    line = capsys.readouterr().err
    assert line.startswith(f"gpt2: {SHOWN}")
    assert line.endswith("File name too long\n")
    assert len(line) < MAX_MESSAGE_CHARACTERS + 10

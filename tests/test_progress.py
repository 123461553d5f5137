"""Progress bars, and long calls of native libraries."""

import io
import logging
import re
import signal
import threading
import time
from collections.abc import Iterator

import pytest
import rich.console

from gpt2 import progress
from gpt2.commands.eval_run import score_line
from gpt2.evaluation.measures import Measured
from gpt2.progress import Cancelled, ProgressBar, print_status, run_cancellable
from gpt2.tokenizer import train_bpe


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What a terminal of 80 columns receives."""
    text = io.StringIO()
    real = rich.console.Console
    monkeypatch.setattr(
        rich.console, "Console", lambda **_: real(file=text, force_terminal=True, width=80, no_color=True)
    )
    return text


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The seconds that have passed for progress bars."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    yield now
    monkeypatch.undo()


def lines(screen: io.StringIO) -> list[str]:
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue()))


def test_a_bar_appears_after_two_seconds_with_the_time_left(screen: io.StringIO, clock: list[float]) -> None:
    with ProgressBar("tokenizing [notes]") as bar:
        bar.update(0.0)
        clock[0] += 1.9
        bar.update(0.01)
        assert screen.getvalue() == ""
        clock[0] += 1.1
        bar.update(0.03, "7 documents")
        clock[0] += 7
        bar.update(0.00001)
    shown = "".join(lines(screen))
    assert re.search(r"tokenizing \[notes\]  +1 min 37 s left  7 documents", shown), shown
    assert "11 d 13 h left" in shown


@pytest.mark.parametrize("task", ["lambada", "hellaswag-completion"])
def test_rows_score_and_time_of_an_evaluation_fit_into_80_columns(
    task: str, screen: io.StringIO, clock: list[float]
) -> None:
    with ProgressBar(task) as bar:
        bar.update(0.0)
        clock[0] += 3
        bar.update(167 / 10042, score_line(167, 10042, Measured({"acc": 0.25, "acc_norm": 0.3125, "loss": 3.5})))
    line = next(line for line in lines(screen) if "167/10042" in line)
    assert line.startswith(task)
    assert re.search(r"2 min 57 s left  167/10042  acc 0.2500  acc_norm 0.3125", line), line


def test_work_of_unknown_size_has_a_count_and_no_time(screen: io.StringIO, clock: list[float]) -> None:
    with ProgressBar("reading rows") as bar:
        clock[0] += 3
        bar.update(status="7,000 rows")
    shown = "".join(lines(screen))
    assert re.search(r"reading rows [━ ]+7,000 rows", shown), shown
    assert "left" not in shown


def test_quiet_shows_no_progress(screen: io.StringIO, clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("gpt2")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with ProgressBar("x") as bar:
            clock[0] += 5
            bar.update(0.5)
        print_status("y")
    finally:
        logger.setLevel(before)
    assert (screen.getvalue(), capsys.readouterr().err) == ("", "")
    print_status("a\nb")
    assert capsys.readouterr().err == "gpt2: a b\n"


def test_ctrl_c_ends_a_call_that_checks() -> None:
    ended = threading.Event()

    def work(check: object) -> None:
        assert callable(check)
        try:
            while True:
                check()
                time.sleep(0.001)
        except Cancelled:
            ended.set()
            raise

    with pytest.raises(KeyboardInterrupt):
        run_cancellable(work, lambda: signal.raise_signal(signal.SIGINT))
    assert ended.wait(10)


def test_ctrl_c_does_not_wait_for_a_call_that_does_not_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_STOP_SECONDS", 0.0)
    release = threading.Event()
    with pytest.raises(KeyboardInterrupt):
        run_cancellable(lambda check: release.wait(60), lambda: signal.raise_signal(signal.SIGINT))
    release.set()


def test_results_and_errors_of_a_call() -> None:
    assert run_cancellable(lambda check: 7, lambda: None) == 7
    with pytest.raises(ZeroDivisionError):
        run_cancellable(lambda check: 1 / 0, lambda: None)


def test_ctrl_c_ends_the_training_of_a_tokenizer_between_two_texts() -> None:
    started = threading.Event()

    def texts() -> Iterator[str]:
        while True:
            started.set()
            yield "words and more words " * 100

    def interrupt() -> None:
        if started.is_set():
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train_bpe(texts(), 300, interrupt)

"""Signals during a run: acknowledged while torch computes, and what a second one loses."""

import ctypes
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpt2.config import TrainConfig, config_for_resume
from gpt2.data.text_blocks import TextBlock
from gpt2.reporting.metrics import read_metrics
from gpt2.train import trainer
from gpt2.train.stopping import catch_signals
from gpt2.train.trainer import Interrupted, train
from tests.helpers.training_helpers import with_frequent_saves


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="signals go to the process only")
def test_a_signal_is_acknowledged_while_a_library_computes(capfd: pytest.CaptureFixture[str]) -> None:
    """The main thread is in a C function until the line was printed: no handler of Python can run before."""
    reader, writer = os.pipe()
    acknowledged: list[bool] = []

    def interrupt(received: list[int]) -> None:
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
        deadline = time.monotonic() + 30
        while not received and time.monotonic() < deadline:
            time.sleep(0.001)
        acknowledged.append(bool(received))
        os.write(writer, b"x")

    with catch_signals(lambda: "x") as received:
        thread = threading.Thread(target=interrupt, args=(received,))
        thread.start()
        ctypes.CDLL(None).read(reader, ctypes.create_string_buffer(1), 1)
        thread.join()
    assert acknowledged == [True]
    assert received == [signal.SIGTERM]
    assert capfd.readouterr().err == (
        "gpt2: SIGTERM: saving and stopping after this step. Again: stop at once, without saving\n"
    )
    for fd in (reader, writer):
        os.close(fd)


@pytest.mark.parametrize(
    ("save_every", "lost"),
    [(2, "step 4 is saved, 1 step(s) after it are lost; --resume {} goes on from there"), (50, "nothing is saved, 5 ")],
)
def test_a_second_signal_stops_at_once_and_says_what_is_lost(
    save_every: int,
    lost: str,
    tiny: TrainConfig,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    config = replace(with_frequent_saves(tiny), save_every=save_every)
    update = trainer.update

    def interrupted_update(run: Any, *args: Any) -> Any:
        if run.step == 5:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            threading.Event().wait(60)
        return update(run, *args)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "update", interrupted_update)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    folder = Path(config.out_dir, "tiny")
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("gpt2: SIGINT")]
    assert errors[0] == "gpt2: SIGINT: saving and stopping after this step. Again: stop at once, without saving"
    assert errors[1].startswith(f"gpt2: SIGINT again: stopping at once; {lost.format(folder)}")
    assert len(errors) == 2
    train(config_for_resume(folder, {}))
    assert [line["step"] for line in read_metrics(folder / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_one_signal_saves_the_step_that_is_under_way(tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(with_frequent_saves(tiny), save_every=50)
    update = trainer.update

    def interrupted_update(run: Any, *args: Any) -> Any:
        if run.step == 3:
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.05)  # the signal is received by another thread; if that takes longer, a later step is the last
        return update(run, *args)

    monkeypatch.setattr(trainer, "update", interrupted_update)
    with pytest.raises(Interrupted) as stop:
        train(config)
    assert stop.value.exit_code == 130
    assert stop.value.step >= 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no SIGHUP")
def test_a_hangup_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with catch_signals(lambda: "x") as received:
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert received == []


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_tokenizing_before_the_first_step_stops_at_once(
    tokenizer: str, tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nothing is left: no run folder, no shards in the cache."""
    monkeypatch.setenv("GPT2_HOME", str(tmp_path / "home"))

    def interrupted(block: TextBlock) -> int:
        if threading.current_thread() is threading.main_thread():
            signal.raise_signal(signal.SIGINT)
        else:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        return 1

    monkeypatch.setattr(TextBlock, "num_bytes", property(interrupted))
    with pytest.raises(KeyboardInterrupt):
        train(replace(tiny, tokenizer=tokenizer))
    assert not Path(tiny.out_dir).exists()
    shards = tmp_path / "home" / "shards"
    assert not shards.exists() or not list(shards.iterdir())

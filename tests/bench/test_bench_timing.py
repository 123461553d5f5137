"""What all benchmarks share: the workload, timing, and subprocesses."""

import os
import pickle
import signal
import time
from pathlib import Path

import pytest
import torch

from gpt2.bench.common import (
    BenchmarkError,
    SubprocessRunner,
    Workload,
    load_benchmark,
    quartiles_ms,
    run_in_process,
    run_in_subprocess,
)
from tests.helpers.bench_helpers import TINY_CONFIG, TINY_WORKLOAD
from tests.helpers.cli_helpers import run_cli


def test_batches_are_deterministic_and_follow_zipfs_law() -> None:
    batches = TINY_WORKLOAD.batches()
    assert len(batches) == TINY_WORKLOAD.warmup + TINY_WORKLOAD.steps
    for (tokens, targets), (again, _) in zip(batches, TINY_WORKLOAD.batches(), strict=True):
        assert tokens.shape == targets.shape == (2, 16)
        assert torch.equal(tokens, again)
        assert torch.equal(tokens[:, 1:], targets[:, :-1])
    many = torch.cat([tokens.flatten() for tokens, _ in Workload("cpu", TINY_CONFIG, 64, 64, steps=5).batches()])
    counts = torch.bincount(many, minlength=301).float()
    assert counts.argmax() == 0
    assert counts[0] / counts[9] == pytest.approx(10, rel=0.25)  # Zipf


def test_milliseconds_are_median_and_quartiles() -> None:
    assert quartiles_ms([0.004, 0.001, 0.002, 0.003, 0.005]) == pytest.approx({"median": 3, "low": 2, "high": 4})
    assert quartiles_ms([0.002]) == pytest.approx({"median": 2, "low": 2, "high": 2})


def test_a_subprocess_returns_results_and_its_death_is_an_error() -> None:
    assert run_in_subprocess(os.getpid) != os.getpid()
    with pytest.raises(BenchmarkError, match="SIGKILL") as death:
        run_in_subprocess(signal.raise_signal, signal.SIGKILL)
    assert death.value.out_of_memory
    with pytest.raises(BenchmarkError, match="block_size must be at least 1") as failure:
        run_in_process(Workload, "cpu", TINY_CONFIG, 1, 0)
    sent = pickle.loads(pickle.dumps(failure.value))  # as it is sent between processes
    assert (sent.reason, sent.out_of_memory) == (failure.value.reason, False)


def test_peers_need_a_source_tree(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An installed package has no benchmarks/."""
    assert load_benchmark("serving_chart", "this chart").draw
    monkeypatch.setattr("gpt2.bench.common.SOURCE_TREE", tmp_path)
    (tmp_path / "a.json").write_text('{"kind": "bench serve"}')
    chart = ["chart", str(tmp_path / "a.json"), str(tmp_path / "a.png")]
    for arguments in (["train", "--peer", "transformers"], ["generate", "--peer", "llamacpp"], ["serve"], chart):
        code, out, err = run_cli(capsys, "bench", *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert "needs a clone of the source tree" in err


def blocked_signals() -> set[int]:
    return {int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])}


class Busy:
    """A worker that interrupts its parent, and then does not answer."""

    def blocked_signals(self) -> set[int]:
        return blocked_signals()

    def interrupt_parent(self) -> None:
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(60)


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="signals cannot be blocked")
def test_ctrl_c_reaches_no_subprocess_and_does_not_wait_for_it() -> None:
    """Blocked from the start of Python, whose own handler would print a traceback while torch is imported."""
    before = blocked_signals()
    started = time.monotonic()
    runner = SubprocessRunner(Busy)
    assert signal.SIGINT in runner.call("blocked_signals")
    assert blocked_signals() == before
    with pytest.raises(KeyboardInterrupt), runner:
        runner.call("interrupt_parent")
    assert not runner._process.is_alive()
    assert time.monotonic() - started < 60

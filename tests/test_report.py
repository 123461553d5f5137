"""What a run says on standard error, terminal or not, and the curve it draws."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from gpt2.train.report import Report, _smoothed, plot_loss, read_metrics


def record(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "loss": 5.0 - step / 10, "tokens_per_second": 1000.0, **more}


def test_plain_lines_when_it_is_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Report(tmp_path, 0, 20) as report:
        for step in range(1, 21):
            report.step(record(step, **({"val_loss": 4.5} if step == 10 else {})))
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("step 1/20  loss 4.9000  1,000 tok/s")
    assert any(line.startswith("step 10/20  loss 4.0000  val 4.5000") for line in said)
    assert said[-1].startswith("step 20/20  loss 3.0000  val 4.5000")
    assert len(said) == 3


def test_a_live_line_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(Console, "is_terminal", True)
    with Report(tmp_path, 0, 5) as report:
        for step in range(1, 6):
            report.step(record(step))
        report.say("a line above")
    text = screen.getvalue()
    assert "step 5/5" in text
    assert "tok/s" in text
    assert "a line above" in text


def test_metrics_are_cut_back_to_the_step_that_is_gone_on_from(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record(step)) + "\n" for step in range(1, 8)) + '{"step": 8, "lo')
    with Report(tmp_path, 4, 6) as report:
        report.step(record(5))
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4, 5]


def test_the_curve_does_not_lag() -> None:
    line = [float(i) for i in range(1000)]
    assert _smoothed(line)[500] == pytest.approx(500, abs=0.5)
    assert _smoothed([3.0] * 10) == pytest.approx([3.0] * 10)


def test_the_plot_shows_losses_and_where_knowing_nothing_is(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    original = Figure.savefig
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), original(self, *a, **k)))
        with Report(tmp_path, 0, 30) as report:
            for step in range(1, 31):
                report.step(record(step, **({"val_loss": 4.5} if step % 10 == 0 else {})))
        assert plot_loss(tmp_path, "title", 257).read_bytes().startswith(b"\x89PNG")
    (axes,) = figures[0].axes
    reference, raw, _, val = axes.lines
    assert np.asarray(reference.get_ydata()) == pytest.approx([5.549, 5.549], abs=1e-3)
    assert np.asarray(raw.get_ydata()).tolist() == [5.0 - s / 10 for s in range(1, 31)]
    assert np.asarray(val.get_xdata()).tolist() == [10, 20, 30]

"""metrics.jsonl and the progress line, on a terminal or not; and loss.png."""

import io
import json
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from gpt2.errors import UserError
from gpt2.reporting.metrics import MetricsLogger, read_metrics
from gpt2.reporting.plots import _smoothed, plot_loss


def record(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "loss": 5.0 - step / 10, "tokens": 256 * step, "tokens_per_second": 1000.0, **more}


def test_plain_lines_without_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with MetricsLogger(tmp_path, 0, 20) as logger:
        for step in range(1, 21):
            logger.log_step(record(step, **({"val_loss": 4.5} if step == 10 else {})))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("step 1/20  loss 4.9000  1,000 tok/s")
    assert any(line.startswith("step 10/20  loss 4.0000  val 4.5000") for line in lines)
    assert lines[-1].startswith("step 20/20  loss 3.0000  val 4.5000")
    assert len(lines) == 3


def test_remaining_time_is_a_duration_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with MetricsLogger(tmp_path, 0, 10) as logger:
        logger._start_time -= 100_000  # seconds for the first of ten steps
        logger.log_step(record(1))
    assert capsys.readouterr().err.rstrip().endswith("tok/s  10 d 10 h left")


def test_progress_line_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(Console, "is_terminal", True)
    with MetricsLogger(tmp_path, 0, 5) as logger:
        for step in range(1, 6):
            logger.log_step(record(step))
        logger.log_message("a line above")
    text = stderr.getvalue()
    assert "step 5/5" in text
    assert "tok/s" in text
    assert "a line above" in text


def test_metrics_are_truncated_on_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record(step)) + "\n" for step in range(1, 8)) + '{"step": 8, "lo')
    with MetricsLogger(tmp_path, 4, 6) as logger:
        logger.log_step(record(5))
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "line",
    [
        '{"stap": 2, "loss": 1.0, "tokens": 512, "tokens_per_second": 1.0}',
        '{"step": 2, "loss": 1.0, "token{": 512, "tokens_per_second": 1.0}',
        '{"step": 2, "loss": 1.0, "tokens": 512, "tokens_per_sgcond": 1.0}',
        '{"step": "2", "loss": 1.0, "tokens": 512, "tokens_per_second": 1.0}',
        '{"step": 2, "loss": 1.0, "tokens": 512, "tokens_per_second": 1.0, "val_loss": "x"}',
        '{"step": Infinity, "loss": 1.0, "tokens": 512, "tokens_per_second": 1.0}',
        f'{{"step": 2, "loss": 1{"0" * 400}, "tokens": 512, "tokens_per_second": 1.0}}',
        "[2]",
        "[" * 100_000,
        "\xff",
    ],
)
def test_a_changed_line_is_skipped(line: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Such as one of whose keys a bit was flipped: a resumed run and its report go on without it."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{json.dumps(record(1))}\n{line}\n{json.dumps(record(3))}\n", encoding="utf-8")
    assert [found["step"] for found in read_metrics(path)] == [1, 3]
    assert "skipped 1 line(s)" in caplog.text


def test_smoothing_does_not_lag() -> None:
    line = [float(i) for i in range(1000)]
    assert _smoothed(line)[500] == pytest.approx(500, abs=0.5)
    assert _smoothed([3.0] * 10) == pytest.approx([3.0] * 10)


def test_smoothing_follows_a_steep_beginning() -> None:
    steep = [3 + 8 * 0.99**i for i in range(10_000)]
    for i in (0, 20, 100, 9_999):
        assert _smoothed(steep)[i] == pytest.approx(steep[i], abs=0.2)


def plot_axes(folder: Path, records: list[dict[str, Any]], unigram_entropy: float | None = None) -> Any:
    """The axes of the plot of a run with these records."""
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    original = Figure.savefig
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), original(self, *a, **k)))
        png = plot_loss(folder, "a run on $HOME/$data", 257, unigram_entropy).read_bytes()
    assert png.startswith(b"\x89PNG")
    assert struct.unpack(">II", png[16:24]) == (960, 540)
    (axes,) = figures[0].axes
    return axes


def legend(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_plot_shows_losses_and_uniform_baseline(tmp_path: Path) -> None:
    axes = plot_axes(tmp_path, [record(s, **({"val_loss": 4.5} if s % 10 == 0 else {})) for s in range(1, 31)])
    reference, raw, smooth, val = axes.lines
    assert np.asarray(reference.get_ydata()) == pytest.approx([5.549, 5.549], abs=1e-3)
    assert np.asarray(raw.get_ydata()).tolist() == [5.0 - s / 10 for s in range(1, 31)]
    assert np.asarray(smooth.get_xdata()).tolist() == list(range(1, 31))
    assert np.asarray(val.get_xdata()).tolist() == [10, 20, 30]
    assert [text.get_text() for text in axes.texts] == ["uniform baseline: ln 257 = 5.55"]
    assert legend(axes) == ["training 2.000", "validation 4.500"]


def test_plot_shows_unigram_baseline_without_overlapping_labels(tmp_path: Path) -> None:
    records = [record(s) for s in range(1, 31)]
    axes = plot_axes(tmp_path, records, unigram_entropy=3.3)
    assert np.asarray(axes.lines[1].get_ydata()).tolist() == [3.3, 3.3]
    assert [text.get_text() for text in axes.texts][1] == "unigram baseline: 3.30"
    close = plot_axes(tmp_path, records, unigram_entropy=5.4)
    (text,) = close.texts
    assert "5.55; unigram baseline: 5.40" in text.get_text()
    assert np.asarray(close.lines[1].get_ydata()).tolist() == [5.4, 5.4]


def test_plot_marks_the_best_validation_loss(tmp_path: Path) -> None:
    records = [record(s, **({"val_loss": 4 + abs(s - 20) / 10} if s % 10 == 0 else {})) for s in range(1, 41)]
    axes = plot_axes(tmp_path, records)
    assert legend(axes)[1] == "validation 6.000 (best 4.000 at step 20)"
    assert np.asarray(axes.lines[-1].get_xydata()).tolist() == [[20, 4.0]]


def test_skipped_steps_are_marked_and_not_in_the_curve(tmp_path: Path) -> None:
    records = [record(s) for s in range(1, 31)]
    records[7] |= {"loss": 99.0, "skipped": True}
    records[9] |= {"loss": float("nan")}
    axes = plot_axes(tmp_path, records)
    _, raw, _, crosses = axes.lines
    assert np.asarray(raw.get_xdata()).tolist() == [s for s in range(1, 31) if s not in (8, 10)]
    assert np.asarray(crosses.get_xdata()).tolist() == [8]
    assert legend(axes)[1] == "skipped: 1 step"
    assert axes.get_ylim()[1] < 7


def test_long_run_is_a_band_and_one_step_a_point(tmp_path: Path) -> None:
    axes = plot_axes(tmp_path, [record(s, loss=3 + s % 2) for s in range(1, 20_001)])
    ((band,),) = [axes.collections]
    edges = band.get_paths()[0].vertices
    assert len(edges) < 2000
    assert {3.0, 4.0} <= set(edges[:, 1].tolist())
    assert len(axes.lines) == 2
    assert plot_axes(tmp_path, [record(1)]).lines[-1].get_marker() == "o"


def test_plot_has_a_panel_for_evaluation_tasks_with_published_values(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    records = [record(step) for step in range(1, 31)]
    for step, value in ((10, 0.25), (20, 0.27), (30, 0.29)):
        records[step - 1] |= {"eval/hellaswag/acc": 0.2, "eval/hellaswag/acc_norm": value, "eval/wikitext2/loss": 4.0}
        records[step - 1] |= {"eval/hellaswag/acc_norm_stderr": 0.01, "eval/wikitext2/word_perplexity": 50.0}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records))
    figures: list[Figure] = []
    original = Figure.savefig
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), original(self, *a, **k)))
        published = {"eval/hellaswag/acc_norm": {"gpt2": 0.3114, "gpt2-xl": 0.5089}}
        png = plot_loss(tmp_path, "title", 257, published=published).read_bytes()
    assert struct.unpack(">II", png[16:24]) == (3 * 960, 540)
    _, accuracy, perplexity = figures[0].axes
    curve, small, large = accuracy.lines
    assert np.asarray(curve.get_xydata()).tolist() == [[10, 0.25], [20, 0.27], [30, 0.29]]
    assert [np.asarray(line.get_ydata()).tolist() for line in (small, large)] == [[0.3114, 0.3114], [0.5089, 0.5089]]
    assert [text.get_text() for text in accuracy.texts] == ["gpt2 0.3114", "gpt2-xl 0.5089"]
    assert (accuracy.get_ylabel(), legend(accuracy)) == ("accuracy", ["hellaswag acc_norm 0.29"])
    assert (perplexity.get_ylabel(), perplexity.get_yscale(), len(perplexity.lines)) == ("perplexity", "log", 1)


def test_plot_without_steps_raises(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match=r"metrics\.jsonl has no step to draw"):
        plot_loss(tmp_path, "title", 257)

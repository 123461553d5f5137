"""How numbers are written in reports and on charts."""

import math

import pytest

pytest.importorskip("matplotlib", reason="the extra [plot] is not installed")
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from gpt2.commands.bench_output import format_quartiles
from gpt2.reporting.axes import NUMBER_FORMAT, format_ticks
from gpt2.reporting.plots import format_loss
from gpt2.train.comparison import LossComparison, _loss_change
from gpt2.units import format_ratio, format_significant


@pytest.mark.parametrize(
    ("ratio", "text"),
    [
        (131.94, "132 times as high"),
        (2, "2 times as high"),
        (1.5, "50% higher"),
        (1.001, "the same"),
        (0.25, "75% lower"),
    ],
)
def test_the_change_of_a_perplexity(ratio: float, text: str) -> None:
    assert _loss_change(LossComparison("text", 1.0, 1.0 + math.log(ratio))) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0001, "0.0001"), (0.05, "0.05"), (0, "0"), (2.5, "2.5"), (401, "401"), (2_000_000, "2,000,000")],
)
def test_ticks_below_one_are_not_zero(value: float, text: str) -> None:
    assert StrMethodFormatter(NUMBER_FORMAT)(value) == text


@pytest.mark.parametrize(
    ("loss", "text"),
    [(0.0001, "0.0001"), (0.00123, "0.0012"), (0.0123, "0.012"), (3.28, "3.280"), (0, "0.000"), (1234.5, "1,234")],
)
def test_small_losses_have_two_digits(loss: float, text: str) -> None:
    assert format_loss(loss) == text


@pytest.mark.parametrize(
    ("scale", "limits", "labels"),
    [
        ("linear", (3.2811, 3.28114), ["3.2811", "3.28112", "3.28114"]),  # no offset
        ("linear", (0, 2e6), ["0", "1,000,000", "2,000,000"]),
        ("log", (3e-3, 3.1e-3), ["0.003", "0.00305", "0.0031"]),
        ("log", (1e-4, 1e-2), ["0.0001", "0.0002", "0.0005", "0.001", "0.002", "0.005", "0.01"]),
        ("log", (1e-3, 1e5), ["0.001", "0.1", "10", "1,000", "100,000"]),
    ],
)
def test_ticks_are_plain_numbers(scale: str, limits: tuple[float, float], labels: list[str]) -> None:
    figure = Figure(figsize=(7, 3))
    axes = figure.subplots()
    axes.set(xscale=scale, xlim=limits)
    format_ticks(axes.xaxis)
    figure.draw_without_rendering()
    assert set(labels) <= {label.get_text() for label in axes.get_xticklabels()}
    assert axes.xaxis.get_offset_text().get_text() == ""
    assert not [label.get_text() for label in axes.get_xticklabels(minor=True) if label.get_text()]


def test_small_and_large_numbers_on_bars_and_lines() -> None:
    assert [format_significant(n) for n in (1e-4, 0.00466, 0.95, 1, 12.34, 401.3, 72_865_057)] == [
        *("0.0001", "0.00466", "0.95", "1.00", "12.3", "401", "72,865,057")
    ]
    assert [format_ratio(n) for n in (0.946, 1.0, 1.126, 12.34, 401.3, 0.0025)] == [
        *("0.95", "1.00", "1.13", "12.3", "401", "0.0025")
    ]
    assert format_quartiles({"median": 0.000123, "low": 0.0001, "high": 0.0002}) == ("0.000123", "0.000100-0.000200")
    assert format_quartiles({"median": 1.234, "low": 1.0, "high": 2.0}) == ("1.23", "1.00-2.00")

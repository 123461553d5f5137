"""How numbers are written in reports and on charts."""

import math

import pytest

pytest.importorskip("matplotlib", reason="the extra [plot] is not installed")
from matplotlib.ticker import StrMethodFormatter

from gpt2.reporting.axes import NUMBER_FORMAT
from gpt2.reporting.plots import format_loss
from gpt2.train.comparison import LossComparison, _loss_change


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
    ("loss", "text"), [(0.0001, "0.0001"), (0.00123, "0.0012"), (0.0123, "0.012"), (3.28, "3.280"), (0, "0.000")]
)
def test_small_losses_have_two_digits(loss: float, text: str) -> None:
    assert format_loss(loss) == text

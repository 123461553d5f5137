"""Axes of charts whose ticks are plain numbers."""

from typing import Any

NUMBER_FORMAT = "{x:,.10g}"  # 0.0001, 0.5, 1,000
_DECADE, _FEW_DECADES = 10, 10_000


def format_ticks(axis: Any) -> None:
    """Plain numbers as ticks of a matplotlib axis, without powers of ten, offsets and overlapping labels.

    On a logarithmic axis the ticks are 1, 2, 5, 10 and so on; over more than four decades only powers of ten, and over
    less than one the same as on a linear axis.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    if axis.get_scale() == "log":
        low, high = sorted(axis.get_view_interval())
        if high < _DECADE * low:
            axis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        else:
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < _FEW_DECADES * low else (1.0,)))
        axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(NUMBER_FORMAT)

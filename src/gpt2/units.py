"""Numbers with units, and tables of text, formatted for people."""

from collections.abc import Sequence


def format_count(number: float) -> str:
    """4.5M, 1.2B, 3.0T; all digits below a million."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return f"{number:,.0f}"


def format_significant(number: float) -> str:
    """Three significant digits: 12,345, 401, 12.3, 1.20, 0.95, 0.000123."""
    if abs(number) >= 100:
        return f"{number:,.0f}"
    return f"{number:.1f}" if abs(number) >= 10 else f"{number:.2f}" if abs(number) >= 1 else f"{number:.3g}"


def format_ratio(ratio: float) -> str:
    """0.95, 1.09, 12.3, 401."""
    return f"{ratio:.2f}" if 0.1 <= ratio < 10 else format_significant(ratio)


def format_bytes(number: float) -> str:
    """1.50 GiB, 949.4 MiB, 1.0 KiB, 12 B."""
    for size, unit, digits in ((2**30, "GiB", 2), (2**20, "MiB", 1), (2**10, "KiB", 1)):
        if number >= size:
            return f"{number / size:,.{digits}f} {unit}"
    return f"{number:.0f} B"


def format_flops(rate: float) -> str:
    """From FLOP/s: 312.0 TFLOP/s, 5.0 GFLOP/s."""
    return f"{rate / 1e12:,.1f} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:,.1f} GFLOP/s"


def format_duration(seconds: float) -> str:
    """0.042 s, 12.3 s, 1 min 42 s, 3 h 12 min, 2 d 5 h."""
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 1 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def align_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table of text, whose rows have equally many cells."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]

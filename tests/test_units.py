"""Numbers with units."""

import pytest

from gpt2.units import format_bytes, format_count, format_duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0421, "0.042 s"),
        (12.34, "12.3 s"),
        (102, "1 min 42 s"),
        (3599.9, "1 h 0 min"),
        (11520, "3 h 12 min"),
        (86400 * 2 + 5 * 3600, "2 d 5 h"),
    ],
)
def test_format_duration(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_format_count_and_bytes() -> None:
    counts = [format_count(number) for number in (50_000, 1e6, 124_439_808, 1.24e9, 3e12)]
    assert counts == ["50,000", "1.0M", "124.4M", "1.2B", "3.0T"]
    sizes = [format_bytes(number) for number in (12, 2**10, 2**20 - 2**10, 995_000_000, 3 * 2**29, 2000 * 2**30)]
    assert sizes == ["12 B", "1.0 KiB", "1,023.0 KiB", "948.9 MiB", "1.50 GiB", "2,000.00 GiB"]

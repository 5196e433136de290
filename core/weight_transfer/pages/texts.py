"""How pages say figures: three digits and a unit."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Return a time with three digits: ``1.53 ms``, ``2.04 s``."""
    return f"{_three_digits(seconds * 1e3)} ms" if seconds < 0.9995 else f"{_three_digits(seconds)} s"


def rate(bytes_per_second: float) -> str:
    """Return a rate in GB/s (10**9 bytes) with three digits."""
    return f"{_three_digits(bytes_per_second / 1e9)} GB/s"


def percent(part: float) -> str:
    """Return a part of one in percent."""
    return f"{part * 100:.1f} %" if part < 0.0995 else f"{part * 100:.0f} %"


def _three_digits(value: float) -> str:
    digits = 3 if value < 0.9995 else 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f}"

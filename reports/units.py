"""Figures as text, each with its unit."""

from __future__ import annotations

from reports.metrics import GIB


def percent(share: float, digits: int = 1) -> str:
    """A share as ``71.1 %``."""
    return f"{100 * share:.{digits}f} %"


def count(number: float) -> str:
    """A whole number with commas."""
    return f"{number:,.0f}"


def data(size_bytes: float) -> str:
    """Bytes in the unit that reads best: ``1.50 GiB``, ``22.5 MiB``."""
    for unit, scale in (("TiB", 2**40), ("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(size_bytes) >= scale:
            return f"{significant(size_bytes / scale)} {unit}"
    return f"{size_bytes:.0f} B"


def duration(seconds: float) -> str:
    """Seconds in the unit that reads best: ``39.2 s``, ``10.9 ms``, ``172 us``."""
    if seconds == 0:
        return "0 s"
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if abs(_rounded(seconds)) >= scale:
            return f"{significant(seconds / scale)} {unit}"
    return f"{significant(seconds * 1e6)} us"


def significant(number: float) -> str:
    """Three significant digits, never fewer than the whole number has."""
    size = abs(_rounded(number))
    return f"{number:,.{0 if size >= 100 else 1 if size >= 10 else 2}f}"


def _rounded(number: float) -> float:
    """What *number* reads as, so that 99.996 counts as 100."""
    return float(f"{number:.3g}")

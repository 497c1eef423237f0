"""Numbers as people write them. A missing value is an en dash, one that is not finite is called what it is."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

THIN = "\u202f"
"""Narrow no-break space: between a number and its unit."""
TIMES = "\u00d7"
_PREFIXES = {"count": ("", "k", "M", "B", "T"), "si": ("", "k", "M", "G", "T", "P", "E")}


def _writer(write: Callable[..., str]) -> Callable[..., str]:
    """A function from a finite number to text, made to take any."""

    @functools.wraps(write)
    def any_number(value: float | None, *form: Any) -> str:
        if value is not None and math.isfinite(value):
            return write(value, *form)
        return {None: "\u2013", math.inf: "\u221e", -math.inf: "\u2212\u221e"}.get(value, "NaN")

    return any_number


def _scientific(value: float) -> str:
    mantissa, exponent = f"{value:.1e}".split("e")
    power = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{mantissa.removesuffix('.0')}{THIN}{TIMES}{THIN}10{power}"


@_writer
def count(value: float, unit: str = "", kind: str = "count") -> str:
    """Three significant digits and a prefix: 1.48 M. `kind` "si" writes G where `count` writes B (billion)."""
    prefixes, rank, scaled = _PREFIXES[kind], 0, float(value)
    while abs(scaled) >= 999.5 and rank < len(prefixes) - 1:
        rank, scaled = rank + 1, scaled / 1000
    if abs(scaled) >= 999.5:
        return f"{_scientific(value)}{THIN}{unit}".rstrip(THIN)
    places = 2 - math.floor(math.log10(abs(scaled))) if rank else 0
    number = f"{scaled:.{places}f}".rstrip("0").rstrip(".") if places else f"{scaled:.0f}"
    return f"{number}{THIN}{prefixes[rank]}{unit}".rstrip(THIN)


@_writer
def decimal(value: float, places: int | None = None) -> str:
    """A plain decimal, `places` after the point or as many as its size calls for: 12.3, 1.93, 0.012, 3.1 x 10^-5."""
    size = abs(value)
    if size >= 1e5 or 0 < size < 1e-3:
        return _scientific(value)
    return f"{value:.{sum(size < edge for edge in (1, 10, 100)) if places is None else places}f}"


def tick(value: float) -> str:
    """A decimal without trailing zeros, for the axis of a plot."""
    text = decimal(value, 6)
    if TIMES in text:
        return text.removeprefix(f"1{THIN}{TIMES}{THIN}")
    return text.rstrip("0").rstrip(".")


@_writer
def percent(fraction: float, least: int = 1) -> str:
    """With `least` places, and more where not quite all would be written as 100 %."""
    if abs(fraction) >= 1e3:
        return f"{_scientific(100 * fraction)}{THIN}%"
    places = next((p for p in range(least, 4) if fraction >= 1 or round(100 * fraction, p) < 100), 4)
    return f"{100 * fraction:.{places}f}{THIN}%"


@_writer
def duration(seconds: float) -> str:
    """The two largest units: 2 d 3 h, 3 h 12 min, 12 min 5 s, 4.2 s."""
    if seconds < 59.5 or seconds >= 1e9:
        return f"{decimal(seconds, 1 if seconds < 9.95 else 0)}{THIN}s"
    units = ((86_400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s"))
    whole = round(seconds)
    size, unit, small, lesser = next(found for found in units if whole >= found[0])
    rest = whole % size // small
    return f"{whole // size}{THIN}{unit}" + (f" {rest}{THIN}{lesser}" if rest else "")

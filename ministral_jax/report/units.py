"""Numbers as people write them. A missing value is an en dash, one that is not finite is called what it is."""

from __future__ import annotations

import math

THIN = "\u202f"
"""Narrow no-break space: between a number and its unit."""
TIMES = "\u00d7"
MISSING = "\u2013"
_PREFIXES = {"count": ("", "k", "M", "B", "T"), "si": ("", "k", "M", "G", "T", "P", "E")}


def _unusual(value: float | None) -> str | None:
    if value is None:
        return MISSING
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "\u221e" if value > 0 else "\u2212\u221e"
    return None


def _significant(value: float, digits: int = 3) -> str:
    """`digits` significant digits without an exponent, for 1 <= |value| < 1000."""
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:.{places}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _scientific(value: float) -> str:
    mantissa, exponent = f"{value:.1e}".split("e")
    power = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{mantissa.removesuffix('.0')}{THIN}{TIMES}{THIN}10{power}"


def count(value: float | None, unit: str = "", kind: str = "count") -> str:
    """Three significant digits and a prefix: 1.48 M. `kind` "si" writes G where `count` writes B (billion)."""
    if (text := _unusual(value)) is not None:
        return text
    assert value is not None
    prefixes = _PREFIXES[kind]
    rank, scaled = 0, float(value)
    while abs(scaled) >= 999.5 and rank < len(prefixes) - 1:
        rank, scaled = rank + 1, scaled / 1000
    if abs(scaled) >= 999.5:
        return f"{_scientific(value)}{THIN}{unit}".rstrip(THIN)
    number = f"{scaled:.0f}" if rank == 0 or scaled == 0 else _significant(scaled)
    return f"{number}{THIN}{prefixes[rank]}{unit}".rstrip(THIN)


def decimal(value: float | None, places: int | None = None) -> str:
    """A plain decimal, `places` after the point or as many as its size calls for: 12.3, 1.93, 0.012, 3.1 x 10^-5."""
    if (text := _unusual(value)) is not None:
        return text
    assert value is not None
    size = abs(value)
    if size >= 1e5 or 0 < size < 1e-3:
        return _scientific(value)
    if places is None:
        places = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{value:.{places}f}"


def tick(value: float) -> str:
    """A decimal without trailing zeros, for the axis of a plot."""
    text = decimal(value, 6)
    if text.startswith(f"1{THIN}{TIMES}"):
        return text.rsplit(THIN, 1)[1]
    return text.rstrip("0").rstrip(".") if "." in text and TIMES not in text else text


def percent(fraction: float | None) -> str:
    if (text := _unusual(fraction)) is not None:
        return text
    assert fraction is not None
    if abs(fraction) >= 1e3:
        return f"{_scientific(100 * fraction)}{THIN}%"
    places = next(
        (p for p in (1, 2, 3) if fraction >= 1 or round(100 * fraction, p) < 100), 4
    )  # not quite all is not 100 %
    return f"{100 * fraction:.{places}f}{THIN}%"


def factor(ratio: float | None) -> str:
    """How many times: 8.4x below ten, 12x above."""
    if (text := _unusual(ratio)) is not None:
        return text
    assert ratio is not None
    return f"{decimal(ratio, 1 if abs(ratio) < 9.95 else 0)}{TIMES}"


def duration(seconds: float | None) -> str:
    """The two largest units: 2 d 3 h, 3 h 12 min, 12 min 5 s, 4.2 s."""
    if (text := _unusual(seconds)) is not None:
        return text
    assert seconds is not None
    if seconds >= 1e9:
        return _scientific(seconds) + f"{THIN}s"
    if seconds < 59.5:
        return f"{seconds:.1f}{THIN}s" if seconds < 9.95 else f"{seconds:.0f}{THIN}s"
    whole = round(seconds)
    for size, unit, small, lesser in ((86_400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // small
            return f"{whole // size}{THIN}{unit}" + (f" {rest}{THIN}{lesser}" if rest else "")
    raise AssertionError


def listing(words: list[str]) -> str:
    """a, b and c."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def plural(number: int, noun: str) -> str:
    words = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    return f"{words[number] if number < len(words) else number} {noun}{'' if number == 1 else 's'}"


def ranges(numbers: list[int]) -> str:
    """3, 5, 8-11."""
    groups: list[list[int]] = []
    for number in sorted(numbers):
        if groups and number == groups[-1][-1] + 1:
            groups[-1].append(number)
        else:
            groups.append([number])
    return ", ".join(str(g[0]) if len(g) == 1 else f"{g[0]}\u2013{g[-1]}" for g in groups)

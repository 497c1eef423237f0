"""Lines as inline SVG. Matplotlib draws in the light palette; its colours become the page's variables, light or dark."""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from ministral_jax.report.style import PALETTE, light
from ministral_jax.report.units import THIN, count, tick

_RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ministral_jax",
    "text.parse_math": False,
    "font.size": 11,
    "axes.edgecolor": light("faint"),
    "axes.labelcolor": light("muted"),
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.labelcolor": light("muted"),
    "ytick.labelcolor": light("muted"),
    "text.color": light("ink"),
    "legend.frameon": False,
    "lines.solid_capstyle": "butt",
    "grid.color": light("rule"),
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
}
_MARKS = {"ring": ("o", 4.8, 1.2), "dot": ("o", 6.0, 1.2), "cross": ("x", 8.0, 2.0), "dash": ("_", 9.0, 1.4)}
"""Marker of matplotlib, size and edge."""
MANY = 400
"""Points; more are drawn as means of equal bins."""


@dataclass(frozen=True)
class Line:
    """Points in order; what no axis can show is a gap."""

    x: Sequence[float] | np.ndarray
    y: Sequence[float] | np.ndarray
    colour: str = "ink"
    """Of the palette, of course."""
    label: str | None = None
    style: str = "-"
    """Matplotlib's; "" for marks alone."""
    mark: str = ""
    """"ring", "dot", "cross" or "dash"."""
    width: float = 1.9
    alpha: float = 1.0
    down_to: float | None = None
    """Fill between this and the points."""


@dataclass(frozen=True)
class Axis:
    label: str = ""
    form: Callable[[float], str] = tick
    """Of its ticks."""
    log: bool = False
    share: bool = False
    """From nothing to all, in per cent."""
    zero: bool = False
    """It begins there."""
    ticks: Sequence[float] = ()
    """Where, if they are few."""
    names: Sequence[str] = ()
    """Of the places 0, 1, 2, ... instead of numbers."""

    @property
    def write(self) -> Callable[[float], str]:
        return (lambda value: f"{tick(round(100 * value, 6))}{THIN}%") if self.share else self.form


TOKENS, STEPS = Axis("tokens", count, zero=True), Axis("steps", count, zero=True)


@dataclass(frozen=True)
class Note:
    """A word at a point, or without `y` at a vertical rule."""

    x: float
    y: float | None
    text: str


def lines(shown: Sequence[Line], x: Axis, y: Axis, alt: str, notes: Sequence[Note] = (), wide: bool = False) -> Any:
    """The one kind of figure. Takes its colours from the page; None when there is nothing that can be drawn."""
    shown = [line for line in (_drawable(line, x, y) for line in shown) if np.isfinite(line.y).any()]
    if not shown:
        return None
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(7.6, 3.4) if wide else (4.7, 3.4), layout="constrained")
        axes = figure.subplots()
        axes.grid(axis="y")
        axes.tick_params(length=0)
        for line in shown:
            _draw(axes, line)
        _scale(axes, "x", x, np.concatenate([line.x for line in shown]))
        _scale(axes, "y", y, np.concatenate([line.y for line in shown]))
        for place, note in enumerate(notes):
            _write(axes, note, 0.98 - 0.09 * place)
        _legend(axes, [line.label for line in shown if line.label], wide)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(buffer.getvalue(), alt)


def _drawable(line: Line, *axes: Axis) -> Line:
    """Numbers of a sensible size, positive on a logarithmic axis, and NaN for all else."""
    x, y = np.asarray(line.x, float), np.asarray(line.y, float)
    for values, axis in zip((x, y), axes, strict=True):
        with np.errstate(invalid="ignore"):
            shown = np.isfinite(x + y) & (abs(values) < 1e30) & ((values > 1e-30) | (not axis.log))
        x, y = np.where(shown, x, np.nan), np.where(shown, y, np.nan)
    return replace(line, x=x, y=y)


def _draw(axes: Axes, line: Line) -> None:
    colour, (marker, size, edge) = light(line.colour), _MARKS.get(line.mark, ("", 0, 0))
    face = light("paper") if line.mark == "ring" else colour
    look: dict[str, Any] = {"marker": marker, "ms": size, "mew": edge, "mfc": face, "mec": colour}
    if line.down_to is not None:
        axes.fill_between(line.x, line.y, line.down_to, color=colour, alpha=0.18, lw=0)
    look |= {"ls": line.style or "None", "lw": line.width, "alpha": line.alpha, "label": line.label}
    axes.plot(line.x, line.y, color=colour, **look)


def _scale(axes: Axes, side: str, scale: Axis, values: np.ndarray) -> None:
    axis, values = getattr(axes, f"{side}axis"), values[np.isfinite(values)]
    low, high = float(values.min()), float(values.max())
    limit = getattr(axes, f"set_{side}lim")
    axis.set_label_text(scale.label)
    axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10], integer=scale.form is count))
    if scale.log:
        getattr(axes, f"set_{side}scale")("log")
        limit(low / 1.25, high * 1.25)
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 250 * low else (1,), numticks=8))
    elif scale.share and high > 0.3:
        limit(-0.03, 1.03)
        axis.set_major_locator(FixedLocator([0, 0.25, 0.5, 0.75, 1]))
    elif len(values) > MANY // 2 and side == "y":
        high = float(np.quantile(values, 0.995))  # limits that a few outliers do not decide
        limit(low - 0.06 * (high - low), high + 0.06 * (high - low))
    if scale.zero:
        limit(0, None)
    if scale.names:
        limit(-0.5, len(scale.names) - 0.5)
        slant: Any = {"rotation": 25, "ha": "right"} if sum(len(name) + 2 for name in scale.names) > 44 else {}
        axes.set_xticks(range(len(scale.names)), scale.names, **slant)
    else:
        if scale.ticks:
            axis.set_major_locator(FixedLocator(list(scale.ticks)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: scale.write(value)))
    axis.set_minor_locator(NullLocator())


def _write(axes: Axes, note: Note, height: float) -> None:
    if note.y is not None:
        axes.annotate(note.text, (note.x, note.y), (7, -4), textcoords="offset points", va="top")
        return
    axes.axvline(note.x, color=light("faint"), lw=0.9)
    (left, _), (right, _) = axes.transAxes.transform([(0, 0), (1, 0)])
    late = axes.transData.transform((note.x, 1))[0] > (left + right) / 2
    side: Any = {"ha": "right", "xytext": (-5, 0)} if late else {"ha": "left", "xytext": (5, 0)}
    place = (note.x, height)
    axes.annotate(note.text, place, xycoords=axes.get_xaxis_transform(), textcoords="offset points", va="top", **side)


def _legend(axes: Axes, names: list[str], wide: bool) -> None:
    if wide and 3 < len(names) <= 16:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), handlelength=2.6)
    elif names and len(names) <= 6:
        columns = min(len(names), 3, max(1, 60 // (max(map(len, names)) + 6)))
        axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=columns, borderaxespad=0.0, handlelength=1.8)


def _inline(svg: str, alt: str) -> Markup:
    """Matplotlib's file as part of a page: no prologue, no foreign name spaces, ids of its own, colours by variable."""
    body = svg[svg.index("<svg") :]
    view = re.search(r'viewBox="([^"]*)"', body)
    assert view is not None
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body[body.index(">") + 1 :], flags=re.S)
    body = re.sub(r" font-family: [^;\"]*;", "", body).replace("xlink:href", "href")
    used = set(re.findall(r'(?:url\(|href=")#(\w+)', body))
    prefix = f"f{hashlib.sha256((alt + body).encode('utf-8', 'replace')).hexdigest()[:8]}-"
    body = re.sub(r' id="([^"]*)"', lambda m: f' id="{prefix}{m[1]}"' if m[1] in used else "", body)
    body = re.sub(r'(url\(|href=")#(\w+)', rf"\1#{prefix}\2", body)
    for name, (hexadecimal, _) in PALETTE.items():
        body = body.replace(hexadecimal, f"var(--{name})")
    body = re.sub(r"\s*\n\s*", " ", body)
    return Markup(f'<svg class="plot" role="img" aria-label="{escape(alt)}" viewBox="{view[1]}">{body}')


def smooth(y: np.ndarray) -> np.ndarray:
    """Centred moving average over a tenth of the points, shorter at the ends."""
    at = np.arange(len(y))
    half = np.minimum(np.minimum(at, len(y) - 1 - at), max(1, len(y) // 20))
    total = np.concatenate([[0.0], np.cumsum(y)])
    return (total[at + half + 1] - total[at - half]) / (2 * half + 1)


def thin(values: np.ndarray) -> np.ndarray:
    """Means of equal bins when there are more points than a figure can show."""
    if len(values) <= MANY:
        return values
    starts = np.arange(0, len(values), math.ceil(len(values) / MANY))
    return np.add.reduceat(values, starts) / np.diff(starts, append=len(values))

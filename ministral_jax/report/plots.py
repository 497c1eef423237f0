"""Lines as inline SVG. Matplotlib draws in the light palette; its colours become the page's variables."""

from __future__ import annotations

import hashlib
import io
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from ministral_jax.report.units import THIN, count, tick

PALETTE: dict[str, tuple[str, str]] = {
    "paper": ("#fdfdfc", "#15181c"), "panel": ("#f4f4f1", "#1c2026"), "ink": ("#1b1f24", "#e7e9ec"),
    "muted": ("#5f6872", "#9aa4af"), "faint": ("#a4abb3", "#5d6772"), "rule": ("#e2e3df", "#2d333b"),
    "wrong": ("#b1261d", "#ff8f85"), "model-0": ("#47505c", "#b4bfcc"), "model-1": ("#0069a8", "#5db7ee"),
    "model-2": ("#00795a", "#3cc79a"), "model-3": ("#bd4b00", "#ff9850"), "model-4": ("#9c4280", "#e070b4"),
    "model-5": ("#514200", "#f0e07c"),
}  # fmt: skip
"""Name of a colour to its light and dark value. The `model-n` follow Okabe and Ito, so that colour-blind readers tell
them apart, and reach a contrast of 4.5 on paper. No light value occurs twice: plots find their variable by it."""
_RAMP = 16
for _n, _light, _dark in zip(range(_RAMP), np.linspace(0.0, 0.72, _RAMP), np.linspace(0.3, 1.0, _RAMP), strict=True):
    PALETTE[f"ramp-{_n}"] = (
        to_hex(matplotlib.colormaps["cividis"](_light)),
        to_hex(matplotlib.colormaps["cividis"](_dark)),
    )
_LIGHT = {name: light for name, (light, _) in PALETTE.items()}
_RC: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "ministral_jax", "text.parse_math": False, "text.color": _LIGHT["ink"],
    "font.size": 11, "axes.edgecolor": _LIGHT["faint"], "axes.labelcolor": _LIGHT["muted"], "axes.linewidth": 0.8,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "xtick.labelcolor": _LIGHT["muted"],
    "ytick.labelcolor": _LIGHT["muted"], "legend.frameon": False, "lines.solid_capstyle": "butt",
    "grid.color": _LIGHT["rule"], "grid.linewidth": 0.8,
}  # fmt: skip
_MARKS = {"ring": ("o", 4.8, 1.2), "dot": ("o", 6.0, 1.2), "cross": ("x", 8.0, 2.0), "dash": ("_", 9.0, 1.4)}
"""Marker of matplotlib, size and edge."""


def accent(index: int, of: int = 1) -> str:
    """The colour of the parent (0) or of child 1, 2, ... of so many. Up to five are told apart by hue, up to sixteen by
    shades of a scale made for colour-blind readers; only beyond that do some share one."""
    if index == 0 or of <= 5:
        return f"model-{index and (index - 1) % 5 + 1}"
    return f"ramp-{(index - 1) * (_RAMP - 1) // (of - 1) if of <= _RAMP else (index - 1) % _RAMP}"


def variables(selector: str) -> str:
    """The palette as CSS custom properties of `selector`: dark on dark screens, light elsewhere (on paper too)."""
    light, dark = ("".join(f"--{name}:{pair[tone]};" for name, pair in PALETTE.items()) for tone in (0, 1))
    return f"{selector}{{{light}}}\n@media screen and (prefers-color-scheme:dark){{{selector}{{{dark}}}}}\n"


def share_tick(value: float) -> str:
    return f"{tick(round(100 * value, 6))}{THIN}%"


@dataclass(frozen=True)
class Line:
    """Points in order; what no axis can show is a gap. `style` is matplotlib's, "" for marks alone; see `_MARKS`."""

    x: Sequence[float] | np.ndarray
    y: Sequence[float] | np.ndarray
    colour: str = "ink"
    label: str | None = None
    style: str = "-"
    mark: str = ""
    width: float = 1.9
    alpha: float = 1.0
    down_to: float | None = None
    """Fill between this and the points."""


@dataclass(frozen=True)
class Axis:
    label: str = ""
    form: Callable[[float], str] = tick
    """Of its ticks."""
    log: bool | None = False
    """None: where the values call for it."""
    share: bool = False
    """From nothing to all, in per cent."""
    zero: bool = False
    """It begins there."""
    high: float | None = None
    """Where it ends."""
    names: Sequence[str] = ()
    """Of the places 0, 1, 2, ... instead of numbers."""


TOKENS, STEPS = Axis("tokens", count, zero=True), Axis("steps", count, zero=True)


@dataclass(frozen=True)
class Note:
    """A word at a point, or without `y` at a vertical rule."""

    x: float
    y: float | None
    text: str


def lines(
    shown: Sequence[Line], x: Axis, y: Axis, alt: str, notes: Sequence[Note] = (), wide: bool = False
) -> Markup | None:
    """The one kind of figure. Takes its colours from the page; None when there is nothing that can be drawn."""
    if y.log is None:
        values = np.concatenate([np.asarray(line.y, float) for line in shown])
        y = replace(y, log=len(values) > 0 and 0 < 10 * values.min() < values.max())
    shown = [line for line in (_drawable(line, x, y) for line in shown) if np.isfinite(line.y).any()]
    if not shown:
        return None
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(8.8, 3.6) if wide else (4.7, 3.4), layout="constrained")
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


def spark(values: np.ndarray, alt: str) -> Markup:
    """A line without axes, from 0 at its foot to the largest value, for a cell of a table."""
    x, y = np.linspace(1, 159, len(values)), 31 - 30 * values / max(float(values.max()), 1e-30)
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y.clip(1, 31), strict=True))
    look = 'fill="none" stroke="var(--ink)" stroke-width="1.3"'
    box = 'class="spark" role="img" viewBox="0 0 160 32"'
    return Markup(f'<svg {box} aria-label="{escape(alt)}"><polyline {look} points="{path}" /></svg>')


def _drawable(line: Line, *axes: Axis) -> Line:
    """Numbers of a sensible size, positive on a logarithmic axis, and NaN for all else."""
    ends = np.array([line.x, line.y], float)
    low = np.array([[1e-30 if axis.log else -1e30] for axis in axes])
    x, y = np.where(((ends > low) & (ends < 1e30)).all(0), ends, np.nan)
    return replace(line, x=x, y=y)


def _draw(axes: Axes, line: Line) -> None:
    colour, (marker, size, edge) = _LIGHT[line.colour], _MARKS.get(line.mark, ("", 0, 0))
    look: dict[str, Any] = {"marker": marker, "ms": size, "mew": edge, "mec": colour, "clip_on": not line.mark}
    look |= {"ls": line.style or "None", "lw": line.width, "alpha": line.alpha, "label": line.label}
    if line.down_to is not None:
        axes.fill_between(line.x, line.y, line.down_to, color=colour, alpha=0.18, lw=0)
    axes.plot(line.x, line.y, color=colour, mfc=_LIGHT["paper"] if line.mark == "ring" else colour, **look)


def _scale(axes: Axes, side: str, scale: Axis, values: np.ndarray) -> None:
    axis, limit = getattr(axes, f"{side}axis"), getattr(axes, f"set_{side}lim")
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    axis.set_label_text(scale.label)
    axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10], integer=scale.form is count))
    if scale.log:
        getattr(axes, f"set_{side}scale")("log")
        limit(low / 1.25, high * 1.25)
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 250 * low else (1,), numticks=8))
    elif scale.share and high > 0.3:
        limit(-0.03, 1.03)
        axis.set_major_locator(FixedLocator([0, 0.25, 0.5, 0.75, 1]))
    elif scale.share:
        limit(-0.03 * (top := max(1.05 * high, 0.02)), top)
    if scale.zero or scale.high is not None:
        limit(0 if scale.zero else None, scale.high)
    if scale.names:
        limit(-0.5, len(scale.names) - 0.5)
        slant: Any = {"rotation": 25, "ha": "right"} if sum(len(name) + 2 for name in scale.names) > 44 else {}
        axes.set_xticks(range(len(scale.names)), scale.names, **slant)
    else:
        form = share_tick if scale.share else scale.form
        axis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))
    axis.set_minor_locator(NullLocator())


def _write(axes: Axes, note: Note, height: float) -> None:
    if note.y is not None:
        axes.annotate(note.text, (note.x, note.y), (7, -4), textcoords="offset points", va="top")
        return
    axes.axvline(note.x, color=_LIGHT["faint"], lw=0.9)
    late = axes.transAxes.inverted().transform(axes.transData.transform((note.x, 1)))[0] > 0.5
    side: Any = {"ha": "right", "xytext": (-5, 0)} if late else {"ha": "left", "xytext": (5, 0)}
    place = (note.x, height)
    axes.annotate(note.text, place, xycoords=axes.get_xaxis_transform(), textcoords="offset points", va="top", **side)


def _legend(axes: Axes, names: list[str], wide: bool) -> None:
    beside = wide and 3 < len(names) <= 16
    # a long name would leave no room for the axes, or go beyond them
    told = [textwrap.fill(name, 28 if beside else 44) for name in names]
    style = {"handles": axes.get_legend_handles_labels()[0], "labels": told}
    if beside and sum(name.count("\n") + 1 for name in told) <= 20:
        axes.legend(**style, loc="upper left", bbox_to_anchor=(1.0, 1.0), handlelength=2.6)
    elif 0 < len(names) <= 6:
        columns = min(len(names), 3, max(1, 60 // (max(map(len, names)) + 6)))
        above = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "borderaxespad": 0.0, "handlelength": 1.8}
        axes.legend(**style, **above, ncols=columns)


def _inline(svg: str, alt: str) -> Markup:
    """Matplotlib's file as part of a page: no prologue, no foreign name spaces, ids of its own, colours by variable."""
    view = re.findall(r'viewBox="([^"]*)"', svg)[0]
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.S)
    body = re.sub(r" font-family: [^;\"]*;", "", body).replace("xlink:href", "href")
    used = set(re.findall(r'(?:url\(|href=")#(\w+)', body))
    prefix = f"f{hashlib.sha256((alt + body).encode('utf-8', 'replace')).hexdigest()[:8]}-"
    body = re.sub(r' id="([^"]*)"', lambda m: f' id="{prefix}{m[1]}"' if m[1] in used else "", body)
    body = re.sub(r'(url\(|href=")#(\w+)', rf"\1#{prefix}\2", body)
    for name, light in _LIGHT.items():
        body = body.replace(light, f"var(--{name})")
    body = re.sub(r"\s*\n\s*", " ", body)
    return Markup(f'<svg class="plot" role="img" aria-label="{escape(alt)}" viewBox="{view}">{body}')

"""Figures as inline SVG. Matplotlib draws in the light palette; its colours become the page's variables, light or dark.

No text that comes from data enters a figure: names stand in the HTML around it.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from ministral_jax.report.collect import Crossing, Row, series
from ministral_jax.report.markup import Html, escape
from ministral_jax.report.style import PALETTE, light
from ministral_jax.report.units import THIN, count, factor, percent, tick

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
    "axes.unicode_minus": True,
    "xtick.color": light("faint"),
    "ytick.color": light("faint"),
    "xtick.labelcolor": light("muted"),
    "ytick.labelcolor": light("muted"),
    "text.color": light("ink"),
    "legend.frameon": False,
    "lines.linewidth": 1.9,
    "lines.solid_capstyle": "round",
    "grid.color": light("rule"),
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
}
_POINTS = 400


def draw(paint: Callable[[Axes], None], alt: str, size: tuple[float, float] = (4.7, 3.4)) -> Html:
    """One figure with one axes, `size` in inches of 72 CSS pixels, as SVG that takes its colours from the page."""
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        axes.grid(axis="y")
        axes.tick_params(length=0)
        paint(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(buffer.getvalue(), alt)


def _inline(svg: str, alt: str) -> Html:
    """Matplotlib's file as part of a page: no prologue, no foreign name spaces, ids of its own, colours by variable."""
    body = svg[svg.index("<svg") :]
    view = re.search(r'viewBox="([^"]*)"', body)
    assert view is not None
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body[body.index(">") + 1 :], flags=re.S)
    body = re.sub(r" font-family: [^;\"]*;", "", body)
    body = body.replace("xlink:href", "href")
    used = set(re.findall(r'(?:url\(|href=")#(\w+)', body))
    prefix = f"f{hashlib.sha256((alt + body).encode('utf-8', 'replace')).hexdigest()[:8]}-"
    body = re.sub(r' id="([^"]*)"', lambda m: f' id="{prefix}{m[1]}"' if m[1] in used else "", body)
    body = re.sub(r'(url\(|href=")#(\w+)', rf"\1#{prefix}\2", body)
    for name, (hexadecimal, _) in PALETTE.items():
        body = body.replace(hexadecimal, f"var(--{name})")
    body = re.sub(r"\s*\n\s*", " ", body)
    return Html(f'<svg class="plot" role="img" aria-label="{escape(alt)}" viewBox="{view[1]}">{body}')


def log_y(axes: Axes, values: Sequence[float]) -> None:
    """Logarithmic, limits with some air, ticks written as plain decimals."""
    low, high = min(values), max(values)
    low, high = low / 1.25, high * 1.25
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    decades = math.log10(high / low)
    subs = (1.0, 2.0, 5.0) if decades < 2.6 else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=8))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: tick(y)))


def percent_axis(axes: Axes, highest: float) -> None:
    """Shares, from nothing to all; where even the highest is small, to a little above it."""
    top = 1.0 if highest > 0.3 else max(1.1 * highest, 0.02)
    axes.set_ylim(-0.03 * top, 1.03 * top)
    axes.yaxis.set_major_locator(FixedLocator([0, 0.25, 0.5, 0.75, 1]) if top == 1 else MaxNLocator(4))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{tick(100 * y)}{THIN}%"))


def token_axis(axes: Axes, label: str = "tokens") -> None:
    axes.set_xlabel(label)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: count(x)))


def thin(xs: list[float], ys: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Means of equal bins when there are more points than a figure can show."""
    x, y = np.asarray(xs), np.asarray(ys)
    if len(x) <= _POINTS:
        return x, y
    starts = np.arange(0, len(x), -(-len(x) // _POINTS))
    sizes = np.diff(starts, append=len(x))
    return np.add.reduceat(x, starts) / sizes, np.add.reduceat(y, starts) / sizes


def smooth(y: np.ndarray) -> np.ndarray:
    """Centred moving average over a tenth of the points, shorter at the ends."""
    at = np.arange(len(y))
    half = np.minimum(np.minimum(at, len(y) - 1 - at), max(1, len(y) // 20))
    total = np.concatenate([[0.0], np.cumsum(y)])
    return (total[at + half + 1] - total[at - half]) / (2 * half + 1)


def kl_curves(
    colour: str, pruned: list[list[Row]], scratch: list[list[Row]], found: Crossing | None, alt: str
) -> Html | None:
    """Held-out KL against tokens: pruned start and baseline, short stage and then long stage on one axis.

    `pruned` and `scratch` hold the evaluations of the short and, where there is one, the long stage.
    """
    accent = light(colour)
    starts = _starts(pruned, scratch)
    lines = [
        (series(rows, "kl", start, positive=True), style)
        for stages, style in ((scratch, "--"), (pruned, "-"))
        for rows, start in zip(stages, starts, strict=False)
    ]
    lines = [line for line in lines if line[0][1]]
    values = [y for (_, ys), _ in lines for y in ys]
    if not values:
        return None

    def paint(axes: Axes) -> None:
        log_y(axes, values)
        labels = {"-": "pruned start", "--": "random start"}
        for (xs, ys), style in lines:
            if style == "-" and found is not None and found.tokens and xs and xs[0] == 0:
                xs, ys = zip(*sorted([*zip(xs, ys, strict=True), (found.tokens, found.kl)]), strict=True)
            faded = 0.75 if style == "--" else 1.0
            axes.plot(
                xs,
                ys,
                style,
                color=accent,
                alpha=faded,
                label=labels.pop(style, None),
                lw=1.5 if style == "--" else 2.2,
            )
            if len(xs) == 1:
                axes.plot(xs, ys, "o", color=accent, ms=5, alpha=faded)
        if found is not None:
            _mark_crossing(axes, found, accent)
        for start in starts[1:]:
            axes.axvline(start, color=light("faint"), lw=0.9)
            axes.text(
                start, 1.01, " long context", transform=axes.get_xaxis_transform(), color=light("muted"), va="bottom"
            )
        token_axis(axes)
        axes.set_ylabel("held-out KL to the parent, nats")
        handles, names = axes.get_legend_handles_labels()
        short_end = starts[1] / axes.get_xlim()[1] if len(starts) > 1 else 1.0
        axes.legend(handles[::-1], names[::-1], loc="upper right", bbox_to_anchor=(short_end, 1.0), handlelength=2.2)

    return draw(paint, alt)


def _starts(pruned: list[list[Row]], scratch: list[list[Row]]) -> list[float]:
    """Where each stage begins on the common axis; stages count their own tokens from 0."""
    ends = [[rows[-1].get("tokens", 0.0) for rows in stages if rows] for stages in (pruned, scratch)]
    longest = [max(same) for same in itertools.zip_longest(*ends, fillvalue=0.0)]
    return list(itertools.accumulate([0.0, *longest[:-1]])) if longest else []


def _mark_crossing(axes: Axes, found: Crossing, accent: str) -> None:
    begin = found.tokens if found.tokens is not None else 0.0
    axes.plot([begin, found.scratch_tokens], [found.kl] * 2, ":", color=light("ink"), lw=1.1)
    if found.tokens is None or found.speedup is None:
        return
    axes.plot([found.tokens], [found.kl], "o", ms=7, mfc=light("paper"), mec=accent, mew=2, zorder=5, clip_on=False)
    if found.tokens > 0 and found.speedup > 1.05:
        where = ((begin + found.scratch_tokens) / 2, found.kl)
        axes.annotate(
            f"{factor(found.speedup)} fewer tokens", where, (0, -5), textcoords="offset points", ha="center", va="top"
        )


def loss_curve(
    colour: str,
    train: list[Row],
    evals: list[Row],
    key: str,
    label: str,
    alt: str,
    size: tuple[float, float] = (4.7, 3.4),
    of_training: str = "loss",
    over: str = "tokens",
) -> Html | None:
    """Training loss (or what else `of_training`), smoothed over the raw one, and held-out values of `key` as points."""
    xs, ys = thin(*series(train, of_training, over=over))
    held_x, held_y = series(evals, key, over=over)
    if not len(xs) and not held_x:
        return None
    accent = light(colour)

    def paint(axes: Axes) -> None:
        if len(xs):
            axes.plot(xs, ys, color=accent, alpha=0.28, lw=1)
            axes.plot(xs, smooth(ys), color=accent, label="training")
        if held_x:
            axes.plot(held_x, held_y, "o", ms=4.5, mfc=light("paper"), mec=light("ink"), mew=1.2, label="held out")
        _cut_spikes(axes, np.concatenate([ys, held_y]))
        token_axis(axes, "steps" if over == "step" else over)
        axes.set_ylabel(label)
        axes.legend(loc="best")

    return draw(paint, alt, size)


def _cut_spikes(axes: Axes, values: np.ndarray) -> None:
    """Limits that a few outliers do not decide."""
    low, high = float(values.min()), float(np.quantile(values, 0.995))
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    axes.set_ylim(low - room, max(high, float(values[0]) if values[0] < 3 * abs(high) else high) + room)


def spectrum(
    colour: str, index: list[float], energy: list[float], kept: int, retained: float | None, alt: str
) -> Html | None:
    """Energy of the residual stream along each direction, most important first, and where it was cut."""
    pairs = [
        (i + 1, e) for i, e in zip(index, energy, strict=False) if math.isfinite(i + e) and 1e-30 < e < 1e30 and i >= 0
    ]
    if not pairs:
        return None
    x, y = (np.array(values) for values in zip(*pairs, strict=True))
    y = y / y.max()
    accent = light(colour)

    def paint(axes: Axes) -> None:
        log_y(axes, list(y))
        floor = axes.get_ylim()[0]
        axes.fill_between(x, y, floor, where=(x <= kept).tolist(), color=accent, alpha=0.18, lw=0)
        axes.plot(x, y, color=light("faint"), lw=1.6)
        axes.plot(x[x <= kept], y[x <= kept], color=accent, lw=2.2)
        axes.axvline(kept + 0.5, color=light("ink"), lw=1, ls=":")
        side = {"ha": "right", "xytext": (-6, 0)} if kept > x.max() / 2 else {"ha": "left", "xytext": (6, 0)}
        note = f"{kept} kept" + (f", {percent(retained)} of the energy" if retained is not None else "")
        axes.annotate(
            note, (kept + 0.5, 0.97), xycoords=axes.get_xaxis_transform(), textcoords="offset points", va="top", **side
        )
        axes.set_xlim(0, x.max() + 1)
        axes.set_xlabel("principal direction of the residual stream")
        axes.set_ylabel("energy, largest = 1")

    return draw(paint, alt)


def layer_scores(colour: str, scores: list[float], kept: list[int], alt: str) -> Html | None:
    """One point per layer of the source; a dropped one is a cross."""
    values = np.array([s if math.isfinite(s) and abs(s) < 1e30 else 0.0 for s in scores])
    if not len(values):
        return None
    accent = light(colour)

    def paint(axes: Axes) -> None:
        position = np.arange(len(values))
        stays = np.isin(position, kept)
        axes.plot(position, values, color=light("rule"), lw=1.6)
        axes.plot(position[stays], values[stays], "o", color=accent, ms=7, label="kept")
        axes.plot(position[~stays], values[~stays], "x", color=light("ink"), ms=8, mew=2, label="dropped")
        axes.margins(x=0.06, y=0.12)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, borderaxespad=0.0)
        axes.xaxis.set_major_locator(
            MaxNLocator(9, integer=True) if len(values) > 12 else FixedLocator(position.tolist())
        )
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0f}"))
        axes.set_xlabel("layer")
        axes.set_ylabel("score")

    return draw(paint, alt)


def mlp_scores(colour: str, layers: list[tuple[list[float], float]], alt: str) -> Html | None:
    """Spread of neuron scores in every layer; what lies above the cut was kept.

    `layers` holds for each its quantiles (minimum, quarter, median, three quarters, maximum) and its lowest kept score.
    """
    finite = [
        (q, cut) for q, cut in layers if len(q) == 5 and all(math.isfinite(v) and abs(v) < 1e30 for v in [*q, cut])
    ]
    positive = [v for q, _ in finite for v in q if v > 0]
    if not positive:
        return None
    floor, accent = min(positive), light(colour)

    def paint(axes: Axes) -> None:
        log_y(axes, positive)
        for x, (quantiles, cut) in enumerate(finite):
            low, quarter, median, upper, high = (max(v, floor) for v in quantiles)
            cut = min(max(cut, low), high)
            for begin, end, color, alpha in ((low, cut, light("muted"), 0.55), (cut, high, accent, 1.0)):
                axes.plot([x, x], [begin, end], color=color, alpha=alpha, lw=1.6, solid_capstyle="butt")
                if (lower := max(begin, quarter)) < (top := min(end, upper)):
                    axes.plot([x, x], [lower, top], color=color, alpha=alpha, lw=8, solid_capstyle="butt")
            axes.plot([x - 0.17, x + 0.17], [median] * 2, color=light("paper"), lw=1.6, solid_capstyle="butt")
            axes.plot([x - 0.4, x + 0.4], [cut] * 2, color=light("ink"), lw=1.4, solid_capstyle="butt")
        axes.set_xlim(-0.7, len(finite) - 0.3)
        axes.xaxis.set_major_locator(
            MaxNLocator(9, integer=True) if len(finite) > 12 else FixedLocator(range(len(finite)))
        )
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0f}"))
        axes.set_xlabel("layer")
        axes.set_ylabel("neuron score")

    return draw(paint, alt)

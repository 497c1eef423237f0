"""Figures of a logit store: what it leaves out of a token, from shard to shard, and against what it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from ministral_jax.report.markup import Html
from ministral_jax.report.plots import draw, log_y
from ministral_jax.report.style import light
from ministral_jax.report.units import THIN, count, tick

_MOST_BARS = 36
_MOST_SHARDS = 400


def drawable(*values: float | None) -> bool:
    """Whether a logarithmic axis can show all of them."""
    return all(value is not None and 1e-30 < value < 1e30 for value in values)


def distribution(
    colour: str, at_most: Sequence[float], tokens: Sequence[float], marks: Mapping[str, float], alt: str
) -> Html | None:
    """Tokens by the share left out of them.

    Args:
        at_most: upper ends of bins, ascending.
        tokens: how many are in each.
        marks: rules, by name.
    """
    edges, counts = np.array(at_most), np.array(tokens)
    if len(edges) != len(counts) or len(edges) < 2 or not drawable(*at_most) or not (np.diff(edges) > 0).all():
        return None
    if not (np.isfinite(counts).all() and (counts >= 0).all() and 0 < counts.sum() < 1e30):
        return None
    edges = np.concatenate([[edges[0] ** 2 / edges[1]], edges])  # the first bin has no lower end
    first, last = np.flatnonzero(counts)[[0, -1]]
    starts = np.arange(first, last + 1, -(-(last + 1 - first) // _MOST_BARS))
    stops = np.append(starts[1:], last + 1)
    shares = np.add.reduceat(counts[: last + 1], starts) / counts.sum()

    def paint(axes: Axes) -> None:
        axes.set_xscale("log")
        axes.bar(
            edges[starts], shares, np.diff(edges[[*starts, stops[-1]]]), align="edge", color=light(colour), alpha=0.6
        )
        axes.set_ylim(0, 1.2 * shares.max())
        middle = np.sqrt(edges[first] * edges[last + 1])
        for place, (name, share) in zip((0.98, 0.9), marks.items(), strict=False):
            if drawable(share):
                axes.axvline(share, color=light("ink"), lw=1.1, ls=":")
                side = {"ha": "right", "xytext": (-5, 0)} if share > middle else {"ha": "left", "xytext": (5, 0)}
                where = (share, place)
                axes.annotate(
                    name, where, xycoords=axes.get_xaxis_transform(), textcoords="offset points", va="top", **side
                )
        _shares(axes.xaxis)
        narrow = edges[last + 1] < 400 * edges[first]
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if narrow else (1.0,), numticks=6))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{tick(100 * y)}{THIN}%"))
        axes.set_xlabel("probability left out of a token")
        axes.set_ylabel("tokens in each bar")

    return draw(paint, alt)


def by_shard(colour: str, lines: Mapping[str, Sequence[float]], alt: str) -> Html | None:
    """Shares of every shard by name of the share; where there are many shards, the range over neighbours."""
    shown = {name: np.array(values) for name, values in lines.items() if len(values) > 1 and drawable(*values)}
    if not shown:
        return None

    def paint(axes: Axes) -> None:
        log_y(axes, [share for values in shown.values() for share in values])
        for (name, values), filled in zip(shown.items(), (True, False), strict=False):
            starts = np.arange(0, len(values), -(-len(values) // _MOST_SHARDS))
            if len(starts) < len(values):
                low, high = (pick.reduceat(values, starts) for pick in (np.minimum, np.maximum))
                axes.fill_between(
                    starts, low, high, color=light(colour), alpha=0.8 if filled else 0.35, lw=0, label=name
                )
            else:
                face = light(colour) if filled else light("paper")
                axes.plot(starts, values, "o", ms=4, mfc=face, mec=light(colour), mew=1.1, label=name)
        _shares(axes.yaxis)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: count(x)))
        axes.margins(x=0.04)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, borderaxespad=0.0)
        axes.set_xlabel("shard")
        axes.set_ylabel("probability left out")

    return draw(paint, alt)


def against_bytes(colour: str, points: Sequence[tuple[int, float, float, bool]], alt: str) -> Html | None:
    """Share left out against bytes per token: (entries, bytes, share, whether it is what was stored) of each size."""
    shown = [(entries, takes, share, now) for entries, takes, share, now in points if drawable(takes, share)]
    if len(shown) < 2:
        return None

    def paint(axes: Axes) -> None:
        log_y(axes, [share for _, _, share, _ in shown])
        axes.plot([takes for _, takes, _, _ in shown], [share for _, _, share, _ in shown], color=light("rule"), lw=1.6)
        for entries, takes, share, now in shown:
            face = light(colour) if now else light("paper")
            axes.plot([takes], [share], "o", ms=7, mfc=face, mec=light(colour), mew=1.6)
            axes.annotate(f"{entries}", (takes, share), (7, 3), textcoords="offset points")
        _shares(axes.yaxis)
        axes.set_xlim(0, 1.15 * max(takes for _, takes, _, _ in shown))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: count(x)))
        axes.set_xlabel("bytes per token")
        axes.set_ylabel("probability left out, mean")

    return draw(paint, alt)


def _shares(axis: Axis) -> None:
    """Percent on a logarithmic axis."""
    axis.set_major_formatter(FuncFormatter(lambda share, _: f"{tick(100 * share)}{THIN}%"))
    axis.set_minor_locator(NullLocator())

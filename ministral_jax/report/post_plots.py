"""Figures of post-training: held-out accuracy, rewards, win rates and the conduct of answers, against steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ministral_jax.report.collect import Row, series
from ministral_jax.report.markup import Html
from ministral_jax.report.plots import draw, percent_axis, smooth, thin, token_axis
from ministral_jax.report.style import light

SMALL = (4.7, 1.72)
"""Two of them are as high as another figure."""

_STEPS = [1, 2, 2.5, 5, 10]


@dataclass(frozen=True)
class Line:
    """A metric against steps."""

    key: str
    colour: str
    label: str | None = None
    """In the figure, so never text that comes from data; None: the page tells what the colour means."""
    style: str = "-"
    thick: bool = False


def lines(
    rows: Sequence[Row],
    shown: Sequence[Line],
    y_label: str,
    alt: str,
) -> Html | None:
    """Shares at held-out evaluations, a ring at each."""
    found = [(line, *series(rows, line.key, over="step")) for line in shown]
    found = [(line, xs, ys) for line, xs, ys in found if xs]
    if not found:
        return None

    def paint(axes: Axes) -> None:
        for line, xs, ys in found:
            mark = "o" if len(xs) <= 30 else ""
            axes.plot(
                xs,
                ys,
                mark + line.style,
                color=light(line.colour),
                label=line.label,
                lw=2.4 if line.thick else 1.6,
                ms=4,
                mfc=light("paper"),
                mew=1.2,
                clip_on=False,
                zorder=3,
            )
        step_axes(axes, y_label, [y for _, _, ys in found for y in ys])
        if any(line.label for line, _, _ in found):
            _legend(axes)

    return draw(paint, alt)


def training(rows: Sequence[Row], shown: Sequence[Line], y_label: str, alt: str) -> Html | None:
    """Metrics of the training steps that are never below 0, small: moving averages over the raw values."""
    found = [(line, *thin(*series(rows, line.key, over="step"))) for line in shown]
    found = [(line, xs, ys) for line, xs, ys in found if len(xs)]
    if not found:
        return None

    def paint(axes: Axes) -> None:
        for line, xs, ys in found:
            colour = light(line.colour)
            axes.plot(xs, ys, line.style, color=colour, alpha=0.28, lw=1)
            axes.plot(xs, smooth(ys), line.style, color=colour, label=line.label)
        step_axes(axes, y_label)
        axes.set_ylim(0, max(0.01, *(1.1 * float(ys.max()) for _, _, ys in found)))
        if any(line.label for line, _, _ in found):
            _legend(axes)

    return draw(paint, alt, SMALL)


def rewards(colour: str, train: Sequence[Row], evals: Sequence[Row], alt: str) -> Html | None:
    """Mean reward of the answers trained on, smoothed over the raw one, and that of held-out prompts over it."""
    xs, ys = thin(*series(train, "reward", over="step"))
    held_x, held_y = series(evals, "reward", over="step")
    if not len(xs) and not held_x:
        return None

    def paint(axes: Axes) -> None:
        if len(xs):
            axes.plot(xs, ys, color=light(colour), alpha=0.28, lw=1)
            axes.plot(xs, smooth(np.asarray(ys)), color=light(colour), label="training, sampled")
        if held_x:
            ink = light("ink")
            axes.plot(held_x, held_y, "o-", color=ink, lw=1.2, ms=4.5, mfc=light("paper"), mew=1.2, label="held out")
        step_axes(axes, "mean reward of an answer")
        _legend(axes)

    return draw(paint, alt)


def step_axes(axes: Axes, y_label: str, shares: Sequence[float] = ()) -> None:
    """Steps across; upwards `shares`, if that is what all the values are."""
    token_axis(axes, "steps")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=_STEPS))
    if len(shares) and min(shares) >= -0.001 and max(shares) <= 1.001:
        percent_axis(axes, max(shares))
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
    axes.set_ylabel(y_label)


def _legend(axes: Axes) -> None:
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, borderaxespad=0.0, handlelength=1.8)

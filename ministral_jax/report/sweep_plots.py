"""Figures of a sweep. Names in them are made of the letters of file names (`sweep.label`), so no text needs care."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from ministral_jax.report.collect import Row, series
from ministral_jax.report.markup import Html
from ministral_jax.report.plots import draw, log_y, token_axis
from ministral_jax.report.post_plots import step_axes
from ministral_jax.report.style import light
from ministral_jax.report.units import tick
from ministral_jax.runs.naming import label

STYLES = ("-", "--", ":", "-.")
_MOST_NAMES = 12


@dataclass(frozen=True)
class Series:
    """Points of one colour."""

    name: str
    colour: str
    points: list[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """Held-out KL of one point of the sweep, `(tokens, KL)`."""

    name: str
    colour: str
    style: str
    points: list[tuple[float, float]]


def figure_over_values(
    series: Sequence[Series], x_label: str, y_label: str, alt: str, categories: Sequence[str] = ()
) -> Html | None:
    """A figure of every point against the value of a key: lines over numbers, dots over `categories` (x an index)."""
    shown = [s for s in series if s.points]
    values = [y for s in shown for _, y in s.points]
    if not values:
        return None
    places = sorted({x for s in series for x, _ in s.points})

    def paint(axes: Axes) -> None:
        if min(values) > 0 and max(values) >= 4 * min(values):
            log_y(axes, values)
        else:
            axes.margins(y=0.12)
        for s in shown:
            xs, ys = zip(*sorted(s.points), strict=True)
            axes.plot(xs, ys, "o" if categories else "o-", color=light(s.colour), ms=6.5, label=s.name, alpha=0.9)
        if categories:
            axes.set_xlim(-0.5, len(categories) - 0.5)
            slant = {"rotation": 25, "ha": "right"} if _crowded(categories) else {}
            axes.set_xticks(range(len(categories)), categories, **slant)
        else:
            _number_axis(axes, places)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)

    return draw(paint, alt)


def _crowded(categories: Sequence[str]) -> bool:
    return sum(len(text) + 2 for text in categories) > 44


def _number_axis(axes: Axes, places: list[float]) -> None:
    """Logarithmic when the values span a decade; ticks at the values themselves while they are few."""
    if places[0] > 0 and places[-1] >= 10 * places[0]:
        axes.set_xscale("log")
    if len(places) <= 6:
        axes.xaxis.set_major_locator(FixedLocator(places))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: label(float(x)) if len(places) <= 6 else tick(x)))
    axes.margins(x=0.12)


def kl_of_points(curves: Sequence[Curve], stage_ends: Sequence[float], alt: str) -> Html | None:
    """Held-out KL against tokens, all points on one axis; a rule where a stage ends and the next one begins."""
    shown = [curve for curve in curves if curve.points]
    values = [y for curve in shown for _, y in curve.points]
    if not values:
        return None

    def paint(axes: Axes) -> None:
        log_y(axes, values)
        for curve in shown:
            xs, ys = zip(*curve.points, strict=True)
            axes.plot(xs, ys, curve.style, color=light(curve.colour), label=curve.name, lw=1.8)
        for end in stage_ends:
            axes.axvline(end, color=light("faint"), lw=0.9)
        token_axis(axes)
        axes.set_ylabel("held-out KL to the teacher, nats")
        if len(shown) <= _MOST_NAMES:
            axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), handlelength=2.6)

    return draw(paint, alt, (10.0, 4.2))


def over_seeds(
    seeds: Sequence[Sequence[Row]], key: str, colour: str, y_label: str, shares: bool, alt: str
) -> Html | None:
    """A held-out metric against steps: a thin line for every seed, a thick one for the mean where all have a value."""
    curves = [dict(zip(*series(rows, key, over="step"), strict=True)) for rows in seeds]
    curves = [curve for curve in curves if curve]
    if not curves:
        return None
    common = sorted(set.intersection(*map(set, curves)))

    def paint(axes: Axes) -> None:
        for curve in curves:
            axes.plot(list(curve), list(curve.values()), color=light(colour), lw=0.9, alpha=0.6, marker=".", ms=3)
        if len(curves) > 1:
            means = [sum(curve[x] for curve in curves) / len(curves) for x in common]
            axes.plot(common, means, color=light(colour), lw=2.6)
        step_axes(axes, y_label, [y for curve in curves for y in curve.values()] if shares else ())

    return draw(paint, alt)

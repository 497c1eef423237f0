"""What the sections of a run's page draw."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from markupsafe import Markup

from ministral_jax.pruning.report import LayersStep, MlpStep, WidthStep
from ministral_jax.report.plots import STEPS, TOKENS, Axis, Line, Note, accent, lines, spark
from ministral_jax.report.units import count, decimal, percent
from ministral_jax.runs.overview import learned
from ministral_jax.runs.reading import Member, Stage, points
from ministral_jax.stages.figures import Figure
from ministral_jax.stages.manifest import Manifest
from ministral_jax.teachers.summary import SplitSummary

_LEFT_OUT = Axis("probability left out of a token", log=True, share=True)
_BARS = 36


@dataclass(frozen=True)
class Chart:
    title: str
    picture: Markup | None
    caption: str = ""
    colour: str | None = None


def charts(*made: Chart | None) -> list[Chart]:
    """Those that there is something to draw of."""
    return [chart for chart in made if chart and chart.picture]


def axis(figure: Figure) -> Axis:
    share = figure.unit == "share"
    unit = "" if share or figure.unit in figure.label else f", {figure.unit}"
    return Axis(figure.label + unit, log=False if share else None, share=share)


def recovery(member: Member, colour: str) -> Chart | None:
    """Held-out KL against tokens: pruned and random start, short stage and then long stage on one axis."""
    if member.stale:
        return None
    shown, notes, told, begin = [], [], [], 0.0
    for roles in (("scratch_short", "short"), ("scratch_base", "base")):
        random, pruned = stages = [member.stages.get(role) for role in roles]
        rows = f"rows of {length}" if (length := next((s.length for s in stages if s and s.length), None)) else "on"
        if begin and any(stages):
            notes.append(Note(begin, None, f"{rows} from here"))
        for stage, name, look in zip(stages, ("random start", "pruned start"), (("--", 1.5), ("-", 2.2)), strict=True):
            x, y = points(stage.evals if stage and not stage.stale else [], "kl", "tokens")
            line = "muted" if stage is random else colour
            shown.append(Line(x + begin, y, line, None if begin else name, look[0], width=look[1]))
        if pruned and (kl := pruned.last("kl")) is not None:
            other = random.last("kl") if random and not random.stale else None
            change = " \u2192 ".join(decimal(value) for value in (pruned.first("kl"), kl) if value is not None)
            told.append(f"{rows}: {change}" + (f", random start {decimal(other)}" if other is not None else ""))
        begin += max((stage.seen("tokens") or 0.0 for stage in stages if stage), default=0.0)
    y_axis = Axis("held-out KL to the parent, nats", log=True)
    picture = lines(shown, TOKENS, y_axis, f"Held-out KL of {member.name} against tokens.", notes)
    return Chart(member.name, picture, f"KL on {'; on '.join(told)}." if told else "", colour)


def curve(stage: Stage, colour: str, wide: bool = False) -> Chart | None:
    """Of its verb: a held-out figure and what training logs that compares with it."""
    if stage.curve is None:
        return None
    figure, over = stage.figure(stage.curve.figure), stage.curve.over
    x, y = (thin(values) for values in points(stage.train, stage.curve.training or "", over))
    held_out = points(stage.evals, figure.name, over)
    high = max(np.quantile(y, 0.995), *held_out[1]) if len(y) > 200 else None  # outliers do not decide it
    shown = [Line(x, y, colour, width=1, alpha=0.28), Line(x, smooth(y), colour, "training" if len(x) else None)]
    shown.append(Line(*held_out, "ink" if len(x) else colour, "held out", ":" if len(x) else "-", "ring", 1.2))
    at, y_axis = STEPS if over == "step" else TOKENS, replace(axis(figure), high=high)
    picture = lines(shown, at, y_axis, f"{figure.label} of {stage.name} against {at.label}.", wide=wide)
    return Chart(stage.name, picture, f"{count(stage.seen(over))} {at.label}, {stage.state}.", colour)


def steering(stage: Stage) -> list[tuple[Markup, str]]:
    """What the optimizer was told and met: learning rate, and norm of the gradient before clipping, with a caption."""
    made: list[tuple[Markup, str]] = []
    for key, label in (("learning_rate", "learning rate"), ("gradient_norm", "gradient norm")):
        _, y = points(stage.train, key, "step")
        if len(y):
            told = f"{decimal(y[0])} \u2192 {decimal(y[-1])}, at most {decimal(y.max())}"
            made.append((spark(thin(y, 120), f"{label} of {stage.name}"), told))
    return made


def smooth(y: np.ndarray) -> np.ndarray:
    """Centred moving average over a tenth of the points, shorter at the ends."""
    at = np.arange(len(y))
    half = np.minimum(np.minimum(at, len(y) - 1 - at), max(1, len(y) // 20))
    total = np.concatenate([[0.0], np.cumsum(y)])
    return (total[at + half + 1] - total[at - half]) / (2 * half + 1)


def thin(values: np.ndarray, most: int = 400) -> np.ndarray:
    """Means of equal bins when there are more points than a figure can show."""
    starts = np.arange(0, len(values), max(1, math.ceil(len(values) / most)))
    return np.add.reduceat(values, starts) / np.diff(starts, append=len(values)) if len(values) else values


def parts(stage: Stage, figure: Figure) -> dict[str, str]:
    """Metrics that a figure is made of, by what they add to its name: sources of prompts, or the parts of a reward."""
    found: dict[str, dict[str, str]] = {figure.name: {} for figure in stage.figures}
    for key in dict.fromkeys(key for row in stage.evals for key in row if key not in found):
        if owner := max((name for name in found if key.startswith(f"{name}_")), key=len, default=None):
            found[owner][key.removeprefix(f"{owner}_")] = key
    sources = tuple(f"_{source}" for source in found.get("accuracy", ()))
    return {part: key for part, key in found[figure.name].items() if not part.endswith(sources)}


def learning(stage: Stage, colour: str) -> list[Chart]:
    """What of held-out answers is right, wins, loops, ..., and the curve of the verb where that is something else."""
    shown = [figure for figure in learned(stage) if figure.unit == "share"]
    hues = [accent(i, len(shown)) for i in range(1, len(shown) + 1)]
    drawn_points = [points(stage.evals, figure.name, "step") for figure in shown]
    made = [Line(*xy, hue, f.label, mark="ring") for f, hue, xy in zip(shown, hues, drawn_points, strict=True)]
    alt = f"{', '.join(figure.label for figure in shown)} of {stage.name} against steps."
    told = Chart(stage.name, lines(made, STEPS, Axis("held out", share=True), alt), "At every evaluation.", colour)
    drawn = stage.curve and stage.curve.figure in [figure.name for figure in shown]
    return charts(told, None if drawn else curve(stage, colour))


def left_out(name: str, split: SplitSummary, colour: str) -> list[Chart]:
    """What a stored teacher leaves out: of how many tokens how much, and with other numbers of entries."""
    made, histogram, tail = [], split.tail_histogram, split.tail_mass
    if histogram and tail and any(histogram.tokens):
        tokens, ends = np.array(histogram.tokens), np.array(histogram.at_most)
        edges = np.concatenate([[ends[0] ** 2 / ends[1]], ends])  # the first bin has no lower end
        first, last = np.flatnonzero(tokens)[[0, -1]]
        starts = np.arange(first, last + 1, math.ceil((last + 1 - first) / _BARS))
        bars = np.add.reduceat(tokens[: last + 1], starts) / tokens.sum()
        outline = Line(edges[[*starts, last + 1]].repeat(2)[1:-1], bars.repeat(2), colour, width=1.2, down_to=0.0)
        notes = [Note(tail.mean, None, "mean"), Note(tail.p99, None, "99th percentile")]
        y_axis, alt = (
            Axis("tokens in each bar", share=True, zero=True, high=1.25 * bars.max()),
            f"Tokens by what {name} leaves out of them.",
        )
        caption = f"Half of the tokens miss less than {percent(tail.p50, 2)}."
        made.append(Chart("Token by token", lines([outline], _LEFT_OUT, y_axis, alt, notes), caption))
    if split.tail_by_shard:
        words, shown = {"mean": ("mean", "dot", colour), "p99": ("99th percentile", "ring", "ink")}, []
        for key, values in split.tail_by_shard.items():
            at, y = thin(np.arange(len(values), dtype=float)), thin(np.array(values))
            shown.append(Line(at, y, words[key][2], words[key][0], "", words[key][1]))
        picture = lines(shown, Axis("shard", count), _LEFT_OUT, f"What {name} leaves out, shard by shard.")
        made.append(Chart("Shard by shard", picture, f"{split.shards} shards."))
    if len(split.curve) > 1:
        sizes, now = sorted(split.curve), split.codec.get("entries", 0)
        others = Line(sizes, [split.curve[size] for size in sizes], "muted", width=1.2, mark="ring")
        stored = Line([now], [split.curve.get(now, math.nan)], colour, mark="dot")
        x_axis = Axis("entries per token", count, log=True)
        picture = lines([others, stored], x_axis, _LEFT_OUT, f"What {name} would leave out with other sizes.")
        made.append(Chart("With another number of entries", picture, f"Mean over tokens; filled: the {now} stored."))
    return charts(*made)


def cuts(made: Manifest, colour: str) -> list[Chart]:
    """Of a surgery its scores, and what they decided."""
    drawn: dict[str, Callable[[Manifest, Any, str], Chart]]
    drawn = {"layers": _layers, "width": _directions, "mlp": _neurons}
    steps = made.prune.steps if made.prune else ()
    return charts(*(drawn[step.step](made, step, colour) for step in steps if step.step in drawn))


def _layers(made: Manifest, step: LayersStep, colour: str) -> Chart:
    at, scores = np.arange(len(step.scores)), np.array(step.scores)
    kept = np.isin(at, step.kept)
    shown = [Line(at, scores, "rule", width=1.6), Line(at[kept], scores[kept], colour, "kept", "", "dot")]
    shown.append(Line(at[~kept], scores[~kept], "ink", "dropped", "", "cross"))
    dropped = ", ".join(map(str, at[~kept]))
    picture = lines(
        shown, Axis("layer", count), Axis("score"), f"Score of every layer of {made.stage}; {dropped} dropped."
    )
    return Chart(f"Layers: without {dropped}", picture, f"Score: {step.score.replace('_', ' ')}; layers count from 0.")


def _directions(made: Manifest, step: WidthStep, colour: str) -> Chart:
    index, energy = np.array(step.spectrum.index) + 1, np.array(step.spectrum.energy) / max(step.spectrum.energy)
    kept = index <= (width := made.spec.width)
    shown = [Line(index, energy, "faint", width=1.6)]
    shown.append(Line(index[kept], energy[kept], colour, width=2.2, down_to=float(energy.min()) / 2))
    x_axis, y_axis = Axis("principal direction", count, zero=True), Axis("energy, largest = 1", log=True)
    alt = f"Energy spectrum of {made.stage}; {width} directions are kept."
    picture = lines(shown, x_axis, y_axis, alt, [Note(width + 0.5, None, f"{width} kept")])
    caption = f"Mean square of the residual stream along the directions; basis: {step.basis}."
    return Chart(f"Width: {percent(step.retained_energy)} of the energy", picture, caption)


def _neurons(made: Manifest, step: MlpStep, colour: str) -> Chart:
    """Spread of the scores in every layer; what lies above the cut was kept."""
    low, quarter, median, upper, high = np.array([layer.all for layer in step.layers]).T
    cut, at = np.array([layer.kept[0] for layer in step.layers]), np.arange(len(step.layers))

    def bars(begin: np.ndarray, end: np.ndarray, colour: str, width: float) -> Line:
        ends = np.where(begin < end, [begin, end, math.nan * end], math.nan)
        return Line(at.repeat(3), ends.T.ravel(), colour, width=width, alpha=0.55 if colour == "muted" else 1.0)

    thick = min(7.0, 180 / len(at))
    shown = [bars(low, cut, "muted", 1.6), bars(cut, high, colour, 1.6)]
    shown += [
        bars(quarter, np.minimum(cut, upper), "muted", thick),
        bars(np.maximum(cut, quarter), upper, colour, thick),
    ]
    shown += [Line(at, median, "paper", style="", mark="dash"), Line(at, cut, style="", mark="dash")]
    y_axis = Axis("score of a neuron", log=True)
    picture = lines(shown, Axis("layer", count), y_axis, f"Neuron scores of {made.stage} by layer.")
    score = float(np.mean([layer.kept_share for layer in step.layers]))
    caption = f"{step.kept} a layer. Line: all; thick: middle half; gap: median; above the dark tick: kept."
    return Chart(f"Feed-forward: {percent(score)} of the score", picture, caption)

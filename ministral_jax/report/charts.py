"""What the sections of a run's page draw."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from ministral_jax.models.spec import ModelSpec
from ministral_jax.pruning.report import LayersStep, MlpStep, PruneReport, WidthStep
from ministral_jax.report.plots import STEPS, TOKENS, Axis, Line, Note, lines, smooth, thin
from ministral_jax.report.read import Member, Stage, points
from ministral_jax.report.style import accent
from ministral_jax.report.units import count, decimal, factor, percent
from ministral_jax.stages.figures import HELD_OUT, KL, Figure
from ministral_jax.teachers.summary import SplitSummary

_LAYER = Axis("layer", lambda layer: f"{layer:.0f}")
_LEFT_OUT = Axis("probability left out of a token", log=True, share=True)
_SCORES = {
    "norm_ratio": "mean norm of a layer\u2019s output over that of its input",
    "norm_ratio_inverse": "inverse of the mean norm of a layer\u2019s output over that of its input",
    "block_influence": "one minus the mean cosine of a layer\u2019s input and output",
}


@dataclass(frozen=True)
class Chart:
    title: str
    picture: Markup
    caption: str = ""
    colour: str | None = None


def charts(*made: Chart | None) -> list[Chart]:
    """Those that there is something to draw of."""
    return [chart for chart in made if chart and chart.picture]


def axis(figure: Figure) -> Axis:
    share = figure.unit == "share"
    return Axis(figure.label if share or not figure.unit else f"{figure.label}, {figure.unit}", share=share)


def recovery(member: Member) -> Chart | None:
    """Held-out KL against tokens: pruned and random start, short stage and then long stage on one axis."""
    shown, notes, begin = [], [], 0.0
    for roles in (("scratch_short", "short"), ("scratch_base", "base")):
        stages = [member.stages.get(role) for role in roles]
        if begin and any(stages):
            notes.append(Note(begin, None, "long context"))
        for stage, name, style in zip(stages, ("random start", "pruned start"), ("--", "-"), strict=True):
            if stage:
                x, y = points(stage.evals, "kl")
                look = (1.5, 0.75) if style == "--" else (2.2, 1.0)
                shown.append(Line(x + begin, y, member.colour, None if begin else name, style, "", *look))
        begin += max((stage.seen("tokens") or 0.0 for stage in stages if stage), default=0.0)
    scratch, speedup = member.stages.get("scratch_short"), member.entry.token_speedup
    if scratch and speedup and not member.at_once and (kl := scratch.last("kl")) is not None:
        end = scratch.seen("tokens") or 0.0
        shown.append(Line([end / speedup, end], [kl, kl], style=":", width=1.1))
        shown.append(Line([end / speedup], [kl], member.colour, mark="ring"))
        notes.append(Note(end / speedup, kl, f"{factor(speedup)} fewer tokens"))
    y_axis = Axis("held-out KL to the parent, nats", log=True)
    picture = lines(shown, TOKENS, y_axis, f"Held-out KL of {member.name} against tokens.", notes)
    entry = member.entry
    told = {"after surgery": entry.kl_after_surgery, "at the end": entry.kl_final, "from random": entry.kl_scratch}
    caption = ", ".join(f"{decimal(kl)} {when}" for when, kl in told.items() if kl is not None)
    return Chart(member.name, picture, f"KL: {caption}." if caption else "", member.colour)


def curve(stage: Stage, colour: str, wide: bool = False) -> Chart | None:
    """Of its verb: a held-out figure and what training logs that compares with it."""
    if stage.curve is None:
        return None
    over, known = stage.curve.over, {figure.name: figure for figure in stage.figures}
    figure = known.get(stage.curve.figure, Figure(stage.curve.figure, stage.curve.figure))
    x, y = (thin(values) for values in points(stage.train, stage.curve.training or "", over))
    shown = [Line(x, y, colour, width=1, alpha=0.28), Line(x, smooth(y), colour, "training")]
    held_out = points(stage.evals, figure.name, over)
    shown.append(Line(*held_out, "ink" if len(x) else colour, "held out", "" if len(x) else "-", "ring"))
    at = STEPS if over == "step" else TOKENS
    alt = f"{figure.label} of {stage.name} against {at.label}."
    seen = f"{count(stage.seen(over))} {at.label}, {stage.state}."
    return Chart(stage.name, lines(shown, at, axis(figure), alt, wide=wide), seen, colour)


def learned(stage: Stage) -> list[Figure]:
    """The figures by which post-training is told: all but those of every loop over packed rows."""
    packed = {figure.name for figure in (*HELD_OUT, KL)}
    return [figure for figure in stage.figures if figure.name not in packed] if stage.curve else []


def parts(stage: Stage, figure: Figure) -> dict[str, str]:
    """Metrics that a figure is made of, by what they add to its name: sources of prompts, or the parts of a reward."""
    names = {other.name for other in stage.figures}
    found: dict[str, dict[str, str]] = {name: {} for name in names}
    for key in dict.fromkeys(key for row in stage.evals for key in row if key not in names):
        if owner := max((name for name in names if key.startswith(f"{name}_")), key=len, default=None):
            found[owner][key.removeprefix(f"{owner}_")] = key
    sources = tuple(f"_{source}" for source in found.get("reward_accuracy", ()))
    return {part: key for part, key in found[figure.name].items() if not part.endswith(sources)}


def learning(stage: Stage, colour: str) -> list[Chart]:
    """What of held-out answers is right, wins, loops, ..., and the curve of the verb where that is something else."""
    shown = [figure for figure in learned(stage) if figure.unit == "share"]
    made = [Line(*points(stage.evals, f.name, "step"), accent(i), f.label, "-", "ring") for i, f in enumerate(shown, 1)]
    alt = f"{', '.join(figure.label for figure in shown)} of {stage.name} against steps."
    picture = lines(made, STEPS, Axis("held out", share=True), alt)
    told = stage.curve and stage.curve.figure in [figure.name for figure in shown]
    return charts(Chart(stage.name, picture, "Held-out figures.", colour), None if told else curve(stage, colour))


def left_out(name: str, split: SplitSummary, colour: str) -> list[Chart]:
    """What a stored teacher leaves out of its tokens: over tokens, over shards, and with other numbers of entries."""
    return charts(_tokens(name, split, colour), _shards(name, split, colour), _entries(name, split, colour))


def _tokens(name: str, split: SplitSummary, colour: str, most: int = 36) -> Chart | None:
    histogram, tail = split.tail_histogram, split.tail_mass
    if histogram is None or tail is None or not any(histogram.tokens):
        return None
    tokens, edges = np.array(histogram.tokens), np.array(histogram.at_most)
    edges = np.concatenate([[edges[0] ** 2 / edges[1]], edges])  # the first bin has no lower end
    first, last = np.flatnonzero(tokens)[[0, -1]]
    starts = np.arange(first, last + 1, math.ceil((last + 1 - first) / most))
    bars = np.add.reduceat(tokens[: last + 1], starts) / tokens.sum()
    outline = Line(edges[[*starts, last + 1]].repeat(2)[1:-1], bars.repeat(2), colour, width=1.2, down_to=0.0)
    notes = [Note(tail.mean, None, "mean"), Note(tail.p99, None, "99th percentile")]
    y_axis = Axis("tokens in each bar", share=True, zero=True)
    picture = lines([outline], _LEFT_OUT, y_axis, f"Tokens by what {name} leaves out of them.", notes)
    return Chart("Token by token", picture, f"Half of the tokens miss less than {percent(tail.p50, 2)}.")


def _shards(name: str, split: SplitSummary, colour: str) -> Chart | None:
    if not split.tail_by_shard:
        return None
    words, made = {"mean": ("mean", "dot"), "p99": ("99th percentile", "ring")}, []
    for key, values in split.tail_by_shard.items():
        at, y = thin(np.arange(len(values), dtype=float)), thin(np.array(values))
        made.append(Line(at, y, colour, words[key][0], "", words[key][1]))
    picture = lines(made, Axis("shard", count), _LEFT_OUT, f"What {name} leaves out, shard by shard.")
    return Chart("Shard by shard", picture, f"{count(split.shards)} shards.")


def _entries(name: str, split: SplitSummary, colour: str) -> Chart | None:
    if len(split.curve) < 2:
        return None
    sizes, now = sorted(split.curve), split.codec.get("entries")
    made = [Line(sizes, [split.curve[size] for size in sizes], colour, width=1.2, mark="ring")]
    made.append(Line([now], [split.curve.get(now, math.nan)], colour, style="", mark="dot"))
    x_axis = Axis("entries per token", count, log=True, ticks=sizes)
    picture = lines(made, x_axis, _LEFT_OUT, f"What other numbers of entries than that of {name} would leave out.")
    return Chart("With another number of entries", picture, f"Filled: the {now} that are stored; the mean over tokens.")


def cuts(name: str, report: PruneReport, width: int, colour: str) -> list[Chart]:
    """Of a surgery its scores, and what they decided; `width` is that of the pruned model."""
    made: list[Chart | None] = []
    for step in report.steps:
        if isinstance(step, LayersStep):
            made.append(_layers(name, step, colour))
        elif isinstance(step, WidthStep):
            made.append(_directions(name, step, width, colour))
        elif isinstance(step, MlpStep):
            made.append(_neurons(name, step, colour))
    return charts(*made)


def _layers(name: str, step: LayersStep, colour: str) -> Chart:
    scores, kept = np.array(step.scores, float), np.isin(range(len(step.scores)), step.kept)
    at = np.arange(len(scores))
    shown = [
        Line(at, scores, "rule", width=1.6),
        Line(at[kept], scores[kept], colour, "kept", "", "dot"),
        Line(at[~kept], scores[~kept], "ink", "dropped", "", "cross"),
    ]
    dropped = ", ".join(map(str, at[~kept]))
    picture = lines(shown, _LAYER, Axis("score"), f"Score of every layer of {name}; {dropped} are dropped.")
    return Chart(f"Layers: without {dropped}", picture, f"Score: {_SCORES.get(step.score, step.score)}; from layer 0.")


def _directions(name: str, step: WidthStep, width: int, colour: str) -> Chart:
    index, energy = np.array(step.spectrum.index) + 1, np.array(step.spectrum.energy)
    energy = energy / energy.max()
    kept = index <= width
    shown = [
        Line(index, energy, "faint", width=1.6),
        Line(index[kept], energy[kept], colour, width=2.2, down_to=float(energy.min()) / 2),
    ]
    notes = [Note(width + 0.5, None, f"{width} kept")]
    x_axis, y_axis = Axis("principal direction", count, zero=True), Axis("energy, largest = 1", log=True)
    picture = lines(shown, x_axis, y_axis, f"Energy spectrum of {name}; {width} directions are kept.", notes)
    basis = {"pca": "one PCA over all norm inputs"}.get(step.basis, f"basis: {step.basis}")
    caption = f"Mean square of the residual stream, {basis}."
    return Chart(f"Width: {percent(step.retained_energy)} of the energy", picture, caption)


def _neurons(name: str, step: MlpStep, colour: str) -> Chart:
    """Spread of the scores in every layer; what lies above the cut was kept."""
    low, quarter, median, upper, high = np.array([layer.all for layer in step.layers], float).T
    cut, at = np.array([layer.kept[0] for layer in step.layers]), np.arange(len(low))

    def bars(begin: np.ndarray, end: np.ndarray, colour: str, width: float) -> Line:
        ends = np.where(begin < end, [begin, end, begin * math.nan], math.nan)
        return Line(at.repeat(3), ends.T.ravel(), colour, width=width, alpha=0.55 if colour == "muted" else 1.0)

    shown = [
        bars(low, cut, "muted", 1.6),
        bars(cut, high, colour, 1.6),
        bars(quarter, np.minimum(cut, upper), "muted", 7),
        bars(np.maximum(cut, quarter), upper, colour, 7),
        Line(at, median, "paper", style="", mark="dash"),
        Line(at, cut, style="", mark="dash"),
    ]
    picture = lines(shown, _LAYER, Axis("score of a neuron", log=True), f"Neuron scores of {name} by layer.")
    score = float(np.mean([layer.kept_share for layer in step.layers]))
    caption = f"{count(step.kept)} of each layer. Line: all; thick: middle half; gap: median; above the dark tick: kept."
    return Chart(f"Feed-forward: {percent(score)} of the score", picture, caption)


def components(spec: ModelSpec, length: int) -> dict[str, tuple[int, int]]:
    """Parameters, and forward FLOPs of a token at context `length`, by component.

    They add up to `spec.parameters` and `spec.flops_per_token(length)`.
    """
    attention = spec.layers * spec.width * spec.head_width * 2 * (spec.heads + spec.kv_heads)
    mlp, table, v = spec.layers * 3 * spec.width * spec.mlp_width, spec.vocab * spec.width, spec.vision
    projector = v.width + v.merge**2 * v.width**2 + v.width * spec.width + spec.width**2 if v else 0
    return {
        "embedding": (table, 0),
        "attention": (attention, 2 * attention),
        "attention scores": (0, spec.layers * 2 * spec.heads * spec.head_width * length),
        "feed-forward": (mlp, 2 * mlp),
        "norms": ((2 * spec.layers + 1) * spec.width, 0),
        "head": (0 if spec.tied else table, 2 * table),
        "vision tower": (spec.vision_parameters - projector, 0),
        "projector": (projector, 0),
    }

"""How the stages trained, each by the figure that tells most about its kind."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ministral_jax.report import plots
from ministral_jax.report.collect import Run, Stage
from ministral_jax.report.markup import Html, el, figure, section
from ministral_jax.report.units import count


@dataclass(frozen=True)
class _Curve:
    """What is drawn of a kind of stage: a held-out metric, and what training has to compare with it."""

    key: str
    label: str
    of_training: str = "loss"
    over: str = "tokens"


_CURVES = {
    "distill": _Curve("kl", "KL to the teacher, nats"),
    "sft": _Curve("ce", "cross-entropy of answers, nats", "ce"),
    "reward": _Curve("judge_accuracy", "pairs judged right", "", "step"),
    "odpo": _Curve("win_rate", "win rate", "", "step"),
    "grpo": _Curve("reward", "reward", "reward", "step"),
}


def curves(run: Run) -> Html | None:
    shown = run.parent.stages.get("base") if run.parent else None
    figures = []
    for stage in run.stages:
        if stage is shown:
            continue
        curve = _CURVES.get(stage.do, _Curve("ce", "loss"))
        alt = f"{curve.label} of {stage.name} against {'steps' if curve.over == 'step' else curve.over}."
        picture = plots.loss_curve(
            run.colours.get(stage.name, "model-0"),
            stage.train,
            stage.evals,
            curve.key,
            curve.label,
            alt,
            of_training=curve.of_training,
            over=curve.over,
        )
        if picture:
            figures.append(figure(stage.name, picture, _curve_caption(stage)))
    if not figures:
        return None
    inside = el("details", el("summary", f"Show {len(figures)} curves"), el("div", figures, class_="grid"))
    return section("curves", "Curves", "Training of the other stages", None, inside)


def _curve_caption(stage: Stage) -> str:
    bad = sum(not math.isfinite(row.get("loss", 0.0)) for row in stage.train)
    seen = f"{count(stage.steps)} steps" if stage.tokens is None else f"{count(stage.tokens)} tokens"
    parts = [seen, stage.state] + ([f"{bad} values that are no number are not drawn"] if bad else [])
    return ", ".join(parts) + "."

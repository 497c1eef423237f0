"""`summary.json`: the family in figures, read off the manifests and metrics of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from ministral_jax.files import read_jsonl, write_json
from ministral_jax.losses.held_out import HeldOut
from ministral_jax.recipe.load import lineage
from ministral_jax.recipe.types import Recipe
from ministral_jax.runs.comparable import row_length, stale_stages
from ministral_jax.stages.distill import scratch_name
from ministral_jax.stages.evaluate import evaluation_name
from ministral_jax.stages.figures import Figure, Share, share_of, shares_of
from ministral_jax.stages.manifest import Manifest, digest, finished, read_manifest
from ministral_jax.stages.rows import RowStage

Rows = list[dict[str, Any]]
_TOLD = ("bits_per_byte", "digit_accuracy")


class Member(BaseModel):
    """A model of the family: its size, what it was trained on, and held-out figures."""

    parameters: int
    decoder_parameters: int
    flops_per_token: int
    """Forward, of a token that sees no other."""
    tokens: int
    row_length: int | None = None
    """Tokens of the held-out rows: bits per byte of rows of different lengths do not compare."""
    bits_per_byte: float | None
    digit_accuracy: float | None
    documents: int | None = None
    """Of the held-out rows."""
    intervals: dict[str, tuple[float, float]] = Field(default_factory=dict)
    """Of these figures by name, in which 95 % lie when held-out documents are drawn anew: see `losses.held_out`."""


class Parent(Member):
    stage: str


class Child(Member):
    """`tokens` are those of the distil stages of its own; KL is to the teacher, nats per token.

    Held-out figures, KL from random weights among them, are on rows as long as those of the first distil stage: of the
    last stage that reads such rows. What a longer context is worth stands in its own stage's manifest, by position.
    """

    tokens_lineage: int
    """Read on the whole path from the family's parent: distillation, and calibration of the prunings."""
    kl_after_surgery: float
    kl_final: float
    kl_scratch: float | None = None
    """Of the baseline: same shape, data, tokens and teacher, from random weights."""
    stages: dict[str, str]
    """By role: `pruned`, `short`, `base`, and with baselines `scratch_short`, `scratch_base`."""


class Answered(BaseModel):
    """A share of the answers of a stage's last evaluation."""

    every: Share
    """Of all prompts."""
    sources: dict[str, Share] = Field(default_factory=dict)
    """Of those of each source, where there are several."""


class Summary(BaseModel):
    """`summary.json`."""

    name: str
    parent: Parent | None = None
    children: dict[str, Child] = Field(default_factory=dict)
    """Those of whose stages every one was made from what is there now."""
    stale: dict[str, str] = Field(default_factory=dict)
    """The other finished ones, and why."""
    answers: dict[str, dict[str, Answered]] = Field(default_factory=dict)
    """By stage and figure, of the finished stages that answer held-out prompts and are not stale."""
    wall_seconds: float
    """Of all finished stages, and of packing data."""


def write_summary(recipe: Recipe, run_dir: Path) -> Summary:
    """Write `summary.json` and `samples.json` from whatever is finished, and return the summary."""
    family, parent = recipe.family, None
    if family is not None and (manifest := read_manifest(run_dir / family.parent)) is not None:
        evaluated = read_manifest(run_dir / evaluation_name(family.parent))
        parent = Parent(stage=family.parent, **_member(manifest, evaluated))
    made = {name: manifest for name in recipe.stages if (manifest := read_manifest(run_dir / name)) is not None}
    here = {
        name: digest(run_dir / name) if name in made else None for name in recipe.stages if (run_dir / name).is_dir()
    }
    stale = stale_stages(made, here)
    children, left_out = {}, {}
    for child, last in (family.children if family else {}).items():
        names = lineage(recipe, last)
        gone = [f"made from {name}, which is not there" for name in names if name not in made]
        old = [stale[name] for name in names if name in stale]
        if last in made and (gone or old):
            left_out[child] = (gone + old)[0]
        elif last in made and not _evaluations(run_dir, next(n for n in names if recipe.stages[n].distils)):
            left_out[child] = "made with evaluations that are not in its metrics.jsonl any more"
        elif last in made:
            children[child] = _child(recipe, run_dir, last)
    answers = {name: _answers(recipe.stages[name].figures, made[name]) for name in made if name not in stale}
    besides = sum(record["seconds"] for record in read_jsonl(run_dir / "ledger.jsonl"))
    wall = round(sum(m.seconds for m in made.values()) + besides, 1)
    summary = Summary(
        name=recipe.name,
        parent=parent,
        children=children,
        stale=left_out,
        answers={name: found for name, found in answers.items() if found},
        wall_seconds=wall,
    )
    write_json(run_dir / "summary.json", summary.model_dump(mode="json"))
    write_json(run_dir / "samples.json", _samples(recipe, run_dir))
    return summary


def _member(manifest: Manifest, evaluated: Manifest | None = None) -> dict[str, Any]:
    """Of a finished stage; its figures those of another one that `evaluated` it, where there is one."""
    spec, measured = manifest.spec, evaluated or manifest
    metrics, behind = measured.metrics, measured.held_out or HeldOut()
    return {
        "parameters": spec.parameters,
        "decoder_parameters": spec.decoder_parameters,
        "flops_per_token": spec.flops_per_token(1),
        "tokens": manifest.tokens,
        "row_length": row_length(measured),
        "bits_per_byte": metrics.get("bits_per_byte"),
        "digit_accuracy": metrics.get("digit_accuracy"),
        "documents": behind.documents or None,
        "intervals": {key: behind.intervals[key] for key in _TOLD if key in behind.intervals},
    }


def _answers(figures: tuple[Figure, ...], manifest: Manifest) -> dict[str, Answered]:
    found = {figure: share_of(manifest.metrics, figure) for figure in figures}
    return {
        figure.name: Answered(every=whole, sources=shares_of(manifest.metrics, figure))
        for figure, whole in found.items()
        if whole
    }


def _child(recipe: Recipe, run_dir: Path, last: str) -> Child:
    names = lineage(recipe, last)
    distilled = [name for name in names if recipe.stages[name].distils]
    manifests = {name: finished(run_dir / name) for name in names}
    shown = [name for name in distilled if row_length(manifests[name]) == row_length(manifests[distilled[0]])][-1]
    figures = {
        **_member(manifests[last], manifests[shown]),
        "tokens": sum(manifests[name].tokens for name in distilled),
        "tokens_lineage": _tokens_of_lineage(recipe, run_dir, last),
        "kl_after_surgery": _evaluations(run_dir, distilled[0])[0]["kl"],
    }
    stages = {"pruned": names[0], "short": distilled[0], "base": distilled[-1]}
    for role, name in (("scratch_short", distilled[0]), ("scratch_base", distilled[-1])):
        if read_manifest(run_dir / scratch_name(name)) and _evaluations(run_dir, scratch_name(name)):
            stages[role] = scratch_name(name)
    compared = {"kl_final": shown}
    if scratch_name(shown) in stages.values():
        compared["kl_scratch"] = scratch_name(shown)
    for key, stage in compared.items():
        made = finished(run_dir / stage)
        figures[key] = made.metrics["kl"]
        if made.held_out is not None and "kl" in made.held_out.intervals:
            figures["intervals"][key] = made.held_out.intervals["kl"]
    return Child(**figures, stages=stages)


def _tokens_of_lineage(recipe: Recipe, run_dir: Path, name: str | None) -> int:
    """Tokens read on the whole path from the family's parent to a stage: what the surgery and its recovery cost."""
    total = 0
    while name is not None:
        stage, made = recipe.stages[name], read_manifest(run_dir / name)
        if made is not None and isinstance(stage, RowStage) and (stage.distils or stage.prunes):
            total += tokens_read(made)
        name = stage.source
    return total


def tokens_read(manifest: Manifest) -> int:
    """Tokens that a finished stage read: of a cut those of every pass over the calibration batches."""
    if manifest.do != "prune":
        return manifest.tokens
    config, cuts = manifest.config, [step.step for step in manifest.prune.steps] if manifest.prune else []
    options, batch = config["options"], config["batch"]
    passes = sum(cut in ("layers", "width", "mlp") for cut in cuts)
    passes = passes if options["recollect"] else min(passes, 1)
    passes += options["norm_gain"] == "per_norm" and "width" in cuts
    return passes * config["calibration"] * batch["sequences"] * batch["length"]


def _evaluations(run_dir: Path, stage: str) -> Rows:
    return [r for r in read_jsonl(run_dir / stage / "metrics.jsonl") if r.get("kind") == "eval" and "kl" in r]


def _samples(recipe: Recipe, run_dir: Path) -> dict[str, Any]:
    """The parent's held-out image questions with every model's answers beside the right one."""
    family = recipe.family
    models = {"parent": family.parent, **family.children} if family else {}
    found: dict[str, dict[str, Any]] = {}
    for model, stage in models.items():
        places = (run_dir / name / "samples.json" for name in (stage, evaluation_name(stage)))
        if (path := next((place for place in places if place.is_file()), None)) is not None:
            found[model] = {s["png"]: s for s in json.loads(path.read_text(encoding="utf-8"))["images"]}
    if "parent" not in found:
        return {"images": []}
    images = [
        {
            "png": png,
            "question": sample["question"],
            "label": sample["label"],
            "answers": {model: samples[png]["answer"] for model, samples in found.items() if png in samples},
        }
        for png, sample in found["parent"].items()
    ]
    return {"images": images}

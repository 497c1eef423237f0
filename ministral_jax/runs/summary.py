"""`summary.json`: the family in figures, read off the manifests and metrics of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ministral_jax.config import DistillStage, PruneStage, Recipe
from ministral_jax.files import read_jsonl, write_json
from ministral_jax.recipe.load import scratch_name
from ministral_jax.stages.manifest import Manifest, finished, read_manifest

Figures = dict[str, Any]


def write_summary(recipe: Recipe, run_dir: Path) -> Figures:
    """Write `summary.json` and `samples.json` from whatever is finished, and return the summary."""
    family = recipe.family
    summary: Figures = {"name": recipe.name, "parent": None, "children": {}}
    if family is not None and (manifest := read_manifest(run_dir / family.parent)) is not None:
        summary["parent"] = {"stage": family.parent, **_model_figures(manifest)}
    for child, last in (family.children if family else {}).items():
        if read_manifest(run_dir / last) is not None:
            summary["children"][child] = _child_figures(recipe, run_dir, last)
    manifests = [m for name in recipe.stages if (m := read_manifest(run_dir / name)) is not None]
    besides = sum(record["seconds"] for record in read_jsonl(run_dir / "ledger.jsonl"))
    summary["wall_seconds"] = round(sum(m.seconds for m in manifests) + besides, 1)
    write_json(run_dir / "summary.json", summary)
    write_json(run_dir / "samples.json", _samples(recipe, run_dir))
    return summary


def _model_figures(manifest: Manifest) -> Figures:
    spec, metrics = manifest.spec, manifest.metrics
    return {
        "parameters": spec.parameters,
        "decoder_parameters": spec.decoder_parameters,
        "flops_per_token": spec.flops_per_token(1),
        "tokens": manifest.tokens,
        "bits_per_byte": metrics.get("bits_per_byte"),
        "digit_accuracy": metrics.get("digit_accuracy"),
    }


def lineage(recipe: Recipe, last: str) -> list[str]:
    """A child's stages from its surgery (or its first stage) to `last`."""
    names = [last]
    while not isinstance(recipe.stages[names[0]], PruneStage) and recipe.stages[names[0]].source is not None:
        names.insert(0, recipe.stages[names[0]].source or "")
    return names


def _child_figures(recipe: Recipe, run_dir: Path, last: str) -> Figures:
    names = lineage(recipe, last)
    distilled = [name for name in names if isinstance(recipe.stages[name], DistillStage)]
    manifests = {name: finished(run_dir / name) for name in names}
    scratch = [scratch_name(name) for name in distilled]
    finished_scratch = bool(scratch) and all(read_manifest(run_dir / name) for name in scratch)
    stages = {"pruned": names[0], "short": distilled[0], "base": distilled[-1]}
    figures: Figures = {
        **_model_figures(manifests[last]),
        "tokens": sum(manifests[name].tokens for name in distilled),
        "tokens_lineage": _tokens_of_ancestors(recipe, run_dir, last),
        "kl_after_surgery": _evaluations(run_dir, distilled[0])[0]["kl"],
        "kl_final": manifests[last].metrics["kl"],
        "kl_scratch": None,
        "token_speedup": None,
    }
    if finished_scratch:
        stages |= {"scratch_short": scratch[0], "scratch_base": scratch[-1]}
        final = finished(run_dir / scratch[-1])
        figures["kl_scratch"] = final.metrics["kl"]
        figures["token_speedup"] = token_speedup(_evaluations(run_dir, distilled[0]), _evaluations(run_dir, scratch[0]))
    return {**figures, "stages": stages}


def _tokens_of_ancestors(recipe: Recipe, run_dir: Path, name: str | None) -> int:
    """Distillation tokens spent on the whole path from the family's parent to a stage."""
    total = 0
    while name is not None:
        if isinstance(recipe.stages[name], DistillStage):
            made = read_manifest(run_dir / name)
            total += made.tokens if made else 0
        name = recipe.stages[name].source
    return total


def _evaluations(run_dir: Path, stage: str) -> list[Figures]:
    return [r for r in read_jsonl(run_dir / stage / "metrics.jsonl") if r["kind"] == "eval"]


def token_speedup(pruned: list[Figures], scratch: list[Figures]) -> float | None:
    """Tokens of the scratch run over the tokens after which the pruned start had reached the scratch run's final KL.

    Both are the short-context stage, evaluated on the same held-out rows. The crossing is interpolated linearly between
    two evaluations; a pruned start that is below from the beginning counts as its first evaluation after an update, so
    the figure is then a lower bound. None when the pruned start never gets there.
    """
    goal = scratch[-1]["kl"]
    for before, after in zip([None, *pruned[:-1]], pruned, strict=True):
        if after["kl"] > goal:
            continue
        if before is None:
            return scratch[-1]["tokens"] / pruned[1]["tokens"]
        share = (before["kl"] - goal) / (before["kl"] - after["kl"])
        return scratch[-1]["tokens"] / (before["tokens"] + share * (after["tokens"] - before["tokens"]))
    return None


def _samples(recipe: Recipe, run_dir: Path) -> Figures:
    """The parent's held-out image questions with every model's answer beside the right one."""
    family = recipe.family
    if family is None or not (run_dir / family.parent / "samples.json").is_file():
        return {"images": []}
    models = {"parent": family.parent, **family.children}
    found: dict[str, dict[str, Figures]] = {}
    for model, stage in models.items():
        if (path := run_dir / stage / "samples.json").is_file():
            found[model] = {s["png"]: s for s in json.loads(path.read_text(encoding="utf-8"))["images"]}
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

"""A made-up run directory with the files, shapes and magnitudes of a real one, for the tests of the report."""

from __future__ import annotations

import base64
import io
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from ministral_jax.models.spec import PRESETS, ModelSpec
from ministral_jax.runs.summary import write_summary
from ministral_jax.stages import verbs
from ministral_jax.stages.manifest import digest
from ministral_jax.teachers.statistics import EDGES

CHILDREN = {"14b": ("parent", 0.9, 0.011), "8b": ("14b-short", 2.1, 0.034), "3b": ("8b-short", 3.4, 0.093)}
"""Source, KL right after surgery and KL after the short stage."""
POST = {
    "14b-sft": {"do": "sft", "from": "14b-base", "teacher": "parent"},
    "14b-reward": {"do": "reward", "from": "14b-sft"},
    "14b-instruct": {"do": "odpo", "from": "14b-sft", "judge": "14b-reward"},
    "14b-cot": {"do": "sft", "from": "14b-base"},
    "14b-rl": {"do": "grpo", "from": "14b-cot"},
}
STORE = {"do": "record", "from": "parent", "codec": {"kind": "topk", "entries": 32, "bits": 8}}
TOKENS_PER_STEP = 2048
DATA = {"sources": {"code": {"kind": "jsonl", "path": "mine/rows.jsonl", "weight": 0.6, "on_bad_row": "stop"}}}
DATA |= {"held_out": 0.1}


def picture(seed: int) -> str:
    """A PNG in base64."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8), np.uint8)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


SHOWN = {"type": "image", "png": picture(0)}
ASKED = (("4-2=?", 1.0), ("25-6=?", 0.0), ([SHOWN, {"type": "image"}, {"type": "text", "text": "Sum?"}], 1.0))
"""Prompts, and whether they are answered right."""


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def told_by(run: Path, stage: str) -> dict[str, Any]:
    return json.loads((run / stage / "manifest.json").read_text())


def recipe() -> dict[str, Any]:
    stages: dict[str, Any] = {"parent": {"do": "train"}}
    for name, (source, _, _) in CHILDREN.items():
        stages[f"{name}-pruned"] = {"do": "prune", "from": source}
        sources = {"short": f"{name}-pruned", "short-scratch": None, "base": f"{name}-short"}
        for kind, start in {**sources, "base-scratch": f"{name}-short-scratch"}.items():
            stages[f"{name}-{kind}"] = {"do": "distill", "from": start, "teacher": "parent"}
        stages[f"{name}-hf"] = {"do": "export", "from": f"{name}-base"}
    family = {"parent": "parent", "children": {name: f"{name}-base" for name in CHILDREN}}
    return {"name": "tiny", "stages": stages, "family": family}


def spec_of(stage: str) -> ModelSpec:
    return PRESETS[f"tiny-{stage.split('-')[0]}" if stage.split("-")[0] in CHILDREN else "tiny-24b"]


def write_run(run: Path, until: str | None = None, more: dict[str, Any] | None = None) -> Path:
    """All stages of the family and `more`, or those before `until`; without it also the summary and the samples."""
    raw = recipe()
    raw["stages"] |= more or {}
    write_json(run / "recipe.json", raw)
    told = {}
    for name, settings in raw["stages"].items():
        if name == until:
            return run
        write_stage(run / name, name, settings)
        do = settings["do"]
        verb = verbs()[do]
        told[name] = SimpleNamespace(
            source=settings.get("from"), distils=verb.distils, prunes=verb.prunes, figures=verb.figures
        )
    made: Any = SimpleNamespace(name="tiny", stages=told, family=SimpleNamespace(**raw["family"]))
    write_summary(made, run)
    write_json(run / "samples.json", samples())
    return run


def write_stage(directory: Path, name: str, settings: dict[str, Any], seed: int = 0) -> None:
    rng, do = np.random.default_rng([seed, *name.encode()]), settings["do"]
    rows = post_metrics(do, rng) if name in POST else metrics(name, rng) if do in ("train", "distill") else []
    made = {"parent": settings.get("from"), "judge": settings.get("judge")}
    places = {role: directory.parent / stage for role, stage in made.items() if stage}
    last = next((row for row in reversed(rows) if row["kind"] == "eval"), {})
    inputs = {role: {"stage": p.name, "digest": digest(p)} for role, p in places.items() if p.is_dir()}
    length = 512 if "base" in name else 128
    figures = {key: value for key, value in last.items() if key not in ("kind", "step", "tokens")}
    manifest = {"stage": name, "do": do, "status": "finished", "inputs": inputs, "metrics": figures}
    manifest |= {"tokens": last.get("tokens", 0), "steps": last.get("step", 0), "seconds": 243.7, "git": "3f1c9ad0b7e8"}
    manifest |= {"spec": spec_of(name).model_dump(mode="json"), "versions": {"jax": "0.10.2"}}
    manifest |= {"devices": {"count": 4, "kind": "made-up chip", "hosts": 2, "peak_memory": 5_000_000_000}}
    manifest["config"] = {"do": do, "optimizer": {"lr": 1e-3, "clip": None}, "data": DATA}
    if do in ("train", "prune", "distill", "sft", "reward"):
        manifest["config"]["batch"] = {"sequences": 16, "length": length}
        manifest["data"] = {"digest": f"{length:064x}", "tokenizer_digest": 64 * "7"}
    if do == "prune":
        manifest["prune"] = surgery(spec_of(settings["from"]), spec_of(name), CHILDREN[name.split("-")[0]][1], rng)
    if do == "record":
        manifest["store"] = {"train": split(settings["codec"], rng), "held_out": split({"kind": "hidden"}, rng)}
    write_json(directory / "manifest.json", manifest)
    write_rows(directory / "metrics.jsonl", rows)
    if name in POST and do != "reward":
        answers = []
        for prompt, right in ASKED:
            said = {"prompt": json.dumps(prompt), "answer": f"[THINK]1 steps[/THINK]{name} says 7"}
            said["before"] = {"answer": f"before {name}", "reward": 0.1, "parts": {"accuracy": 0.0}}
            answers.append({**said, "reward": 0.1 + 0.9 * right, "parts": {"accuracy": right, "format": None}})
        write_json(directory / "answers.json", {"prompts": 64, "answers": answers})


def relink(run: Path) -> None:
    """Manifests that a test has changed are what later stages were made from."""
    for name in json.loads((run / "recipe.json").read_text())["stages"]:
        if (run / name / "manifest.json").is_file():
            made = told_by(run, name)
            for given in made["inputs"].values():
                given["digest"] = digest(run / given["stage"]) if (run / given["stage"]).is_dir() else given["digest"]
            write_json(run / name / "manifest.json", made)


def metrics(name: str, rng: np.random.Generator) -> list[dict[str, Any]]:
    rows, steps = [], 60 if "base" in name else 300
    _, start, end = CHILDREN.get(name.split("-")[0], ("", 0.0, 0.0))
    start, end = (4.6, 6 * end) if "scratch" in name else (1.25 * end, 0.8 * end) if "base" in name else (start, end)
    for step in range(steps + 1):
        kl = end + (start - end) * math.exp(-7 * step / steps)
        ce = 2.9 + (4.7 * math.exp(-step / 70) if name == "parent" else 0.9 * kl)
        at = {"step": step, "tokens": step * TOKENS_PER_STEP}
        if step:
            loss = (ce if name == "parent" else kl) * math.exp(0.09 * rng.standard_normal())
            steered = {"learning_rate": 1e-3 * (1 - step / steps), "gradient_norm": 0.5 + rng.random()}
            rows.append(
                {"kind": "train", **at, **steered, "loss": loss, "tokens_per_second": 9000 + 500 * rng.random()}
            )
        if step in (0, steps) or step % 50 == 0 or (step < 50 and step & (step - 1) == 0):
            row = {"ce": ce, "bits_per_byte": ce / 2.1, "digit_accuracy": max(0.1, 1.6 - 0.23 * ce)}
            rows.append({"kind": "eval", **at, **row, **({} if name == "parent" else {"kl": kl})})
    return rows


def surgery(before: ModelSpec, after: ModelSpec, kl: float, rng: np.random.Generator) -> dict[str, Any]:
    steps, kls = [], {"mlp": 0.9 * kl}
    if after.layers < before.layers:
        scores = rng.random(before.layers)
        kept = sorted(np.argsort(-scores)[: after.layers].tolist())
        steps.append({"step": "layers", "score": "norm_ratio", "scores": scores.tolist(), "kept": kept})
        kls["layers"] = 0.25 * kl
    if after.width < before.width:
        energy = np.exp(-0.09 * np.arange(before.width))
        share = np.cumsum(energy) / energy.sum()
        spectrum = {"index": list(range(before.width)), "energy": energy.tolist(), "cumulative": share.tolist()}
        kept = {"basis": "pca", "retained_energy": float(share[after.width - 1]), "gain": 1.1}
        steps.append({"step": "width", **kept, "spectrum": spectrum})
        kls["width"] = 0.8 * kl
    neurons = {"all": [0.1, 0.2, 0.4, 0.8, 3.0], "kept": [0.3, 0.5, 0.7, 0.9, 3.0], "kept_share": 0.84}
    steps.append({"step": "mlp", "score": "activation", "kept": after.mlp_width, "layers": [neurons] * after.layers})
    if after.tied:
        steps.append({"step": "tie", "seed": "mean"})
        kls["tie"] = kl
    return {"steps": steps, "kl": kls}


def split(codec: dict[str, Any], rng: np.random.Generator, tokens: int = 20_000) -> dict[str, Any]:
    """What a logit store says of a split."""
    told = {"codec": codec, "rows": 160, "shards": 5, "tokens": tokens}
    told |= {"bytes": {"ids": 48 * tokens}, "bytes_per_token": 48.0}
    if codec["kind"] != "topk":
        return told
    counts = np.histogram(rng.normal(-1.5, 0.3, tokens), [-99, *np.log10(EDGES)])[0]
    mean, p50, p90, p99 = 0.038, 0.0282, 0.0891, 0.1995
    return told | {
        "teacher_entropy": 1.5,
        "tail_mass": {"mean": mean, "p50": p50, "p90": p90, "p99": p99, "max": 0.631},
        "curve": {str(size): mean * (32 / size) ** 0.5 for size in (8, 16, 32, 64, 128)},
        "tail_histogram": {"at_most": EDGES.tolist(), "tokens": counts.tolist()},
        "tail_by_shard": {"mean": [mean * (1 + 0.1 * i) for i in range(5)], "p99": [0.2 + 0.01 * i for i in range(5)]},
    }


def samples(images: int = 24) -> dict[str, Any]:
    made, wrong = [], {"8b": {7}, "3b": {3, 7, 18}}
    for i in range(images):
        answers = {name: str((i + (i in wrong.get(name, ()))) % 10) for name in ("parent", *CHILDREN)}
        told = {"question": "Which digit is this?", "label": str(i % 10), "answers": answers}
        made.append({"png": picture(i), **told})
    return {"images": made}


def post_metrics(do: str, rng: np.random.Generator, steps: int = 20) -> list[dict[str, Any]]:
    """Rows with the keys of the real stages; only those that read data count tokens."""
    rows = []
    spent = {"step": 60.0, "generate": 35.0} if do in ("grpo", "odpo") else {"step": 95.0}
    for step in range(steps + 1):
        at = {"step": step, **({"tokens": step * TOKENS_PER_STEP} if do in ("sft", "reward") else {})}
        done = 1 - math.exp(-4 * step / steps)
        if step:
            drawn = {"reward": 0.4 + 0.3 * done} if do == "grpo" else {"ce": 2 - done}
            rows.append({"kind": "train", **at, "loss": 2 - done, "tokens_per_second": 700.0, **drawn})
        if step % 10 == 0:
            rows.append({"kind": "eval", **at, **_held_out(do, done, float(rng.random()))})
        if step in (0, steps):
            time = {"attempt": 1, "from": 0, "at": 1e9, "seconds": {**spent, "evaluate": 5.0}}
            rows.append({"kind": "time", **at, **time})
    return rows


def _held_out(do: str, done: float, noise: float) -> dict[str, float]:
    if do == "reward":
        judge = {"judge_temperature": 1.7, "judge_accuracy": 0.5 + 0.4 * done + 0.02 * noise}
        return {"ce": 2 - done, **judge, "judge_ece_before": 0.21 - 0.1 * done, "judge_ece": 0.034}
    sums, pictures = 0.4 * done + 0.02 * noise, 0.7 * done
    found = {"reward": 0.4 * (sums + pictures) + 0.1, "reward_accuracy": (sums + pictures) / 2, "reward_format": 1.0}
    found |= {"accuracy": (sums + pictures) / 2, "accuracy_sums": sums, "accuracy_pictures": pictures}
    found |= {"pass@8": 0.9, "pass@8_sums": 0.8, "pass@8_pictures": 1.0}
    found |= {"reward_format_sums": 1.0, "reward_accuracy_sums": sums, "reward_accuracy_pictures": pictures}
    found |= {"prompts": 64.0, "prompts_sums": 38.0, "prompts_pictures": 26.0}
    found |= {"loop_rate": 0.1 * (1 - done), "truncated": 0.0, "completion_length": 20.0 + 10 * done}
    return found | ({"win_rate": 0.5 + 0.2 * done} if do == "odpo" else {"ce": 2 - done} if do == "sft" else {})


def write_sweep(sweep: Path, axes: dict[str, list[Any]], stages: tuple[str, ...], measure: str) -> Path:
    """A finished sweep that multiplies its axes, all of its stages made anew at each point."""
    short, points = {key: key.rpartition(".")[2] for key in axes}, []
    for i, values in enumerate(itertools.product(*axes.values())):
        places = {name: f"shared/{name}-{i}" for name in stages}
        for name, place in places.items():
            write_stage(sweep / place, name, (recipe()["stages"] | POST)[name], seed=i)
        figures = {key: value + 0.001 * i for key, value in told_by(sweep, places[measure])["metrics"].items()}
        point = {"name": f"point-{i}", "settings": dict(zip(axes, values, strict=True)), "stages": places}
        points.append({**point, "state": "finished", "figures": {measure: figures}})
    curve = [name for name in stages if name in recipe()["stages"]]
    record = {"name": "made-up", "recipe": "tiny", "keys": short, "axes": [[key] for key in axes], "wanted": []}
    record |= {"stages": 3 * len(points), "stages_unshared": 3 * len(points), "seconds": 731.0, "points": points}
    told = {"overrides": {"seed": 1}, "measure": [{"stage": measure, "metrics": [], "curve": curve}]}
    write_json(sweep / "sweep.json", {**record, **told})
    return sweep

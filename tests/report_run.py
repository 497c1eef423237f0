"""A made-up run directory with the files, shapes and magnitudes of a real one, for the tests of the report."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from ministral_jax.models.spec import PRESETS, ModelSpec
from ministral_jax.stages import record
from ministral_jax.teachers.codecs import Codec, HiddenCodec, SampledCodec, TopKCodec, curve_sizes
from ministral_jax.teachers.statistics import EDGES

CHILDREN = {"14b": ("parent", 0.9, 0.011), "8b": ("14b-short", 2.1, 0.034), "3b": ("8b-short", 3.4, 0.093)}
"""Source, KL right after surgery and KL after the short stage."""
TOKENS_PER_STEP = 2048
VERSIONS = {"ministral-jax": "0.1.0", "jax": "0.10.2", "flax": "0.12.8", "orbax-checkpoint": "0.12.1"}
_GLYPHS = ("757", "262", "617", "717", "551", "747", "757", "711", "777", "757")


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def recipe() -> dict[str, Any]:
    stages: dict[str, Any] = {"parent": {"do": "train", "model": "tiny-24b", "steps": 600}}
    for name, (source, _, _) in CHILDREN.items():
        stages[f"{name}-pruned"] = {"do": "prune", "from": source, "model": f"tiny-{name}"}
        stages[f"{name}-short"] = {"do": "distill", "from": f"{name}-pruned", "teacher": "parent", "steps": 300}
        stages[f"{name}-short-scratch"] = {"do": "distill", "from": None, "teacher": "parent", "steps": 300}
        stages[f"{name}-base"] = {"do": "distill", "from": f"{name}-short", "teacher": "parent", "steps": 60}
        stages[f"{name}-base-scratch"] = {
            "do": "distill",
            "from": f"{name}-short-scratch",
            "teacher": "parent",
            "steps": 60,
        }
        stages[f"{name}-hf"] = {"do": "export", "from": f"{name}-base"}
    family = {"parent": "parent", "children": {name: f"{name}-base" for name in CHILDREN}}
    return {"name": "tiny", "stages": stages, "family": family}


def spec_of(stage: str) -> ModelSpec:
    return PRESETS["tiny-24b" if stage == "parent" else f"tiny-{stage.split('-')[0]}"]


def write_run(run: Path, until: str | None = None) -> Path:
    """All stages, or those before `until`; without it also the summary and the samples."""
    write_json(run / "recipe.json", recipe())
    rng = np.random.default_rng(0)
    for name, raw in recipe()["stages"].items():
        if name == until:
            return run
        _write_stage(run, name, raw, rng)
    write_json(run / "summary.json", summary())
    write_json(run / "samples.json", samples(rng))
    return run


def manifest(stage: str, do: str, spec: ModelSpec, **more: Any) -> dict[str, Any]:
    """Of a finished stage."""
    return {
        "stage": stage,
        "do": do,
        "status": "finished",
        "config": {},
        "spec": spec.model_dump(mode="json"),
        "versions": VERSIONS,
        "git": "3f1c9ad0b7e84c55a1d2",
        **more,
    }


def _write_stage(run: Path, name: str, raw: dict[str, Any], rng: np.random.Generator) -> None:
    rows = metrics(name, raw["steps"], rng) if "steps" in raw else []
    if rows:
        (run / name).mkdir(parents=True)
        (run / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = raw.get("from")
    more: dict[str, Any] = {
        "inputs": {"parent": {"stage": source, "digest": _digest(run / source)}} if source else {},
        "tokens": raw.get("steps", 0) * TOKENS_PER_STEP,
        "steps": raw.get("steps", 0),
        "seconds": 0.35 * raw.get("steps", 20),
        "metrics": {k: v for k, v in rows[-1].items() if k not in ("kind", "step")} if rows else {},
    }
    if raw["do"] == "prune":
        more["prune"] = surgery(spec_of(str(source)), spec_of(name), CHILDREN[name.split("-")[0]][1], rng)
    write_json(run / name / "manifest.json", manifest(name, raw["do"], spec_of(name), **more))


def _digest(stage: Path) -> str:
    return hashlib.sha256((stage / "manifest.json").read_bytes()).hexdigest()


def metrics(name: str, steps: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    rows = []
    for step in range(steps + 1):
        tokens = step * TOKENS_PER_STEP
        kl, ce = _curve(name, step, steps)
        if step:
            noisy = (kl if name != "parent" else ce) * math.exp(0.09 * rng.standard_normal())
            speed = 9000 * (1 + 0.05 * rng.standard_normal())
            row = {"kind": "train", "step": step, "tokens": tokens, "loss": noisy, "learning_rate": 3e-4}
            rows.append({**row, "gradient_norm": 0.8, "tokens_per_second": speed})
        if step in (0, steps) or step % 50 == 0 or (step < 50 and step & (step - 1) == 0):
            accuracy = max(0.1, 0.99 - 0.5 * kl) if name != "parent" else min(0.985, 0.1 + step / 400)
            row = {
                "kind": "eval",
                "step": step,
                "tokens": tokens,
                "ce": ce,
                "bits_per_byte": ce / 2.1,
                "digit_accuracy": accuracy,
            }
            rows.append(row if name == "parent" else {**row, "kl": kl})
    return rows


def _curve(name: str, step: int, steps: int) -> tuple[float, float]:
    """KL to the parent and cross-entropy."""
    if name == "parent":
        return 0.0, 2.9 + 4.7 * math.exp(-step / 70)
    child = name.split("-")[0]
    _, start, end = CHILDREN[child]
    if "scratch" in name:
        start, end, rate = 4.6, end * 6, steps / 5
    else:
        rate = steps / 9
    if "base" in name:
        start, end = end * 1.25, end * 0.8
    kl = end + (start - end) * math.exp(-step / rate) * (1 - 0.3 * step / steps)
    return kl, 2.9 + 0.9 * kl


def surgery(before: ModelSpec, after: ModelSpec, kl: float, rng: np.random.Generator) -> dict[str, Any]:
    steps, kls = [], {}
    if after.layers < before.layers:
        scores = 1.02 + 0.35 * rng.random(before.layers) * np.linspace(1.6, 0.7, before.layers)
        kept = sorted(np.argsort(-scores)[: after.layers].tolist())
        steps.append({"step": "layers", "score": "norm_ratio", "scores": scores.tolist(), "kept": kept})
        kls["layers"] = 0.25 * kl
    if after.width < before.width:
        energy = np.exp(-0.09 * np.arange(before.width)) * (1 + 30 * (np.arange(before.width) < 2))
        share = np.cumsum(energy) / energy.sum()
        spectrum = {"index": list(range(before.width)), "energy": energy.tolist(), "cumulative": share.tolist()}
        retained = float(share[after.width - 1])
        steps.append({"step": "width", "basis": "pca", "retained_energy": retained, "gain": 1.1, "spectrum": spectrum})
        kls["width"] = 0.8 * kl
    layers = [
        _quantiles(np.exp(rng.standard_normal(before.mlp_width) - 3), after.mlp_width) for _ in range(after.layers)
    ]
    steps.append({"step": "mlp", "score": "activation", "kept": after.mlp_width, "layers": layers})
    kls["mlp"] = 0.9 * kl if after.tied else kl
    if after.tied:
        steps.append({"step": "tie", "seed": "mean"})
        kls["tie"] = kl
    return {"tokens": {"text": 30_000, "image": 2_000}, "steps": steps, "kl": kls}


def _quantiles(scores: np.ndarray, keep: int) -> dict[str, Any]:
    kept, levels = np.sort(scores)[-keep:], (0, 0.25, 0.5, 0.75, 1)
    quantiles = {name: np.quantile(s, levels).tolist() for name, s in (("all", scores), ("kept", kept))}
    return {**quantiles, "kept_share": float(kept.sum() / scores.sum())}


def summary() -> dict[str, Any]:
    def entry(spec: ModelSpec) -> dict[str, Any]:
        return {
            "parameters": spec.parameters,
            "decoder_parameters": spec.decoder_parameters,
            "flops_per_token": spec.flops_per_token(128),
        }

    parent = {
        **entry(spec_of("parent")),
        "stage": "parent",
        "tokens": 1_228_800,
        "bits_per_byte": 1.381,
        "digit_accuracy": 0.985,
    }
    children, lineage = {}, 1_228_800
    for rank, (name, (_, start, end)) in enumerate(CHILDREN.items()):
        lineage += 614_400
        roles = {
            "pruned": "pruned",
            "short": "short",
            "base": "base",
            "scratch_short": "short-scratch",
            "scratch_base": "base-scratch",
        }
        children[name] = {
            **entry(spec_of(name)),
            "tokens": 737_280,
            "tokens_lineage": lineage + 122_880,
            "bits_per_byte": 1.381 + 0.43 * end,
            "digit_accuracy": (0.984, 0.975, 0.941)[rank],
            "kl_after_surgery": start,
            "kl_final": _curve(f"{name}-base", 60, 60)[0],
            "kl_scratch": _curve(f"{name}-base-scratch", 60, 60)[0],
            "token_speedup": (3.4, 3.5, 4.3)[rank],
            "stages": {role: f"{name}-{stage}" for role, stage in roles.items()},
        }
    return {"parent": parent, "children": children, "wall_seconds": 2263.0}


def samples(rng: np.random.Generator, images: int = 24) -> dict[str, Any]:
    def answers(label: int, image: int) -> dict[str, str]:
        wrong = {"8b": {7}, "3b": {3, 7, 18}}
        return {name: str((label + (image in wrong.get(name, ()))) % 10) for name in ("parent", *CHILDREN)}

    shown = [
        {
            "png": digit(i % 10, rng),
            "question": "Which digit is this?",
            "label": str(i % 10),
            "answers": answers(i % 10, i),
        }
        for i in range(images)
    ]
    return {"images": shown}


def digit(label: int, rng: np.random.Generator) -> str:
    """A blurred 8 x 8 figure with noise, as PNG in base64."""
    image = np.zeros((8, 8))
    for row, bits in zip((1, 4, 6), _GLYPHS[label], strict=True):
        for column in range(3):
            image[row : row + 2, 1 + 2 * column : 3 + 2 * column] = 220 * (int(bits) >> (2 - column) & 1)
    noisy = (image + rng.normal(12, 14, image.shape)).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noisy).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


SOURCES = {"sums": 0.6, "pictures": 0.9}
"""Of prompts, with the share that is answered right in the end."""
POST = {
    "14b-sft": {"do": "sft", "from": "14b-base", "teacher": "parent", "steps": 40},
    "14b-reward": {"do": "reward", "from": "14b-sft", "steps": 30},
    "14b-instruct": {"do": "odpo", "from": "14b-sft", "judge": "14b-reward", "steps": 20},
    "14b-cot": {"do": "sft", "from": "14b-base", "teacher": None, "steps": 40},
    "14b-rl": {"do": "grpo", "from": "14b-cot", "steps": 20},
    "14b-reasoning": {"do": "odpo", "from": "14b-rl", "rewards": {"accuracy": {}}, "steps": 20},
}
_ASKED = ("4-2=?", "25-6=?", [{"type": "image"}, {"type": "text", "text": "Sum?"}], "87*3=?")


def write_post(run: Path, seed: int = 0, stages: tuple[str, ...] = tuple(POST)) -> Path:
    """Add finished stages of post-training to a run."""
    raw = json.loads((run / "recipe.json").read_text()) if (run / "recipe.json").is_file() else recipe()
    for name in stages:
        raw["stages"][name] = post_settings(name)
        write_post_stage(run / name, name, np.random.default_rng([seed, *name.encode()]))
    write_json(run / "recipe.json", raw)
    return run


def post_settings(name: str) -> dict[str, Any]:
    rewards: dict[str, Any] = {"accuracy": {"weight": 0.9}, "format": {"weight": 0.1}}
    asked = {"prompts": 64, "temperature": 0.0, "rewards": rewards}
    match (stage := POST[name])["do"]:
        case "sft":
            return {**stage, "generate": asked, "evaluate": {"every": 10, "rows": 64}}
        case "reward":
            return {**stage, "evaluate": {"every": 10, "rows": 64}}
        case "grpo":
            return {**stage, "evaluate": asked, "rewards": rewards}
        case _:
            return {**stage, "evaluate": asked}


def write_post_stage(directory: Path, name: str, rng: np.random.Generator) -> None:
    stage = POST[name]
    rows = post_metrics(str(stage["do"]), int(stage["steps"] or 0), rng)
    last = next(row for row in reversed(rows) if row["kind"] == "eval")
    more = {"tokens": last.get("tokens", 0), "steps": stage["steps"], "seconds": 243.7}
    more["metrics"] = {key: value for key, value in last.items() if key not in ("kind", "step")}
    write_json(directory / "manifest.json", manifest(name, str(stage["do"]), spec_of(name), **more))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if stage["do"] != "reward":
        answers = [_answer(i, content, name, rng) for i, content in enumerate(_ASKED)]
        write_json(directory / "answers.json", {"answers": answers})


def _answer(index: int, content: Any, name: str, rng: np.random.Generator) -> dict[str, Any]:
    right = float(index != 1)
    said = f"[THINK]{index} steps[/THINK]{name} says {rng.integers(99)}"
    parts = {"accuracy": right, "format": 1.0}
    return {"prompt": json.dumps(content), "answer": said, "reward": 0.1 + 0.9 * right, "parts": parts}


def post_metrics(do: str, steps: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Rows with the keys of the real stages; only those that read data count tokens."""
    rows = []
    for step in range(steps + 1):
        seen = {"tokens": step * TOKENS_PER_STEP} if do in ("sft", "reward") else {}
        done = 1 - math.exp(-4 * step / steps)
        noise = lambda scale=0.02: scale * float(rng.standard_normal())
        if step:
            row = {"loss": 2 - done + noise(), "gradient_norm": 0.8, "learning_rate": 1e-4, "tokens_per_second": 700.0}
            rows.append({"kind": "train", "step": step, **seen, **row, **_drawn(do, done, noise)})
        if step % 10 == 0 or step == steps:
            rows.append({"kind": "eval", "step": step, **seen, **_held_out(do, done, noise)})
        if step in (0, steps):
            spent = {"step": 60.0, "generate": 30.0, "score": 5.0, "evaluate": 5.0}
            spent = spent if do in ("grpo", "odpo") else {"step": 95.0, "evaluate": 5.0}
            rows.append({"kind": "time", "attempt": 1, "from": 0, "step": step, "at": 1e9 + step, "seconds": spent})
    return rows


def _drawn(do: str, done: float, noise: Any) -> dict[str, float]:
    match do:
        case "sft" | "reward":
            return {"ce": 2 - done + noise()}
        case "grpo":
            clipped = {"clipped_low": 0.01 + abs(noise(0.005)), "clipped_high": 0.02 + abs(noise(0.005))}
            return {"reward": 0.4 + 0.3 * done + noise(), "entropy": 0.4 - 0.3 * done, "ratio": 1.0, **clipped}
        case _:
            return {"margin": done, "accuracy": 0.5 + 0.4 * done, "judge_confidence": 0.8, "pairs_kept": 0.9}


def _held_out(do: str, done: float, noise: Any) -> dict[str, float]:
    if do == "reward":
        judge = {"judge_temperature": 1.7, "judge_accuracy": 0.5 + 0.4 * done + noise()}
        return {"ce": 2 - done, "ece": 0.02, **judge, "judge_ece_before": 0.21 - 0.1 * done, "judge_ece": 0.034}
    begin = 0.0 if do == "sft" else 0.5
    right = {source: begin + (end - begin) * done + abs(noise()) for source, end in SOURCES.items()}
    accuracy = sum(right.values()) / len(right)
    found = {"reward": 0.9 * accuracy + 0.1, "reward_accuracy": accuracy, "reward_format": 1.0}
    found |= {f"reward_accuracy_{source}": value for source, value in right.items()}
    found |= {"loop_rate": 0.1 * (1 - done), "truncated": 0.0, "completion_length": 20.0 + 10 * done}
    return found | ({"win_rate": 0.5 + 0.2 * done} if do == "odpo" else {"ce": 2 - done} if do == "sft" else {})


def write_seeds(sweep: Path, seeds: int = 3, stages: tuple[str, ...] = ("14b-sft", "14b-reward", "14b-rl")) -> Path:
    """A finished sweep over seeds, all of its stages made anew by each."""
    key = "stages.14b-sft.seed"
    points = []
    for seed in range(seeds):
        made = {name: f"shared/{name}-{seed}" for name in stages}
        for name, place in made.items():
            write_post_stage(sweep / place, name, np.random.default_rng([seed, *name.encode()]))
        figures = {"14b-rl": json.loads((sweep / made["14b-rl"] / "manifest.json").read_text())["metrics"]}
        point = {"name": f"seed={seed}", "settings": {key: seed}, "error": None, "stages": made, "state": "finished"}
        points.append({**point, "figures": figures})
    record = {"name": "seeds", "recipe": "tiny", "keys": {key: "seed"}, "axes": [[key]], "overrides": {}, "wanted": []}
    measure = [{"stage": "14b-rl", "metrics": [], "curve": []}]
    counts = {"stages": 3 * seeds, "stages_unshared": 3 * seeds, "seconds": 731.0}
    write_json(sweep / "sweep.json", {**record, "measure": measure, "points": points, **counts})
    return sweep


def write_record(run: Path, name: str, codec: Codec, shards: int = 5) -> Path:
    """Add a finished record stage of the parent to a run."""
    raw = json.loads((run / "recipe.json").read_text())
    raw["stages"][name] = {"do": "record", "from": "parent", "codec": codec.model_dump(mode="json")}
    write_json(run / "recipe.json", raw)
    splits = {}
    for split, kept, many in (("train", codec, shards), ("held_out", HiddenCodec(), 1)):
        told: Any = SimpleNamespace(codec=kept, order=range(32 * many))
        splits[split] = record._summary(told, [shard(kept, i) for i in range(many)])
    more = {"tokens": 4096 * (shards + 1), "seconds": 83.0, "store": splits}
    write_json(run / name / "manifest.json", manifest(name, "record", spec_of("parent"), **more))
    return run / name / "manifest.json"


def shard(codec: Codec, index: int, tokens: int = 4000) -> dict[str, Any]:
    """A file's record in a store: what is left out grows from one shard to the next."""
    found: dict[str, Any] = {"tokens": tokens}
    size = {"counted": 3_000, "hash": 512}
    match codec:
        case TopKCodec(entries=entries):
            tail = np.exp(np.random.default_rng(index).normal(math.log(0.01 * (1 + index)), 0.7, tokens)).clip(max=0.9)
            bins = np.minimum(np.searchsorted(EDGES, tail), len(EDGES) - 1)
            curve = [float(tail.sum()) * (entries / s) ** 0.5 for s in curve_sizes(codec, 2048)]
            found |= {
                "tail_mass": float(tail.sum()),
                "tail_histogram": np.bincount(bins, minlength=len(EDGES)).tolist(),
            }
            found |= {"entropy": 1.5 * tokens, "tail_entropy": 4.0 * tokens, "curve": curve}
            size |= {"ids": entries * tokens, "logprobs": entries * tokens // 2, "forced": 40_000, "tail": 8_000}
        case SampledCodec():
            found |= {"entropy": 1.5 * tokens, "unique_ids": 12 * tokens}
            size |= {"ids": 20 * tokens, "counts": 9 * tokens}
        case _:
            size |= {"states": 128 * tokens}
    return {"rows": 32, "bytes": size, "sha256": {}, "statistics": found}

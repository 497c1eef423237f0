"""What FP8 costs a stage of the tiny family, exported as it is and after quantisation-aware distillation.

    python benchmarks/fp8_export.py --run-dir DIR [--from RUN] [--stage 14b-short] [--steps 80] [--lr 2e-5] [--seeds 1]

Two copies of the stage learn from the stage itself for `--steps`: one with `quantize: fp8`, one without, on the same
rows. Stage and copies are exported in FP8, and the files read again: printed is the KL, in nats per token on held-out
rows, from the stage in float32 to each of them, computed with the weights and the activation scales that the files
hold, and with rounded weights alone, which is what a program computes that only dequantises.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml

from hardware import processor
from ministral_jax.interop import safetensors
from ministral_jax.interop.checkpoint import import_checkpoint
from ministral_jax.losses.evaluation import model_inputs
from ministral_jax.models.block import Exported
from ministral_jax.models.vlm import VLM, Compute
from ministral_jax.recipe.load import load_recipe, resolve_specs
from ministral_jax.runs.cascade import make_job
from ministral_jax.runs.run import opened, run_recipe
from ministral_jax.stages.base import Job, load_stage
from ministral_jax.stages.export import export_stage
from ministral_jax.stages.rows import held_out_batches, open_data

SITES = {
    "self_attn.q_proj": ("attention", "input"),
    "self_attn.o_proj": ("attention", "mixed"),
    "mlp.up_proj": ("mlp", "input"),
    "mlp.down_proj": ("mlp", "hidden"),
}


def scales_of(file: Path, layers: int) -> dict[str, Any]:
    """The variables `block.SCALES` that an export holds."""
    found = {
        name: tensor.read() for name, tensor in safetensors.read(file).items() if name.endswith("activation_scale")
    }
    scales: dict[str, Any] = {"attention": {}, "mlp": {}}
    for module, (part, name) in SITES.items():
        each = [found[f"language_model.model.layers.{i}.{module}.activation_scale"] for i in range(layers)]
        scales[part][name] = np.array(each, np.float32)
    return {"decoder": {"layers": scales}}


@partial(jax.jit, static_argnums=(0, 1))
def _kl(teacher: VLM, student: VLM, told: Any, variables: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
    p, q = (
        jax.nn.log_softmax(model.apply(given, batch["tokens"], **model_inputs(batch)))
        for model, given in ((teacher, told), (student, variables))
    )
    return (batch["loss_mask"] * (jnp.exp(p) * (p - q)).sum(-1)).sum(), batch["loss_mask"].sum()


def kl_of(job: Job[Any], source: Path, student: VLM, variables: Any) -> float:
    spec, params = load_stage(source, placement=job.placement)
    sums = [
        _kl(VLM(spec), student, {"params": params}, variables, batch) for batch in held_out_batches(job, open_data(job))
    ]
    return float(sum(total for total, _ in sums) / sum(count for _, count in sums))


def measure(job: Job[Any], source: Path, stage: Path) -> tuple[float, float, float]:
    """KL from `source` to `stage` in float32, with rounded weights, and with all that its FP8 export rounds."""
    out = stage.with_name(f"{stage.name}-fp8")
    export_stage(stage, out, "float32", job.placement, "fp8")
    spec, weights = import_checkpoint(out)
    whole = {"params": load_stage(stage, placement=job.placement)[1]}
    rounded = {"params": weights, "scales": scales_of(out / "model.safetensors", spec.layers)}
    plain, exported = VLM(spec, Compute()), VLM(spec, Exported())
    kl = partial(kl_of, job, source)
    return kl(plain, whole), kl(plain, {"params": weights}), kl(exported, rounded)


def with_copies(args: argparse.Namespace, arms: dict[str, tuple[str, int]]) -> Path:
    """The recipe of the tiny family with the copies, below the run's directory."""
    raw = yaml.safe_load(Path("configs/tiny.yaml").read_text())
    settings: dict[str, Any] = {"do": "distill", "from": args.stage, "teacher": args.stage, "steps": args.steps}
    settings |= {"optimizer": {"lr": args.lr, "warmup": 4}, "evaluate": {"every": args.steps}, "baseline": False}
    quantize = {"plain": None, "aware": "fp8"}
    raw["stages"] |= {name: {**settings, "seed": seed, "quantize": quantize[arm]} for name, (arm, seed) in arms.items()}
    path = args.run_dir.with_name(f"{args.run_dir.name}.yaml")
    path.write_text(yaml.safe_dump(raw))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--from", dest="taken_from", type=Path, action="append", default=[])
    parser.add_argument("--stage", default="14b-short")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    arms = {f"{arm}-{seed}": (arm, seed) for arm in ("plain", "aware") for seed in range(args.seeds)}
    recipe = load_recipe(with_copies(args, arms))
    with opened(args.run_dir):
        run_recipe(recipe, args.run_dir, [args.stage, *arms], args.taken_from)
    job = make_job(recipe, "aware-0", resolve_specs(recipe), args.run_dir)
    with jax.set_mesh(job.mesh):
        rows = {name: measure(job, args.run_dir / args.stage, args.run_dir / name) for name in (args.stage, *arms)}
    print(f"{args.stage}, {args.steps} steps of {job.stage.batch.tokens} tokens, {args.seeds} seeds; {processor()}")
    print("| KL from the stage in float32 | float32 | weights in FP8 | exported |")
    print("|---|---|---|---|")
    groups = {"the stage": [rows[args.stage]]}
    groups |= {
        label: [rows[name] for name, (arm, _) in arms.items() if arm == wanted]
        for label, wanted in (("distilled without", "plain"), ("distilled with quantize: fp8", "aware"))
    }
    for label, found in groups.items():
        cells = [" ".join(f"{one:.2e}" for one in column) for column in zip(*found, strict=True)]
        means = [f"{statistics.mean(column):.2e}" for column in zip(*found, strict=True)]
        print(f"| {label} | " + " | ".join(means if len(found) == 1 else map("{} ({})".format, means, cells)) + " |")


if __name__ == "__main__":
    main()

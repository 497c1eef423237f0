"""Predicted against measured time of a distillation step on this CPU, at six shapes.

    python benchmarks/plan_cpu.py [--json FILE] [--rounds 5]

The model is that of `planning.roofline`; its two peaks, of products and of memory, are fitted to the measured times by
least squares of log(predicted / measured): to all six shapes, and for each shape to the other five alone. The process
is held to one core, and a time is the least CPU time of several steps: on an idle machine that is the wall-clock time,
on a busy one it is still near it. All shapes are measured in turn, round by round.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

import jax
from scaling import OPTIMIZER, STEPS, Setting, batch_of, compile_step, distil

from hardware import processor
from ministral_jax.distributed.chips import Chip
from ministral_jax.distributed.placement import MeshConfig, Placement, Rules, make_mesh
from ministral_jax.models.spec import ModelSpec
from ministral_jax.models.vlm import Compute
from ministral_jax.planning.machine import Machine
from ministral_jax.planning.timing.assumptions import Assumptions
from ministral_jax.planning.timing.roofline import stage_time
from ministral_jax.planning.work import stage_work
from ministral_jax.stages.base import fresh_params
from ministral_jax.training.optimizer import make_optimizer
from ministral_jax.training.state import init_state

# The peaks are fitted, so that no share of them is assumed.
ASSUMED = Assumptions(matmul=1, attention=1, memory=1)


def setting(width: int, layers: int, vocab: int, length: int, remat: Any = "none") -> Setting:
    """A student with half the feed-forward width of its teacher."""
    sizes: Any = dict(layers=layers, width=width, heads=width // 32, kv_heads=width // 64, head_width=32, vocab=vocab)
    student = ModelSpec(mlp_width=3 * width, context=length, vision=None, **sizes)
    teacher = ModelSpec(mlp_width=6 * width, context=length, vision=None, **sizes)
    return Setting(student, teacher, Compute(remat=remat), chunk=1024, length=length)


SHAPES: dict[str, tuple[Setting, int]] = {
    "width 128, 8 rows of 64": (setting(128, 4, 2048, 64), 8),
    "width 128, 4 rows of 512": (setting(128, 4, 2048, 512), 4),
    "width 256, 8 rows of 128": (setting(256, 4, 4096, 128), 8),
    "width 256, 16 rows of 128, full remat": (setting(256, 6, 8192, 128, "full"), 16),
    "width 384, 4 rows of 384": (setting(384, 4, 4096, 384), 4),
    "width 512, 8 rows of 128": (setting(512, 4, 8192, 128), 8),
}
PLACE = Placement(make_mesh(MeshConfig(), jax.devices()[:1]), Rules())


def stepper(given: Setting, rows: int) -> Callable[[], float]:
    """Seconds of one step."""
    with jax.set_mesh(PLACE.mesh):
        compiled = compile_step(given, PLACE, rows)
        state = init_state(fresh_params(given.student, 0, PLACE), make_optimizer(OPTIMIZER, STEPS))
        frozen = {"teacher": fresh_params(given.teacher, 1, PLACE)}
    batch = PLACE.place(batch_of(given, rows), rows)

    def step() -> float:
        nonlocal state
        start = time.process_time()
        state, metrics = compiled(state, frozen, batch)
        jax.block_until_ready((state, metrics))
        return time.process_time() - start

    return step


def predict(given: Setting, rows: int, peaks: tuple[float, float], assume: Assumptions = ASSUMED) -> float:
    """Seconds of a step where products run at peaks[0] FLOP/s and memory at peaks[1] bytes/s."""
    chip = Chip("here", ("cpu",), peaks[0], 0, peaks[1], 0, peaks[1], peaks[1], 1, 0)
    stage, graph = distil(given, PLACE, rows)
    work = stage_work(stage, given.student, graph)
    return stage_time(work, PLACE.mesh, Machine(chip, (1, 1)), assume).step_seconds


def fit(measured: Sequence[tuple[Callable[[tuple[float, float]], float], float]]) -> tuple[float, float]:
    """The peaks of least squared log error, by a grid that is refined around its best point."""
    best, span = (1e11, 1e10), 100.0

    def error(peaks: tuple[float, float]) -> float:
        return sum(math.log(model(peaks) / seconds) ** 2 for model, seconds in measured)

    for _ in range(12):
        factors = [span ** (i / 4) for i in range(-4, 5)]
        best = min(((best[0] * a, best[1] * b) for a in factors for b in factors), key=error)
        span **= 0.5
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    steps = {name: stepper(*shape) for name, shape in SHAPES.items()}
    seconds = dict.fromkeys(steps, math.inf)
    for _ in range(args.rounds + 1):
        for name, step in steps.items():
            seconds[name] = min(seconds[name], step())
    models = {name: partial(predict, *shape) for name, shape in SHAPES.items()}
    pairs = {name: (models[name], seconds[name]) for name in SHAPES}
    peaks = fit(list(pairs.values()))
    rows = {}
    for name, (model, measured) in pairs.items():
        others = fit([pair for other, pair in pairs.items() if other != name])
        rows[name] = {"measured": measured, "all": model(peaks), "others": model(others)}
    versions = {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib")},
    }
    print(f"{processor()}; " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    print(f"fitted: {peaks[0] / 1e9:.0f} GFLOP/s, {peaks[1] / 1e9:.1f} GB/s")
    print("| step | measured | fitted to all | off | fitted to the other five | off |\n|---|---|---|---|---|---|")
    for name, row in rows.items():
        told = [f"{1e3 * row[key]:,.0f} ms | {row[key] / row['measured'] - 1:+.0%}" for key in ("all", "others")]
        print(f"| {name} | {1e3 * row['measured']:,.0f} ms | {' | '.join(told)} |")
    if args.json:
        found = {"hardware": processor(), "versions": versions, "peaks": peaks, "steps": rows}
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

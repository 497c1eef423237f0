"""What pictures cost a distillation step: nothing where there are none, and else their own patches, once.

    python benchmarks/vision.py [--json FILE]

Student and teacher have one frozen tower. Rounds of all cases alternate in one process, seconds are medians, and each
is divided by its round's step of a model without vision. Attention's cost is counted in pairs of patches that tiles of
`compute.attention_block` compute; all pairs of all patches stand beside it. `products` is how often the step multiplies
patches by the tower's first matrix, read off its program. Float32 on the CPU.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from hardware import processor
from ministral_jax.data.batch import images_of_rows, one_per_row
from ministral_jax.data.bins import place_whole
from ministral_jax.data.images import to_patches
from ministral_jax.distributed.placement import MeshConfig, Placement, Rules, make_mesh
from ministral_jax.losses.head import LossHead
from ministral_jax.losses.targets import LossOptions
from ministral_jax.models.attention import Part, _visited, into_tiles
from ministral_jax.models.spec import ModelSpec, VisionSpec
from ministral_jax.models.vlm import VLM, Compute, init_params
from ministral_jax.stages.teaching import distillation, without_tower
from ministral_jax.teachers.teacher import online_targets
from ministral_jax.training.state import init_state, make_step, split_frozen

VISION = VisionSpec(layers=4, width=128, mlp_width=256, heads=2, head_width=64, patch_size=4, max_image_size=512)
SIZES = dict(layers=4, width=192, heads=6, kv_heads=2, head_width=32, vocab=2048, context=2048, vision=VISION)
STUDENT, TEACHER = ModelSpec(mlp_width=384, **SIZES), ModelSpec(mlp_width=768, **SIZES)
ROWS, LENGTH, IMG = 8, 1200, 10
CASES: dict[str, list[int]] = {
    "text": [],
    "one picture of 1,024 patches": [16],
    "one picture of 4,096 patches": [32],
    "sixteen pictures of 256 patches": 16 * [8],
}
"""Merged tokens along the side of each picture; they stand in the first rows."""


def batch_of(sides: list[int]) -> dict[str, np.ndarray]:
    random, rows = np.random.default_rng(0), [[] for _ in range(ROWS)]
    for number, side in enumerate(sides):
        rows[number % ROWS].append(random.integers(0, 256, (side * 8, side * 8, 3)).astype(np.uint8))
    shown = [to_patches(row, VISION) if row else None for row in rows]
    counts = [0 if one is None else int(one.grids.prod(axis=1).sum()) for one in shown]
    text = [random.integers(14, STUDENT.vocab, LENGTH - count) for count in counts]
    batch = one_per_row([np.r_[[IMG] * count, words] for count, words in zip(counts, text, strict=True)])
    mask = {"loss_mask": (batch["positions"] > 0).astype(np.float32)}
    return batch | mask | images_of_rows(shown, batch["tokens"] == IMG)


def program_of(specs: tuple[ModelSpec, ModelSpec], batch: dict[str, np.ndarray]) -> tuple[Any, tuple[Any, ...]]:
    """The step, compiled, with its arguments but for the state; and what is told of it."""
    place = Placement(make_mesh(MeshConfig(), jax.devices()[:1]), Rules())
    student, teacher = specs
    loss = distillation(
        VLM(student, COMPUTE), LossOptions(), LossHead(place), online_targets(teacher, COMPUTE, place.rules)
    )
    trainable, fixed = split_frozen(jax.jit(init_params, static_argnums=0)(student, jax.random.key(0)), ("vision",))
    constants = {
        **fixed,
        "teacher": without_tower(jax.jit(init_params, static_argnums=0)(teacher, jax.random.key(1))),
    }
    optimizer = optax.sgd(1e-3)
    step = make_step(loss, optimizer, optax.constant_schedule(1e-3))
    placed = place_whole(place, batch, student.vision)
    lowered = step.lower(state := init_state(trainable, optimizer), constants, placed)
    told = {"gflops_without_loops": lowered.cost_analysis()["flops"] / 1e9, "products": 0, "pairs": 0, "all_pairs": 0}
    if "patches" in placed:
        count = placed["patches"].shape[2]
        embedded = rf"dot_general.*tensor<1x{count}x\d+xf32>, tensor<{VISION.patch_width}x{VISION.width}xf32>"
        told["products"] = len(re.findall(embedded, lowered.as_text()))
        told |= {"patches": count, "pairs": pairs(placed["patch_image"][0]), "all_pairs": count**2}
    return lowered.compile(), state, constants, placed, told


def pairs(images: jax.Array) -> int:
    """Of patches, that attention's tiles compute in a layer and head."""
    x, part = np.zeros((*images.shape, 1, 1), np.float32), Part(images, np.zeros(1, np.int32))
    *_, tiles, keys = into_tiles(x, x, x, part, part, COMPUTE.attention_block)
    begin, end = jax.vmap(lambda tile: _visited(tile, keys, False))(tiles)
    return int((end - begin).sum()) * COMPUTE.attention_block**2


COMPUTE = Compute(attention_block=128)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    blind = tuple(spec.model_copy(update={"vision": None}) for spec in (STUDENT, TEACHER))
    ready = {"text, without vision": program_of(blind, batch_of([]))}
    ready |= {name: program_of((STUDENT, TEACHER), batch_of(sides)) for name, sides in CASES.items()}
    states, seconds = {name: one[1] for name, one in ready.items()}, {name: [] for name in ready}
    for number in range(options.rounds + 1):
        for name, (step, _, constants, placed, _) in ready.items():
            begun = time.perf_counter()
            states[name], _ = jax.block_until_ready(step(states[name], constants, placed))
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - begun)
    base = seconds["text, without vision"]
    table = {}
    for name, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(times, base, strict=True))
        table[name] = {"seconds": statistics.median(times), "ratio": ratio, **ready[name][4]}
        row = table[name]
        print(
            f"{name:32} {row['seconds']:7.3f} s  x {ratio:5.3f}  {row['gflops_without_loops']:7.2f} GFLOP "
            f" products {row['products']}  pairs {row['pairs']:>11,} of {row['all_pairs']:>11,}"
        )
    if options.json:
        options.json.write_text(json.dumps({"cpu": processor(), "jax": jax.__version__, "cases": table}, indent=1))


if __name__ == "__main__":
    main()

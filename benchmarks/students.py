"""A student that trains as in a distil stage, with its teacher online or stored, and a clock on what it waits for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ministral_jax.distributed.placement import make_mesh
from ministral_jax.losses.head import LossHead
from ministral_jax.models.vlm import VLM
from ministral_jax.recipe.load import resolve_specs
from ministral_jax.recipe.types import Recipe
from ministral_jax.stages.base import Graph, Job, fresh_params, load_stage
from ministral_jax.stages.distill import FROZEN
from ministral_jax.stages.rows import open_data, train_batches
from ministral_jax.stages.teaching import distillation
from ministral_jax.teachers.store import Store
from ministral_jax.teachers.teacher import online, stored
from ministral_jax.training.log import mean
from ministral_jax.training.optimizer import learning_rate, make_optimizer
from ministral_jax.training.state import init_state, make_step, split_frozen, state_shardings


@dataclass
class Side:
    """A student with one of its teachers, and where it stands."""

    update: Callable[[Any, Any], tuple[Any, Any]]
    batches: Callable[[], Iterator[Any]]
    state: Any
    tokens: int

    def drive(self, stream: Iterator[Any], steps: int) -> tuple[float, float]:
        """Run steps as the training loop does, which reads a step's figures while the device is at the next one; the
        seconds that it took, and those of them spent in `next`."""
        pending, waited, begun = None, 0.0, time.perf_counter()
        for _ in range(steps):
            asked = time.perf_counter()
            batch = next(stream)
            waited += time.perf_counter() - asked
            self.state, metrics = self.update(self.state, batch)
            if pending is not None:
                mean(pending)
            pending = metrics
        jax.block_until_ready((self.state, pending))
        return time.perf_counter() - begun, waited


def make_side(recipe: Recipe, student: str, teacher: str | None, run_dir: Path) -> Side:
    """The step and the batches of a distil stage, its student drawn at random; `teacher` online, or as the recipe has
    it: stored."""
    stage, specs = recipe.stages[student], resolve_specs(recipe)
    job = Job(student, stage, specs[student], Graph(recipe.stages, specs), run_dir, make_mesh(stage.mesh))
    place, data = job.placement, open_data(job)
    if teacher is None:
        taught = stored(Store(str(run_dir / stage.teacher.store / "store")), place, stage.batch.length)
    else:
        spec, params = load_stage(run_dir / teacher, jnp.dtype(stage.compute.dtype), place)
        taught = online(spec, params, stage.compute, place, stage.batch.length)
    trainable, fixed = split_frozen(fresh_params(job.spec, 0, place), FROZEN)
    loss = distillation(VLM(job.spec, stage.compute), stage.loss, LossHead(place, place.rules), taught.targets)
    rate, optimizer = learning_rate(stage.optimizer, stage.steps), make_optimizer(stage.optimizer, stage.steps)
    step = make_step(place.rules.scoped(loss), optimizer, rate, 1, state_shardings(trainable, optimizer))
    constants = {**fixed, "teacher": taught.constants}
    return Side(
        lambda state, batch: step(state, constants, batch),
        lambda: train_batches(job, data, 0, stage.steps, taught.join),
        init_state(trainable, optimizer),
        stage.batch.tokens,
    )

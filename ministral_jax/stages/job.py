"""What a stage is given and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ministral_jax.distributed.placement import Placement, make_mesh
from ministral_jax.distributed.processes import saving
from ministral_jax.models.spec import ModelSpec
from ministral_jax.models.vlm import abstract_params, init_params, param_shardings, placed_params
from ministral_jax.stages.manifest import finished
from ministral_jax.training.checkpoint import load_params, save_params

Params = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One stage of one run: its settings, the sizes of its result, and where everything lies."""

    name: str
    stage: Any
    spec: ModelSpec
    run_dir: Path

    @property
    def directory(self) -> Path:
        return self.run_dir / self.name

    @property
    def data_root(self) -> Path:
        """Packed data, shared by the stages of the run that read the same."""
        return self.run_dir / "data"

    @property
    def source(self) -> Path | None:
        return None if self.stage.source is None else self.run_dir / self.stage.source

    @cached_property
    def placement(self) -> Placement:
        return Placement(make_mesh(self.stage.mesh), self.stage.sharding)

    @property
    def teacher_placement(self) -> Placement:
        """On the same mesh, by its own rules where it has some."""
        return Placement(self.placement.mesh, getattr(self.stage, "teacher_sharding", None) or self.stage.sharding)

    def save(self, params: Params) -> dict[str, Any]:
        """Write the stage's parameters; returns the checksums for its manifest."""
        saving()
        return save_params(self.directory / "params", params)


@dataclass(frozen=True)
class Result:
    """What goes into the manifest beside the settings."""

    metrics: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    steps: int = 0
    seconds: float | None = None
    """Time over all attempts, where the stage knows it."""
    files: dict[str, Any] = field(default_factory=dict)
    """Checksums of the parameters' files."""
    details: dict[str, Any] = field(default_factory=dict)
    spec: ModelSpec | None = None
    """Where it is not the one the job named: exact surgery scales the norms' epsilon."""


def fresh_params(spec: ModelSpec, seed: int, placement: Placement | None = None) -> Params:
    """Random parameters of a size, made where they are to lie; the values do not depend on that. On CPU, optimising the
    generator's code takes longer than running it."""
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    shardings = None if placement is None else param_shardings(spec, placement)
    init = jax.jit(init_params, static_argnums=0, compiler_options=options, out_shardings=shardings)
    return init(spec, jax.random.key(seed))


def load_stage(
    directory: Path, dtype: Any = jnp.float32, placement: Placement | None = None
) -> tuple[ModelSpec, Params]:
    """Sizes and parameters of a finished stage, on one device unless placed.

    Raises:
        UserError: the stage is not finished, its checkpoint does not have the sizes its manifest names, or a file of it
            is not as it was written.
    """
    manifest = finished(directory)
    spec = manifest.spec
    abstract = abstract_params(spec, dtype) if placement is None else placed_params(spec, placement, dtype)
    return spec, load_params(directory / "params", abstract, manifest.files or None)

"""Scales for an FP8 export, found on rows that the model has learnt from."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from ministral_jax.data.config import DataConfig
from ministral_jax.distributed.placement import Placement
from ministral_jax.distributed.processes import polled
from ministral_jax.errors import UserError
from ministral_jax.interop.fp8_export import calibrate
from ministral_jax.models.spec import ModelSpec
from ministral_jax.models.vlm import VLM, Compute
from ministral_jax.stages import verbs
from ministral_jax.stages.base import Graph, Job, Params, Stage
from ministral_jax.stages.manifest import ancestry
from ministral_jax.stages.rows import BatchConfig, Batches, RowStage, open_data, train_batches


def reads_rows(kind: type[Stage]) -> bool:
    """Whether stages of a kind have rows on which another one can be calibrated."""
    return issubclass(kind, RowStage) and not kind.reads_pairs


def calibration_batches(stage_directory: Path, spec: ModelSpec, placement: Placement, count: int) -> Batches:
    """The first `count` batches of the finished stage, or of the nearest one before it that reads packed rows. All
    processes call it.

    Raises:
        UserError: none of them does, or its rows cannot be read.
    """
    name, config = _reader(stage_directory)
    given = BatchConfig.model_validate(config["batch"])
    batch = BatchConfig(sequences=placement.even(given.sequences), length=given.length)
    data = DataConfig.model_validate(config["data"])
    stage = RowStage(do="export", data=data, batch=batch, seed=config["seed"], first_row=0, sharding=placement.rules)
    job = Job(name, stage, spec, Graph({name: stage}, {name: spec}), stage_directory.parent, placement.mesh)
    stage.check_mesh(job)
    return train_batches(job, open_data(job), stop=count)


def activation_scales(
    spec: ModelSpec, params: Params, placement: Placement, batches: Iterable[dict[str, Any]]
) -> Params:
    """`fp8_export.calibrate`, in the dtype of the parameters. All processes call it."""
    model = VLM(spec, Compute(dtype=jax.tree.leaves(params)[0].dtype.name))
    with jax.set_mesh(placement.mesh), placement.rules.active():
        return calibrate(model, params, polled(batches, "calibration batch"))


def _reader(stage_directory: Path) -> tuple[str, dict[str, Any]]:
    """Name and settings of the stage whose rows are read."""
    parent = None
    for manifest in ancestry(stage_directory):
        if (kind := verbs().get(manifest.do)) is not None and reads_rows(kind):
            return manifest.stage, manifest.config
        parent = manifest.inputs.get("parent")
    none = "no stage that it comes from reads any"
    why = none if parent is None else f"{parent.stage}, which it comes from, does not lie beside it"
    raise UserError(f"{stage_directory}: format fp8 needs rows to find scales on, and {why}")

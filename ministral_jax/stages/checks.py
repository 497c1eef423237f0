"""What is wrong with how a stage computes, found before anything of its run is."""

from __future__ import annotations

import math
from typing import Any

from ministral_jax.data.bins import most_patches
from ministral_jax.distributed.axes import dividing_axes
from ministral_jax.models import decoder
from ministral_jax.models.attention import AttentionSpec, check_attention
from ministral_jax.models.block import check_remat
from ministral_jax.models.kernels import Asked
from ministral_jax.models.quantized import check_fp8
from ministral_jax.stages.base import Job


def check_compute(job: Job[Any], length: int) -> None:
    """Raise `UserError` when the devices of a stage, or what is installed, do not do what its `compute` names for rows
    of `length` tokens."""
    compute, platform = job.stage.compute, job.mesh.devices.flat[0].platform
    check_fp8(compute.matmul, f"{job.where}.compute.matmul")
    check_remat(compute.remat, platform, job.where)
    axes = dividing_axes(length, job.stage.sharding.length, job.mesh.shape, decoder.ZIGZAG)
    parts = math.prod(job.mesh.shape[axis] for axis in axes)
    asked = Asked.of_row(length, parts, True, job.spec.head_width, compute.dtype)
    given = compute.attention, compute.attention_block, compute.context
    check_attention(AttentionSpec(True, *given), platform, asked, job.where)
    if (patches := _patches(job)) and job.spec.vision is not None:
        asked = Asked(patches, patches, job.spec.vision.head_width, compute.dtype)
        check_attention(AttentionSpec(False, *given), platform, asked, job.where)


def _patches(job: Job[Any]) -> int:
    """In a bin of a step's pictures; 0 where the stage has no rows with pictures of a known number."""
    stage, vision = job.stage, job.spec.vision
    if not hasattr(stage, "batch") or vision is None or not stage.data.patches:
        return 0
    bins = job.placement.bins(stage.batch.microbatches)
    return most_patches(stage.batch.sequences, stage.data.patches, bins, vision)

"""Turn one large vision-language model into a family: prune, distil, extend the context, post-train, export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ministral_jax.distributed.placement import Placement
    from ministral_jax.models.vlm import VLM

__version__ = "0.2.0"


def load(path: str | Path, dtype: Any = "float32", placement: Placement | None = None) -> tuple[VLM, dict[str, Any]]:
    """A model and its parameters, from a finished stage's directory, at gs:// too, a model's directory, that at s3://
    too, or a model's name on the Hugging Face hub; whole, or cut over a mesh as `placement` says.

    `model.apply({"params": params}, tokens, positions=..., segments=..., images=...)` gives logits `[B, T, V]`; see
    `ministral_jax.models.vlm.VLM` for the layout of the batch.

    Raises:
        ministral_jax.errors.UserError: neither of the two, or a checkpoint that does not fit its sizes.
    """
    import jax.numpy as jnp

    from ministral_jax.errors import UserError
    from ministral_jax.interop.checkpoint import import_checkpoint, is_checkpoint, read_spec
    from ministral_jax.interop.hub import downloaded, hub_name, refuse_missing
    from ministral_jax.models.vlm import VLM, Compute, param_shardings
    from ministral_jax.places import fetched, place
    from ministral_jax.stages.base import load_stage

    name = hub_name(path)
    path = place(path, "checkpoint") if name is None else downloaded(name)
    if (path / "manifest.json").is_file():
        spec, params = load_stage(path, jnp.dtype(dtype), placement)
    elif is_checkpoint(path):
        path = fetched(path)
        shardings = param_shardings(read_spec(path), placement) if placement is not None else None
        spec, params = import_checkpoint(path, dtype, shardings)
    else:
        refuse_missing(path)
        raise UserError(
            f"{path} is neither a finished stage (manifest.json) nor a model's (config.json or params.json)"
        )
    return VLM(spec, Compute(dtype=str(dtype))), params

"""Hugging Face directories in FP8, as the released instruct models are: of the decoder's linear layers numbers of eight
bits with one scale a tensor, and one for what goes into each layer, found on rows beforehand (static); the rest is as
in `interop.hf`.

A matrix is `weight · weight_scale_inv`, and what goes into it is rounded to a number of eight bits after a division by
`activation_scale`. Both are powers of two, which bfloat16 holds exactly; see `models.quantized.fp8_scale`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float

from ministral_jax.distributed.collectives import fetch
from ministral_jax.errors import UserError
from ministral_jax.interop.export import Export, Format, pending
from ministral_jax.interop.fp8_weights import E4M3, HF_NAMES
from ministral_jax.interop.hf import HF, disk_slots, write_model
from ministral_jax.interop.safetensors import Pending
from ministral_jax.interop.slots import Slot
from ministral_jax.losses.evaluation import model_inputs
from ministral_jax.models.quantized import fp8_scale
from ministral_jax.models.spec import ModelSpec
from ministral_jax.models.vlm import VLM, Params

_BFLOAT16 = np.dtype(jnp.bfloat16)
_LAYERS = "decoder/layers/"
# A matrix, and of what goes into it the name in `block.SCALES` and that in `VLM.observe`.
_INPUTS = {
    **dict.fromkeys(("attention/q", "attention/k", "attention/v"), ("attention", "input", "attention_in")),
    "attention/o": ("attention", "mixed", "mixed"),
    **dict.fromkeys(("mlp/gate", "mlp/up"), ("mlp", "input", "mlp_in")),
    "mlp/down": ("mlp", "hidden", "mlp_hidden"),
}


# ---- scales of what goes in ------------------------------------------------------------------------------------------


def calibrate(model: VLM, params: Params, batches: Iterable[dict[str, Array]]) -> Params:
    """The variables `block.SCALES`, `[L]` float32 each: `fp8_scale` of the largest number that goes into each layer's
    matrices at a token of `batches` (of `losses.evaluation.Batch`), padding left out.

    Raises:
        UserError: no batch, no token, or activations that are not finite.
    """
    largest: dict[str, np.ndarray] = {}
    for batch in batches:
        found = jax.device_get(_largest(model, params, batch))
        largest = {name: np.maximum(largest.get(name, 0), value) for name, value in found.items()}
    if not largest or not all(value.any() for value in largest.values()):
        raise UserError("FP8 calibration saw no token: the rows are empty or all padding (segments == 0)")
    if not all(np.isfinite(value).all() for value in largest.values()):
        raise UserError("FP8 calibration met activations that are not finite: the parameters give NaN or infinity")
    scales: Params = {}
    for part, name, tap in _INPUTS.values():
        scales.setdefault(part, {})[name] = fp8_scale(largest[tap], np)
    return {"decoder": {"layers": scales}}


@partial(jax.jit, static_argnums=0)
def _largest(model: VLM, params: Params, batch: dict[str, Array]) -> dict[str, Float[Array, " L"]]:
    def tap(activations: dict[str, Array], counted: Bool[Array, "B T"]) -> dict[str, Array]:
        inside = lambda x: jnp.max(jnp.abs(x), where=counted[..., None], initial=0).astype(jnp.float32)
        return {name: inside(activations[name]) for *_, name in _INPUTS.values()}

    counted = batch["segments"] > 0
    found: Any = model.apply({"params": params}, batch["tokens"], tap, counted, **model_inputs(batch), method="observe")
    if jax.sharding.get_abstract_mesh().empty:
        return found[1]
    return jax.lax.with_sharding_constraint(found[1], jax.sharding.PartitionSpec())  # whole on every host


# ---- files ----------------------------------------------------------------------------------------------------------


@jax.jit
def _rounded(x: Array) -> tuple[Array, Float[Array, ""]]:
    """Numbers of eight bits, and the scale by which they are multiplied."""
    scale = fp8_scale(jnp.max(jnp.abs(x)).astype(jnp.float32))
    return (x / scale.astype(x.dtype)).astype(jnp.float8_e4m3fn), scale


@dataclass
class _Matrix:
    """A matrix of a linear layer, rounded where it lies; `values` first, then `scale`."""

    slot: Slot
    params: Params
    _scale: Any = field(init=False)

    def values(self) -> np.ndarray:
        rounded, self._scale = _rounded(self.slot.leaf(self.params))
        return self.slot.turned(fetch(rounded))

    def scale(self) -> np.ndarray:
        return fetch(self._scale)


def _tensors(model: Export) -> Iterator[Pending]:
    assert model.scales is not None, "an FP8 export needs the scales of what goes into linear layers"
    for slot in disk_slots(model.spec):
        where = _INPUTS.get(slot.path.removeprefix(_LAYERS))
        if where is None or not slot.path.startswith(_LAYERS):
            yield pending(slot, model.params, model.dtype)
            continue
        matrix, into = _Matrix(slot, model.params), model.scales["decoder"]["layers"][where[0]][where[1]]
        yield Pending(slot.name, E4M3, slot.shape, matrix.values)
        base = slot.name.removesuffix(HF_NAMES.weight)
        yield Pending(base + HF_NAMES.scale, _BFLOAT16, (), matrix.scale)
        yield Pending(base + HF_NAMES.activation, _BFLOAT16, (), partial(np.asarray, into[slot.layer]))


def quantization_config(spec: ModelSpec) -> dict[str, Any]:
    """What `config.json` says of it."""
    kept = [] if spec.vision is None else ["model.vision_tower", "model.multi_modal_projector"]
    return {
        "quant_method": "fp8",
        "activation_scheme": "static",
        "weight_block_size": None,
        "modules_to_not_convert": [*kept, "lm_head"],
        "dequantize": False,
    }


def _write(model: Export, directory: Path) -> None:
    write_model(model, directory, _tensors(model), {"quantization_config": quantization_config(model.spec)})


FP8 = Format(HF.dtypes, HF.last, HF.check, _write, _tensors)

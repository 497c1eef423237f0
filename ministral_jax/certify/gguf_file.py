"""A GGUF file as the numbers that stand in it: the library `gguf` reads them, and this project computes with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import ml_dtypes
import numpy as np
from einops import rearrange

from ministral_jax.certify.prompts import COMPARED, Prompt
from ministral_jax.certify.readers import Opened, Read
from ministral_jax.data.tokenizer import Tokenizer
from ministral_jax.errors import UserError
from ministral_jax.interop.gguf_format import decoder_slots, vision_slots
from ministral_jax.interop.llama import loaded
from ministral_jax.interop.slots import Slot
from ministral_jax.lazy import Lazy
from ministral_jax.models.spec import ModelSpec
from ministral_jax.models.vlm import VLM, abstract_params

if TYPE_CHECKING:
    import gguf
else:
    gguf = Lazy("gguf")

LOST = {"F32": 0.0, "F16": 0.0, "BF16": 0.0, "Q8_0": 0.02, "Q4_0": 0.2}
"""By the kind of a tensor, the most of its Frobenius norm that rounding to blocks takes away; 0: it is the parameter,
rounded."""
LIMITS = {"F32": 1e-4, "F16": 1e-2, "BF16": 5e-2, "Q8_0": 1e-1, "Q4_0": 1e-1}
"""By kind of matrix, of max |Δlogit| / max |logit| between llama.cpp and the numbers of the file: llama.cpp
rounds what it multiplies them with to the same kind, or to 8 bits."""


def as_text(opened: Opened) -> Opened:
    """The decoder alone, which is what `model.gguf` holds."""
    spec = opened.model.spec.model_copy(update={"vision": None})
    return replace(opened, model=VLM(spec, opened.model.compute), params={"decoder": opened.params["decoder"]})


def llama_limit(directory: Path) -> float:
    """Of `LIMITS`, that of the coarsest kind of matrix."""
    kinds = {t.tensor_type.name for t in _tensors(directory / "model.gguf").values() if len(t.shape) > 1}
    return max(LIMITS[kind] for kind in kinds)


def read_gguf(directory: Path, trained: Opened) -> Opened:
    """`model.gguf` with the sizes of what it was made from, whose tensors are taken by name, and its own positions.

    Raises:
        UserError: a tensor is missing, of another shape or in numbers that are not certified, or the file is damaged.
    """
    tensors = _tensors(directory / "model.gguf")
    spec = trained.model.spec.model_copy(update={"vision": None, "rope": _rope(directory, trained.model.spec)})
    if "output.weight" not in tensors:
        spec = spec.model_copy(update={"tied": True})
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), abstract_params(spec))
    for slot in decoder_slots(spec):
        leaf = reduce(getitem, slot.path.split("/"), params)
        leaf[... if slot.layer is None else slot.layer] = slot.view(_value(tensors, slot))
    return Opened(VLM(spec, trained.model.compute), params, trained.placement)


def wrong_tensors(directory: Path, trained: Opened, tokenizer: Tokenizer | None) -> tuple[list[str], int, set[str]]:
    """Tensors of both files that are not the parameters to within rounding, how many there are, and of which kinds."""
    spec, wrong, kinds, count = trained.model.spec, list[str](), set[str](), 0
    parts = {"model.gguf": decoder_slots(spec)}
    if spec.vision is not None:
        parts["mmproj.gguf"] = vision_slots(spec, tokenizer)
    for name, slots in parts.items():
        tensors = _tensors(directory / name)
        for slot in slots:
            found, value = _value(tensors, slot), np.asarray(slot.take(trained.params), np.float32)
            kinds.add(kind := tensors[slot.name].tensor_type.name)
            count += 1
            if LOST[kind] == 0:
                same = any(np.array_equal(found, _rounded(one, kind)) for one in (value, _narrow(value)))
            else:
                same = np.linalg.norm(found - value) <= LOST[kind] * np.linalg.norm(value)
            if not same:
                wrong.append(slot.name)
    return wrong, count, kinds


def _narrow(value: np.ndarray) -> np.ndarray:
    """As an export in bfloat16 has also what it writes in float32: that is how it loads the parameters."""
    return value.astype(ml_dtypes.bfloat16).astype(np.float32)


def _rounded(value: np.ndarray, kind: str) -> np.ndarray:
    return _dequantised(gguf.quantize(value, gguf.GGMLQuantizationType[kind]), kind)


def ask_llama(directory: Path, spec: ModelSpec) -> Read:
    """llama.cpp, which loads the file for each prompt."""

    def read(prompt: Prompt) -> np.ndarray:
        with loaded(directory / "model.gguf", len(prompt.tokens)) as model:
            return model.logits(prompt.tokens.tolist())[-COMPARED:].astype(np.float64)

    return read


def _tensors(path: Path) -> dict[str, Any]:
    """By name. Raises `UserError`: the file is missing or damaged, or has numbers that are not certified."""
    if not path.is_file():
        raise UserError(f"{path} is missing")
    try:
        found = gguf.GGUFReader(path).tensors
    except (ValueError, LookupError, OverflowError) as error:
        raise UserError(f"{path} is no GGUF file, or damaged ({error!s:.200})") from None
    if other := next((t for t in found if t.tensor_type.name not in LOST), None):
        raise UserError(f"{path}: {other.name} is {other.tensor_type.name}; {', '.join(LOST)} can be certified")
    return {tensor.name: tensor for tensor in found}


def _value(tensors: dict[str, Any], slot: Slot) -> np.ndarray:
    """float32, in the shape of the slot. Raises `UserError`: it is not there, or of another size."""
    if (tensor := tensors.get(slot.name)) is None:
        raise UserError(f"tensor {slot.name} is missing")
    value = _dequantised(tensor.data, tensor.tensor_type.name)
    if value.size != np.prod(slot.shape):
        raise UserError(f"tensor {slot.name} has {value.size} values, expected the shape {slot.shape}")
    return value.reshape(slot.shape)


def _dequantised(data: np.ndarray, kind: str) -> np.ndarray:
    return np.asarray(gguf.dequantize(data, gguf.GGMLQuantizationType[kind]), np.float32)


def _rope(directory: Path, spec: ModelSpec) -> Any:
    """What the file says of positions."""
    fields = gguf.GGUFReader(directory / "model.gguf").fields

    def told(name: str, usual: float) -> float:
        field = fields.get(f"mistral3.{name}")
        return usual if field is None else float(str(np.float32(field.parts[field.data[0]][0])))

    rope = spec.rope
    found: dict[str, Any] = {
        "theta": told("rope.freq_base", 1e4),
        "yarn_factor": told("rope.scaling.factor", 1.0),
        "temperature_beta": told("attention.temperature_scale", 0.0),
        "beta_fast": told("rope.scaling.yarn_beta_fast", rope.beta_fast),
        "beta_slow": told("rope.scaling.yarn_beta_slow", rope.beta_slow),
    }
    return rope.model_copy(update=found)


# ---- controls: a copy is changed in its place ------------------------------------------------------------------------


def set_key(name: str, change: Callable[[float], float]) -> Callable[[Path, ModelSpec], None]:
    """Change a number of the header."""

    def plant(directory: Path, spec: ModelSpec) -> None:
        reader = gguf.GGUFReader(directory / "model.gguf", "r+")
        field = reader.fields[f"mistral3.{name}"]
        place = field.parts[field.data[0]]
        place[0] = change(float(place[0]))
        reader.data.flush()

    return plant


def permute_back(directory: Path, spec: ModelSpec) -> None:
    """q and k of the first layer in the order of transformers."""
    reader = gguf.GGUFReader(directory / "model.gguf", "r+")
    for tensor in reader.tensors:
        if tensor.name in ("blk.0.attn_q.weight", "blk.0.attn_k.weight"):
            turned = rearrange(tensor.data.copy(), "(n s r) d -> (n r s) d", r=2, s=spec.head_width // 2)
            tensor.data[...] = turned
    reader.data.flush()


def drop_head(directory: Path, spec: ModelSpec) -> None:
    """The embedding in the place of the head, as a reader has it that finds none."""
    reader = gguf.GGUFReader(directory / "model.gguf", "r+")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    head, embed = tensors["output.weight"], tensors["token_embd.weight"]
    value = _dequantised(embed.data, embed.tensor_type.name)
    head.data[...] = gguf.quantize(value, head.tensor_type).view(head.data.dtype).reshape(head.data.shape)
    reader.data.flush()

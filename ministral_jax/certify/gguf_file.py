"""A GGUF file as the numbers that stand in it: the library `gguf` reads them, and this project computes with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import ml_dtypes
import numpy as np
from einops import rearrange

from ministral_jax.certify.gguf_keys import Keys, spec_of
from ministral_jax.certify.prompts import COMPARED, Prompt
from ministral_jax.certify.readers import Opened, Read
from ministral_jax.data.tokenizer import Tokenizer
from ministral_jax.errors import UserError
from ministral_jax.interop.gguf_format import decoder_slots, vision_slots
from ministral_jax.interop.llama import Llama, loaded, seen
from ministral_jax.interop.slots import Slot
from ministral_jax.lazy import Lazy
from ministral_jax.models.spec import ModelSpec
from ministral_jax.models.vlm import VLM, Params, abstract_params

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
_PREFIXES = ("mistral3", "clip.vision")


def llama_limit(directory: Path) -> Callable[[Prompt], float]:
    """Of `LIMITS`, that of the coarsest kind of matrix, with a picture at least that of float16: llama.cpp's GELU is
    the tanh approximation, looked up in float16."""
    tensors, _ = _mapped(directory / "model.gguf")
    coarsest = max(LIMITS[t.tensor_type.name] for t in tensors.values() if len(t.shape) > 1)
    return lambda prompt: coarsest if prompt.picture is None else max(coarsest, LIMITS["F16"])


@dataclass(frozen=True)
class Held:
    """The files of a directory, mapped: what their keys say, and every tensor by its name."""

    spec: ModelSpec
    slots: list[Slot]
    tensors: dict[str, Any]

    def opened(self, like: Opened) -> Opened:
        """Computed with as `like` is. Raises `UserError`: a tensor is missing, or of another shape."""
        params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), abstract_params(self.spec))
        for slot in self.slots:
            leaf = reduce(getitem, slot.path.split("/"), params)
            leaf[... if slot.layer is None else slot.layer] = slot.view(_value(self.tensors, slot))
        return replace(like, model=VLM(self.spec, like.model.compute), params=params)


def open_gguf(directory: Path, trained: ModelSpec, tokenizer: Tokenizer | None) -> Held:
    """`model.gguf`, and `mmproj.gguf` where `trained` sees.

    Raises:
        UserError: a file is missing or damaged, or has numbers that are not certified.
    """
    tensors, decoder = _mapped(directory / "model.gguf")
    tower = None
    if trained.vision is not None:
        more, tower = _mapped(directory / "mmproj.gguf")
        tensors |= more
    spec = spec_of(decoder, tower, "output.weight" not in tensors, trained)
    slots = decoder_slots(spec) + (vision_slots(spec, tokenizer) if spec.vision is not None else [])
    return Held(spec, slots, tensors)


def wrong_tensors(held: Held, trained: Params) -> tuple[list[str], int, set[str]]:
    """Tensors that are not the parameters to within rounding, how many there are, and of which kinds."""
    wrong, kinds = list[str](), set[str]()
    for slot in held.slots:
        found, value = _value(held.tensors, slot), np.asarray(slot.take(trained), np.float32)
        kinds.add(kind := held.tensors[slot.name].tensor_type.name)
        if LOST[kind] == 0:
            same = any(np.array_equal(found, _rounded(one, kind)) for one in (value, _narrow(value)))
        else:
            same = np.linalg.norm(found - value) <= LOST[kind] * np.linalg.norm(value)
        if not same:
            wrong.append(slot.name)
    return wrong, len(held.slots), kinds


def _narrow(value: np.ndarray) -> np.ndarray:
    """As an export in bfloat16 has also what it writes in float32: that is how it loads the parameters."""
    return value.astype(ml_dtypes.bfloat16).astype(np.float32)


def _rounded(value: np.ndarray, kind: str) -> np.ndarray:
    return _dequantised(gguf.quantize(value, gguf.GGMLQuantizationType[kind]), kind)


def ask_llama(directory: Path, spec: ModelSpec) -> Read:
    """llama.cpp, which loads the files for each prompt."""

    def read(prompt: Prompt) -> np.ndarray:
        with loaded(directory / "model.gguf", len(prompt.tokens)) as model:
            tokens = prompt.tokens.tolist()
            found = model.logits(tokens) if prompt.picture is None else _after_picture(model, directory, prompt)
        return found[-COMPARED:].astype(np.float64)

    return read


def _after_picture(model: Llama, directory: Path, prompt: Prompt) -> np.ndarray:
    """Logits of what follows a picture that stands after the first token."""
    assert prompt.picture is not None
    model.logits(prompt.tokens[:1].tolist())
    with seen(model, directory / "mmproj.gguf", prompt.picture) as picture:
        picture.put(start=1)
        return model.logits(prompt.tokens[1 + picture.tokens :].tolist(), start=1 + picture.tokens)


def _mapped(path: Path) -> tuple[dict[str, Any], Keys]:
    """Tensors by name, and keys. Raises `UserError`: the file is missing or damaged, or has numbers that are not
    certified."""
    if not path.is_file():
        raise UserError(f"{path} is missing")
    try:
        found = gguf.GGUFReader(path)
        values = {name: field.contents() for name, field in found.fields.items() if name.startswith(_PREFIXES)}
    except (ValueError, LookupError, OverflowError) as error:
        raise UserError(f"{path} is no GGUF file, or damaged ({error!s:.200})") from None
    if other := next((t for t in found.tensors if t.tensor_type.name not in LOST), None):
        raise UserError(f"{path}: {other.name} is {other.tensor_type.name}; {', '.join(LOST)} can be certified")
    return {tensor.name: tensor for tensor in found.tensors}, Keys(path, _PREFIXES[path.stem == "mmproj"], values)


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

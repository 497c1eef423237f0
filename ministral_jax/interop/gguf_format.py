"""Checkpoints as GGUF files for llama.cpp and what is built on it: the decoder in `model.gguf`, and the vision tower
with its projector in `mmproj.gguf`.

Names and keys are those of llama.cpp's own converter, architecture `mistral3` and projector `pixtral`, which its
readers expect. The library `gguf` (extra `gguf`) writes the file's frame and rounds to blocks of integers.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from ministral_jax.data.tokenizer import Tokenizer, read_tokenizer
from ministral_jax.distributed.collectives import fetch
from ministral_jax.errors import UserError
from ministral_jax.interop import safetensors
from ministral_jax.interop.export import WRITER, Export, Format, files_of, pending
from ministral_jax.interop.gguf_tokenizer import add_tokenizer
from ministral_jax.interop.slots import NEIGHBOURS, Slot, table_of, table_slots
from ministral_jax.lazy import Lazy
from ministral_jax.models.spec import ModelSpec
from ministral_jax.models.vision import MEAN, STD

if TYPE_CHECKING:
    import gguf
else:
    gguf = Lazy("gguf")

_TEXT = table_of(
    {
        "decoder/embed": "token_embd.weight",
        "decoder/layers/attention_norm": "blk.{}.attn_norm.weight",
        "decoder/layers/attention/q": "blk.{}.attn_q.weight",
        "decoder/layers/attention/k": "blk.{}.attn_k.weight",
        "decoder/layers/attention/v": "blk.{}.attn_v.weight",
        "decoder/layers/attention/o": "blk.{}.attn_output.weight",
        "decoder/layers/mlp_norm": "blk.{}.ffn_norm.weight",
        "decoder/layers/mlp/gate": "blk.{}.ffn_gate.weight",
        "decoder/layers/mlp/up": "blk.{}.ffn_up.weight",
        "decoder/layers/mlp/down": "blk.{}.ffn_down.weight",
        "decoder/norm": "output_norm.weight",
        "decoder/head": "output.weight",
    },
    NEIGHBOURS,
)
_VISION = table_of(
    {
        "vision/patch_embed": "v.patch_embd.weight",
        "vision/norm": "v.pre_ln.weight",
        "vision/layers/attention_norm": "v.blk.{}.ln1.weight",
        "vision/layers/attention/q": "v.blk.{}.attn_q.weight",
        "vision/layers/attention/k": "v.blk.{}.attn_k.weight",
        "vision/layers/attention/v": "v.blk.{}.attn_v.weight",
        "vision/layers/attention/o": "v.blk.{}.attn_out.weight",
        "vision/layers/mlp_norm": "v.blk.{}.ln2.weight",
        "vision/layers/mlp/gate": "v.blk.{}.ffn_gate.weight",
        "vision/layers/mlp/up": "v.blk.{}.ffn_up.weight",
        "vision/layers/mlp/down": "v.blk.{}.ffn_down.weight",
        "projector/norm": "mm.input_norm.weight",
        "projector/merge": "mm.patch_merger.weight",
        "projector/linear_1": "mm.1.weight",
        "projector/linear_2": "mm.2.weight",
    },
    NEIGHBOURS,
)

_IMAGE_BREAK = 12
"""Tekken's [IMG_BREAK], where no tokenizer says otherwise."""
_ROWS = 2**26
"""Bytes of a tensor that are rounded at once."""

FILE_TYPES = {
    "float32": ("F32", "ALL_F32"),
    "float16": ("F16", "MOSTLY_F16"),
    "bfloat16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
    "q4_0": ("Q4_0", "MOSTLY_Q4_0"),
}
"""Number formats: what matrices are written in, and what the file calls itself. q8_0 and q4_0 are whole numbers of 8
and 4 bits with a float16 scale for every 32."""

_MOST = {"F16": 65504.0, "Q8_0": 127 * 65504.0, "Q4_0": 8 * 65504.0}
"""What can be written: the largest number of float16, and that of whole numbers times it."""


def _check(spec: ModelSpec) -> None:
    if find_spec("gguf") is None:
        raise UserError("format = gguf needs gguf, which is not installed; in the checkout, pip install -e '.[gguf]'")
    if (v := spec.vision) is None:
        return
    if v.rope_theta != 1e4:
        raise UserError(f"vision.rope_theta is {v.rope_theta:g}, but the Pixtral tower of llama.cpp has 10000")
    if v.norm_eps != spec.norm_eps:
        raise UserError(
            f"vision.norm_eps is {v.norm_eps:g}, but llama.cpp norms the tower's features with norm_eps, which is "
            f"{spec.norm_eps:g}; both must be the same"
        )


def _write(model: Export, directory: Path) -> None:
    spec, tokenizer = model.spec, _tokenizer(model)
    writer = _writer(directory / "model.gguf", "mistral3", model.dtype)
    _add_sizes(writer, spec)
    if tokenizer is None:
        writer.add_tokenizer_model("none")
    else:
        template = next(
            (file.read_text() for file in files_of(model.files) if file.name == "chat_template.jinja"), None
        )
        add_tokenizer(writer, tokenizer, spec.vocab, template)
    (dtype, slots), *tower = _parts(model)
    _write_tensors(writer, model, slots, dtype)
    for dtype, slots in tower:
        writer = _writer(directory / "mmproj.gguf", "clip", dtype)
        _add_vision_sizes(writer, spec)
        _write_tensors(writer, model, slots, dtype)


def _parts(model: Export) -> list[tuple[str, list[Slot]]]:
    """Number format and tensors of `model.gguf`, and of `mmproj.gguf` where there is a tower."""
    parts = [(model.dtype, decoder_slots(model.spec))]
    if model.spec.vision is not None:
        dtype = model.dtype if model.dtype in ("float32", "bfloat16") else "float16"
        parts.append((dtype, vision_slots(model.spec, _tokenizer(model))))
    return parts


def _tensors(model: Export) -> Iterator[safetensors.Pending]:
    return (pending(slot, model.params, "float32") for _, slots in _parts(model) for slot in slots)


@jax.jit
def _largest(x: Array) -> Float[Array, ""]:
    return jnp.max(jnp.abs(x)).astype(jnp.float32)


def _check_values(model: Export) -> None:
    """Where they lie, one tensor after another."""
    for dtype, slots in _parts(model):
        for slot in slots:
            kind = _kind(slot, model.spec, dtype).name
            if kind not in _MOST:
                continue
            largest = float(fetch(_largest(slot.leaf(model.params))))
            if not np.isfinite(largest):
                raise UserError(f"{slot.name} holds numbers that are not finite, which dtype {model.dtype} cannot say")
            if largest > _MOST[kind]:
                raise UserError(
                    f"{slot.name} holds {largest:g}, and {kind}, in which dtype {model.dtype} writes it, ends at "
                    f"{_MOST[kind]:g}; bfloat16 and float32 have room for it"
                )


GGUF = Format(tuple(FILE_TYPES), "model.gguf", _check, _write, _tensors, _check_values)
"""One tensor is fetched at a time; beside it is what goes into the file. Vectors stay float32. Where others become
whole numbers, the vision tower and rows that are no multiple of 32 stay float16, and the output matrix has 8 bits."""


def _tokenizer(model: Export) -> Tokenizer | None:
    return next((read_tokenizer(file) for file in files_of(model.files) if file.name == "tekken.json"), None)


def decoder_slots(spec: ModelSpec) -> list[Slot]:
    """Every tensor of `model.gguf`."""
    return table_slots(spec, _TEXT)


def vision_slots(spec: ModelSpec, tokenizer: Tokenizer | None) -> list[Slot]:
    """Every tensor of `mmproj.gguf`. What llama.cpp sets between the rows of an image's tokens comes with the tower:
    the embedding of [IMG_BREAK]."""
    line_break = _IMAGE_BREAK if tokenizer is None else tokenizer.image_ids[1]
    return [
        *table_slots(spec, _VISION),
        Slot("decoder/embed", line_break, "v.token_embd.img_break", "D -> D", {"D": spec.width}),
    ]


# ---- keys -----------------------------------------------------------------------------------------------------------


def _writer(path: Path, architecture: str, dtype: str) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string("general.writer", WRITER)
    writer.add_type(gguf.GGUFType.MODEL if architecture != "clip" else gguf.GGUFType.MMPROJ)
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[dtype][1]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    return writer


def _add_sizes(writer: gguf.GGUFWriter, spec: ModelSpec) -> None:
    writer.add_vocab_size(spec.vocab)
    writer.add_context_length(spec.context)
    writer.add_embedding_length(spec.width)
    writer.add_block_count(spec.layers)
    writer.add_feed_forward_length(spec.mlp_width)
    writer.add_head_count(spec.heads)
    writer.add_head_count_kv(spec.kv_heads)
    writer.add_key_length(spec.head_width)
    writer.add_value_length(spec.head_width)
    writer.add_layer_norm_rms_eps(spec.norm_eps)
    writer.add_rope_dimension_count(spec.head_width)
    rope = spec.rope
    writer.add_rope_freq_base(rope.theta)
    if rope.original_context is not None:
        writer.add_rope_scaling_orig_ctx_len(rope.original_context)
    if rope.yarn_factor != 1:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope.yarn_factor)
        writer.add_rope_scaling_yarn_beta_fast(rope.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(rope.beta_slow)
        writer.add_rope_scaling_yarn_log_mul(1.0)  # mscale_all_dim = mscale: cos and sin are not rescaled but by this
        if rope.attention_factor != 1:
            writer.add_rope_scaling_attn_factors(rope.attention_factor)
    if rope.temperature_beta != 0:
        writer.add_attn_temperature_scale(rope.temperature_beta)


def _add_vision_sizes(writer: gguf.GGUFWriter, spec: ModelSpec) -> None:
    v = spec.vision
    assert v is not None
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(gguf.VisionProjectorType.PIXTRAL)
    writer.add_vision_projection_dim(spec.width)
    writer.add_vision_image_size(v.max_image_size)
    writer.add_vision_patch_size(v.patch_size)
    writer.add_vision_embedding_length(v.width)
    writer.add_vision_feed_forward_length(v.mlp_width)
    writer.add_vision_block_count(v.layers)
    writer.add_vision_head_count(v.heads)
    writer.add_vision_attention_layernorm_eps(v.norm_eps)
    writer.add_vision_spatial_merge_size(v.merge)
    writer.add_vision_use_silu(True)
    writer.add_vision_image_mean(MEAN.tolist())
    writer.add_vision_image_std(STD.tolist())


# ---- tensors --------------------------------------------------------------------------------------------------------


def _write_tensors(writer: gguf.GGUFWriter, model: Export, wanted: list[Slot], dtype: str) -> None:
    kinds = [_kind(slot, model.spec, dtype) for slot in wanted]
    for slot, kind in zip(wanted, kinds, strict=True):
        size = int(np.prod(gguf.quant_shape_to_byte_shape(slot.shape, kind)))
        writer.add_tensor_info(slot.name, slot.shape, np.dtype(np.float32), size, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for slot, kind in zip(wanted, kinds, strict=True):
        writer.write_tensor_data(_rounded(slot, kind, model))
    writer.close()


def _kind(slot: Slot, spec: ModelSpec, dtype: str) -> gguf.GGMLQuantizationType:
    kinds = gguf.GGMLQuantizationType
    kind = kinds[FILE_TYPES[dtype][0]]
    if len(slot.shape) == 1:
        return kinds.F32
    if slot.path in ("vision/patch_embed", "projector/merge") and kind != kinds.F16:
        return kinds.F32  # convolutions have no kernels in other formats
    if slot.path == ("decoder/embed" if spec.tied else "decoder/head") and kind == kinds.Q4_0:
        kind = kinds.Q8_0
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    return kind if slot.shape[-1] % block == 0 else kinds.F16


def _rounded(slot: Slot, kind: gguf.GGMLQuantizationType, model: Export) -> np.ndarray:
    """A tensor as it goes into the file, bytes by row; of its copy in float32 some rows at a time."""
    value = slot.take(model.params)
    rows = value.reshape(-1, value.shape[-1])
    out = np.empty(gguf.quant_shape_to_byte_shape(rows.shape, kind), np.uint8)
    step = max(1, _ROWS // (4 * rows.shape[1]))
    for here in (slice(first, first + step) for first in range(0, len(rows), step)):
        part = gguf.quantize(safetensors.packed(rows[here], np.dtype(np.float32)), kind)
        out[here] = part.view(np.uint8)
    return out

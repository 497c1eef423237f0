"""Checkpoints in Mistral's own format, `consolidated*.safetensors` and `params.json`, in both directions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ministral_jax.files import write_json
from ministral_jax.interop import safetensors
from ministral_jax.interop.export import Export, Format, pending, write_shards
from ministral_jax.interop.fp8_weights import Names, with_scales
from ministral_jax.interop.native_config import from_params, load_params, to_params
from ministral_jax.interop.shards import NATIVE_STEM, named_tensors
from ministral_jax.interop.slots import NEIGHBOURS, Checkpoint, check_depth, table_of, table_slots

NATIVE_TABLE = table_of(
    {
        "decoder/embed": "tok_embeddings.weight",
        "decoder/layers/attention_norm": "layers.{}.attention_norm.weight",
        "decoder/layers/attention/q": "layers.{}.attention.wq.weight",
        "decoder/layers/attention/k": "layers.{}.attention.wk.weight",
        "decoder/layers/attention/v": "layers.{}.attention.wv.weight",
        "decoder/layers/attention/o": "layers.{}.attention.wo.weight",
        "decoder/layers/mlp_norm": "layers.{}.ffn_norm.weight",
        "decoder/layers/mlp/gate": "layers.{}.feed_forward.w1.weight",
        "decoder/layers/mlp/up": "layers.{}.feed_forward.w3.weight",
        "decoder/layers/mlp/down": "layers.{}.feed_forward.w2.weight",
        "decoder/norm": "norm.weight",
        "decoder/head": "output.weight",
        "vision/patch_embed": "vision_encoder.patch_conv.weight",
        "vision/norm": "vision_encoder.ln_pre.weight",
        "vision/layers/attention_norm": "vision_encoder.transformer.layers.{}.attention_norm.weight",
        "vision/layers/attention/q": "vision_encoder.transformer.layers.{}.attention.wq.weight",
        "vision/layers/attention/k": "vision_encoder.transformer.layers.{}.attention.wk.weight",
        "vision/layers/attention/v": "vision_encoder.transformer.layers.{}.attention.wv.weight",
        "vision/layers/attention/o": "vision_encoder.transformer.layers.{}.attention.wo.weight",
        "vision/layers/mlp_norm": "vision_encoder.transformer.layers.{}.ffn_norm.weight",
        "vision/layers/mlp/gate": "vision_encoder.transformer.layers.{}.feed_forward.w1.weight",
        "vision/layers/mlp/up": "vision_encoder.transformer.layers.{}.feed_forward.w3.weight",
        "vision/layers/mlp/down": "vision_encoder.transformer.layers.{}.feed_forward.w2.weight",
        "projector/norm": "pre_mm_projector_norm.weight",
        "projector/merge": "patch_merger.merging_layer.weight",
        "projector/linear_1": "vision_language_adapter.w_in.weight",
        "projector/linear_2": "vision_language_adapter.w_out.weight",
    },
    NEIGHBOURS,
)


NATIVE_NAMES = Names(".weight", ".qscale_weight", ".qscale_act")


def open_native(directory: Path) -> Checkpoint:
    """A directory in Mistral's own format, in floats or in FP8.

    Raises:
        UserError: no weights, another architecture, weights quantised in another way, or damaged files.
    """
    params, where = load_params(directory), str(directory / "params.json")
    from_params(params, where, True)  # another architecture is refused, whatever its weights are
    found = named_tensors(directory, NATIVE_STEM)
    spec = from_params(params, where, "output.weight" in found)
    check_depth(spec, len(found), directory)
    tensors = with_scales(found, NATIVE_NAMES, None, str(directory)) if params.get("quantization") else found
    return Checkpoint(directory, spec, table_slots(spec, NATIVE_TABLE), tensors)


def _write(model: Export, directory: Path) -> None:
    write_json(directory / "params.json", to_params(model.spec))
    write_shards(_tensors(model), directory, NATIVE_STEM)


def _tensors(model: Export) -> Iterator[safetensors.Pending]:
    return (pending(slot, model.params, model.dtype) for slot in table_slots(model.spec, NATIVE_TABLE))


NATIVE = Format(("float32", "bfloat16"), "params.json", to_params, _write, _tensors)

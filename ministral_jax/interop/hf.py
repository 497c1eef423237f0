"""Checkpoints as Hugging Face directories, in both directions, one tensor in memory at a time."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ministral_jax.files import write_json
from ministral_jax.interop import safetensors
from ministral_jax.interop.export import Export, Format, export, pending, write_shards
from ministral_jax.interop.fp8_weights import HF_NAMES, block_size, with_scales
from ministral_jax.interop.hf_config import from_config, generation_config, load_config, processor_config, to_config
from ministral_jax.interop.shards import named_tensors
from ministral_jax.interop.slots import HALVES, Checkpoint, Slot, Table, check_depth, table_of, table_slots
from ministral_jax.models.spec import ModelSpec
from ministral_jax.models.vlm import Params

# Those of the decoder lie under `language_model.model.`.
TABLE = table_of(
    {
        "decoder/embed": "embed_tokens.weight",
        "decoder/layers/attention_norm": "layers.{}.input_layernorm.weight",
        "decoder/layers/attention/q": "layers.{}.self_attn.q_proj.weight",
        "decoder/layers/attention/k": "layers.{}.self_attn.k_proj.weight",
        "decoder/layers/attention/v": "layers.{}.self_attn.v_proj.weight",
        "decoder/layers/attention/o": "layers.{}.self_attn.o_proj.weight",
        "decoder/layers/mlp_norm": "layers.{}.post_attention_layernorm.weight",
        "decoder/layers/mlp/gate": "layers.{}.mlp.gate_proj.weight",
        "decoder/layers/mlp/up": "layers.{}.mlp.up_proj.weight",
        "decoder/layers/mlp/down": "layers.{}.mlp.down_proj.weight",
        "decoder/norm": "norm.weight",
        "decoder/head": "lm_head.weight",
        "vision/patch_embed": "vision_tower.patch_conv.weight",
        "vision/norm": "vision_tower.ln_pre.weight",
        "vision/layers/attention_norm": "vision_tower.transformer.layers.{}.attention_norm.weight",
        "vision/layers/attention/q": "vision_tower.transformer.layers.{}.attention.q_proj.weight",
        "vision/layers/attention/k": "vision_tower.transformer.layers.{}.attention.k_proj.weight",
        "vision/layers/attention/v": "vision_tower.transformer.layers.{}.attention.v_proj.weight",
        "vision/layers/attention/o": "vision_tower.transformer.layers.{}.attention.o_proj.weight",
        "vision/layers/mlp_norm": "vision_tower.transformer.layers.{}.ffn_norm.weight",
        "vision/layers/mlp/gate": "vision_tower.transformer.layers.{}.feed_forward.gate_proj.weight",
        "vision/layers/mlp/up": "vision_tower.transformer.layers.{}.feed_forward.up_proj.weight",
        "vision/layers/mlp/down": "vision_tower.transformer.layers.{}.feed_forward.down_proj.weight",
        "projector/norm": "multi_modal_projector.norm.weight",
        "projector/merge": "multi_modal_projector.patch_merger.merging_layer.weight",
        "projector/linear_1": "multi_modal_projector.linear_1.weight",
        "projector/linear_2": "multi_modal_projector.linear_2.weight",
    },
    HALVES,
)


def slots(spec: ModelSpec, table: Table = TABLE) -> list[Slot]:
    """Every tensor of a model that `table` names, layer by layer."""
    return table_slots(spec, table)


# ---- export ---------------------------------------------------------------------------------------------------------


def export_hf(
    params: Params, spec: ModelSpec, directory: Path, dtype: str = "float32", tokenizer_files: Sequence[Path] = ()
) -> None:
    """Write a model that `transformers` loads, see `export`: configuration, sharded weights in `dtype` and copies of
    `tokenizer_files` (directories give their files)."""
    export(Export(params, spec, dtype, tokenizer_files), HF, directory)


def disk_slots(spec: ModelSpec) -> Iterator[Slot]:
    """`slots` under the names that they have in an export."""
    outer = "" if spec.vision is None else "language_model."
    for slot in slots(spec):
        inner = "" if slot.path == "decoder/head" else "model."
        yield replace(slot, name=f"{outer}{inner}{slot.name}") if slot.path.startswith("decoder/") else slot


def _tensors(model: Export) -> Iterator[safetensors.Pending]:
    return (pending(slot, model.params, model.dtype) for slot in disk_slots(model.spec))


def _write(model: Export, directory: Path) -> None:
    write_model(model, directory, _tensors(model), {})


def write_model(model: Export, directory: Path, tensors: Iterable[safetensors.Pending], more: dict[str, Any]) -> None:
    """The files of a model whose `config.json` says `more` and whose weights are `tensors`."""
    write_json(directory / "config.json", to_config(model.spec, model.dtype) | more)
    write_json(directory / "generation_config.json", generation_config(model.spec))
    if model.spec.vision is not None:
        write_json(directory / "processor_config.json", processor_config(model.spec))
    write_shards(tensors, directory, "model")


HF = Format(("float32", "bfloat16"), "config.json", partial(to_config, dtype="float32"), _write, _tensors)


# ---- import ---------------------------------------------------------------------------------------------------------

_BUFFER = re.compile(r"(rotary_emb|patch_positional_embedding)\.((original_)?inv_freq|(cos|sin)_cached)$")


def open_hf(directory: Path) -> Checkpoint:
    """A Hugging Face directory: Mistral3ForConditionalGeneration, or the text-only Ministral3ForCausalLM and
    MistralForCausalLM, in floats or in FP8.

    Raises:
        UserError: no such model, another architecture, weights quantised in another way, or damaged files.
    """
    config, where = load_config(directory), str(directory / "config.json")
    from_config(config, where, True)  # another architecture is refused, whatever its weights are
    quantised = config.get("quantization_config")
    block = block_size(quantised, where) if quantised else None
    found = named_tensors(directory, "model", lambda name: None if is_buffer(name) else short_name(name))
    spec = from_config(config, where, "lm_head.weight" in found)
    check_depth(spec, len(found), directory)
    tensors = with_scales(found, HF_NAMES, block, str(directory)) if quantised else found
    return Checkpoint(directory, spec, slots(spec), tensors)


def short_name(name: str) -> str:
    """As `TABLE` has it: the prefixes `language_model.model.`, `model.language_model.` and `model.` are all in use."""
    return re.sub(r"^(language_model\.|model\.)+", "", name)


def is_buffer(name: str) -> bool:
    """Whether it is of a tensor that older releases kept beside the weights, and the configuration says anyway."""
    return _BUFFER.search(name) is not None

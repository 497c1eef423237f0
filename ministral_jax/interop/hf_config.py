"""A model's sizes as a Hugging Face `config.json`, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ministral_jax.errors import UserError
from ministral_jax.files import read_object
from ministral_jax.interop.hub import refuse_missing
from ministral_jax.interop.keys import Keys, refused
from ministral_jax.interop.rope_config import axial_theta, mscale_all_dim, text_rope
from ministral_jax.models.spec import ModelSpec, VisionSpec

# Tekken's control tokens; [PAD] only if the vocabulary has it.
BOS, EOS, PAD = 1, 2, 11

# Sizes, ours -> theirs; the vision tower has those that it has under the same names.
_SIZES = {
    "vocab": "vocab_size",
    "width": "hidden_size",
    "mlp_width": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_width": "head_dim",
}
# What a missing key means: older releases of `transformers` wrote only what differs from the class.
_CLASS: dict[str, dict[str, Any]] = {
    "mistral": dict(
        vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=131072, rms_norm_eps=1e-6, sliding_window=4096,
    ),
    "ministral3": dict(
        vocab_size=131072, hidden_size=4096, intermediate_size=14336, num_hidden_layers=34, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=262144, rms_norm_eps=1e-5,
    ),
    "pixtral": dict(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=1024,
        patch_size=16, hidden_act="gelu",
    ),
}  # fmt: skip
_OTHERS = {"mistral4": ", Mistral Small 4, which has latent attention and experts and shares only the outer class"}
_IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
_IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


def to_config(spec: ModelSpec, dtype: str) -> dict[str, Any]:
    """`config.json` of a model: a Mistral3ForConditionalGeneration, or without vision the causal LM alone. Raises
    `UserError`: the vision tower's epsilon is not the one that `transformers` hard-codes."""
    text = _text_config(spec)
    if spec.vision is None:
        name = {"mistral": "MistralForCausalLM", "ministral3": "Ministral3ForCausalLM"}[text["model_type"]]
        return {"architectures": [name], "dtype": dtype, **text}
    v = spec.vision
    if v.norm_eps != 1e-5:
        raise UserError(f"vision.norm_eps is {v.norm_eps}, but the Pixtral tower of transformers has 1e-5")
    return {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "model_type": "mistral3",
        "dtype": dtype,
        "image_token_index": spec.image_token,
        "multimodal_projector_bias": False,
        "projector_hidden_act": "gelu",
        "spatial_merge_size": v.merge,
        "vision_feature_layer": -1,
        # Written at both levels: the wrapper class takes true where the key is missing.
        "tie_word_embeddings": spec.tied,
        "text_config": text,
        "vision_config": {
            "model_type": "pixtral",
            **_sizes(v),
            "hidden_act": "silu",
            "image_size": v.max_image_size,
            "patch_size": v.patch_size,
            "num_channels": 3,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "rope_parameters": {"rope_type": "axial", "rope_theta": v.rope_theta},
        },
    }


def _sizes(spec: ModelSpec | VisionSpec) -> dict[str, int]:
    return {theirs: getattr(spec, ours) for ours, theirs in _SIZES.items() if hasattr(spec, ours)}


def _text_config(spec: ModelSpec) -> dict[str, Any]:
    r = spec.rope
    plain = r.yarn_factor == 1 and r.temperature_beta == 0
    rope: dict[str, Any] = {"rope_type": "default" if r.yarn_factor == 1 else "yarn", "rope_theta": r.theta}
    if not plain:
        rope |= {"original_max_position_embeddings": r.original_context, "llama_4_scaling_beta": r.temperature_beta}
    if r.yarn_factor != 1:
        rope |= {"type": "yarn", "factor": r.yarn_factor, "beta_fast": r.beta_fast, "beta_slow": r.beta_slow}
        other = mscale_all_dim(r)  # not every reader knows an attention_factor
        rope |= (
            {"mscale": 1.0, "mscale_all_dim": other} if other is not None else {"attention_factor": r.attention_factor}
        )
    return {
        "model_type": "mistral" if plain else "ministral3",
        **_sizes(spec),
        "hidden_act": "silu",
        "max_position_embeddings": spec.context,
        "rms_norm_eps": spec.norm_eps,
        "rope_parameters": rope,
        "sliding_window": None,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "tie_word_embeddings": spec.tied,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD if spec.vocab > PAD else None,
    }


def generation_config(spec: ModelSpec) -> dict[str, Any]:
    return {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD if spec.vocab > PAD else EOS}


def processor_config(spec: ModelSpec) -> dict[str, Any]:
    """`processor_config.json`: how images become patches and [IMG] tokens."""
    v = spec.vision
    assert v is not None
    return {
        "processor_class": "PixtralProcessor",
        "patch_size": v.patch_size,
        "spatial_merge_size": v.merge,
        "image_token": "[IMG]",
        "image_break_token": "[IMG_BREAK]",
        "image_end_token": "[IMG_END]",
        "image_processor": {
            "image_processor_type": "PixtralImageProcessor",
            "patch_size": {"height": v.stride, "width": v.stride},
            "size": {"longest_edge": v.max_image_size},
            "do_convert_rgb": True,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": _IMAGE_MEAN,
            "image_std": _IMAGE_STD,
            "do_resize": True,
            "resample": 3,
        },
    }


def from_config(config: dict[str, Any], where: str, has_head: bool) -> ModelSpec:
    """Sizes from a parsed `config.json` found at `where`.

    Embedding and head are untied where the weights contain a head, whatever the file says: `transformers` has
    written the flag wrongly. Otherwise `text_config` decides, then the top level.

    Raises:
        UserError: another architecture, a missing size, or a variation this family does not have.
    """
    top = Keys(config, where)
    kind = top.get("model_type")
    if kind not in ("mistral3", "ministral3", "mistral"):
        raise UserError(f"{where}: model_type is {kind!r:.80}; mistral3, ministral3 and mistral can be read")
    text = top.section("text_config") if kind == "mistral3" else top
    text_kind = text.get("model_type", "mistral")
    if text_kind not in ("ministral3", "mistral"):
        other = _OTHERS.get(str(text_kind), "")
        raise UserError(f"{text.where}: model_type is {text_kind!r:.80}{other}; ministral3 and mistral can be read")
    text = Keys(_CLASS[text_kind] | text.values, text.where)
    text.accept("hidden_act", "silu", ("silu",))
    text.accept("partial_rotary_factor", 1.0, (1.0, None))
    kinds = text.get("layer_types", [])
    if other := [kind for kind in (kinds if isinstance(kinds, list) else [kinds]) if kind != "full_attention"]:
        raise UserError(f"{text.where}: layer_types has {other[0]!r:.80}, this model family has full attention")
    window, context = text.get("sliding_window"), text.required("max_position_embeddings")
    if window is not None and not (type(window) is type(context) is int and window >= context):
        raise UserError(f"{text.where}: sliding_window is {window!r:.80}, this model family has full attention")
    for section in (text, top):
        section.accept("tie_word_embeddings", None, (True, False, None))
    tied = text.get("tie_word_embeddings", top.get("tie_word_embeddings", False)) and not has_head
    try:
        return ModelSpec(
            **text.sizes(_SIZES),
            context=context,
            tied=tied,
            norm_eps=text.required("rms_norm_eps"),
            rope=text_rope(text, text_kind),
            vision=_vision(top) if kind == "mistral3" else None,
            image_token=top.get("image_token_index", top.get("image_token_id", 10)),
        )
    except ValidationError as error:
        raise refused(error, where) from None


def _vision(top: Keys) -> VisionSpec:
    top.accept("projector_hidden_act", "gelu", ("gelu",))
    top.accept("multimodal_projector_bias", False, (False,))
    top.accept("vision_feature_layer", -1, (-1, [-1]))
    v = top.section("vision_config")
    v.accept("model_type", "pixtral", ("pixtral",))
    v = Keys(_CLASS["pixtral"] | v.values, v.where)
    v.accept("hidden_act", "gelu", ("silu",))
    v.accept("num_channels", 3, (3,))
    return VisionSpec(
        **v.sizes({name: _SIZES[name] for name in ("width", "mlp_width", "layers", "heads", "head_width")}),
        patch_size=v.required("patch_size"),
        max_image_size=v.required("image_size"),
        merge=top.get("spatial_merge_size", 2),
        rope_theta=axial_theta(v),
        norm_eps=1e-5,
    )


def load_config(directory: Path) -> dict[str, Any]:
    """`config.json` of a directory, parsed. Raises `UserError` where there is none, or no JSON object."""
    path = directory / "config.json"
    refuse_missing(directory)
    if not path.is_file():
        raise UserError(f"{directory} has no config.json: not a Hugging Face model directory")
    return read_object(path)

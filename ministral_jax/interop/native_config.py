"""A model's sizes as the `params.json` of Mistral's own format, and back.

Keys are those that vLLM's `transformers_utils/configs/mistral.py` and the conversion scripts of `transformers` read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ministral_jax.errors import UserError
from ministral_jax.files import read_object
from ministral_jax.interop.keys import Keys, check_same, refused
from ministral_jax.interop.rope_config import attention_factor, mscale_all_dim
from ministral_jax.models.spec import ModelSpec, RopeSpec, VisionSpec

# Sizes, ours -> theirs.
_TEXT = {
    "vocab": "vocab_size",
    "width": "dim",
    "mlp_width": "hidden_dim",
    "layers": "n_layers",
    "heads": "n_heads",
    "kv_heads": "n_kv_heads",
    "head_width": "head_dim",
}
_VISION = {
    "width": "hidden_size",
    "mlp_width": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "head_width": "head_dim",
}
_NORM_EPS = 1e-5
"""Of every norm of the vision tower and of the projector, in native readers."""


def to_params(spec: ModelSpec) -> dict[str, Any]:
    """`params.json` of a model. Raises `UserError`: epsilons that native readers do not have."""
    r, v = spec.rope, spec.vision
    params: dict[str, Any] = {theirs: getattr(spec, ours) for ours, theirs in _TEXT.items()}
    params |= {
        "norm_eps": spec.norm_eps,
        "rope_theta": r.theta,
        "max_position_embeddings": spec.context,
        "tied_embeddings": spec.tied,
    }
    if r.yarn_factor != 1:
        params["yarn"] = {
            "factor": r.yarn_factor,
            "original_max_position_embeddings": r.original_context,
            "beta": r.beta_fast,
            "alpha": r.beta_slow,
            "apply_scale": _apply_scale(r),
        }
    if r.temperature_beta:
        params["llama_4_scaling"] = {
            "original_max_position_embeddings": r.original_context,
            "beta": r.temperature_beta,
        }
    if v is not None:
        _check_eps(spec.norm_eps, "norm_eps")
        _check_eps(v.norm_eps, "vision.norm_eps")
        params["vision_encoder"] = {
            **{theirs: getattr(v, ours) for ours, theirs in _VISION.items()},
            "num_channels": 3,
            "image_size": v.max_image_size,
            "max_image_size": v.max_image_size,
            "patch_size": v.patch_size,
            "rope_theta": v.rope_theta,
            "spatial_merge_size": v.merge,
            "mm_projector_id": "patch_merge",
            "add_pre_mm_projector_layer_norm": True,
            "adapter_bias": False,
            "image_token_id": spec.image_token,
            "image_break_token_id": 12,
            "image_end_token_id": 13,
        }
        del params["vision_encoder"]["head_dim"]  # heads fill the width
    return params


def _apply_scale(rope: RopeSpec) -> bool:
    """Whether cos and sin are rescaled."""
    if (other := mscale_all_dim(rope)) is None:
        raise UserError(
            f"rope.attention_factor is {rope.attention_factor}; Mistral's format has 1 and 0.1 ln(yarn_factor) + 1"
        )
    return other == 0


def _check_eps(value: float, where: str) -> None:
    if value != _NORM_EPS:
        raise UserError(f"{where} is {value}, but readers of Mistral's format have {_NORM_EPS} beside a vision tower")


def from_params(params: dict[str, Any], where: str, has_head: bool) -> ModelSpec:
    """Sizes from a parsed `params.json` found at `where`. Embedding and head are untied where the weights contain a
    head.

    Raises:
        UserError: another architecture, a missing size, or a variation this family does not have.
    """
    top = Keys(params, where)
    for key, what in _OTHERS.items():
        if top.get(key):
            raise UserError(f"{where}: {key} is given: {what}, which this model family does not have")
    if top.get("quantization"):
        top.section("quantization").accept("qformat_weight", None, ("fp8_e4m3",))
    top.accept("tied_embeddings", None, (True, False, None))
    top.accept("activation", "silu", ("silu", None))
    top.accept("model_type", "transformer", ("transformer", None))
    context = {key: top.get(key) for key in ("max_position_embeddings", "max_seq_len")}
    check_same(context, where)
    try:
        spec = ModelSpec(
            **top.sizes(_TEXT),
            context=context["max_seq_len"] or top.required("max_position_embeddings"),
            tied=top.get("tied_embeddings", False) and not has_head,
            norm_eps=top.required("norm_eps"),
            rope=_rope(top),
            vision=_vision(top.section("vision_encoder")) if top.get("vision_encoder") else None,
            image_token=top.section("vision_encoder").get("image_token_id", 10) if top.get("vision_encoder") else 10,
        )
    except ValidationError as error:
        raise refused(error, where) from None
    if spec.vision is not None:
        _check_eps(spec.norm_eps, f"{where}: norm_eps")
    return spec


_OTHERS = {
    "moe": "a mixture of experts",
    "qk_nope_head_dim": "latent attention",
    "sliding_window": "attention to a window",
    "multimodal": "an encoder of another kind",
}
"""What a reader of this family must not pass over."""


def _rope(top: Keys) -> RopeSpec:
    theta = top.required("rope_theta")
    yarn = top.section("yarn") if top.get("yarn") else None
    scaling = top.section("llama_4_scaling") if top.get("llama_4_scaling") else None
    found: dict[str, Any] = {}
    if yarn is not None:
        factor = yarn.number("factor")
        if factor is None:
            raise UserError(f"{yarn.where}: factor is missing")
        yarn.accept("apply_scale", True, (True, False))
        found |= {"yarn_factor": factor}
        if yarn.get("apply_scale", True):
            found |= {"attention_factor": attention_factor(factor)}
        found |= {"beta_fast": yarn.get("beta", 32.0), "beta_slow": yarn.get("alpha", 1.0)}
    if scaling is not None:
        found["temperature_beta"] = scaling.required("beta")
    key = "original_max_position_embeddings"
    original = {f"{key} of {s.where.split(': ')[-1]}": s.required(key) for s in (yarn, scaling) if s is not None}
    check_same(original, top.where)
    return RopeSpec(theta=theta, original_context=next(iter(original.values()), None), **found)


def _vision(v: Keys) -> VisionSpec:
    v.accept("num_channels", 3, (3,))
    v.accept("adapter_bias", False, (False,))
    v.accept("mm_projector_id", "", ("patch_merge",))
    v.accept("add_pre_mm_projector_layer_norm", False, (True,))
    size = {key: v.get(key) for key in ("max_image_size", "image_size")}
    check_same(size, v.where)
    return VisionSpec(
        **v.sizes(_VISION),
        patch_size=v.required("patch_size"),
        max_image_size=size["max_image_size"] or v.required("image_size"),
        merge=v.required("spatial_merge_size"),
        rope_theta=v.get("rope_theta", 1e4),
        norm_eps=_NORM_EPS,
    )


def load_params(directory: Path) -> dict[str, Any]:
    """`params.json` of a directory, parsed. Raises `UserError` where it is no JSON object."""
    return read_object(directory / "params.json")

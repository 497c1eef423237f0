"""Rotary positions as configuration files of `transformers` spell them."""

from __future__ import annotations

import math
from typing import Any

from ministral_jax.errors import UserError
from ministral_jax.interop.keys import Keys, check_same
from ministral_jax.models.spec import RopeSpec


def attention_factor(factor: float, mscale: float | None = None, mscale_all_dim: float | None = None) -> float:
    """What YaRN multiplies cos and sin by: 0.1 ln(factor) + 1 (arXiv 2309.00071, section 3.4); of two mscales other
    than 0, each with its own 0.1, the ratio, as `transformers` computes it."""

    def scale(m: float) -> float:
        return 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0

    return scale(mscale) / scale(mscale_all_dim) if mscale and mscale_all_dim else scale(1.0)


def mscale_all_dim(rope: RopeSpec) -> float | None:
    """What stands beside an mscale of 1 for the attention factor of `rope`: 1 where cos and sin are not rescaled, 0
    where they are as YaRN has it; None for another factor."""
    return {attention_factor(rope.yarn_factor): 0.0, 1.0: 1.0}.get(rope.attention_factor)


def text_rope(text: Keys, kind: str) -> RopeSpec:
    """Of a decoder of the `model_type` `kind`.

    Raises:
        UserError: another form than plain RoPE and YaRN, a missing value, or values that contradict each other.
    """
    if kind == "ministral3" and not (text.get("rope_parameters") or text.get("rope_scaling")):
        raise UserError(f"{text.where}: rope_parameters is missing")
    rope = _section(text)
    theta = rope.get("rope_theta", text.get("rope_theta"))
    if theta is None:
        raise UserError(f"{rope.where}: rope_theta is missing")
    form = _form(rope, ("default", "yarn"))
    beta = rope.get("llama_4_scaling_beta", 0.0)
    if beta and kind != "ministral3":
        raise UserError(
            f"{rope.where}: llama_4_scaling_beta is {beta!r:.80}, which is ministral3's, but model_type is {kind}"
        )
    outer, inner = (keys.get("original_max_position_embeddings") for keys in (text, rope))
    check_same({"original_max_position_embeddings": outer, f"that of {rope.where}": inner}, text.where)
    original = inner if outer is None else outer
    if form == "default":
        return RopeSpec(theta=theta, temperature_beta=beta, original_context=original if beta else None)
    if original is None:
        original = text.required("max_position_embeddings")
    return _yarn(rope, original, text.required("max_position_embeddings"), {"theta": theta, "temperature_beta": beta})


def axial_theta(vision: Keys) -> float:
    """Of a vision tower. Raises `UserError`: positions of another form."""
    rope = _section(vision)
    _form(rope, ("axial", "default"))
    return rope.get("rope_theta", vision.get("rope_theta", 1e4))


def _section(keys: Keys) -> Keys:
    """What is said of positions: under its name of today or of before, or nothing."""
    name = next((name for name in ("rope_parameters", "rope_scaling") if keys.get(name)), None)
    check_same({name: keys.get(name) for name in ("rope_parameters", "rope_scaling")}, keys.where)
    rope = keys.section(name) if name else Keys({}, keys.where)
    if nested := [key for key, value in rope.values.items() if isinstance(value, dict)]:
        raise UserError(
            f"{rope.where}: {nested[0]!r:.80} has positions of its own, this model family has one for all layers"
        )
    rope.accept("partial_rotary_factor", 1.0, (1.0, None))
    check_same({"rope_theta": keys.get("rope_theta"), f"rope_theta of {name}": rope.get("rope_theta")}, keys.where)
    return rope


def _form(rope: Keys, accepted: tuple[str, str]) -> str:
    form = rope.get("rope_type", rope.get("type", accepted[0]))
    if form not in accepted:
        raise UserError(f"{rope.where}: rope_type is {form!r:.80}; {' and '.join(accepted)} can be read")
    check_same({key: rope.get(key) for key in ("rope_type", "type")}, rope.where)
    return form


def _yarn(rope: Keys, original: int, context: int, more: dict[str, Any]) -> RopeSpec:
    rope.accept("truncate", True, (True, None))
    if "factor" not in rope.values:
        raise UserError(f"{rope.where}: factor is missing")
    factor = rope.number("factor")
    if factor is None:  # as DeepSeek's are written
        factor = context / original
    rescaled = rope.number("attention_factor")
    if rescaled is None:
        rescaled = attention_factor(factor, rope.number("mscale"), rope.number("mscale_all_dim"))
    return RopeSpec(
        yarn_factor=factor,
        original_context=original,
        beta_fast=rope.get("beta_fast") or 32.0,
        beta_slow=rope.get("beta_slow") or 1.0,
        attention_factor=rescaled,
        **more,
    )

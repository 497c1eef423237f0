"""Calibration: what the pruner needs to know about a model's activations, as sums over tokens.

Batches stream through the model once and no activation is kept. Sums are taken on the device in at least float32 within
a batch and on the host in float64 across batches, so neither batch size nor order matters. Text and image tokens are
summed apart (an image token stands where `image_slot >= 0`); padding (`segments == 0`) never counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import Array
from jaxtyping import Bool, Float, Int

from ministral_jax.distributed.axes import constrain
from ministral_jax.errors import UserError
from ministral_jax.models.vision import Projector
from ministral_jax.models.vlm import IMAGE_KEYS, VLM, Images, Params, image_features

DOMAINS = ("text", "image")
"""The leading axis of every sum."""

_einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


@dataclass(frozen=True)
class Statistics:
    """Sums over calibration tokens, float64 on the host; the leading axis is `DOMAINS`. `a + b` merges two."""

    tokens: Float[np.ndarray, " 2"]
    """Tokens counted."""
    norm_ratio: Float[np.ndarray, "2 L"]
    """|out| / |in| of each layer."""
    cosine: Float[np.ndarray, "2 L"]
    """cos(in, out) of each layer."""
    mlp: Float[np.ndarray, "2 L F"]
    """|SiLU(gate x) * up x| of each feed-forward neuron."""
    second_moment: Float[np.ndarray, "2 D D"] | None = None
    """x x^T of the residual stream, averaged over the 2L inputs of attention and feed-forward norms."""
    projector: Float[np.ndarray, "2 D"] | None = None
    """|GELU(linear_1 ...)| of each hidden neuron of the projector, over image tokens: the text row is zero."""

    def __add__(self, other: Statistics) -> Statistics:
        def plus(name: str) -> Any:
            mine = getattr(self, name)
            return None if mine is None else mine + getattr(other, name)

        return Statistics(**{field.name: plus(field.name) for field in fields(self)})

    def mean(self, sums: Float[np.ndarray, "2 ..."] | None, image_weight: float = 1.0) -> Float[np.ndarray, "..."]:
        """Mean over tokens of a field, one image token counting `image_weight` text tokens."""
        if sums is None:
            raise ValueError("these statistics were collected without `width=True`")
        weight = np.array([1.0, image_weight])
        total = weight @ self.tokens
        if not total > 0:
            raise UserError(
                f"calibration counted {self.tokens[0]:.0f} text and {self.tokens[1]:.0f} image tokens, which weigh "
                f"nothing with image_weight = {image_weight}; give batches with tokens of a kind that counts"
            )
        return np.tensordot(weight, sums, 1) / total

    def take_layers(self, keep: Int[np.ndarray, " kept"]) -> Statistics:
        """What is left of the per-layer sums after `drop_layers`; `second_moment` still sees the dropped layers."""
        per_layer = {name: getattr(self, name)[:, keep] for name in ("norm_ratio", "cosine", "mlp")}
        return replace(self, **per_layer)


def collect(
    model: VLM,
    params: Params,
    batches: Iterable[Mapping[str, Any]],
    *,
    width: bool = True,
    token_weighted: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Statistics:
    """Statistics of `model` over `batches`: dicts of `tokens`, `positions`, `segments` [B, T] and `vlm.IMAGE_KEYS`.

    `width` also collects what only a cut of the width needs, `second_moment` and `projector`; `token_weighted` of
    x / rms(x), which is what a norm lets through, so that every token weighs the same at every norm. Besides the
    forward pass that takes L D^2 floats on the device (twice that with images), sharded like the `embed` axis of a
    parameter.

    Raises:
        UserError: no batch, no token that counts, or activations that are not finite.
    """
    total: Statistics | None = None
    for number, batch in enumerate(batches, 1):
        sums = jax.device_get(batch_sums(model, width, token_weighted, params, calibrated(batch)))
        part = Statistics(**{name: np.asarray(value, np.float64) for name, value in sums.items()})
        total = part if total is None else total + part
        if progress is not None:
            progress(f"calibration batch {number}")
    if total is None or not total.tokens.sum() > 0:
        raise UserError("calibration saw no token: the batches are empty or all padding (segments == 0)")
    for field in fields(total):
        value = getattr(total, field.name)
        if value is not None and not np.isfinite(value).all():
            raise UserError(
                f"calibration statistic {field.name} is not finite: the source parameters or the batches give NaN or "
                "infinity"
            )
    return total


def calibrated(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What of a batch calibration reads."""
    return {key: batch[key] for key in ("tokens", "positions", "segments", *IMAGE_KEYS) if key in batch}


@partial(jax.jit, static_argnums=(0, 1, 2))
def batch_sums(
    model: VLM, width: bool, token_weighted: bool, params: Params, batch: dict[str, Array]
) -> dict[str, Array]:
    """The fields of `Statistics` for one batch."""
    images = {key: batch[key] for key in IMAGE_KEYS} if "image_slot" in batch else None
    masks = _masks(batch)
    sums = _observed(model, params, batch, partial(_layer_sums, width, token_weighted))
    sums["tokens"] = masks.sum((1, 2))
    if width:
        sums["second_moment"] = sums["second_moment"].mean(1)
        if model.spec.vision is not None:
            sums["projector"] = _projector_sums(model, params, images, masks)
    return _whole(sums)


def _masks(batch: dict[str, Array]) -> Bool[Array, "N B T"]:
    """Which tokens count, by domain; of text alone when there are no images."""
    counted = batch["segments"] > 0
    if "image_slot" not in batch:
        return counted[None]
    image = batch["image_slot"] >= 0
    return jnp.stack([counted & ~image, counted & image])


def _observed(model: VLM, params: Params, batch: dict[str, Array], tap: Callable[..., Any]) -> dict[str, Array]:
    """What `tap` makes of every layer's activations and the masks, `[N, L, ...]`."""
    images = {key: batch[key] for key in IMAGE_KEYS} if "image_slot" in batch else None
    where: dict[str, Any] = {"positions": batch["positions"], "segments": batch["segments"], "images": images}
    found: Any = model.apply({"params": params}, batch["tokens"], tap, _masks(batch), **where, method="observe")
    return {name: jnp.moveaxis(value, 0, 1) for name, value in found[1].items()}


def _whole(sums: dict[str, Array]) -> dict[str, Array]:
    """Both domains, on every device."""
    sums = {name: jnp.pad(v, [(0, 2 - len(v))] + [(0, 0)] * (v.ndim - 1)) for name, v in sums.items()}
    if jax.sharding.get_abstract_mesh().empty:
        return sums
    return jax.lax.with_sharding_constraint(sums, jax.sharding.PartitionSpec())


@dataclass(frozen=True)
class Retained:
    """Mean share of a token's energy that is left at the input of each norm when the stream is cut."""

    attention: Float[np.ndarray, " L"]
    mlp: Float[np.ndarray, " L"]
    final: float


def retained(
    model: VLM,
    params: Params,
    batches: Iterable[Mapping[str, Any]],
    basis: Float[np.ndarray, "D D'"],
    image_weight: float = 1.0,
) -> Retained:
    """What the directions `basis` hold of the residual stream at each norm: E|xQ|^2 / |x|^2 over tokens, one image
    token counting `image_weight` text tokens."""
    total: dict[str, np.ndarray] = {}
    for batch in batches:
        found = jax.device_get(_shares(model, params, calibrated(batch), jnp.asarray(basis, jnp.float32)))
        total = {name: total.get(name, 0) + np.asarray(value, np.float64) for name, value in found.items()}
    weight = np.array([1.0, image_weight])
    mean = {name: np.tensordot(weight, sums, 1) / (weight @ total["tokens"]) for name, sums in total.items()}
    return Retained(mean["attention_norm_in"], mean["mlp_norm_in"], float(mean["out"][-1]))


@partial(jax.jit, static_argnums=0)
def _shares(model: VLM, params: Params, batch: dict[str, Array], basis: Array) -> dict[str, Array]:
    def tap(activations: dict[str, Array], masks: Bool[Array, "N B T"]) -> dict[str, Array]:
        def share(x: Array) -> Array:
            x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
            kept = jnp.square(_einsum("btd,de->bte", x, basis)).sum(-1) / jnp.square(x).sum(-1)
            return jnp.where(masks, kept, 0).sum((1, 2))

        return {name: share(activations[name]) for name in ("attention_norm_in", "mlp_norm_in", "out")}

    return _whole(_observed(model, params, batch, tap) | {"tokens": _masks(batch).sum((1, 2))})


def _layer_sums(
    width: bool, token_weighted: bool, activations: dict[str, Array], masks: Bool[Array, "N B T"]
) -> dict[str, Array]:
    """One layer's sums over the tokens of each mask, [N, ...]."""
    wide = {name: x.astype(jnp.promote_types(x.dtype, jnp.float32)) for name, x in activations.items()}
    before, middle, after = wide["attention_norm_in"], wide["mlp_norm_in"], wide["out"]
    size_before, size_after = (jnp.linalg.norm(before, axis=-1), jnp.linalg.norm(after, axis=-1))
    cosine = jnp.sum(before * after, -1) / (size_before * size_after)
    keep = masks.astype(before.dtype)

    def over_tokens(x: Float[Array, "B T"]) -> Float[Array, " N"]:
        # Whatever stands at padding may be 0/0; a zero weight would not remove a NaN.
        return jnp.where(masks, x, 0).sum((1, 2))

    sums = {
        "norm_ratio": over_tokens(size_after / size_before),
        "cosine": over_tokens(cosine),
        "mlp": _einsum("nbt,btf->nf", keep, jnp.abs(wide["mlp_hidden"])),
    }
    if width:
        inputs = [_normed(x) if token_weighted else x for x in (before, middle)]
        moments = [_einsum("nbti,btj->nij", keep[..., None] * x, x) for x in inputs]
        sums["second_moment"] = constrain((moments[0] + moments[1]) / 2, (None, "embed", None))
    return sums


def _normed(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """x / rms(x), and 0 where that is 0, as at padding."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).mean(-1, keepdims=True), jnp.finfo(x.dtype).tiny))


def _projector_sums(
    model: VLM, params: Params, images: Images | None, masks: Bool[Array, "N B T"]
) -> Float[Array, "N D"]:
    """|hidden activation| of the projector summed over image tokens; the text row is zero.

    With the identity for linear_2 the projector returns its hidden activations.
    """
    linear_2 = params["projector"]["linear_2"]
    if images is None or model.spec.vision is None:
        return jnp.zeros((1, len(linear_2)))
    bare = {**params["projector"], "linear_2": jnp.eye(len(linear_2), dtype=linear_2.dtype)}
    features = image_features(model, params["vision"], images)["features"]
    hidden: Any = Projector(model.spec, model.compute).apply({"params": bare}, features)
    wide = jnp.abs(hidden).astype(jnp.promote_types(hidden.dtype, jnp.float32))
    wide = rearrange(wide, "S G n D -> S (G n) D")

    slots, counted = (
        rearrange(x, "(S b) T -> S (b T)", S=len(wide)) for x in (jnp.maximum(images["image_slot"], 0), masks[1])
    )
    uses = jax.vmap(lambda slot, mask: jnp.zeros(wide.shape[1], wide.dtype).at[slot].add(mask, mode="drop"))
    times = uses(slots, counted.astype(wide.dtype))  # [S, G P / m^2]
    rows = jnp.where(times[..., None] > 0, wide * times[..., None], 0).sum((0, 1))
    return jnp.stack([jnp.zeros_like(rows), rows])

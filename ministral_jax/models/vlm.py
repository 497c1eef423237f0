"""The vision-language model: text and image features in one residual stream, and its parameters as plain trees."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jax import Array
from jax.tree_util import Partial
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from ministral_jax.distributed.axes import relaid
from ministral_jax.distributed.placement import Placement, with_shardings
from ministral_jax.errors import UserError
from ministral_jax.models.block import Compute
from ministral_jax.models.cache import Cache, append, keys_and_values, new_cache
from ministral_jax.models.decoder import Decoder
from ministral_jax.models.spec import ModelSpec
from ministral_jax.models.vision import Projector, VisionTower

__all__ = ["VLM", "Compute", "abstract_params", "check_params", "head_matrix", "init_params", "logical_axes"]

IMAGE_KEYS = ("patches", "patch_image", "patch_row", "patch_col", "image_slot")

Params = dict[str, Any]
"""A nested dict of arrays, or of shapes, axes or shardings in their place."""
Images = dict[str, Array]
Ids = Int[Array, "B T"]
Hidden = Float[Array, "B T D"]


class VLM(nn.Module):
    """Ministral 3. Arguments of every method:

    positions  restart at 0 in each packed document; None counts the tokens of a row
    segments   the document a token belongs to (0 is padding); None is one document per row
    images     None or the five arrays named by `IMAGE_KEYS`: `patches` [S, G, P, 3pp] in merge-block order, uint8
               pixels or normalised floats, `patch_image`, `patch_row`, `patch_col` [S, G, P] int, in G bins for each
               of S groups of B/S rows, and `image_slot` [B, T] int, the merged token of the group's bins, one after
               the other, that stands at a position, -1 for text. `features` [S, G, P, Dv], what the tower makes of
               the patches (`image_features`), may stand in the place of the first four
    """

    spec: ModelSpec
    compute: Compute = Compute()

    def setup(self) -> None:
        self.decoder = Decoder(self.spec, self.compute)
        if self.spec.vision is not None:
            self.vision = VisionTower(self.spec.vision, self.compute.unrounded)
            self.projector = Projector(self.spec, self.compute)

    def __call__(
        self, tokens: Ids, positions: Ids | None = None, segments: Ids | None = None, images: Images | None = None
    ) -> Float[Array, "B T V"]:
        """Logits, float32 or wider."""
        return self.decoder.logits(self.hidden(tokens, positions, segments, images))

    def hidden(
        self, tokens: Ids, positions: Ids | None = None, segments: Ids | None = None, images: Images | None = None
    ) -> Hidden:
        """Hidden states after the final norm, in the compute dtype."""
        return self.decoder(self._embed(tokens, images), positions, segments)[0]

    def observe(
        self,
        tokens: Ids,
        tap: Callable[[dict[str, Array], Any], Any],
        weights: Any = None,
        positions: Ids | None = None,
        segments: Ids | None = None,
        images: Images | None = None,
    ) -> tuple[Hidden, Any]:
        """Hidden states and `tap(activations, weights)` of every decoder layer, stacked on a leading axis.

        `activations` holds "attention_norm_in", "attention_in" (after the norm), "mlp_norm_in", "mlp_in", "out"
        [B, T, D], "key" and "value" [B, T, K, h], "mixed" [B, T, H h], and "mlp_hidden" [B, T, F].
        """
        with_weights = Partial(lambda weights, activations: tap(activations, weights), weights)
        return self.decoder(self._embed(tokens, images), positions, segments, with_weights)

    def prefill(self, tokens: Ids, segments: Ids, images: Images | None = None) -> tuple[Hidden, Cache]:
        """Hidden states of prompts that begin at position 0, and the cache that `extend` goes on from."""
        states, (k, v) = self.decoder(self._embed(tokens, images), None, segments, Partial(keys_and_values))
        return states, new_cache(k, v, segments)

    def extend(
        self, tokens: Ids, positions: Ids, segments: Ids, cache: Cache, slot: Int[Array, ""]
    ) -> tuple[Hidden, Cache]:
        """Hidden states of text that follows what the cache holds, and the cache with it at the slots from `slot`
        on."""
        x, past = self.decoder.embed_tokens(tokens), (cache["k"], cache["v"])
        pair = (cache["segments"], segments)
        states, (k, v) = self.decoder(x, positions, pair, Partial(keys_and_values), past)
        return states, append(cache, k, v, segments, slot)

    def next_logits(self, hidden: Float[Array, "B D"]) -> Float[Array, "B V"]:
        """Logits of the next token."""
        return self.decoder.logits(hidden[:, None])[:, 0]

    def _embed(self, tokens: Ids, images: Images | None) -> Hidden:
        x = self.decoder.embed_tokens(tokens)
        if images is None:
            return x
        check_images(images, self.spec)
        features = images.get("features")
        if features is None:
            with jax.named_scope("vision"):
                features = self.vision(*(images[k] for k in IMAGE_KEYS[:4]))
        with jax.named_scope("projector"):
            return spliced(x, self.projector(features).astype(x.dtype), images["image_slot"])


def spliced(x: Hidden, merged: Float[Array, "S G n D"], slot: Ids) -> Hidden:
    """`x` with merged tokens where `slot` points to one; the devices that share rows tell each other theirs."""
    merged = relaid(rearrange(merged, "S G n D -> S (G n) D"), ("batch", None, None), ("batch", "bins", None))
    places = rearrange(slot, "(S b) T -> S b T", S=len(merged))
    found = jax.vmap(lambda tokens, place: tokens[jnp.maximum(place, 0)])(merged, places)
    return jnp.where(slot[..., None] >= 0, rearrange(found, "S b T D -> (S b) T D"), x)


def image_features(model: VLM, tower: Params, images: Images) -> Images:
    """`images` with the features that the tower's parameters make of them in the place of the patches."""
    assert model.spec.vision is not None
    with jax.named_scope("vision"):
        features: Any = VisionTower(model.spec.vision, model.compute.unrounded).apply(
            {"params": tower}, *(images[k] for k in IMAGE_KEYS[:4])
        )
    return {"features": features, "image_slot": images["image_slot"]}


def check_images(images: Images, spec: ModelSpec) -> None:
    """Raise `UserError` when a batch's image arrays cannot belong to a model of `spec`."""
    if spec.vision is None:
        raise UserError("the batch has images but the model has no vision tower (model.vision is null)")
    groups, rows = len(images.get("features", images.get("patches", ()))), len(images.get("image_slot", ()))
    if "features" not in images:
        missing = [k for k in IMAGE_KEYS if k not in images]
        if missing:
            raise UserError(f"images lack {', '.join(missing)}; expected {', '.join(IMAGE_KEYS)}")
        shape, block = images["patches"].shape, spec.vision.merge**2
        if len(shape) != 4 or shape[2] % block or shape[3] != spec.vision.patch_width:
            raise UserError(
                f"images.patches has shape {tuple(shape)}; expected [S, G, P, {spec.vision.patch_width}] "
                f"with P a multiple of {block}"
            )
    if rows % max(groups, 1):
        raise UserError(
            f"images are in {groups} groups, over which {rows} rows of images.image_slot do not fall evenly"
        )


def _trace(spec: ModelSpec) -> Params:
    # The key is traced too: on the mesh of a topology that is only described, none can be made.
    return jax.eval_shape(lambda: _init(spec)(jax.random.key(0)))


# Shapes and logical axes of every parameter, as Flax boxes; a spec is traced once.
_boxed: Any = cache(_trace)


def _init(spec: ModelSpec) -> Callable[[Array], Any]:
    images = None
    if (v := spec.vision) is not None:
        grid = jnp.zeros((1, 1, v.merge**2), jnp.int32)
        slot = jnp.full((1, 1), -1, jnp.int32)
        patches = jnp.zeros((1, 1, v.merge**2, v.patch_width))
        images = {"patches": patches, "patch_image": grid, "patch_row": grid, "patch_col": grid, "image_slot": slot}

    def init(key: Array) -> Params:
        with nn.logical_axis_rules(()):  # where parameters lie is said by whoever compiles this
            variables: Any = VLM(spec).init(key, jnp.zeros((1, 1), jnp.int32), images=images)
            return variables["params"]

    return init


def init_params(spec: ModelSpec, key: Array, dtype: DTypeLike = jnp.float32) -> Params:
    """Fresh parameters: gains 1, kernels normal with deviation 1/√fan-in, and 1/√(2·layers) of that where they write
    to the residual stream (GPT-2's rule)."""
    return jax.tree.map(lambda box: box.value.astype(dtype), _init(spec)(key), is_leaf=_is_box)


def abstract_params(spec: ModelSpec, dtype: DTypeLike = jnp.float32) -> Params:
    """The parameter tree as `jax.ShapeDtypeStruct`s; nothing is allocated."""
    return jax.tree.map(lambda box: jax.ShapeDtypeStruct(box.value.shape, dtype), _boxed(spec), is_leaf=_is_box)


def logical_axes(spec: ModelSpec) -> Params:
    """The parameter tree as tuples of axis names, e.g. ("layers", "embed", "mlp")."""
    return jax.tree.map(lambda box: tuple(box.names), _boxed(spec), is_leaf=_is_box)


def param_shardings(spec: ModelSpec, placement: Placement) -> Params:
    """Where every parameter lies."""
    return jax.tree.map(
        lambda leaf, axes: placement.sharding(leaf.shape, axes), abstract_params(spec), logical_axes(spec)
    )


def placed_params(spec: ModelSpec, placement: Placement, dtype: DTypeLike = jnp.float32) -> Params:
    """`abstract_params` that say where they lie."""
    return with_shardings(abstract_params(spec, dtype), param_shardings(spec, placement))


def _is_box(x: Any) -> bool:
    return isinstance(x, nn.Partitioned)


def head_matrix(params: Params) -> Float[Array, "D V"]:
    """The output head: the embedding transposed when they are tied."""
    decoder = params["decoder"]
    return decoder["head"] if "head" in decoder else decoder["embed"].T


def head_of(params: Params) -> Params:
    """Of a model's parameters (or shapes, or shardings) those that `head_matrix` reads."""
    name = "head" if "head" in params["decoder"] else "embed"
    return {"decoder": {name: params["decoder"][name]}}


def check_params(params: Params, spec: ModelSpec, where: str) -> None:
    """Raise `UserError` naming the first leaf of `params` (arrays or shapes) that a model of `spec` lacks, adds or has
    in another shape; `where` says in the message where the parameters came from."""
    found, expected = (_shapes(tree) for tree in (params, abstract_params(spec)))
    for name in sorted(found.keys() | expected.keys()):
        if name not in found:
            raise UserError(f"{where}: parameter {name} {expected[name]} is missing")
        if name not in expected:
            raise UserError(f"{where}: parameter {name} {found[name]} is not part of this model")
        if found[name] != expected[name]:
            raise UserError(f"{where}: parameter {name} has shape {found[name]}, expected {expected[name]}")


def _shapes(tree: Params) -> dict[str, tuple[int, ...]]:
    """By the path of a leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}

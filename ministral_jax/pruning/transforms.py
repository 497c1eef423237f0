"""Surgery on parameters: pure functions from one parameter pytree to another.

Nothing here looks at data or mutates its argument; leaves that a transform does not name are shared with the input.
Every leaf keeps its dtype, and products with a basis are taken in at least float32. Letters as in `models.spec`; D' and
F' are pruned sizes.

The algebra (SliceGPT, arXiv 2401.15024, with one basis for the whole network as in Ministral 3, arXiv 2601.08584,
Algorithm 2). Write RMSN(x) = x / sqrt(|x|^2 / D + eps), so a norm with gain g is RMSN(x) diag(g).

1. diag(g) folds into the matrices that read the norm (`fold_norm_gains`); what is left is gain-free.
2. For orthogonal Q, RMSN(xQ) = RMSN(x) Q, so x -> xQ leaves the model unchanged when every matrix that writes the
   residual stream becomes WQ and every one that reads it Q^T W (`rotate`).
3. Keep the first D' components y of xQ. If they hold the share rho of the energy, |y|^2 = rho |x|^2, then

       y / sqrt(|x|^2 / D + eps) = g y / sqrt(|y|^2 / D' + eps'),    g = sqrt(rho D / D'),  eps' = g^2 eps:

   the unsliced norm's value is that of a standard RMSNorm over D' with gain g (`slice_width`, `slice_gain`). With
   rho = 1 that is SliceGPT's norm, |y|^2 / D for every token; with the basis' average rho, the cut energy still counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from ministral_jax.models.vlm import Params

Edit = Callable[[Array], Array]
TieSeed = Literal["embed", "head", "mean"]

RESIDUAL_AXIS: Mapping[str, int] = {
    "decoder/embed": 1,  # [V, D] writes
    "decoder/layers/attention/q": 1,  # [L, D, H, h] reads
    "decoder/layers/attention/k": 1,
    "decoder/layers/attention/v": 1,
    "decoder/layers/attention/o": 3,  # [L, H, h, D] writes
    "decoder/layers/mlp/gate": 1,  # [L, D, F] reads
    "decoder/layers/mlp/up": 1,
    "decoder/layers/mlp/down": 2,  # [L, F, D] writes
    "decoder/head": 0,  # [D, V] reads
    "projector/linear_2": 1,  # [D, D] writes; its input axis is the projector's own and not in the residual stream
}
"""Every matrix that touches the decoder's residual stream, and which of its axes does."""

NORM_GAINS = ("decoder/layers/attention_norm", "decoder/layers/mlp_norm", "decoder/norm")
"""The gains that stand in the residual stream: [L, D], [L, D], [D]."""


def edit(params: Params, edits: Mapping[str, Edit]) -> Params:
    """A tree in which the leaf at each `a/b/c` path is replaced by its function's value; absent paths are skipped."""

    def walk(node: Any, prefix: str) -> Any:
        if isinstance(node, Mapping):
            return {name: walk(child, f"{prefix}/{name}" if prefix else name) for name, child in node.items()}
        return edits[prefix](node) if prefix in edits else node

    return walk(params, "")


def drop_layers(params: Params, keep: Int[np.ndarray, " L'"]) -> Params:
    """Keep the decoder layers with indices `keep`, in the order given."""
    layers = jax.tree.map(lambda leaf: leaf[np.asarray(keep)], params["decoder"]["layers"])
    return {**params, "decoder": {**params["decoder"], "layers": layers}}


def narrow_mlp(params: Params, keep: Int[np.ndarray, "L F'"]) -> Params:
    """Keep the feed-forward neurons with indices `keep` of each layer: columns of gate and up, rows of down."""
    keep = np.asarray(keep)

    def columns(w: Array) -> Array:
        return jnp.take_along_axis(w, keep[:, None, :], axis=2)

    def rows(w: Array) -> Array:
        return jnp.take_along_axis(w, keep[:, :, None], axis=1)

    mlp = "decoder/layers/mlp"
    return edit(params, {f"{mlp}/gate": columns, f"{mlp}/up": columns, f"{mlp}/down": rows})


def narrow_projector(params: Params, keep: Int[np.ndarray, " D'"]) -> Params:
    """Keep the projector's hidden neurons with indices `keep`: columns of linear_1, rows of linear_2."""
    keep = np.asarray(keep)
    return edit(params, {"projector/linear_1": lambda w: w[:, keep], "projector/linear_2": lambda w: w[keep]})


def fold_norm_gains(params: Params) -> Params:
    """Multiply every decoder norm gain into the matrices that read the norm, and leave ones in its place.

    A tied model keeps its final gain: the matrix that reads it is also the embedding. `untie` first to fold that too.
    """
    decoder = params["decoder"]
    attention, mlp, final = decoder["layers"]["attention_norm"], decoder["layers"]["mlp_norm"], decoder["norm"]
    edits: dict[str, Edit] = {}
    edits |= {f"decoder/layers/attention/{name}": lambda w: _scale(w, attention[:, :, None, None]) for name in "qkv"}
    edits |= {f"decoder/layers/mlp/{name}": lambda w: _scale(w, mlp[:, :, None]) for name in ("gate", "up")}
    edits |= {"decoder/layers/attention_norm": jnp.ones_like, "decoder/layers/mlp_norm": jnp.ones_like}
    if "head" in decoder:
        edits |= {"decoder/head": lambda w: _scale(w, final[:, None]), "decoder/norm": jnp.ones_like}
    return edit(params, edits)


def rotate(params: Params, basis: Float[Array, "D D'"] | Float[np.ndarray, "D D'"]) -> Params:
    """Express the residual stream in `basis`, whose columns are orthonormal: x becomes x @ basis.

    Exact for D' = D once the gains are folded (identity 2 above). With D' < D this is the rotation and the cut in one
    product per leaf; the norms still need their gain, see `slice_width`.

    Raises:
        ValueError: the head is tied, so that its final gain stands between the stream and the matrix: `untie` first.
    """
    if "head" not in params["decoder"]:
        raise ValueError("rotate needs an untied head: the final norm gain of a tied model cannot be folded")

    edits: dict[str, Edit] = {path: partial(_in_parts, basis=basis, axis=axis) for path, axis in RESIDUAL_AXIS.items()}
    return edit(params, edits | {path: lambda g: g[..., : basis.shape[1]] for path in NORM_GAINS})


WHOLE = 2**28
"""Values of a leaf that is rotated at once. Of a larger one, the embedding or the head, copies in float32 would be what
surgery needs most memory for."""


def _in_parts(w: Array, basis: Any, axis: int) -> Array:
    """`_along` of slices of another axis, which are taken `parts` apart, so that each is cut over devices as `w` is."""
    other = max((n for n in range(w.ndim) if n != axis), key=lambda n: w.shape[n])
    size = w.shape[other]
    parts = next(n for n in range(1, size + 1) if size % n == 0 and (w.size <= n * WHOLE or n == size))
    if parts == 1:
        return _along(w, basis, axis)
    split = w.reshape(*w.shape[:other], size // parts, parts, *w.shape[other + 1 :])
    cut = list(w.shape)
    cut[axis] = basis.shape[1]
    made = jnp.zeros((*cut[:other], size // parts, parts, *cut[other + 1 :]), w.dtype)

    def one(n: Array, made: Array) -> Array:
        part = jax.lax.dynamic_index_in_dim(split, n, other + 1, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(made, _along(part, basis, axis), n, other + 1)

    return jax.lax.fori_loop(0, parts, one, made).reshape(cut)


def _along(w: Array, basis: Any, axis: int) -> Array:
    dtype = jnp.promote_types(w.dtype, jnp.float32)
    q = jnp.asarray(basis, dtype)
    product = jnp.tensordot(w.astype(dtype), q, axes=(axis, 0), precision=jax.lax.Precision.HIGHEST)
    return jnp.moveaxis(product, -1, axis).astype(w.dtype)


class Gains(NamedTuple):
    """What decoder norm gains are multiplied by: of attention and feed-forward norms `[L]`, of the final one `[]`."""

    attention: Array
    mlp: Array
    final: Array

    @staticmethod
    def same(gain: float, layers: int) -> Gains:
        """One gain for every norm."""
        every = jnp.full(layers, gain)
        return Gains(every, every, jnp.asarray(gain))


def slice_width(params: Params, width: int, gains: Gains) -> Params:
    """Keep the first `width` components of the residual stream and multiply decoder norm gains by `gains`.

    The projector's hidden neurons, which a checkpoint's config ties to the width, are left to `narrow_projector`.
    """
    edits: dict[str, Edit] = {
        path: partial(jax.lax.slice_in_dim, start_index=0, limit_index=width, axis=axis)
        for path, axis in RESIDUAL_AXIS.items()
    }
    scales = (gains.attention[:, None], gains.mlp[:, None], gains.final)
    scaled = {p: lambda g, by=by: _scale(g[..., :width], by) for p, by in zip(NORM_GAINS, scales, strict=True)}
    return edit(params, edits | scaled)


def slice_gain(width: int, kept: int, energy: float = 1.0) -> float:
    """Gain g = sqrt(rho D / D') of a standard RMSNorm over the `kept` of `width` components holding `energy` = rho.

    Its exact epsilon is g^2 eps; see identity 3 above.
    """
    return float(np.sqrt(energy * width / kept))


def untie(params: Params) -> Params:
    """Give a tied model a head of its own, the transposed embedding. Exact; an untied model is returned as it is."""
    decoder = params["decoder"]
    return params if "head" in decoder else {**params, "decoder": {**decoder, "head": decoder["embed"].T}}


def tie_embeddings(params: Params, seed: TieSeed) -> Params:
    """Make embedding and head one matrix M [V, D]. Lossy: two matrices become one.

    With E the embedding and W = head^T diag(final gain), and a_i = |E_i| / |W_i| bringing component i of the head to
    the embedding's scale, M is E (`embed`), W diag(a) (`head`: logits of a given hidden state are kept) or the average
    of both (`mean`). The final gain becomes, per component, the least-squares one: g_i = <M_i, W_i> / <M_i, M_i>
    minimises E|h diag(g) M^T - h W^T|^2 when the components of the hidden state h are uncorrelated, as in a PCA basis.
    """
    decoder = params["decoder"]
    dtype = jnp.promote_types(decoder["embed"].dtype, jnp.float32)
    embed = decoder["embed"].astype(dtype)
    head = (decoder["head"].astype(dtype) * decoder["norm"][:, None]).T
    matched = head * _ratio(jnp.linalg.norm(embed, axis=0), jnp.linalg.norm(head, axis=0))
    matrix = {"embed": embed, "head": matched, "mean": (embed + matched) / 2}[seed]
    gain = _ratio(jnp.sum(matrix * head, axis=0), jnp.sum(matrix * matrix, axis=0))
    rest = {name: leaf for name, leaf in decoder.items() if name != "head"}
    tied = {"embed": matrix.astype(decoder["embed"].dtype), "norm": gain.astype(decoder["norm"].dtype)}
    return {**params, "decoder": {**rest, **tied}}


def _scale(w: Array, factor: float | Array) -> Array:
    return (w * factor).astype(w.dtype)


def _ratio(numerator: Array, denominator: Array) -> Array:
    return jnp.where(denominator > 0, numerator / jnp.where(denominator > 0, denominator, 1), 1)

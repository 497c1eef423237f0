"""Which layers, directions and neurons to keep: scores from calibration statistics, all on the host in float64.

Every score reads "larger is more worth keeping"; `top` turns a score into indices.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int
from pydantic import Field

from ministral_jax.distributed.collectives import fetch
from ministral_jax.models.vlm import Params
from ministral_jax.pruning.statistics import Statistics
from ministral_jax.pruning.transforms import TieSeed
from ministral_jax.settings import Frozen

LayerScore = Literal["norm_ratio", "norm_ratio_inverse", "block_influence", "random"]
MlpScore = Literal["activation", "weight_norm", "random"]
WidthBasis = Literal["pca", "magnitude", "random"]


class PruneOptions(Frozen):
    """How to choose what is cut. The defaults are Ministral 3's Algorithm 2 where it speaks, but for `width_weight`,
    which a study decided (docs/evidence.md)."""

    layer_score: LayerScore = "norm_ratio"
    """`norm_ratio`: mean |out|/|in|, the paper's code; `norm_ratio_inverse`: its inverse, the paper's text;
    `block_influence`: 1 - mean cos(in, out), Minitron's."""
    mlp_score: MlpScore = "activation"
    """`activation`: mean |SiLU(W1 x) * W3 x|, the paper's; `weight_norm`: |gate_j| |up_j| |down_j|."""
    width_basis: WidthBasis = "pca"
    """`pca`: one uncentred PCA of the residual stream at every norm input, the paper's; `magnitude`: the channels of
    largest mean square; `random`: a random rotation."""
    width_weight: Literal["energy", "token"] = "token"
    """What a token weighs in the basis: the same at every norm; or `energy`, its squared norm, as in the paper, so that
    late layers and tokens with massive activations decide."""
    norm_gain: Literal["exact", "energy", "per_norm"] = "exact"
    """Gain of the sliced norms: sqrt(D/D'), or sqrt(rho D/D') with rho the energy retained by the basis, of all norms
    together or at each, for which the calibration batches are read once more."""
    norm_eps: Literal["spec", "exact"] = "spec"
    """Keep the target spec's epsilon, or scale the source's by the squared gain, which makes the sliced norm exact (but
    with `per_norm`, whose mean gain it then is)."""
    projector: Literal["rotated", "fresh"] = "rotated"
    """Rotate and narrow the source's projector with the decoder, or draw a new one as the paper does."""
    tie_seed: TieSeed = "head"
    """What the shared matrix starts from when the target ties embedding and head. Of the three, `head` was nearest to
    the source both right after tying and after a short distillation."""
    image_weight: float = Field(default=1.0, ge=0)
    """How much one image token counts relative to one text token, in every calibrated score."""
    recollect: bool = True
    """Collect the statistics again after each surgery step, on the model as it then is."""


def top(scores: Float[np.ndarray, "*layers N"], count: int) -> Int[np.ndarray, "*layers count"]:
    """Indices (int32) of the `count` largest scores along the last axis, ascending; of equal scores the first wins."""
    order = np.argsort(-scores, axis=-1, kind="stable")[..., :count]
    return np.sort(order, axis=-1).astype(np.int32)


def layer_scores(statistics: Statistics, options: PruneOptions, rng: np.random.Generator) -> Float[np.ndarray, " L"]:
    """Importance of each layer (Ministral 3, Algorithm 2; Minitron, arXiv 2407.14679, for block influence)."""
    ratio = statistics.mean(statistics.norm_ratio, options.image_weight)
    match options.layer_score:
        case "norm_ratio":
            return ratio
        case "norm_ratio_inverse":
            return 1 / ratio
        case "block_influence":
            return 1 - statistics.mean(statistics.cosine, options.image_weight)
        case "random":
            return rng.random(ratio.shape)


def mlp_scores(
    params: Params, statistics: Statistics, options: PruneOptions, rng: np.random.Generator
) -> Float[np.ndarray, "L F"]:
    """Importance of each feed-forward neuron; `weight_norm` takes the norm's gain as part of gate and up."""
    match options.mlp_score:
        case "activation":
            return statistics.mean(statistics.mlp, options.image_weight)
        case "random":
            return rng.random(statistics.mlp.shape[1:])
        case "weight_norm":
            layers = params["decoder"]["layers"]
            # One layer at a time: a float64 copy of them all need not fit the host.
            return np.stack(
                [_weight_norm(jax.tree.map(lambda w, i=i: w[i], layers)) for i in range(len(statistics.mlp[0]))]
            )


def _weight_norm(layer: Params) -> Float[np.ndarray, " F"]:
    gain = fetch(layer["mlp_norm"]).astype(np.float64)[:, None]
    gate, up, down = (fetch(layer["mlp"][name]).astype(np.float64) for name in ("gate", "up", "down"))
    return np.linalg.norm(gain * gate, axis=0) * np.linalg.norm(gain * up, axis=0) * np.linalg.norm(down, axis=1)


class Basis(NamedTuple):
    """An orthonormal basis of the residual stream, most important direction first, and the energy along each."""

    vectors: Float[np.ndarray, "D D"]
    """float64, directions in columns."""
    energy: Float[np.ndarray, " D"]
    """Mean square of the residual stream along each direction."""

    def retained(self, width: int) -> float:
        """Share of the energy in the first `width` directions, rho."""
        return float(self.energy[:width].sum() / self.energy.sum())


def width_basis(statistics: Statistics, options: PruneOptions, rng: np.random.Generator) -> Basis:
    """Basis to express the residual stream in before it is cut.

    `pca` holds the eigenvectors of the uncentred second moment (float64 `eigh`), each with its largest entry positive;
    uncentred because no bias exists in the model that could absorb a mean.
    """
    moment = statistics.mean(statistics.second_moment, options.image_weight)
    width = len(moment)
    match options.width_basis:
        case "pca":
            energy, vectors = np.linalg.eigh(moment)
            energy, vectors = energy[::-1].clip(min=0), vectors[:, ::-1]
            pivot = np.abs(vectors).argmax(axis=0)
            return Basis(vectors * np.sign(vectors[pivot, np.arange(width)]), energy)
        case "magnitude":
            order = np.argsort(-np.diag(moment), kind="stable")
            return Basis(np.eye(width)[:, order], np.diag(moment)[order])
        case "random":
            vectors, triangle = np.linalg.qr(rng.standard_normal((width, width)))
            vectors = vectors * np.sign(np.diag(triangle))  # Haar measure (Mezzadri 2007)
            return Basis(vectors, np.einsum("di,de,ei->i", vectors, moment, vectors, optimize=True))

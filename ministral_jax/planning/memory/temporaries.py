"""What the programs of a phase need beside their arguments on one device, moment by moment.

A compiler keeps an array from where it is made to where it is last used, so a program's size is that of its fullest
moment. Which arrays live when follows from the model's code; each of them is named here. Two properties of XLA are
relied upon. What does not change in a loop is made once, before it: parameters in the dtype that is computed in,
embeddings gathered over the devices that share them. And where the devices of one axis alone add up a gradient, they
do so after the loop that accumulates it, until when each has all of it: the head's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

from jax.sharding import Mesh

from ministral_jax.models.spec import ModelSpec
from ministral_jax.planning.memory.shards import ITEMSIZE, Shards, local_shape
from ministral_jax.planning.records import Read

Moment = dict[str, int]
"""Bytes by what they are for, at one moment of a program."""

FLOAT = 4
"""Bytes of float32, in which gradients, moments and logits are kept."""


def together(*parts: Moment) -> Moment:
    """Bytes of the same name added."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: sum(part.get(name, 0) for part in parts) for name in names}


@dataclass(frozen=True)
class Rows:
    """A read as one device sees it: bytes of its arrays, of one microbatch."""

    read: Read
    mesh: Mesh

    @cached_property
    def shards(self) -> Shards:
        return Shards(self.read.model.spec, self.read.model.rules, self.mesh)

    @cached_property
    def taught(self) -> Rows | None:
        """The same rows of the model whose logits are made beside this one's."""
        model = self.read.taught
        return None if model is None else Rows(replace(self.read, model=model, taught=None), self.mesh)

    @property
    def spec(self) -> ModelSpec:
        return self.read.model.spec

    @property
    def width(self) -> int:
        """Bytes of a value in the dtype that is computed in."""
        return ITEMSIZE[self.read.compute.dtype]

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Rows and tokens."""
        rows = self.read.rows // self.read.microbatches
        found = local_shape((rows, self.read.length), ("batch", "length"), self.read.model.rules, self.mesh)
        return found[0], found[1]

    @property
    def tokens(self) -> int:
        return math.prod(self.shape)

    # ---- arrays of a layer ----

    @property
    def stream(self) -> int:
        """[B, T, D], the residual stream."""
        return self.tokens * self.spec.width * self.width

    @property
    def between(self) -> int:
        """[B, T, D] as it lies between blocks, cut over the axes of tensor parallelism too."""
        shape = (self.read.rows // self.read.microbatches, self.read.length)
        found = local_shape(shape, ("batch", "residual"), self.read.model.rules, self.mesh)
        return math.prod(found) * self.spec.width * self.width

    @property
    def hidden(self) -> int:
        """[B, T, F] of the feed-forward."""
        return self.tokens * self.shards.cut(self.spec.mlp_width, "mlp") * self.width

    @property
    def queries(self) -> int:
        """[B, T, H, h]."""
        return self.tokens * self.shards.cut(self.spec.heads, "heads") * self.spec.head_width * self.width

    @property
    def keys(self) -> int:
        """[B, T, K, h], with the heads that the device's queries read."""
        return self.tokens * self._kv_heads * self.spec.head_width * self.width

    @property
    def _kv_heads(self) -> int:
        """Where the axes of the heads do not divide the key-value heads, a device picks those of its queries."""
        heads, kv_heads = self.shards.cut(self.spec.heads, "heads"), self.shards.cut(self.spec.kv_heads, "heads")
        if kv_heads < self.spec.kv_heads or heads == self.spec.heads:
            return kv_heads
        return max(1, heads * self.spec.kv_heads // self.spec.heads)

    @property
    def all_keys(self) -> int:
        """`keys` of the whole row, which queries meet at once unless they come by around a ring."""
        whole = self.read.compute.context == "all_gather"
        return self.keys * (self.read.length // self.shape[1] if whole else 1)

    @property
    def angles(self) -> int:
        """Cosines and sines of the rotary positions, float32 [B, T, h/2] each."""
        return self.tokens * self.spec.head_width * FLOAT

    @property
    def weights(self) -> int:
        """Two of a layer's matrices [D, F] with all of D: the largest that a product and its neighbour read."""
        return 2 * self.spec.width * self.shards.cut(self.spec.mlp_width, "mlp") * self.width

    @property
    def hole(self) -> int:
        """XLA lays temporaries out once, in one block: between arrays of other sizes a place as large as one of them
        stays empty."""
        return self.stream

    # ---- what is there throughout ----

    @property
    def casts(self) -> int:
        """All parameters of layers in the dtype that is computed in, cut as they are: a cast of what does not change
        is taken out of the loop over layers."""
        if ITEMSIZE[self.read.model.dtype] <= self.width:
            return 0
        return self.shards.size("decoder/layers") * self.width

    @property
    def table(self) -> int:
        """The embedding with all of D, from which the tokens' rows are taken."""
        return self.shards.vocab * self.spec.width * self.width

    @property
    def vision(self) -> tuple[int, int]:
        """What the vision tower holds at once, and what of it the projector's backward pass needs: the features, the
        same merged, and three times the projector's hidden values (before, after and the slope of its GELU)."""
        v, patches = self.spec.vision, self.read.bin(self.mesh)
        if v is None or not patches:
            return 0, 0
        cut = lambda size, axis: self.shards.cut(size, axis)
        count = patches * self.width
        features, hidden = count * v.width, count * cut(v.mlp_width, "vision_mlp")
        # two of the stream, three of the feed-forward or queries, keys and values with their tiles
        tower = 2 * features + max(3 * hidden, 6 * count * cut(v.heads, "vision_heads") * v.head_width)
        merged = count // v.merge**2
        kept = 2 * features + merged * (v.width + 3 * cut(self.spec.width, "projector"))
        shared = math.prod(self.mesh.shape[axis] for axis in self.read.model.rules.bins)
        return tower * self.read.tower, kept + shared * merged * self.spec.width

    # ---- moments ----

    @property
    def layer(self) -> int:
        """Forward through a layer, at its feed-forward: the stream before and after the norm, gate, up and their
        product; or at its attention: the stream twice, queries, keys and values, and their tiles."""
        feed_forward = 2 * self.stream + 3 * self.hidden
        attention = 2 * self.stream + 3 * self.queries + 2 * self.keys + 2 * self.all_keys + self._scores
        return max(feed_forward, attention) + self.angles + self.weights + self.hole

    @property
    def layer_backward(self) -> int:
        """Backward through a layer that is computed again. At its feed-forward: its input, the middle and the middle
        after the norm, the cotangent as it came, once transposed and once of the middle; gate, up and their product;
        queries, keys, values and mixture of the attention before. At the attention: input, norm, middle, cotangent;
        queries, mixture and its cotangent with their tiles, d_q in float32; keys and values, and their gradients in
        float32."""
        before = 2 * self.queries + 2 * self.all_keys
        feed_forward = 6 * self.stream + 3 * self.hidden + before
        gradients = 2 * self.all_keys * FLOAT // self.width
        attention = 4 * self.stream + (6 + FLOAT // self.width) * self.queries + 2 * self.keys + 4 * self.all_keys
        attention += gradients + 2 * self._scores
        return max(feed_forward, attention) + self.angles + self.weights + self.hole

    @property
    def _scores(self) -> int:
        """Scores of every query with every key, float32 and as probabilities, where they are not made by tiles."""
        compute = self.read.compute
        tiled = compute.attention not in ("auto", "xla") or (
            compute.attention == "auto" and self.read.length > compute.attention_block
        )
        if tiled:
            return 0
        heads = self.shards.cut(self.spec.heads, "heads")
        return self.tokens * heads * self.read.length * (FLOAT + self.width)

    @property
    def residuals(self) -> int:
        """What is kept of every layer for its backward pass: its input alone with remat "full"; also the matrix
        products' results but for the last one's, which nothing but the next layer's input needs, with "dots"; the
        attention's with "attention"; and both with "none". With "offload" what "attention" keeps of two layers, one
        that is computed and one that is sent to the host or fetched."""
        remat, kept, products = self.read.compute.remat, self.between, 0
        if remat in ("none", "dots"):
            products = self.between + 2 * self.hidden + self.queries + 2 * self.keys
        if remat in ("none", "attention", "offload"):
            kept += self.queries
        return (2 if remat == "offload" else self.spec.layers) * (kept + products)

    def logits(self, width: int) -> int:
        """[tokens of a chunk, V] in values of `width` bytes."""
        return min(self.read.chunk, self.tokens) * self.shards.vocab * width

    @property
    def sums_late(self) -> bool:
        """Whether the head's gradient is summed over devices once for all microbatches."""
        axes = {*self.read.model.rules.batch, *self.read.model.rules.length}
        return sum(self.mesh.shape[axis] > 1 for axis in axes) == 1

    def head(self, width: int) -> int:
        """[D, V] with all of D, in values of `width` bytes."""
        return self.shards.vocab * self.spec.width * width

"""One stack of transformer blocks, decoder or vision tower, on one device of a mesh: FLOPs, bytes and collectives.

Counts follow `models.block` and `models.attention`; B and T are the rows and tokens of one microbatch on one device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from jax.sharding import Mesh

from ministral_jax.data.bins import largest_picture
from ministral_jax.distributed.axes import Axes, dividing_axes
from ministral_jax.distributed.placement import AXES, Rules
from ministral_jax.models import decoder, vision
from ministral_jax.models.attention import AttentionSpec, chosen_implementation
from ministral_jax.models.block import Compute
from ministral_jax.models.kernels import Asked
from ministral_jax.models.spec import ModelSpec
from ministral_jax.planning.memory.shards import ITEMSIZE, Shards
from ministral_jax.planning.timing.assumptions import Assumptions
from ministral_jax.planning.timing.links import Transfer
from ministral_jax.planning.timing.scores import Passes, Scores, score_cost

Kind = Literal["matmul", "attention", "vision", "head", "memory", "link", "loop"]

ALL_PRODUCTS, ATTENTION_KEPT = ("full", "attention", "offload"), ("none", "attention", "offload")
"""Values of `Compute.remat` with which the linear layers are computed again, and attention is not."""


@dataclass(frozen=True)
class Cost:
    """What a device computes, reads and writes, the trips of its loops and what it sends; all times together."""

    name: str
    kind: Kind
    flops: float = 0.0
    hbm: float = 0.0
    trips: float = 0.0
    sent: tuple[Transfer, ...] = ()
    seconds: float = 0.0
    """Spent elsewhere: on disks."""
    idle: float = 0.0
    """Seconds of a kernel's steps in which nothing is computed."""

    def times(self, count: float) -> Cost:
        sent = tuple(replace(t, times=t.times * count) for t in self.sent)
        scaled = {name: count * getattr(self, name) for name in ("flops", "hbm", "trips", "seconds", "idle")}
        return replace(self, sent=sent, **scaled)


@dataclass(frozen=True)
class Layout:
    """Where logical axes lie on a mesh."""

    mesh: Mesh
    rules: Rules

    @property
    def sizes(self) -> Mapping[str, int]:
        return self.mesh.shape

    def shards(self, spec: ModelSpec) -> Shards:
        return Shards(spec, self.rules, self.mesh)

    def axes(self, size: int, name: str, multiple_of: int = 1) -> Axes:
        """The mesh axes that cut a dimension of `size`."""
        return dividing_axes(size, getattr(self.rules, name), self.sizes, multiple_of)

    def parts(self, axes: Axes) -> int:
        return math.prod(self.sizes[axis] for axis in axes)

    @cached_property
    def batch(self) -> Axes:
        return tuple(axis for axis in self.rules.batch if self.sizes[axis] > 1)

    def rows(self, rows: float) -> int:
        """Of a device, of so many in all."""
        return math.ceil(rows / self.parts(self.batch))


@dataclass(frozen=True)
class Tower:
    """Sizes of a stack, where it lies, and the tokens of a row that go through it, of which documents have `span`."""

    layers: int
    width: int
    mlp: int
    heads: int
    kv_heads: int
    head_width: int
    causal: bool
    names: tuple[str, ...]
    multiple_of: int
    length: int
    span: int
    layout: Layout
    compute: Compute

    @cached_property
    def cut(self) -> dict[str, Axes]:
        """Mesh axes of D, H, K, F and T, and those that cut a shard of T between blocks."""
        D, H, K, _, F = self.names
        at = self.layout.axes
        sizes = {"D": (self.width, D), "H": (self.heads, H), "K": (self.kv_heads, K), "F": (self.mlp, F)}
        found = {letter: at(*given) for letter, given in sizes.items()}
        found["T"] = at(self.length, "length", self.multiple_of)
        taken = {*self.layout.batch, *found["T"]}
        within = tuple(a for a in at(self.length, "residual", self.multiple_of) if a not in taken)
        return found | {"residual": within}

    def parts(self, letter: str) -> int:
        return self.layout.parts(self.cut[letter])

    @property
    def tokens(self) -> float:
        """Of a row on a device."""
        return self.length / self.parts("T")

    @property
    def bytes(self) -> int:
        """Of a number that is computed with."""
        return ITEMSIZE[self.compute.dtype]

    @cached_property
    def weights(self) -> tuple[float, float]:
        """Numbers in a layer's matrices with all of D on a device: in those of attention and of the feed-forward."""
        at_head = self.heads / self.parts("H") + self.kv_heads / self.parts("K")
        return 2 * self.width * self.head_width * at_head, 3 * self.width * self.mlp / self.parts("F")

    @cached_property
    def implementation(self) -> str:
        c, cut = self.compute, self.parts("T")
        spec = AttentionSpec(self.causal, c.attention, c.attention_block, c.context)
        platform = self.layout.mesh.devices.flat[0].platform
        asked = Asked.of_row(self.length, cut, self.causal, self.head_width, c.dtype)
        return chosen_implementation(spec, platform, asked)

    # ---- costs of a microbatch ----

    def costs(self, rows: int, passes: Passes, assume: Assumptions, learns: bool) -> list[Cost]:
        """Of all layers for `rows` rows of a device; with `learns` their weights have gradients."""
        kind: Kind | None = None if self.causal else "vision"
        made = [
            self._linears(rows, passes, kind or "matmul"),
            self._attention(rows, passes, assume, kind or "attention"),
            self._elementwise(rows, passes, assume, kind or "memory"),
            Cost("weights", "memory", sent=self._weights(passes, learns)),
            Cost("reductions", "memory", sent=self._activations(rows, passes)),
        ]
        label = "" if self.causal else "vision "
        return [replace(c, name=label + c.name).times(self.layers) for c in made]

    def _linears(self, rows: int, passes: Passes, kind: Kind) -> Cost:
        tokens, (attention, feed) = rows * self.tokens, self.weights
        inner = (self.heads / self.parts("H") + self.kv_heads / self.parts("K")) * self.head_width
        mlp = self.mlp / self.parts("F")
        # x of q, k, v and of gate, up is read once each at best; every output is written once.
        moved = (tokens * (4 * self.width + 2 * inner + 3 * mlp) + attention + feed) * self.bytes
        # The last product of a block need not be made again: nothing of the backward pass needs it.
        full = passes.again if self.compute.remat in ALL_PRODUCTS else 0
        counted = passes.forward + 2 * passes.backward
        flops = 2 * tokens * ((attention + feed) * counted + (attention + feed * 2 / 3) * full)
        # A layer is computed again in the same trip that goes back through it.
        trips = passes.forward + passes.backward
        return Cost("layers", kind, flops, moved * (counted + full), trips)

    def _attention(self, rows: int, passes: Passes, assume: Assumptions, kind: Kind) -> Cost:
        chunks = (2 if self.causal else 1) if self.parts("T") > 1 else 1
        heads, kept = self.heads / self.parts("H"), self.compute.remat in ATTENTION_KEPT
        given = Scores(
            rows, heads, self.head_width, self.tokens, self.length, self.span, chunks, self.causal, self.bytes, kept
        )
        found = score_cost(given, self.implementation, self.compute.attention_block, passes, assume)
        sent = self._keys(rows, passes)
        return Cost("attention", kind, found.flops, found.hbm, found.trips, sent, idle=found.idle)

    def _elementwise(self, rows: int, passes: Passes, assume: Assumptions, kind: Kind) -> Cost:
        """Norms (x in, x out), residual sums (two in, one out), rotations, the gate: twice as much backward."""
        rotated = (self.heads / self.parts("H") + self.kv_heads / self.parts("K")) * self.head_width
        numbers = 2 * (2 + 3) * self.width + 2 * rotated + 3 * self.mlp / self.parts("F")
        count = passes.forward + passes.again + 2 * passes.backward
        return Cost("norms and gates", kind, hbm=rows * self.tokens * numbers * self.bytes * count * assume.norm_passes)

    # ---- collectives of a layer ----

    def _weights(self, passes: Passes, learns: bool) -> tuple[Transfer, ...]:
        """Gathered forward and once more backward; gradients scattered, then summed over copies."""
        whole, D = sum(self.weights) * self.bytes, self.cut["D"]
        found = [Transfer("gather", D, whole, passes.forward + passes.backward)]
        if learns and passes.backward:
            found.append(Transfer("scatter", D, whole))
            shared = {*self.layout.batch, *self.cut["T"]}
            copies = tuple(axis for axis in AXES if axis in shared and axis not in D)
            within = tuple(axis for axis in copies if axis != "slice")
            part = whole / self.layout.parts(D)
            found.append(Transfer("reduce", within, part))
            if "slice" in copies:
                found.append(Transfer("reduce", ("slice",), part))
        return tuple(t for t in found if t.axes)

    def _activations(self, rows: int, passes: Passes) -> tuple[Transfer, ...]:
        """Tensor parallelism: a sum after attention and after the feed-forward, and of both inputs' gradients. Where
        the stream between is cut, its tokens are gathered before; what a product read is gathered once more for its
        weight's gradient, and so is the gradient of what it made. Half of the bytes of a sum would do there, but at
        real sizes the TPU's compiler writes whole sums, or passes as many bytes on along the axis."""
        whole = rows * self.tokens * self.width * self.bytes
        full = passes.again if self.compute.remat in ALL_PRODUCTS else 0
        sums = {"H": passes.forward + full + passes.backward, "F": passes.forward + passes.backward}
        read = passes.forward + passes.again + passes.backward
        found: list[Transfer] = []
        for letter, count in sums.items():
            if (cut := self.cut[letter]) and self.cut["residual"] == cut:
                found.append(Transfer("gather", cut, whole, read, waits=True))
            if cut:
                found.append(Transfer("reduce", cut, whole, count, waits=True))
        return tuple(found)

    def _keys(self, rows: int, passes: Passes) -> tuple[Transfer, ...]:
        """Context parallelism: keys and values meet, also when scores are made again; their gradients go back."""
        T = self.cut["T"]
        if not T:
            return ()
        heads = self.kv_heads / self.parts("K")
        whole = 2 * rows * self.length * heads * self.head_width * self.bytes
        if self.compute.context == "ring":
            back = passes.backward * (1 + 4 / self.bytes)  # gradients travel along, in float32
            return (Transfer("pass", T, whole, passes.forward + passes.again + back),)
        back = Transfer("scatter", T, whole, passes.backward, waits=True)
        return Transfer("gather", T, whole, passes.forward + passes.again, waits=True), back


def decoder_of(spec: ModelSpec, length: int, layout: Layout, compute: Compute) -> Tower:
    sizes = (spec.layers, spec.width, spec.mlp_width, spec.heads, spec.kv_heads, spec.head_width)
    return Tower(*sizes, True, decoder.AXES, decoder.ZIGZAG, length, length, layout, compute)


def vision_of(spec: ModelSpec, patches: int, layout: Layout, compute: Compute) -> Tower:
    """Over the pictures in a device's bin, of the largest size: every device has its own, and the tower's weights."""
    v = spec.vision
    assert v is not None
    rules = layout.rules
    layout = Layout(layout.mesh, rules.model_copy(update={"batch": rules.pictures, "length": (), "residual": ()}))
    sizes = (v.layers, v.width, v.mlp_width, v.heads, v.heads, v.head_width)
    return Tower(*sizes, False, vision.AXES, 1, patches, min(patches, largest_picture(v)), layout, compute)

"""The loss head on a mesh: the local functions of `kl.py` and `logprobs.py` in one `jax.shard_map`.

Tokens lie over the batch and length axes, V of the heads over the others that cut it. Before the loop over chunks each
head is gathered over the axes that cut D; the transpose of that is one reduce-scatter of `d_head` after the loop. In
the loop only [B, c] numbers are reduced, over the axes of V. Plain `jit` would gather the heads and reduce `d_head`
once per chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax import Array
from jax.sharding import PartitionSpec as P

from ministral_jax.distributed.placement import Placement, Rules, partition
from ministral_jax.losses import chunked as kl
from ministral_jax.losses.chunked import Metrics
from ministral_jax.losses.logprobs import label_logprobs
from ministral_jax.losses.targets import (
    DEFAULT_CHUNK,
    Dense,
    Hidden,
    LossOptions,
    Sampled,
    Targets,
    TopK,
    check_shapes,
)


@dataclass(frozen=True)
class LossHead:
    """The same arguments, results and errors as in `kl` and `logprobs`, on arrays that lie on `placement`.

    Heads are [D, V], `embed.T` when tied, and lie by the rules for ("embed", "vocab"), the teacher's by
    `teacher_rules` where these differ. Sums and metrics come out whole on every device, gradients where their arrays
    lie. `chunk` counts tokens over the rows of one device. On one device these are those functions.
    """

    placement: Placement
    teacher_rules: Rules | None = None

    def distillation_loss(
        self, hidden: Array, head: Array, targets: Targets, labels: Array, mask: Array, options: LossOptions
    ) -> tuple[Array, Metrics]:
        """See `kl.distillation_loss`."""
        local = lambda *arrays, axis: kl.distillation_loss(*arrays, options=options, vocab_axis=axis)
        return self._mapped(local, True, hidden, head, targets, labels, mask)

    def cross_entropy(
        self, hidden: Array, head: Array, labels: Array, mask: Array, chunk: int = DEFAULT_CHUNK
    ) -> tuple[Array, Metrics]:
        """See `kl.cross_entropy`."""
        local = lambda hidden, head, _, labels, mask, axis: kl.cross_entropy(hidden, head, labels, mask, chunk, axis)
        return self._mapped(local, True, hidden, head, None, labels, mask)

    def evaluate_positions(
        self, hidden: Array, head: Array, targets: Targets | None, labels: Array, chunk: int = DEFAULT_CHUNK
    ) -> dict[str, Array]:
        """See `kl.evaluate_positions`; the readings lie as the labels do."""
        local = lambda *arrays, axis: kl.evaluate_positions(*arrays, chunk=chunk, vocab_axis=axis)
        return self._mapped(local, False, hidden, head, targets, labels)

    def label_logprobs(
        self, hidden: Array, head: Array, labels: Array, temperature: float = 1.0, chunk: int = DEFAULT_CHUNK
    ) -> dict[str, Array]:
        """See `logprobs.label_logprobs`; both results lie as the labels do."""
        local = lambda hidden, head, _, labels, axis: label_logprobs(hidden, head, labels, temperature, chunk, axis)
        return self._mapped(local, False, hidden, head, None, labels)

    def _mapped(self, local: Callable, summed: bool, hidden, head, targets, labels, *mask) -> Any:
        """`local` over the shards, its results summed over them or left where the tokens lie."""
        mesh, rules = self.placement.mesh, self.placement.rules
        if mesh.size == 1:
            return local(hidden, head, targets, labels, *mask, axis=None)
        check_shapes(hidden, head, targets, labels, *mask)
        tokens: Any = partition(labels.shape, ("batch", "length"), rules, mesh)
        over = mesh_axes(*tokens)
        # Where rules cut V over an axis of the tokens, or D over another, the head comes in without that cut.
        vocab = tuple(a for a in mesh_axes(partition(head.shape, ("embed", "vocab"), rules, mesh)[1]) if a not in over)

        def lies(head: Array, rules: Rules) -> Any:
            cut = mesh_axes(partition(head.shape, ("embed", "vocab"), rules, mesh)[0])
            return P(tuple(a for a in cut if a in over), vocab)

        own = lies(head, rules)
        rows: Any = P(*tokens, None)
        dense: Any = P(*tokens, vocab)
        match targets:
            case Hidden():
                theirs: Any = Hidden(rows, lies(targets.head, self.teacher_rules or rules))
            case Dense():
                theirs = Dense(dense)
            case TopK() | Sampled():
                theirs = type(targets)(rows, rows, tokens)
            case None:
                theirs = None

        def inside(hidden, head, targets, labels, *mask):
            head = whole_head(head, own, over)
            if isinstance(targets, Hidden):
                # Cast first, as it gets no gradient: half the bytes to gather.
                targets = Hidden(targets.hidden, whole_head(targets.head.astype(targets.hidden.dtype), theirs.head))
            result = local(hidden, head, targets, labels, *mask, axis=vocab or None)
            return jax.lax.psum(result, over) if summed and over else result

        in_specs = (rows, own, theirs, tokens, *(tokens for _ in mask))
        mapped = jax.shard_map(inside, mesh=mesh, in_specs=in_specs, out_specs=P() if summed else tokens)
        return mapped(hidden, head, targets, labels, *mask)


def mesh_axes(*entries: Any) -> tuple[str, ...]:
    """The mesh axes that entries of a `PartitionSpec` name."""
    return tuple(axis for e in entries for axis in ((e,) if isinstance(e, str) else e or ()))


def whole_head(head: Array, spec: P, over: tuple[str, ...] = ()) -> Array:
    """A head's shard with all of D. It varies over `over` before it is gathered, so that its gradient is scattered
    before it is summed over the axes that hold copies."""
    cut = mesh_axes(spec[0])
    copies = tuple(axis for axis in over if axis not in cut)
    head = jax.lax.pcast(head, copies, to="varying") if copies else head
    return jax.lax.all_gather(head, cut, axis=0, tiled=True) if cut else head

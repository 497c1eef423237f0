"""The loss head on a mesh: the functions of `chunked.py` and `logprobs.py` in one `jax.shard_map`.

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
from jaxtyping import Float, Shaped

from ministral_jax.distributed.placement import Placement, Rules, partition
from ministral_jax.losses.chunked import Inputs, cross_entropy, distillation_loss, evaluate_positions
from ministral_jax.losses.divergences import Axis
from ministral_jax.losses.logprobs import label_logprobs
from ministral_jax.losses.targets import (
    DEFAULT_CHUNK,
    Dense,
    Head,
    Hidden,
    Labels,
    LossOptions,
    Metrics,
    PerToken,
    States,
    Targets,
    check_shapes,
)


@dataclass(frozen=True)
class LossHead:
    """The same arguments, results and errors as in `chunked` and `logprobs`, on arrays that lie on `placement`.

    Heads are [D, V], `embed.T` when tied, and lie by the rules for ("embed", "vocab"), the teacher's by
    `teacher_rules` where these differ. Sums and metrics come out whole on every device, gradients where their arrays
    lie. `chunk` counts tokens over the rows of one device. On one device these are those functions.
    """

    placement: Placement
    teacher_rules: Rules | None = None

    def distillation_loss(
        self, hidden: States, head: Head, targets: Targets, labels: Labels, mask: PerToken, options: LossOptions
    ) -> tuple[Array, Metrics]:
        """See `chunked.distillation_loss`."""
        local = lambda x, axis: distillation_loss(*x, options=options, vocab_axis=axis)
        return self._mapped(local, True, Inputs(hidden, head, targets, labels, mask))

    def cross_entropy(
        self, hidden: States, head: Head, labels: Labels, mask: PerToken, chunk: int = DEFAULT_CHUNK
    ) -> tuple[Array, Metrics]:
        """See `chunked.cross_entropy`."""
        local = lambda x, axis: cross_entropy(x.hidden, x.head, x.labels, x.mask, chunk, axis)
        return self._mapped(local, True, Inputs(hidden, head, None, labels, mask))

    def evaluate_positions(
        self, hidden: States, head: Head, targets: Targets | None, labels: Labels, chunk: int = DEFAULT_CHUNK
    ) -> dict[str, Shaped[Array, "B T"]]:
        """See `chunked.evaluate_positions`; the readings lie as the labels do."""
        local = lambda x, axis: evaluate_positions(x.hidden, x.head, x.targets, x.labels, chunk, axis)
        return self._mapped(local, False, Inputs(hidden, head, targets, labels, None))

    def label_logprobs(
        self, hidden: States, head: Head, labels: Labels, temperature: float = 1.0, chunk: int = DEFAULT_CHUNK
    ) -> dict[str, PerToken]:
        """See `logprobs.label_logprobs`; both results lie as the labels do."""
        local = lambda x, axis: label_logprobs(x.hidden, x.head, x.labels, temperature, chunk, axis)
        return self._mapped(local, False, Inputs(hidden, head, None, labels, None))

    def _mapped(self, local: Callable[[Inputs, Axis], Any], summed: bool, inputs: Inputs) -> Any:
        """`local` over the shards, its results summed over them or left where the tokens lie."""
        mesh, rules = self.placement.mesh, self.placement.rules
        if mesh.size == 1:
            return local(inputs, None)
        check_shapes(*inputs)
        tokens: Any = partition(inputs.labels.shape, ("batch", "length"), rules, mesh)
        over = mesh_axes(*tokens)
        # Where rules cut V over an axis of the tokens, or D over another, the head comes in without that cut.
        vocab = tuple(
            a for a in mesh_axes(partition(inputs.head.shape, ("embed", "vocab"), rules, mesh)[1]) if a not in over
        )

        def lies(head: Array, rules: Rules) -> Any:
            cut = mesh_axes(partition(head.shape, ("embed", "vocab"), rules, mesh)[0])
            return P(tuple(a for a in cut if a in over), vocab)

        # Any: the trees of specs have the types of the trees of arrays
        rows: Any = P(*tokens, None)
        dense: Any = P(*tokens, vocab)
        own = lies(inputs.head, rules)
        theirs: Any = None
        if isinstance(inputs.targets, Hidden):
            theirs = Hidden(rows, lies(inputs.targets.head, self.teacher_rules or rules))
        elif isinstance(inputs.targets, Dense):
            theirs = Dense(dense)
        elif inputs.targets is not None:
            theirs = type(inputs.targets)(rows, rows, tokens)

        def inside(shard: Inputs) -> Any:
            shard = shard._replace(head=whole_head(shard.head, own, over))
            if isinstance(targets := shard.targets, Hidden):
                # Cast first, as it gets no gradient: half the bytes to gather.
                head = whole_head(targets.head.astype(targets.hidden.dtype), theirs.head)
                shard = shard._replace(targets=Hidden(targets.hidden, head))
            result = local(shard, vocab or None)
            return jax.lax.psum(result, over) if summed and over else result

        lie: Any = Inputs(rows, own, theirs, tokens, None if inputs.mask is None else tokens)
        mapped = jax.shard_map(inside, mesh=mesh, in_specs=(lie,), out_specs=P() if summed else tokens)
        return mapped(inputs)


def mesh_axes(*entries: Any) -> tuple[str, ...]:
    """The mesh axes that entries of a `PartitionSpec` name."""
    return tuple(axis for e in entries for axis in ((e,) if isinstance(e, str) else e or ()))


def whole_head(head: Float[Array, "D/n V/m"], spec: P, over: tuple[str, ...] = ()) -> Float[Array, "D V/m"]:
    """A head's shard with all of D. It varies over `over` before it is gathered, so that its gradient is scattered
    before it is summed over the axes that hold copies."""
    cut = mesh_axes(spec[0])
    copies = tuple(axis for axis in over if axis not in cut)
    head = jax.lax.pcast(head, copies, to="varying") if copies else head
    return jax.lax.all_gather(head, cut, axis=0, tiled=True) if cut else head

"""The training state, a plain pytree, and the one update that every objective shares."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import NamedSharding, PartitionSpec

from ministral_jax.distributed.placement import like_params, with_shardings
from ministral_jax.lazy import Lazy

if TYPE_CHECKING:
    import optax
else:
    optax = Lazy("optax")

Tree = Any
State = dict[str, Any]
Metrics = dict[str, tuple[jax.Array, jax.Array]]
LossFn = Callable[[Tree, Tree, Tree], tuple[jax.Array, Metrics]]
"""(trainable, frozen, batch) -> (loss summed over counted positions, metrics as (sum, count), `loss` among them)."""


def init_state(params: Tree, optimizer: optax.GradientTransformation) -> State:
    """State before the first update, placed like one that came out of an update, so that the step compiles once:
    moments lie where their parameters do."""
    shardings = state_shardings(params, optimizer)
    fresh = jax.jit(
        lambda params: (optimizer.init(params), jnp.zeros((), jnp.int32)),
        out_shardings=(shardings["optimizer"], shardings["step"]),
    )
    placed = jax.device_put(params, shardings["params"])
    moments, step = fresh(placed)
    return {"params": placed, "optimizer": moments, "step": step}


def state_shardings(params: Tree, optimizer: optax.GradientTransformation) -> State:
    """Where a state lies, by where its parameters (arrays, or shapes with shardings) do."""
    placed = jax.tree.map(lambda p: p.sharding, params)
    one = jax.tree.leaves(placed)[0]
    whole = NamedSharding(one.mesh, PartitionSpec()) if isinstance(one, NamedSharding) else one
    moments = jax.eval_shape(optimizer.init, params)
    return {"params": placed, "optimizer": like_params(moments, params, placed, whole), "step": whole}


def abstract_state(params: Tree, optimizer: optax.GradientTransformation) -> State:
    """Shapes of a state and where they lie; nothing is allocated."""
    shapes = {
        "params": jax.eval_shape(lambda: params),
        "optimizer": jax.eval_shape(optimizer.init, params),
        "step": jax.ShapeDtypeStruct((), jnp.int32),
    }
    return with_shardings(shapes, state_shardings(params, optimizer))


def make_step(
    loss: LossFn,
    optimizer: optax.GradientTransformation,
    rate: optax.Schedule,
    microbatches: int = 1,
    shardings: State | None = None,
) -> Callable[[State, Tree, Tree], tuple[State, Metrics]]:
    """One update, compiled, its state donated: the gradient of sum / count over the whole global batch.

    Sums and counts are added over microbatches before the division, so splitting a batch changes nothing but rounding.
    `shardings`: see `state_shardings`; the state is left where it was.
    """

    def gradient(params: Tree, frozen: Tree, batch: Tree) -> tuple[Tree, Metrics]:
        (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params, frozen, batch)
        return grads, metrics

    def accumulated(params: Tree, frozen: Tree, batch: Tree) -> tuple[Tree, Metrics]:
        if microbatches == 1:
            return gradient(params, frozen, batch)
        # Each microbatch takes rows from every device: reading the batch in order would move rows between devices.
        split = jax.tree.map(lambda x: rearrange(x, "(b m) ... -> m b ...", m=microbatches), batch)
        shapes = jax.eval_shape(gradient, params, frozen, jax.tree.map(lambda x: x[0], split))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

        def add(total: Tree, part: Tree) -> tuple[Tree, None]:
            found = gradient(params, frozen, part)
            with jax.named_scope("gradient_sums"):
                return jax.tree.map(jnp.add, total, found), None

        return jax.lax.scan(add, zeros, split)[0]

    def step(state: State, frozen: Tree, batch: Tree) -> tuple[State, Metrics]:
        grads, metrics = accumulated(state["params"], frozen, batch)
        count = jnp.maximum(metrics["loss"][1], 1)
        grads = jax.tree.map(lambda g: g / count.astype(g.dtype), grads)
        with jax.named_scope("optimizer"):
            updates, moments = optimizer.update(grads, state["optimizer"], state["params"])
            params = optax.apply_updates(state["params"], updates)
            told = {"gradient_norm": optax.tree.norm(grads), "learning_rate": rate(state["step"])}
        metrics |= {name: (jnp.asarray(value), jnp.ones(())) for name, value in told.items()}
        return {"params": params, "optimizer": moments, "step": state["step"] + 1}, metrics

    if shardings is None:
        return jax.jit(step, donate_argnums=0)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, shardings["step"]))


def split_frozen(params: dict[str, Tree], frozen: tuple[str, ...]) -> tuple[dict[str, Tree], dict[str, Tree]]:
    """(trainable, frozen) by top-level key. What is frozen is never differentiated and has no optimiser state."""
    return (
        {key: tree for key, tree in params.items() if key not in frozen},
        {key: tree for key, tree in params.items() if key in frozen},
    )

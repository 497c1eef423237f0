"""The training state, a plain pytree, and the one update that every objective shares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

Tree = Any
State = dict[str, Any]
Metrics = dict[str, tuple[jax.Array, jax.Array]]
LossFn = Callable[[Tree, Tree, Tree], tuple[jax.Array, Metrics]]
"""(trainable, frozen, batch) -> (loss summed over counted positions, metrics as (sum, count), `loss` among them)."""


def init_state(params: Tree, optimizer: optax.GradientTransformation) -> State:
    """State before the first update, placed like one that came out of an update, so that the step compiles once."""
    moments = jax.jit(optimizer.init)(params)
    state = {"params": params, "optimizer": moments, "step": jnp.zeros((), jnp.int32)}
    return jax.device_put(state, jax.devices()[0])


def make_step(
    loss: LossFn, optimizer: optax.GradientTransformation, rate: optax.Schedule, microbatches: int = 1
) -> Callable[[State, Tree, Tree], tuple[State, Metrics]]:
    """One update, compiled, its state donated: the gradient of sum / count over the whole global batch.

    Sums and counts are added over microbatches before the division, so splitting a batch changes nothing but rounding.
    """

    def gradient(params: Tree, frozen: Tree, batch: Tree) -> tuple[Tree, Metrics]:
        (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params, frozen, batch)
        return grads, metrics

    def accumulated(params: Tree, frozen: Tree, batch: Tree) -> tuple[Tree, Metrics]:
        if microbatches == 1:
            return gradient(params, frozen, batch)
        split = jax.tree.map(lambda x: x.reshape(microbatches, -1, *x.shape[1:]), batch)
        shapes = jax.eval_shape(gradient, params, frozen, jax.tree.map(lambda x: x[0], split))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        add = lambda total, part: (jax.tree.map(jnp.add, total, gradient(params, frozen, part)), None)
        return jax.lax.scan(add, zeros, split)[0]

    def step(state: State, frozen: Tree, batch: Tree) -> tuple[State, Metrics]:
        grads, metrics = accumulated(state["params"], frozen, batch)
        count = jnp.maximum(metrics["loss"][1], 1)
        grads = jax.tree.map(lambda g: g / count.astype(g.dtype), grads)
        updates, moments = optimizer.update(grads, state["optimizer"], state["params"])
        one = jnp.ones(())
        metrics = metrics | {
            "gradient_norm": (optax.tree.norm(grads), one),
            "learning_rate": (rate(state["step"]), one),
        }
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "optimizer": moments, "step": state["step"] + 1}, metrics

    return jax.jit(step, donate_argnums=0)


def split_frozen(params: dict[str, Tree], frozen: tuple[str, ...]) -> tuple[dict[str, Tree], dict[str, Tree]]:
    """(trainable, frozen) by top-level key. What is frozen is never differentiated and has no optimiser state."""
    return (
        {key: tree for key, tree in params.items() if key not in frozen},
        {key: tree for key, tree in params.items() if key in frozen},
    )

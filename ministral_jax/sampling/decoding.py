"""The sampler's programs: the distribution a token is drawn from, and a chunk of steps in one loop on the devices."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from pydantic import Field

from ministral_jax.distributed.axes import constrain
from ministral_jax.distributed.placement import Placement
from ministral_jax.models.cache import Cache, fork, grow
from ministral_jax.models.spec import ModelSpec
from ministral_jax.models.vlm import IMAGE_KEYS, VLM, Compute
from ministral_jax.settings import Frozen

Params = dict[str, Any]


class Choice(Frozen):
    """What of a model's distribution is drawn from: see `processed`."""

    temperature: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """0 takes the most probable token, always."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    """0 for all."""
    vocab: int | None = None
    """Of the tokenizer: a model may have more ids, and none from here on is drawn."""


class Rows(NamedTuple):
    """What the host knows of each row [R]: tokens of its prompt, position at which it must end, whether it has
    stopped, and what its random numbers depend on. int32, `seeds` uint32."""

    lengths: Any
    ends: Any
    done: Any
    seeds: Any
    samples: Any


class Programs(NamedTuple):
    """Compiled for each shape they meet."""

    start: Callable[[Params, dict[str, Array], Array], tuple[Array, Cache]]
    fork: Callable[[Array, Cache, Any, int], tuple[Array, Cache]]
    grow: Callable[[Cache, int], Cache]
    chunk: Callable[..., tuple[dict[str, Array], Array, Cache]]


def processed(logits: Array, choice: Choice) -> Array:
    """Log-probabilities [B, V] of what is drawn from, -inf for what is not, in this order, as `transformers` has it.

    Temperature divides the logits. `top_k` keeps the k most probable tokens. `top_p` keeps, of what is left and
    normalised again, the most probable tokens up to the one with which their sum reaches p (nucleus sampling,
    arXiv 1904.09751, equation 2). Tokens as probable as the last one kept are kept too.
    """
    logits = logits / choice.temperature
    vocab = logits.shape[-1]
    k = min(choice.top_k or vocab, vocab)
    if k < vocab or choice.top_p < 1:
        top = lax.top_k(logits, k)[0]
        count = jnp.full(logits.shape[:-1], k)
        if choice.top_p < 1:
            p = jax.nn.softmax(top)
            count = jnp.sum(jnp.cumsum(p, axis=-1) - p < choice.top_p, axis=-1)
        last = jnp.take_along_axis(top, count[:, None] - 1, axis=-1)
        logits = jnp.where(logits >= last, logits, -jnp.inf)
    return jax.nn.log_softmax(logits)


def draw(logits: Array, rows: Rows, positions: Array, choice: Choice) -> tuple[Array, Array]:
    """Tokens [B] and their log-probabilities [B] under `processed`.

    The random numbers of a token are keyed by its row's seed, sample and position alone, and made for the whole
    vocabulary whatever is kept of it (Gumbel-max).
    """
    if choice.vocab is not None and choice.vocab < logits.shape[-1]:
        logits = jnp.where(jnp.arange(logits.shape[-1]) < choice.vocab, logits, -jnp.inf)
    if choice.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), jnp.zeros(len(logits), logits.dtype)

    def noise(seed: Array, sample: Array, position: Array) -> Array:
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), sample)
        return jax.random.gumbel(jax.random.fold_in(key, position), logits.shape[-1:], logits.dtype)

    logprobs = processed(logits, choice)
    tokens = jnp.argmax(logprobs + jax.vmap(noise)(rows.seeds, rows.samples, positions), axis=-1)
    return tokens.astype(jnp.int32), _picked(logprobs, tokens)


def _picked(x: Array, tokens: Array) -> Array:
    return jnp.take_along_axis(x, tokens[:, None], axis=-1)[:, 0]


def _compile(
    spec: ModelSpec, compute: Compute, placement: Placement, choice: Choice, stop_ids: tuple[int, ...], chunk: int
) -> Programs:
    apply: Any = VLM(spec, compute).apply

    def start(params: Params, batch: dict[str, Array], lengths: Array) -> tuple[Array, Cache]:
        """Final states of the prompts' last tokens [N, D], and their cache."""
        images = {key: batch[key] for key in IMAGE_KEYS if key in batch} or None
        states, cache = apply({"params": params}, batch["tokens"], batch["segments"], images, method="prefill")
        return jnp.take_along_axis(states, lengths[:, None, None] - 1, axis=1)[:, 0], cache

    def forked(hidden: Array, cache: Cache, parents: Array, slots: int) -> tuple[Array, Cache]:
        """Final states and cache of the rows that go on, by their prompts' places on the devices that they share."""
        cache = fork({**cache, "hidden": hidden}, parents)
        return cache.pop("hidden"), grow(cache, slots)

    def steps(params: Params, hidden: Array, cache: Cache, rows: Rows, slot: Array, first: Array, count: Array):
        """Up to `count` tokens more of every row, of which `first` are there: the next goes into slot `slot` of the
        cache. Returns {"tokens" [R, chunk], -1 after a row's last, "logprobs", "processed_logprobs"}, states, cache."""
        rows = Rows(*(constrain(jnp.asarray(x), ("batch",)) for x in rows))
        empty = jnp.zeros((len(hidden), chunk), jnp.promote_types(hidden.dtype, jnp.float32))
        out = {"tokens": jnp.full(empty.shape, -1, jnp.int32), "logprobs": empty, "processed_logprobs": empty}

        def going(carry) -> Array:
            i, done, *_ = carry
            return (i < count) & ~jnp.all(done)

        def step(carry):
            i, done, hidden, cache, out = carry
            positions = rows.lengths + first + i
            logits = apply({"params": params}, hidden, method="next_logits")
            with jax.named_scope("draw"):
                logits = constrain(logits, ("batch", None))
                tokens, logprobs = draw(logits, rows, positions, choice)
                new = {
                    "tokens": jnp.where(done, -1, tokens),
                    "logprobs": _picked(jax.nn.log_softmax(logits), tokens),
                    "processed_logprobs": logprobs,
                }
                out = {name: lax.dynamic_update_slice(out[name], x[:, None], (0, i)) for name, x in new.items()}
            done |= jnp.isin(tokens, jnp.array(stop_ids, jnp.int32)) | (positions + 1 >= rows.ends)
            column = tokens[:, None]
            states, cache = apply(
                {"params": params},
                column,
                positions[:, None],
                jnp.ones_like(column),
                cache,
                slot + i,
                method="extend",
            )
            return i + 1, done, states[:, 0], cache, out

        begun = (jnp.zeros((), jnp.int32), rows.done, hidden, cache, out)
        _, _, hidden, cache, out = lax.while_loop(going, step, begun)
        return out, hidden, cache

    scoped = placement.rules.scoped
    return Programs(
        jax.jit(scoped(start)),
        jax.jit(scoped(forked), static_argnums=3),
        jax.jit(scoped(grow), static_argnums=1),
        jax.jit(scoped(steps), donate_argnums=(1, 2), out_shardings=(placement.replicated, None, None)),
    )


# Once for all calls of a process with the same settings. Any: a type checker takes frozen models for unhashable.
programs: Any = cache(_compile)

"""AdamW and its learning rate; the path of a leaf tells whether it is a matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import jax
from pydantic import Field

from ministral_jax.lazy import Lazy
from ministral_jax.settings import Frozen

if TYPE_CHECKING:
    import optax
else:
    optax = Lazy("optax")

Params = dict[str, Any]


class OptimizerConfig(Frozen):
    """AdamW, with the learning rate as a function of the step."""

    lr: float = Field(default=3e-4, gt=0)
    warmup: int = Field(default=20, ge=0)
    """Steps of linear warm-up from 0."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    final_fraction: float = Field(default=0.1, ge=0, le=1)
    """The last step's learning rate as a share of `lr`; `wsd` decays linearly over the last fifth of the steps."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    weight_decay: float = Field(default=0.1, ge=0)
    """Applied to matrices only, never to norm gains."""
    clip: float = Field(default=1.0, gt=0)
    """Global gradient norm above which the gradient is scaled down."""


def decay_begins(config: OptimizerConfig, steps: int) -> int | None:
    """Updates before the learning rate depends on how many there are in all; None where it does from the start."""
    if config.schedule == "cosine":
        return None
    return steps if config.schedule == "constant" else steps - max((steps - min(config.warmup, steps)) // 5, 1)


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate of update n (from 0): linear warm-up, then down to `final_fraction * lr` at `steps`."""
    warmup = min(config.warmup, steps)
    rest, final = max(steps - warmup, 1), config.lr * config.final_fraction
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(config.lr, rest, config.final_fraction)
    elif config.schedule == "wsd":
        begins = decay_begins(config, steps) or 0
        stable, decay = optax.constant_schedule(config.lr), optax.linear_schedule(config.lr, final, steps - begins)
        after = optax.join_schedules([stable, decay], [max(begins - warmup, 0)])
    else:
        after = optax.constant_schedule(config.lr)
    # the first update already moves the weights: (n + 1) / warmup, not n / warmup
    rise = optax.linear_schedule(config.lr / max(warmup, 1), config.lr, max(warmup - 1, 1))
    return optax.join_schedules([rise, after], [warmup])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW; weight decay on matrices only."""
    rate = learning_rate(config, steps)
    adamw = optax.adamw(rate, b1=config.beta1, b2=config.beta2, weight_decay=config.weight_decay, mask=_is_matrix)
    return optax.chain(optax.clip_by_global_norm(config.clip), adamw)


def _is_matrix(params: Params) -> Params:
    return jax.tree_util.tree_map_with_path(lambda path, _: not path[-1].key.endswith("norm"), params)

"""AdamW and its learning rate; the path of a leaf tells whether it is a matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
from pydantic import Field, model_validator

from ministral_jax.lazy import Lazy
from ministral_jax.settings import Frozen

if TYPE_CHECKING:
    import optax
else:
    optax = Lazy("optax")

Params = dict[str, Any]
COARSE_BETA2 = 0.99
"""The largest with moments in bfloat16: of a second moment only changes of 1/512 count, so it follows squared gradients
to within 1/512/(1 - beta2) of themselves, here a fifth."""


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
    moments: Literal["float32", "bfloat16"] = "float32"
    """In which both moments are kept between updates, which compute in float32: 8 or 4 bytes for each parameter."""

    @model_validator(mode="after")
    def _moments_move(self) -> OptimizerConfig:
        if self.moments == "bfloat16" and self.beta2 > COARSE_BETA2:
            raise ValueError(
                f"beta2 = {self.beta2} lets the second moment change by less than bfloat16 can hold; with moments: "
                f"bfloat16 it is at most {COARSE_BETA2}"
            )
        return self


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
    kept = adamw if config.moments == "float32" else _kept_in(jnp.bfloat16, adamw)
    return optax.chain(optax.clip_by_global_norm(config.clip), kept)


def _kept_in(dtype: Any, optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """`optimizer`, whose numbers lie in `dtype` between updates; it computes in float32. optax's own `mu_dtype` narrows
    the first moment alone."""

    def cast(state: Any, to: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(to) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = optimizer.update(updates, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(lambda params: cast(optimizer.init(params), dtype), update)


def _is_matrix(params: Params) -> Params:
    return jax.tree_util.tree_map_with_path(lambda path, _: not path[-1].key.endswith("norm"), params)

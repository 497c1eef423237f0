"""What dividing the preference loss by beta changes under the optimiser that is used: what is clipped, and no more."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ministral_jax.losses.preference import PreferenceOptions, preference_loss
from ministral_jax.training.optimizer import OptimizerConfig, make_optimizer

STEPS, PAIRS, SIZE = 12, 8, 40
LR, NEVER = 0.02, 1e9
EPSILON = LR * STEPS * 1e-5
"""Adam adds 1e-8 to what it divides by, the root of a gradient's mean square, which is over 1e-3 here."""


def trained(beta: float, rescale: bool, clip: float) -> tuple[np.ndarray, list[float]]:
    """What some updates change of a policy whose log-probabilities are linear in it, and the gradients' norms."""
    rng = np.random.default_rng(0)
    options = PreferenceOptions(beta=beta, rescale_beta=rescale)
    optimizer = make_optimizer(OptimizerConfig(lr=LR, warmup=2, clip=clip), STEPS)
    params = {"weight": jnp.asarray(rng.normal(size=SIZE))}
    start, state, norms = params["weight"], optimizer.init(params), []
    for step in range(STEPS):
        # as tokens in answers differ, so do the sizes of gradients from step to step
        a, b = rng.normal(size=(2, PAIRS, SIZE)) * np.exp(0.8 * rng.normal()) / (1 + step / 4)
        p, ones = rng.random(PAIRS), np.ones(PAIRS)

        def loss(params, a=a, b=b, p=p, ones=ones):
            total, _ = preference_loss(
                (a @ params["weight"], b @ params["weight"]), (a @ start, b @ start), p, ones, options
            )
            return total / PAIRS

        gradient = jax.grad(loss)(params)
        norms.append(float(optax.global_norm(gradient)))
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return np.asarray(params["weight"] - start), norms  # type: ignore[index]


def test_under_adam_a_constant_factor_of_the_loss_changes_only_what_is_clipped(x64):
    beta = 0.1
    plain, small = trained(beta, False, NEVER)
    scaled, large = trained(beta, True, NEVER)
    np.testing.assert_allclose(large[0], small[0] / beta, rtol=1e-12)
    same = lambda one, other: np.testing.assert_allclose(one, other, rtol=0, atol=EPSILON)
    same(scaled, plain)

    clip = float(np.median(large))  # half of the steps are above
    clipped, _ = trained(beta, True, clip)
    same(clipped, trained(beta, False, clip * beta)[0])
    np.testing.assert_allclose(trained(beta, False, clip)[0], plain, rtol=1e-12)  # none is
    assert np.linalg.norm(clipped - plain) > 0.1 * np.linalg.norm(plain)


def test_rescaled_what_is_clipped_does_not_depend_on_beta(x64):
    """Of the first gradient, where policy and reference agree."""
    rescaled, plain = ([trained(beta, rescale, NEVER)[1][0] for beta in (0.01, 0.1, 1.0)] for rescale in (True, False))
    np.testing.assert_allclose(rescaled, rescaled[0], rtol=1e-12)
    np.testing.assert_allclose(plain, np.array([0.01, 0.1, 1.0]) * rescaled[0], rtol=1e-12)

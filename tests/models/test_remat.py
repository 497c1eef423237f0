"""What every block keeps for its backward pass, by `Compute.remat`: the traced program says it, nothing is compiled."""

import math

import jax
import jax.numpy as jnp
import pytest

from ministral_jax.errors import UserError
from ministral_jax.models.block import check_remat
from ministral_jax.models.spec import ModelSpec
from ministral_jax.models.vlm import VLM, Compute, abstract_params

SPEC = ModelSpec(layers=3, width=32, mlp_width=40, heads=4, kv_heads=2, head_width=8, vocab=64, context=64)
B, T = 2, 32
INPUT, MIXED, LSE = SPEC.width, SPEC.heads * SPEC.head_width, SPEC.heads
PRODUCTS = MIXED + 2 * SPEC.kv_heads * SPEC.head_width + SPEC.width + 2 * SPEC.mlp_width


def kept(remat: str) -> tuple[int, set[str]]:
    """Numbers of a token and a layer that leave the forward loop over layers, and the memories in which they wait."""
    model = VLM(SPEC, Compute(remat=remat, attention="blockwise", attention_block=16))
    loss = lambda params, tokens: jnp.sum(model.apply({"params": params}, tokens, method="hidden"))
    program = jax.make_jaxpr(jax.grad(loss))(abstract_params(SPEC), jax.ShapeDtypeStruct((B, T), jnp.int32))
    forward = next(eqn for eqn in program.eqns if eqn.primitive.name == "scan")
    stacked = [v.aval for v in forward.outvars[forward.params["num_carry"] :] if v.aval.size >= SPEC.layers * B * T]
    size = sum(math.prod(aval.shape) for aval in stacked)
    assert size % (SPEC.layers * B * T) == 0
    return size // (SPEC.layers * B * T), {aval.memory_space.name for aval in stacked}


@pytest.mark.parametrize(
    ("remat", "numbers", "memory"),
    [
        ("full", INPUT, "Device"),
        ("attention", INPUT + MIXED + LSE, "Device"),
        ("offload", INPUT + MIXED + LSE, "Host"),
        ("none", INPUT + MIXED + LSE + PRODUCTS, "Device"),
    ],
)
def test_a_block_keeps_what_its_name_says(remat, numbers, memory):
    assert kept(remat) == (numbers, {memory})


def test_a_cpu_has_no_second_memory():
    said = r"stages\.a\.compute\.remat = offload needs a TPU or GPU, .* on a CPU, attention keeps as much"
    with pytest.raises(UserError, match=said):
        check_remat("offload", "cpu", "stages.a")
    check_remat("offload", "tpu", "stages.a")
    check_remat("attention", "cpu", "stages.a")

"""The residual stream between the products that `tensor` cuts: where it lies, and what is kept of it."""

import re

import jax
import jax.numpy as jnp
from hlo import collectives
from mesh_cases import placement

from ministral_jax.distributed.placement import Placement, Rules
from ministral_jax.models.spec import ModelSpec
from ministral_jax.models.vlm import VLM, Compute, param_shardings, placed_params

SPEC = ModelSpec(layers=6, width=32, mlp_width=64, heads=8, kv_heads=4, head_width=8, vocab=64, context=128)
COMPUTE = Compute(attention_block=16, remat="full")
B, T = 2, 64
STREAM = B * T * SPEC.width


def program(place: Placement) -> str:
    """Of the gradient of hidden states, compiled."""

    def loss(params, tokens):
        return jnp.sum(VLM(SPEC, COMPUTE).apply({"params": params}, tokens, method="hidden"))

    tokens = jax.ShapeDtypeStruct((B, T), jnp.int32, sharding=place.batch_sharding("tokens", 2))
    function = jax.jit(jax.grad(place.rules.scoped(loss)), out_shardings=param_shardings(SPEC, place))
    with jax.set_mesh(place.mesh):
        return function.lower(placed_params(SPEC, place), tokens).compile().as_text()


def test_what_is_kept_of_every_block_is_cut_over_tensor():
    """Whole over it where the rules say so."""
    mesh = placement(tensor=4, context=2).mesh
    for rules, tokens in ((Rules(residual=("context",)), T // 2), (Rules(), T // 2 // 4)):
        kept = re.findall(rf"f32\[{SPEC.layers},{B},(\d+),{SPEC.width}\]", program(Placement(mesh, rules)))
        assert set(kept) == {str(tokens)}


def test_layers_gather_what_products_read():
    """XLA for CPUs writes a reduce-scatter as an all-reduce and a slice; for TPUs see the tests of `plan --compile`."""
    found = [c.op for c in collectives(program(placement(tensor=8))) if c.in_loop and c.size == STREAM]
    # forward; what is computed again, and the gradients of what attention and the feed-forward made
    assert found.count("all-gather") == 2 + 4
    # forward; again but for the last product; gradients of what they read, before those of q, k and v are one
    assert found.count("all-reduce") <= 2 + 1 + 5

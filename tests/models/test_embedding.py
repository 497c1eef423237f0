"""The embedding's rows, and the sum of a frequent token's gradients against float64 NumPy."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from mesh_cases import placement
from model_cases import TEXT, random_params

from ministral_jax.models.vlm import VLM, Compute, param_shardings

# A float32 addition rounds by at most 2**-24 of the sum so far; thousands of them, of both signs, add up like a random
# walk and stay below 2**-24 of the sum of magnitudes.
ROUNDING = 2.0**-24
OFTEN = 6000


def rows(params, tokens, dtype):
    return VLM(TEXT, Compute(dtype=dtype)).apply(
        {"params": params}, tokens, method=lambda model, tokens: model.decoder.embed_tokens(tokens)
    )


def frequent() -> tuple[np.ndarray, np.ndarray]:
    """Tokens `[8, 1024]`, most of them one token, and gradients of their rows, exact in bfloat16."""
    random = np.random.default_rng(0)
    tokens = random.integers(0, TEXT.vocab, 8 * 1024).astype(np.int32)
    tokens[random.permutation(len(tokens))[:OFTEN]] = 3
    d_rows = (0.1 + random.standard_normal((len(tokens), TEXT.width))).astype(ml_dtypes.bfloat16)
    return tokens.reshape(8, 1024), d_rows.reshape(8, 1024, TEXT.width)


@pytest.mark.parametrize(
    "mesh", [None, {"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "context": 2}], ids=str
)
def test_a_frequent_tokens_gradients_are_added_in_float32(mesh):
    tokens, d_rows = frequent()
    params = random_params(TEXT)
    pull = jax.jit(lambda params, tokens, d: jax.vjp(lambda p: rows(p, tokens, "bfloat16"), params)[1](d)[0])
    if mesh is None:
        d_params = pull(params, tokens, d_rows)
    else:
        place = placement(**mesh)
        with jax.set_mesh(place.mesh):
            placed = jax.device_put(params, param_shardings(TEXT, place))
            batch = place.place({"tokens": tokens, "d_rows": d_rows}, len(tokens))
            d_params = place.rules.scoped(pull)(placed, batch["tokens"], batch["d_rows"])
    found = d_params["decoder"]["embed"]
    exact = np.zeros(found.shape)
    np.add.at(exact, tokens.reshape(-1), d_rows.reshape(-1, TEXT.width).astype(np.float64))
    assert found.dtype == jnp.float32
    size = np.abs(d_rows.astype(np.float64)).sum((0, 1)).max()
    np.testing.assert_allclose(np.asarray(found), exact, rtol=0, atol=ROUNDING * size)


def test_rows_and_their_gradient_in_float32_are_those_of_indexing_to_the_last_bit():
    tokens, d_rows = frequent()
    params, wide = random_params(TEXT), d_rows.astype(np.float32)
    table = params["decoder"]["embed"]
    ours, pull = jax.vjp(lambda p: rows(p, tokens, "float32"), params)
    theirs, pull_theirs = jax.vjp(lambda table: table[tokens], table)
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(pull(wide)[0]["decoder"]["embed"], pull_theirs(wide)[0])


def test_rows_come_in_the_dtype_that_is_computed_in():
    tokens, _ = frequent()
    params = random_params(TEXT)
    found = rows(params, tokens, "bfloat16")
    np.testing.assert_array_equal(found, np.asarray(params["decoder"]["embed"]).astype(ml_dtypes.bfloat16)[tokens])

"""Linear layers in FP8: what is rounded, how far, and what training makes of it."""

import importlib.util
import re

import fp8_loss
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import vlm

from ministral_jax.errors import UserError
from ministral_jax.models.quantized import check_fp8, fp8_exported_linear, fp8_linear, fp8_scale
from ministral_jax.models.vlm import VLM, Compute, abstract_params

SPEC = vlm()

FP8 = Compute(dtype="bfloat16", matmul="fp8")


def products(program: str) -> list[tuple[str, str]]:
    """The element types that each product of a lowered program multiplies."""
    pair = re.compile(r"dot_general.*: \(tensor<(?:\d+x)*(\w+)>, tensor<(?:\d+x)*(\w+)>\)")
    return [found.groups() for line in program.splitlines() if (found := pair.search(line))]


def test_the_decoders_linear_layers_and_nothing_else_multiply_numbers_of_eight_bits():
    def total(params, tokens, images):
        return VLM(SPEC, FP8).apply({"params": params}, tokens, images=images).sum()

    tokens, grid = jax.ShapeDtypeStruct((1, 8), jnp.int32), jax.ShapeDtypeStruct((1, 1, 4), jnp.int32)
    patches = jax.ShapeDtypeStruct((1, 1, 4, SPEC.vision.patch_width), jnp.float32)
    images = dict(patches=patches, patch_image=grid, patch_row=grid, patch_col=grid, image_slot=tokens)
    program = jax.jit(jax.grad(total)).lower(abstract_params(SPEC), tokens, images).as_text()
    found = products(program)
    e4m3, e5m2 = "f8E4M3FN", "f8E5M2"
    # q, k, v, o, gate, up, down: once in the loop forward, which keeps them, and twice in the loop backward
    assert found.count((e5m2, e4m3)) == 14
    assert found.count((e4m3, e4m3)) == 7
    rest = [pair for pair in found if pair not in ((e5m2, e4m3), (e4m3, e4m3))]
    assert rest and not any(kind in (e4m3, e5m2) for pair in rest for kind in pair)


def test_products_and_gradients_are_those_of_rounded_operands():
    rng = np.random.default_rng(0)
    x, kernel, d_y = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((64, 96), (96, 80), (64, 80)))
    x = x * jnp.exp(3 * jnp.asarray(rng.normal(size=(64, 1)), jnp.float32))  # tokens of very different size
    value, pull = jax.vjp(fp8_linear, x, kernel)
    d_x, d_kernel = pull(d_y)
    # Rounding to m bits moves a number by at most 2^-(m+1) of it, evenly spread; e4m3 has 3 and e5m2 2. A product's
    # error is that of both operands, by row, as every token has its own scale.
    bound = lambda *bits: np.sqrt(sum(4.0 ** -(m + 1) for m in bits))
    for ours, exact, most in (
        (value, x @ kernel, bound(3, 3)),
        (d_x, d_y @ kernel.T, bound(2, 3)),
        (d_kernel, x.T @ d_y, bound(2, 3)),
    ):
        error = np.linalg.norm(ours - exact, axis=1) / np.linalg.norm(exact, axis=1)
        assert 0.01 < error.max() < most
    assert fp8_linear(x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_a_scale_is_the_least_power_of_two_that_fits():
    for largest in (0.875, 0.8751, 3e-5, 448.0, 449.0, 1e4):
        scale = float(fp8_scale(np.float32(largest), np))
        assert np.log2(scale) % 1 == 0 and 224 < np.float32(largest) / scale <= 448
        assert scale == float(fp8_scale(jnp.float32(largest)))


@pytest.mark.parametrize("scale", [None, 2.0**-8])
def test_an_exported_product_is_that_of_rounded_numbers_and_gradients_pass_through_the_rounding(scale):
    rng = np.random.default_rng(0)
    x, kernel, d_y = (rng.normal(size=size).astype(np.float32) for size in ((2, 32, 24), (24, 40), (2, 32, 40)))

    def rounded(a, scale=None):
        scale = fp8_scale(np.abs(a).max(), np) if scale is None else scale
        return np.clip(a / scale, -448, 448).astype(jnp.float8_e4m3fn).astype(np.float32) * scale

    value, pull = jax.vjp(lambda x, kernel: fp8_exported_linear(x, kernel, scale), x, kernel)
    d_x, d_kernel = pull(d_y)
    assert (np.abs(x).max() > 448 * 2.0**-8) and not np.array_equal(rounded(x), x)
    np.testing.assert_allclose(value, rounded(x, scale) @ rounded(kernel), atol=1e-5)
    np.testing.assert_allclose(d_x, d_y @ rounded(kernel).T, atol=1e-5)
    np.testing.assert_allclose(d_kernel, np.tensordot(rounded(x, scale), d_y, ((0, 1), (0, 1))), atol=1e-4)


def test_training_loses_as_little_as_the_documentation_says():
    bf16, fp8 = (fp8_loss.train(compute, 0, 60) for compute in fp8_loss.ARMS.values())
    assert abs(fp8 / bf16 - 1) < 0.02
    assert fp8 != bf16


def test_without_qwix_one_sentence_says_what_to_install(monkeypatch):
    check_fp8("fp8", "stages.a.compute.matmul")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_fp8(None, "stages.a.compute.matmul")
    with pytest.raises(UserError, match=r"stages\.a\.compute\.matmul = fp8 needs qwix, .*'\.\[fp8\]'"):
        check_fp8("fp8", "stages.a.compute.matmul")

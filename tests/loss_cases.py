"""What the tests of the loss head share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ministral_jax.losses.chunked import distillation_loss
from ministral_jax.losses.targets import Hidden


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def log_softmax(x):
    """In float64."""
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def single(tree):
    """float64 as float32."""
    return jax.tree.map(lambda x: x.astype(np.float32) if x.dtype == float else x, tree)


def loss_and_gradients(hidden, head, targets, labels, mask, options):
    """((loss, metrics), (d_hidden, d_head)), compiled and fetched."""
    objective = lambda h, w, *rest: distillation_loss(h, w, *rest, options)
    step = jax.jit(jax.value_and_grad(objective, (0, 1), has_aux=True))
    return jax.device_get(step(hidden, head, targets, labels, mask))


def close(got, want, tolerance=1e-12):
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(1.0, np.abs(want).max()))


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def matrix_products(function, *arguments, largest):
    """How many a program has, none of whose arrays is larger than `largest`."""
    found = list(equations(jax.make_jaxpr(function)(*arguments).jaxpr))
    assert max(out.aval.size for equation in found for out in equation.outvars) == largest
    return sum(equation.primitive.name == "dot_general" for equation in found)


def check_memory(gradient, vocab=4_096, width=16, chunk=32):
    """Of the compiled `gradient` of `abstract` arguments: it does not grow with the tokens times the vocabulary."""
    compiled = (jax.jit(gradient).lower(*abstract(tokens, vocab, width)).compile() for tokens in (256, 1_024))
    small, large = (program.memory_analysis().temp_size_in_bytes for program in compiled)
    assert large - small < 768 * width * 4 * 8  # a few copies of the hidden states, 1/32 of one array of added logits
    assert large < 4 * (width + 6 * chunk) * vocab


def abstract(tokens, vocab, width, rows=2):
    f32, s32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32), jax.ShapeDtypeStruct
    position = (rows, tokens // rows)
    hidden, head = f32((*position, width)), f32((width, vocab))
    return hidden, head, Hidden(hidden, head), s32(position, jnp.int32), f32(position)

"""Linear layers in numbers of eight bits, by qwix (extra `fp8`)."""

from __future__ import annotations

import importlib.util
from typing import Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from ministral_jax.errors import UserError


def fp8_linear(x: Float[Array, "... in"], kernel: Float[Array, "in out"]) -> Float[Array, "... out"]:
    """`x` times `kernel` in FP8 (arXiv 2209.05433): both are rounded to e4m3, the gradient that comes back to e5m2, and
    each of the three products adds up in a wider format. A token of `x`, a column of `kernel`, and a row or column of
    the gradient have each a scale of their own, their largest absolute value at that step.

    Raises:
        UserError: qwix is not installed.
    """
    _check_installed("compute.matmul")
    # Of two public entries, one has no gradient and the other takes modules alone.
    from qwix._src.core import dot_general_qt as qwix

    e4m3, e5m2 = jnp.float8_e4m3fn, jnp.float8_e5m2
    config: Any = qwix.DotGeneralQtConfig(lhs_qtype=e4m3, rhs_qtype=e4m3, dlhs_grad_qtype=e5m2, drhs_grad_qtype=e5m2)
    product: Any = qwix.dot_general_qt(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), config)
    return product.astype(x.dtype)


def check_matmul(matmul: str | None, where: str) -> None:
    """Raise `UserError` when the setting `where`.compute.matmul asks for products that need what is not installed."""
    if matmul is not None:
        _check_installed(f"{where}.compute.matmul")


def _check_installed(setting: str) -> None:
    if importlib.util.find_spec("qwix") is None:
        raise UserError(f"{setting} = fp8 needs qwix, which is not installed; in the checkout, pip install -e '.[fp8]'")

"""Linear layers in numbers of eight bits, by qwix (extra `fp8`)."""

from __future__ import annotations

import importlib.util
from functools import partial
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


def fp8_scale(largest: Any, xp: Any = jnp) -> Any:
    """The least power of two by which numbers of absolute value up to `largest` (float32) are divided to fit into e4m3,
    whose own largest number is 448 = 0.875 · 2⁹. `xp`: `jax.numpy` or `numpy`.

    Of a power of two nothing is rounded but the mantissa, to 4 bits, whichever power it is (but for what is below
    2⁻⁶ of it): a scale found on other rows, or stored in bfloat16, gives the same numbers.
    """
    mantissa, exponent = xp.frexp(largest)
    return xp.ldexp(xp.ones_like(mantissa), exponent - 9 + (mantissa > 0.875))


def fp8_exported_linear(
    x: Float[Array, "... in"], kernel: Float[Array, "in out"], scale: Float[Array, ""] | None = None
) -> Float[Array, "... out"]:
    """`x` times `kernel` as an FP8 export multiplies them: both in e4m3, each with one `fp8_scale`. Gradients are those
    of the rounded numbers, passed straight through the rounding (arXiv 1308.3432), in the dtype of `x`.

    `scale`: of `x`, beyond 448 of which it is cut off; None is that of its own largest number.

    Raises:
        UserError: qwix is not installed.
    """
    _check_installed("quantize")
    from qwix._src.core import dot_general_qt as qwix

    config: Any = qwix.DotGeneralQtConfig(
        lhs_qtype=jnp.float8_e4m3fn,
        rhs_qtype=jnp.float8_e4m3fn,
        lhs_disable_channelwise_axes=True,
        rhs_disable_channelwise_axes=True,
        lhs_collect_quant_stat=partial(_reach, x.dtype, scale),
        rhs_collect_quant_stat=partial(_reach, x.dtype, None),
    )
    product: Any = qwix.dot_general_qt(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), config)
    return product.astype(x.dtype)


def _reach(dtype: Any, scale: Array | None, found: dict[str, Array]) -> dict[str, Array]:
    """The largest number of a scale, exact in any dtype, of which qwix takes the 448th part."""
    largest = found["absmax"].astype(jnp.float32)
    used: Array = fp8_scale(largest) if scale is None else jnp.broadcast_to(scale, largest.shape)
    return {"absmax": (448 * used).astype(dtype)}


def check_fp8(value: str | None, setting: str) -> None:
    """Raise `UserError` when `setting` asks for products that need what is not installed."""
    if value is not None:
        _check_installed(setting)


def _check_installed(setting: str) -> None:
    if importlib.util.find_spec("qwix") is None:
        raise UserError(f"{setting} = fp8 needs qwix, which is not installed; in the checkout, pip install -e '.[fp8]'")

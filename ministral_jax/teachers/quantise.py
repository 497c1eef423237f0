"""Numbers of the stored teacher in 8 or 16 bits. Each function serves NumPy and JAX arrays alike.

Log-probabilities lie in [-32, 0] and are coded by their square root, c = round((2^b - 1) √(-log p / 32)), because what
a rounding error costs in KL is weighted by p: steps are fine near p = 1 and coarse where p is nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np

FLOOR = 32.0  # nats; e^-32 = 1.3e-14
ENTROPY_LIMIT = 16.0  # nats; ln V = 11.8 for V = 131072
TAIL_BITS = 16
FLOAT8 = "float8_e4m3fn"
FLOAT8_MAX = 448.0
_CODES = {8: np.uint8, 16: np.uint16}


def encode_log_probs(log_probs: Any, bits: int) -> Any:
    """Log-probabilities (nats; -inf is e^-32) as uint8 or uint16, the largest code for the smallest."""
    xp = log_probs.__array_namespace__()
    scaled = xp.sqrt(xp.clip(-log_probs, 0, FLOOR) / FLOOR)
    return xp.round(scaled * _largest(bits)).astype(_CODES[bits])


def decode_log_probs(codes: Any, bits: int, dtype: Any) -> Any:
    """The log-probabilities that codes stand for. The error is at most `log_prob_error`."""
    return -FLOOR * (codes.astype(dtype) / _largest(bits)) ** 2


def log_prob_error(log_probs: Any, bits: int) -> Any:
    """Bound on |decoded - log p| in nats for log p in [-32, 0], without what floating point adds (a few ulp of log p).

    √(-log p / 32) is off by at most h = 1 / (2 (2^b - 1)), its square times 32 by 64 h √(-log p / 32) + 32 h².
    At log p = -1 that is 0.022 for 8 bits and 8.6e-5 for 16.
    """
    half = 0.5 / _largest(bits)
    return 2 * FLOOR * half * (-log_probs / FLOOR) ** 0.5 + FLOOR * half**2


def encode_tail(tail: Any) -> Any:
    """Log of the tail's mass as uint16. The largest code, that of anything below -31.9995, means that there is none."""
    return encode_log_probs(tail, TAIL_BITS)


def decode_tail(codes: Any, dtype: Any) -> Any:
    """Log of the tail's mass, -inf for none."""
    xp = codes.__array_namespace__()
    return xp.where(codes == _largest(TAIL_BITS), -xp.inf, decode_log_probs(codes, TAIL_BITS, dtype))


def encode_entropy(entropy: Any) -> Any:
    """Entropy in nats as uint16, linear over [0, 16]: off by at most 16 / 65535 / 2 = 1.3e-4."""
    xp = entropy.__array_namespace__()
    return xp.round(xp.clip(entropy, 0, ENTROPY_LIMIT) * (_largest(16) / ENTROPY_LIMIT)).astype(np.uint16)


def decode_entropy(codes: Any, dtype: Any) -> Any:
    return codes.astype(dtype) * (ENTROPY_LIMIT / _largest(16))


def encode_float8(x: Any) -> tuple[Any, Any]:
    """`[.., D]` as float8 (e4m3) and one float32 scale `[..]`, by which the largest |x| becomes 448.

    |decoded - x| is at most the larger of |x| / 16 (three bits of mantissa) and scale / 1024 (below the smallest normal
    number, 2^-6), plus the float32 rounding of the scale.
    """
    xp = x.__array_namespace__()
    top = xp.max(xp.abs(x), axis=-1).astype(np.float32)
    scale = xp.where(top > 0, top / FLOAT8_MAX, 1).astype(np.float32)
    return (x.astype(np.float32) / scale[..., None]).astype(FLOAT8), scale


def decode_float8(codes: Any, scale: Any) -> Any:
    """float32 `[.., D]`."""
    return codes.astype(np.float32) * scale[..., None]


def _largest(bits: int) -> int:
    return 2**bits - 1

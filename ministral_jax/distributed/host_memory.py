"""Memory of the process that nothing needs any more, given back to the system."""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any

import jax

COMPILED = "/jax/core/compile/backend_compile_duration"
"""JAX records it when a program is compiled, before that runs."""
_LONG = 0.5  # seconds of compiling, from which on much was allocated
_trim: Any = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


@functools.cache
def trim_after_compiling() -> None:
    """From now on, after each long compilation, let the C library return what the compiler has freed.

    LLVM's many small pieces otherwise stay with the process, beside the arrays of the program that it made: 220 MB of
    1.1 GB in a distillation step of `benchmarks/train_step.py`. Where the C library is not glibc nothing happens.
    """
    if _trim is not None:
        jax.monitoring.register_event_duration_secs_listener(_compiled)


def _compiled(event: str, duration_secs: float, **_: str | int) -> None:
    if event == COMPILED and duration_secs >= _LONG:
        _trim(0)

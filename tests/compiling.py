"""Programs that run for a moment, of tests that compile many of them."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax


@contextmanager
def quickly_compiled() -> Iterator[None]:
    """At these sizes compiling takes the time."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)

"""Programs that run for a moment, of tests that compile many of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

import jax

# a jaxlib from 0.11 on does not know it any more, and ends the process
SIMPLE_LOOPS = "--xla_cpu_use_fusion_emitters=false " if version("jaxlib").startswith("0.10.") else ""
"""Of `XLA_FLAGS`: fused operations that compile faster."""


@contextmanager
def quickly_compiled() -> Iterator[None]:
    """At these sizes compiling takes the time."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)

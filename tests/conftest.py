"""Eight virtual CPU devices for meshes and one compilation cache for the whole suite."""

import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
cache = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", Path(tempfile.gettempdir()) / "ministral_jax_test_cache"))
jax.config.update("jax_compilation_cache_dir", str(cache))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


LONGEST_FIRST = (
    *("stages/test_resume.py", "stages/test_verbs.py", "runs/test_sweep.py", "pruning/test_surgery.py"),
    *("stages/test_record.py", "distributed/test_mesh.py", "training/test_training.py", "teachers/test_store.py"),
)
"""Else one worker waits for the other at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {name: rank for rank, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: ranks.get(f"{item.path.parent.name}/{item.path.name}", len(ranks)))


@pytest.fixture
def x64():
    """Float64 within a test."""
    with jax.enable_x64(True):
        yield

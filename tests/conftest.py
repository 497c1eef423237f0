"""Eight virtual CPU devices for meshes, no hub, and one compilation cache for the whole suite."""

import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"

from compiling import SIMPLE_LOOPS, quickly_compiled

# most of the suite's time is compiling programs that run for a moment
os.environ.setdefault(
    "XLA_FLAGS", f"{SIMPLE_LOOPS}--xla_backend_optimization_level=1 --xla_llvm_disable_expensive_passes=true"
)

import jax
import pytest

from ministral_jax.cli import main

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


@pytest.fixture(scope="module")
def quickly():
    """For modules whose tests compile more than they run."""
    with quickly_compiled():
        yield


@pytest.fixture(scope="module")
def one_device():
    """The suite's eight are for meshes."""
    devices = jax.devices()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *backend: devices[:1])
        yield


@pytest.fixture
def refused(capsys):
    """`(recipe, run directory, words..) -> ` the one line of a run that must fail as bad input does."""

    def refusal(recipe: str, run_dir, *words: str) -> str:
        assert main(["run", recipe, *words, "--run-dir", str(run_dir)]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("ministral-jax: ") and "Traceback" not in error
        return error

    return refusal

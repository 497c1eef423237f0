"""Stages by the command line, as on a laptop."""

import jax
import pytest

from ministral_jax.cli import main


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

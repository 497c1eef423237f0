"""Whether the stages of a job fit the accelerators that it asks for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ministral_jax.errors import UserError
from ministral_jax.planning.booking import booking
from ministral_jax.planning.findings.find import impossible
from ministral_jax.recipe.launch import Launch
from ministral_jax.recipe.types import Recipe
from ministral_jax.stages.manifest import read_manifest


def refuse_misfit(recipe: Recipe, names: Sequence[str], job: Launch) -> None:
    """Look at the stages `names` on what `job` asks for; of a job without accelerators nothing is known.

    Raises:
        UserError: a line for everything that would end the run, see `planning.findings.impossible`.
    """
    if (asked := booking(job)) is None:
        return
    if found := impossible(recipe, names, asked.machine):
        raise UserError("\n".join(f"{asked.setting}: {finding}" for finding in found))


def unfinished(names: Sequence[str], run_dir: Path) -> list[str]:
    """Those that `run_dir` does not have, as far as it can be seen from here."""
    return [name for name in names if read_manifest(run_dir / name) is None]

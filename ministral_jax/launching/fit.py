"""Whether the stages of a job fit the accelerators that it asks for."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ministral_jax.errors import UserError
from ministral_jax.models.spec import PRESETS, ModelSpec
from ministral_jax.planning.booking import booking
from ministral_jax.planning.findings.find import impossible
from ministral_jax.planning.findings.finding import Context
from ministral_jax.planning.findings.site import starts_on_its_hosts
from ministral_jax.planning.plan import published
from ministral_jax.recipe.launch import GkeLaunch, Launch, LaunchConfig, SlurmLaunch, TpuVmLaunch
from ministral_jax.recipe.types import Recipe
from ministral_jax.stages.manifest import read_manifest

_BLOCKS: dict[type[Launch], str] = {SlurmLaunch: "slurm", GkeLaunch: "gke", TpuVmLaunch: "tpu_vm"}


def refuse_misfit(
    recipe: Recipe,
    names: Sequence[str],
    job: Launch,
    made: Mapping[str, ModelSpec] | None = None,
    shared: bool = False,
) -> None:
    """Look at the stages `names` on what `job` asks for; of a job without accelerators nothing is known.

    What a TPU VM would lack is said on stderr, and no fault.

    Args:
        made: sizes of finished stages, for those whose checkpoint is not here; others have those of their names, where
            they tell some.
        shared: whether the run's directory is in a bucket, where all hosts see it.

    Raises:
        UserError: a line for everything that would end the run, see `planning.findings.impossible`.
    """
    if (asked := booking(job)) is None:
        return
    gone = {name: published(stage) for name, stage in recipe.stages.items() if stage.is_gone}
    known = {name: PRESETS[preset] for name, preset in gone.items() if preset is not None}
    alone = recipe.model_copy(update={"launch": LaunchConfig().model_copy(update={_BLOCKS[type(job)]: job})})
    if found := impossible(alone, names, asked.machine, {**known, **(made or {})}):
        raise UserError("\n".join(f"{asked.setting}: {finding}" for finding in found))
    for finding in starts_on_its_hosts(Context(alone, {}, (), asked.machine), shared):
        print(f"warning: {finding}", file=sys.stderr)


def unfinished(names: Sequence[str], run_dir: Path) -> list[str]:
    """Those that `run_dir` does not have, as far as it can be seen from here."""
    return [name for name in names if read_manifest(run_dir / name) is None]

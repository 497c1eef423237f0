"""What must be there when a job begins: the chips that it asks for, files, modules and room on the disk."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ministral_jax.distributed.chips import CHIPS
from ministral_jax.planning.booking import booking
from ministral_jax.planning.findings.finding import Context, Finding, RecipeCheck, counted, error, warning
from ministral_jax.planning.machine import Machine
from ministral_jax.recipe.types import Recipe


def asks_for_the_machine(context: Context) -> Iterator[Finding]:
    """Jobs that the recipe describes get the machine that is planned for, where they are of its platform."""
    machine, launch = context.machine, context.recipe.launch
    for job in (launch.tpu_vm, launch.gke, launch.slurm):
        asked = None if job is None else booking(job)
        if asked is None or asked.machine.chip.platform != machine.chip.platform:
            continue
        of_kind = asked.machine.chip.name in CHIPS and asked.machine.chip.name != machine.chip.name
        shaped = machine.chip.platform == "tpu" and sorted(asked.machine.shape) != sorted(machine.shape)
        if of_kind or shaped or (asked.machine.chips, asked.machine.slices) != (machine.chips, machine.slices):
            yield error(
                None,
                f"{asked.setting} asks for {_described(asked.machine)}, but the plan is for {_described(machine)}; "
                "make them the same",
            )


def _described(machine: Machine) -> str:
    if machine.chip.name not in CHIPS:
        return f"{machine.chips} chips"
    slices = f" x {counted(machine.slices, 'slice')}" if machine.slices > 1 else ""
    return f"the {counted(machine.chips, 'chip')} of {machine.name}{slices}"


def starts_on_its_hosts(context: Context, shared: bool = False) -> Iterator[Finding]:
    """Machines that are made for a job have nothing on them: hosts share no directory, and the package is not there.

    Args:
        shared: whether the run's directory is in a bucket, where all hosts see it.
    """
    job = context.recipe.launch.tpu_vm
    if job is None or context.machine.chip.platform != "tpu":
        return
    hosts = context.machine.hosts
    if job.bucket is None and hosts > 1 and not shared:
        yield warning(
            None,
            f"launch.tpu_vm.bucket is not set, and {hosts} hosts need a directory that all see at {job.mount} "
            "(launch.tpu_vm.mount), without which the job ends at once; name a bucket, mount one in "
            "launch.tpu_vm.setup, or launch with --run-dir gs://bucket/name",
        )
    if job.setup is None:
        yield warning(
            None,
            "launch.tpu_vm.setup is not set, and a host that is made for the job has no ministral-jax; set it to a "
            "command that installs it",
        )


class Need(NamedTuple):
    """A file, directory or module that a stage begins with."""

    setting: str
    what: str
    stages: tuple[str, ...]

    @property
    def is_here(self) -> bool:
        if ":" in self.what and "/" not in self.what:
            return importlib.util.find_spec(self.what.partition(":")[0].partition(".")[0]) is not None
        if "://" in self.what:  # which is asked when the stage begins
            return True
        path = Path(self.what)
        return path.exists() or any(Path(path.anchor).glob(str(path.relative_to(path.anchor))))


def needed(recipe: Recipe, names: tuple[str, ...]) -> list[Need]:
    """What must exist on the machine before the run starts: every fault of these ends it before its first stage."""
    found: dict[str, Need] = {}
    for name in names:
        for setting, what in _of_stage(recipe.stages[name]):
            known = found.get(what, Need(f"stages.{name}.{setting}", what, ()))
            found[what] = known._replace(stages=(*known.stages, name))
    return list(found.values())


def _of_stage(stage: Any) -> Iterator[tuple[str, str]]:
    if stage.do == "import":
        yield "path", str(stage.path)
    if (data := getattr(stage, "data", None)) is not None:
        if data.tokenizer.file != "bundled":
            yield "data.tokenizer.file", str(data.tokenizer.file)
        for name, source in data.sources.items():
            if source.path is not None:
                yield f"data.sources.{name}.path", str(source.path)
    asked = {"": stage, "evaluate.": getattr(stage, "evaluate", None), "generate.": getattr(stage, "generate", None)}
    for prefix, holder in asked.items():
        for name, reward in (getattr(holder, "rewards", None) or {}).items():
            for key in ("judge", "function"):
                if isinstance(dotted := getattr(reward, key, None), str):
                    yield f"{prefix}rewards.{name}.{key}", dotted


def is_there(context: Context) -> Iterator[Finding]:
    """Told only of the machine at hand; elsewhere `needed` is a list for whoever books it."""
    if context.here is None:
        return
    for need in needed(context.recipe, context.names):
        if not need.is_here:
            yield error(
                need.stages[0],
                f"{need.setting} = {need.what} is not on this machine, and must be before the run starts",
            )


def fits_disk(context: Context) -> Iterator[Finding]:
    """The run's directory has room for what the stages leave, and for the states of the one that runs."""
    if context.here is None or not (written := room(context)):
        return
    place = next(path for path in (context.here.absolute(), *context.here.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if written > free:
        yield warning(
            None,
            f"--run-dir {context.here} has {free / 1e9:,.0f} GB free, and the stages write {written / 1e9:,.0f} GB; "
            "give a directory with more room",
        )


def room(context: Context) -> int:
    """Bytes on disk at the most, if the wanted stages run one after the other: parameters are kept, in float32 at the
    most, and the states of a stage go when it is done."""
    left = most = 0
    for name in context.names:
        if (needed := context.memory.get(name)) is not None:
            most = max(most, left + needed.written)
            left += min(needed.written, 4 * context.specs[name].parameters)
    return most


CHECKS: tuple[RecipeCheck, ...] = (asks_for_the_machine, starts_on_its_hosts, is_there, fits_disk)

"""Whether limits, checkpoints and the job's own clock leave stages the time that they need."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ministral_jax.planning.findings.finding import Context, Finding, RecipeCheck, StageCheck, counted, error, warning
from ministral_jax.planning.memory.stage import state_bytes
from ministral_jax.planning.work import Draw, Read, Work
from ministral_jax.recipe.launch import SlurmLaunch
from ministral_jax.sampling.engine import SamplingOptions

COMPILING = 600
"""Seconds that a stage takes at the most to compile; measured on no machine."""
DISK = 1e9
"""Bytes/s that a host is assumed to write."""
DAY, HOUR, LONG = 86400, 3600, 1800
"""Of these, what a failure may lose: an hour is worth a warning, on spot machines half of one."""


def watched(context: Context, name: str) -> Iterator[Finding]:
    """No piece of work outlasts the watchdog of a job of several processes.

    The first piece of a kind has `limits.slow`, later ones the larger of `limits.step` and ten times the median of
    those before, see `distributed.processes`: so it is the first that must fit, with its compilation.
    """
    if context.machine.hosts == 1 or (times := context.times.get(name)) is None:
        return
    slow, work = context.recipe.limits.slow, context.work[name].on(context.jobs[name].mesh)
    for phase in times.phases:
        found = work.phase(phase.phase)
        pieces = sum(_pieces(one) for one in found.work) if found is not None else 0
        seconds, what = phase.seconds / max(1, pieces), f"{'a part of ' if pieces else ''}{phase.phase!r}"
        if seconds > slow:
            yield error(
                name,
                f"limits.slow = {slow:g} ends stages.{name}, of which {what} takes {seconds:,.0f} s: its processes are "
                f"taken for hanging, each time anew; set it to {2 * seconds + COMPILING:.0f}",
                "limits.slow",
                seconds,
            )
        elif seconds + COMPILING > slow:
            yield warning(
                name,
                f"limits.slow = {slow:g} leaves {slow - seconds:,.0f} s for compiling {what} of stages.{name}, which "
                f"takes {seconds:,.0f} s itself; set it to {2 * seconds + COMPILING:.0f}",
                "limits.slow",
                seconds,
            )


def _pieces(work: Work) -> int:
    """Between which a job says that it goes on: chunks of tokens, and a judge's batches; 0 of all else."""
    if isinstance(work, Draw):
        return work.waves * math.ceil(work.completion / SamplingOptions().chunk)
    return work.microbatches if isinstance(work, Read) and work.head == "choice" else 0


def loses_little(context: Context, name: str) -> Iterator[Finding]:
    """A failure costs the work since the last checkpoint."""
    if (seconds := interval(context, name)) is None:
        return
    saves = context.stage(name).checkpoint
    which = "every" if saves.minutes is None or seconds < 60 * saves.minutes else "minutes"
    setting = f"checkpoint.{which} = {getattr(saves, which):g}"
    # a stage that is shorter than that has no state but its last
    often = (
        f"saves every {_lasting(seconds)}"
        if which == "minutes" or saves.every < context.stage(name).steps
        else (f"saves nothing before its end after {_lasting(seconds)}")
    )
    step = context.times[name].step_seconds
    fitting = LONG // 60 if which == "minutes" else max(1, int(LONG / step))
    spot = _spot(context)
    why = "all of which a failure loses" if seconds > HOUR else f"and {spot} = true takes machines away without notice"
    if seconds > HOUR or (spot is not None and seconds > LONG):
        yield warning(name, f"stages.{name}.{setting} {often}, {why}; {fitting} is half an hour", setting, seconds)


def _lasting(seconds: float) -> str:
    return f"{seconds / HOUR:.1f} hours" if seconds > HOUR else f"{seconds / 60:.0f} minutes"


def stops_in_time(context: Context, name: str) -> Iterator[Finding]:
    """What stands between the wish to stop and the end is enough for the step in progress and a save."""
    times, launch, tpu = context.times.get(name), context.recipe.launch, context.machine.chip.platform == "tpu"
    if times is None or interval(context, name) is None:
        return
    grace: dict[str, float] = {}
    if launch.gke is not None and (launch.gke.tpu is not None) == tpu:
        grace["launch.gke.grace"] = min(launch.gke.grace, 30) if launch.gke.spot else launch.gke.grace
    if launch.slurm != SlurmLaunch() and not tpu:
        grace["launch.slurm.grace"] = launch.slurm.grace
    saving = _saved(context, name) / context.machine.hosts / DISK
    for setting, seconds in grace.items():
        if times.step_seconds + saving > seconds:
            yield warning(
                name,
                f"{setting} = {seconds:g} s is too short for a step of stages.{name} ({times.step_seconds:,.0f} s) and "
                f"a save of {_saved(context, name) / 1e9:,.0f} GB by {counted(context.machine.hosts, 'host')} "
                f"({saving:,.0f} s), so being stopped loses what was done since the last; raise it where the "
                "scheduler allows",
                setting,
                times.step_seconds + saving,
            )


def advances(context: Context, name: str) -> Iterator[Finding]:
    """One start of a job gets as far as its next checkpoint."""
    limit, between = _slurm_seconds(context), interval(context, name)
    if limit is None or between is None:
        return
    if COMPILING + between > limit:
        yield error(
            name,
            f"launch.slurm.time = {context.recipe.launch.slurm.time} ends before stages.{name} has compiled "
            f"({COMPILING} s) and come to a checkpoint (after {between:,.0f} s), so the job may never "
            "advance; ask for more, or save more often",
            "launch.slurm.time",
            between,
        )


def restarts_suffice(context: Context) -> Iterator[Finding]:
    """A chain of starts, each as long as the scheduler gives, ends with the last stage."""
    slurm, limit = context.recipe.launch.slurm, _slurm_seconds(context)
    if limit is None or not context.times:
        return
    total, each = sum(times.seconds for times in context.times.values()), limit - COMPILING - slurm.grace
    if each > 0 and (needed := math.ceil(total / each) - 1) > slurm.restarts:
        lasts = f"{total / DAY:,.1f} days" if total > DAY else f"{total / HOUR:,.1f} hours"
        yield error(
            None,
            f"launch.slurm.restarts = {slurm.restarts} ends the job for good after "
            f"{counted(slurm.restarts + 1, 'start')} of launch.slurm.time = {slurm.time}, and the stages take {lasts}; "
            f"set it to {2 * needed}, or ask for more time",
        )


def interval(context: Context, name: str) -> float | None:
    """Seconds between two checkpoints of a stage that saves some, None where that is not known."""
    times, config = context.times.get(name), getattr(context.stage(name), "checkpoint", None)
    if times is None or config is None or not times.step_seconds:
        return None
    seconds = min(config.every, context.stage(name).steps) * times.step_seconds
    return seconds if config.minutes is None else min(seconds, max(60 * config.minutes, times.step_seconds))


def _saved(context: Context, name: str) -> float:
    """Bytes of a training state."""
    return sum(state_bytes(held) for held in context.work[name].held if held.learns) if name in context.work else 0


def _spot(context: Context) -> str | None:
    """The setting by which machines can be taken away."""
    launch, tpu = context.recipe.launch, context.machine.chip.platform == "tpu"
    if launch.tpu_vm is not None and launch.tpu_vm.spot and tpu:
        return "launch.tpu_vm.spot"
    if launch.gke is not None and launch.gke.spot and (launch.gke.tpu is not None) == tpu:
        return "launch.gke.spot"
    return None


def _slurm_seconds(context: Context) -> int | None:
    """`launch.slurm.time`: minutes, `MM:SS`, `HH:MM:SS`, or days before `-` and hours, minutes, seconds after it."""
    text = context.recipe.launch.slurm.time
    if text is None or context.machine.chip.platform != "gpu":
        return None
    days, dash, clock = text.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if dash:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, [*parts, 0][:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def tasks_are_left_out(context: Context, name: str) -> Iterator[Finding]:
    """How many tokens a model is asked, nobody knows before."""
    stage = context.stage(name)
    for of, where in ((stage, "tasks"), (getattr(stage, "evaluate", None), "evaluate.tasks")):
        if (tasks := getattr(of, "tasks", None)) is not None:
            asked = ", ".join(tasks.names)
            yield warning(name, f"stages.{name}.{where} = {asked} are left out of its time and memory; allow for them")


CHECKS: tuple[StageCheck, ...] = (tasks_are_left_out, watched, loses_little, stops_in_time, advances)
OF_RECIPE: tuple[RecipeCheck, ...] = (restarts_suffice,)

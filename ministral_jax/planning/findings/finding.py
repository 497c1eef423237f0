"""What may be found wrong with a recipe on a machine, and what every check is told."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from ministral_jax.errors import UserError
from ministral_jax.models.spec import ModelSpec
from ministral_jax.planning.machine import Machine
from ministral_jax.planning.memory.stage import StageMemory
from ministral_jax.planning.timing.roofline import StageTime
from ministral_jax.planning.work import StageWork, stage_work
from ministral_jax.recipe.types import Recipe
from ministral_jax.stages.base import Graph, Job, Stage

Level = Literal["error", "warning"]
_NAMED = 3
"""Further stages that a finding names."""


@dataclass(frozen=True)
class Finding:
    """A sentence with the offending value, the setting and what mends it.

    level: `error` is what stops the run, or never lets it end; `warning` what slows it or wastes something.
    stage: None where it is of the whole recipe. others: stages in which it is the same.
    setting: what all stages share, of which the finding with the largest `need` stands for all.
    """

    level: Level
    stage: str | None
    text: str
    others: tuple[str, ...] = ()
    setting: str = ""
    need: float = 0

    def __str__(self) -> str:
        if not self.others:
            return self.text
        more = ", ".join(self.others[:_NAMED]) + (", .." if len(self.others) > _NAMED else "")
        same = "less so" if self.setting else "the same"
        return f"{self.text} ({same} in {counted(len(self.others), 'more stage')}: {more})"


@dataclass(frozen=True)
class Context:
    """What the checks read.

    specs: sizes; of stages that have none here, what depends on sizes is not checked.
    names: the wanted stages, in order.
    memory, times: what the stages need and how long they take, by stage; where there is nothing, that is not checked.
    here: the run's directory, where the plan is of the machine it is made on.
    """

    recipe: Recipe
    specs: Mapping[str, ModelSpec]
    names: tuple[str, ...]
    machine: Machine
    memory: Mapping[str, StageMemory] = field(default_factory=dict[str, StageMemory])
    times: Mapping[str, StageTime] = field(default_factory=dict[str, StageTime])
    here: Path | None = None

    @cached_property
    def graph(self) -> Graph:
        return Graph(self.recipe.stages, self.specs)

    @cached_property
    def work(self) -> Mapping[str, StageWork]:
        """Of the stages whose sizes, and those of what they need, are known."""
        known = (name for name in self.names if {name, *self.stage(name).inputs().values()} <= self.specs.keys())
        return {name: stage_work(self.stage(name), self.specs[name], self.graph) for name in known}

    @cached_property
    def jobs(self) -> Mapping[str, Job[Any]]:
        """Of the stages whose mesh can be built."""
        found: dict[str, Job[Any]] = {}
        for name in self.names:
            if (job := self.job(self.stage(name), name)) is not None:
                found[name] = job
        return found

    def stage(self, name: str) -> Any:
        return self.recipe.stages[name]

    def job(self, stage: Stage, name: str) -> Job[Any] | None:
        """A stage on the devices of the machine."""
        try:
            meshes = self.machine.meshes(stage, f"stages.{name}")
        except UserError:
            return None
        spec: Any = self.specs.get(name)
        return Job(name, stage, spec, self.graph, Path(), *meshes)


StageCheck = Callable[[Context, str], Iterable[Finding]]
RecipeCheck = Callable[[Context], Iterable[Finding]]


def error(stage: str | None, text: str, setting: str = "", need: float = 0) -> Finding:
    return Finding("error", stage, text, (), setting, need)


def warning(stage: str | None, text: str, setting: str = "", need: float = 0) -> Finding:
    return Finding("warning", stage, text, (), setting, need)


def merged(findings: Iterable[Finding]) -> list[Finding]:
    """Those that differ in the stage alone as one, which names the first of them; and those of one setting as the one
    of largest need."""
    first: dict[tuple[str, str], Finding] = {}
    for finding in findings:
        general = finding.text if finding.stage is None else finding.text.replace(f"stages.{finding.stage}.", "")
        key = ("", finding.setting) if finding.setting else (finding.level, general)
        if (known := first.get(key)) is None:
            first[key] = finding
        elif finding.stage is not None:
            most = finding if finding.need > known.need else known
            names = dict.fromkeys(name for name in (known.stage, *known.others, finding.stage) if name)
            first[key] = replace(most, others=tuple(name for name in names if name != most.stage))
    return list(first.values())


def counted(number: float, unit: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{number:,g} {unit}{'' if number == 1 else 's'}"

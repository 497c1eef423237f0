"""A run directory as typed values. Bears what a killed or unfinished run leaves behind."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ministral_jax.errors import UserError
from ministral_jax.files import read_jsonl
from ministral_jax.models.spec import ModelSpec
from ministral_jax.recipe.load import scratch_name
from ministral_jax.report._verbs import verbs
from ministral_jax.report.style import accent
from ministral_jax.runs.published import Answer, Answers, Entry, Sample, Samples, Summary
from ministral_jax.stages.figures import Curve, Figure
from ministral_jax.stages.manifest import Manifest, digest, read_manifest
from ministral_jax.training.goodput import goodput

Row = dict[str, Any]
"""A record of metrics.jsonl."""


class Settings(BaseModel):
    """A stage in recipe.json."""

    model_config = ConfigDict(extra="allow")

    do: str
    source: str | None = Field(default=None, alias="from")


class Family(BaseModel):
    parent: str
    children: dict[str, str]


class RecipeFile(BaseModel):
    name: str
    stages: dict[str, Settings]
    family: Family | None = None


@dataclass(frozen=True)
class Stage:
    """One stage directory, or the place of one that has not begun."""

    name: str
    do: str
    source: str | None
    state: str = "waiting"
    """"finished", "unfinished" (has begun, no finished manifest) or "waiting"."""
    figures: tuple[Figure, ...] = ()
    """Of its verb."""
    curve: Curve | None = None
    manifest: Manifest | None = None
    digest: str | None = None
    """SHA-256 of the finished manifest, what later stages name this one by."""
    train: list[Row] = field(default_factory=list)
    evals: list[Row] = field(default_factory=list)
    time: dict[str, float] = field(default_factory=dict)
    """Seconds by kind, see `training.goodput`."""
    attempts: int = 0
    answers: list[Answer] = field(default_factory=list)
    """Some of those of the last evaluation."""

    @property
    def spec(self) -> ModelSpec | None:
        return self.manifest.spec if self.manifest else None

    def seen(self, what: str) -> float | None:
        """Tokens or steps so far: `what` is a key of the rows."""
        rows = [row[what] for row in self.train[-1:] + self.evals[-1:] if what in row]
        made = {"tokens": self.manifest.tokens, "step": self.manifest.steps} if self.manifest else {}
        return made.get(what) or max(rows, default=None)

    def first(self, key: str) -> float | None:
        """The oldest held-out value of a metric; None when there is at most one."""
        values = [row[key] for row in self.evals if key in row]
        return values[0] if len(values) > 1 else None

    def last(self, key: str) -> float | None:
        """The published value of a metric; of an unfinished stage the newest."""
        values = [row[key] for row in self.evals if key in row]
        return self.manifest.metrics.get(key) if self.manifest else values[-1] if values else None

    @property
    def speed(self) -> float | None:
        """Tokens per second, the median of the steps."""
        speeds = [row["tokens_per_second"] for row in self.train if "tokens_per_second" in row]
        return statistics.median(speeds) if speeds else None

    def has(self, figure: Figure) -> bool:
        return self.last(figure.name) is not None


@dataclass(frozen=True)
class Member:
    """A model of the family: its sizes and published figures, and the stages that made it."""

    name: str
    colour: str
    entry: Entry
    stages: dict[str, Stage]
    """By role, see `Entry.stages`; of the parent "base" alone."""

    @property
    def at_once(self) -> bool:
        """Whether the pruned start was ahead of its trained random start before any training."""
        scratch, after = self.stages.get("scratch_short"), self.entry.kl_after_surgery
        return scratch is not None and after is not None and after <= (scratch.last("kl") or 0)


@dataclass(frozen=True)
class Run:
    name: str
    members: list[Member]
    """The parent first. Of a recipe without a family: a member for each size there is."""
    stages: dict[str, Stage]
    wall_seconds: float | None
    images: list[Sample]
    notes: list[str]
    """What could not be read, or no longer holds."""

    @property
    def colours(self) -> dict[str, str]:
        """Of the stages: that of the model which a stage belongs to, or which its source belongs to."""
        found = {stage.name: member.colour for member in self.members for stage in member.stages.values()}
        for _ in self.stages:  # a recipe may name a stage before its source
            found |= {s.name: found[s.source] for s in self.stages.values() if s.source in found and s.name not in found}
        return {name: found.get(name, accent(0)) for name in self.stages}


def read_run(run_dir: Path) -> Run:
    """Everything the report shows.

    Raises:
        UserError: `run_dir` is not a directory, or holds no readable recipe.json.
    """
    if not run_dir.is_dir():
        raise UserError(f"run {str(run_dir)!r} is not a directory; give one that `ministral-jax run` wrote")
    path, notes = run_dir / "recipe.json", []
    if not path.is_file():
        raise UserError(
            f"{str(run_dir)!r} is not a run: it has no recipe.json; give a directory that `ministral-jax run` wrote"
        )
    if (recipe := _read(RecipeFile, path, notes)) is None:
        raise UserError(f"{str(path)!r} is not a recipe: it must be a JSON object with `name` and `stages`")
    stages = {name: _stage(run_dir, name, settings, notes) for name, settings in recipe.stages.items()}
    summary = _read(Summary, run_dir / "summary.json", notes) or Summary()
    samples = _read(Samples, run_dir / "samples.json", notes) or Samples()
    members = _family(recipe.family, summary, stages) if recipe.family else _sizes(stages)
    notes += [
        f"{stage.name} was made from another {made.stage} than the one that is here now."
        for stage in stages.values()
        for made in (stage.manifest.inputs.values() if stage.manifest else ())
        if made.stage in stages and stages[made.stage].digest != made.digest
    ]
    return Run(recipe.name, members, stages, summary.wall_seconds, samples.images, notes)


M = TypeVar("M", bound=BaseModel)


def _read(model: type[M], path: Path, notes: list[str]) -> M | None:
    if not path.is_file():
        return None
    try:
        return model.model_validate_json(path.read_bytes())
    except ValidationError:
        notes.append(f"{path.parent.name}/{path.name} could not be read and is left out.")
        return None


def _stage(run_dir: Path, name: str, settings: Settings, notes: list[str]) -> Stage:
    verb = verbs().get(settings.do)
    stage = Stage(name, settings.do, settings.source, figures=getattr(verb, "figures", ()), curve=getattr(verb, "curve", None))
    directory = run_dir / name
    if directory.parent != run_dir or not directory.is_dir():
        return stage
    try:
        manifest = read_manifest(directory)
    except UserError:
        manifest = None
        notes.append(f"{name}/manifest.json could not be read and is left out.")
    records = read_jsonl(directory / "metrics.jsonl")
    timed = [record for record in records if record.get("kind") == "time"]
    answers = _read(Answers, directory / "answers.json", notes) or Answers()
    return replace(
        stage,
        state="finished" if manifest else "unfinished",
        manifest=manifest,
        digest=digest(directory) if manifest else None,
        train=rows(records, "train"),
        evals=rows(records, "eval"),
        time=goodput(timed),
        attempts=len({record["attempt"] for record in timed}),
        answers=answers.answers,
    )


def rows(records: list[Row], kind: str) -> list[Row]:
    """Of one kind in order of steps; of a step that was run twice (after a crash) the later one."""
    by_step = {record["step"]: record for record in records if record.get("kind") == kind and "step" in record}
    return [by_step[step] for step in sorted(by_step)]


def points(rows: list[Row], key: str, over: str = "tokens") -> tuple[np.ndarray, np.ndarray]:
    """What to draw against what."""
    found = [(row[over], row[key]) for row in rows if key in row and over in row]
    x, y = np.array(found, float).reshape(-1, 2).T
    return x, y


def _family(family: Family, summary: Summary, stages: dict[str, Stage]) -> list[Member]:
    parent = {"base": stages[family.parent]} if family.parent in stages else {}
    members = [_member("parent", 0, summary.parent or Entry(), parent)]
    for index, (name, last) in enumerate(family.children.items(), start=1):
        entry = summary.children.get(name, Entry())
        roles = entry.stages or _roles(last, stages)
        found = {role: stages[stage] for role, stage in roles.items() if stage in stages}
        for role, long in (("short", "base"), ("scratch_short", "scratch_base")):
            if found.get(role) is found.get(long):  # one distil stage is both
                found.pop(long, None)
        members.append(_member(name, index, entry, found))
    return members


def _member(name: str, index: int, entry: Entry, stages: dict[str, Stage]) -> Member:
    made = [stages[role].spec for role in ("base", "short", "pruned") if role in stages]
    spec = next((spec for spec in made if spec), None)
    return Member(name, accent(index), entry.model_copy(update={"spec": spec}), stages)


def _roles(last: str | None, stages: dict[str, Stage]) -> dict[str, str]:
    """Of a child that is not in the summary yet, walking back from its last stage to the surgery."""
    chain: list[str] = []
    while last in stages and last not in chain:
        chain.insert(0, last)
        if stages[last].do == "prune":
            break
        last = stages[last].source
    distilled = [name for name in chain if stages[name].do == "distill"]
    if not distilled:
        return {"pruned": chain[0]} if chain else {}
    short, base = distilled[0], distilled[-1]
    scratch = {"scratch_short": scratch_name(short), "scratch_base": scratch_name(base)}
    return {"pruned": chain[0], "short": short, "base": base, **scratch}


def _sizes(stages: dict[str, Stage]) -> list[Member]:
    found: dict[int, Stage] = {}
    for stage in stages.values():
        if stage.spec:
            found.setdefault(stage.spec.parameters, stage)
    return [_member(stage.name, i, Entry(), {"base": stage}) for i, stage in enumerate(found.values())]

"""A run directory as typed values. Bears what a killed or unfinished run leaves behind.

Of `run = read_run(Path("runs/tiny"))`, for instance, `run.stages["14b-short"].evals[-1]["kl"]`, or
`run.members[1].figure("kl_final")`.
"""

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
from ministral_jax.recipe.types import Family
from ministral_jax.runs import summary
from ministral_jax.runs.comparable import most_common, row_length, stale_stages
from ministral_jax.stages import verbs
from ministral_jax.stages.distill import scratch_name
from ministral_jax.stages.figures import Curve, Figure, Share, share_of, shares_of
from ministral_jax.stages.manifest import Manifest, digest, read_manifest
from ministral_jax.training.goodput import goodput

Row = dict[str, Any]
"""A record of metrics.jsonl."""
OF_ROWS = ("kl_after_surgery", "kl_final", "kl_scratch", "bits_per_byte")
"""Figures of the summary that depend on the length of the rows."""
_OF_BASELINE = ("kl_scratch",)


class Settings(BaseModel):
    """A stage in recipe.json, of any verb and any version."""

    model_config = ConfigDict(extra="allow")

    do: str
    source: str | None = Field(default=None, alias="from")
    optional: bool = False


class RecipeFile(BaseModel):
    name: str
    stages: dict[str, Settings]
    family: Family | None = None


class Sample(BaseModel):
    """A held-out image and what the models say to it."""

    png: str
    """Base64."""
    question: str
    label: str
    answers: dict[str, str]
    """By model."""


class Samples(BaseModel):
    """`samples.json`."""

    images: list[Sample] = Field(default_factory=list)


class Said(BaseModel):
    """An answer, and how good it is."""

    answer: str
    reward: float | None = None
    parts: dict[str, float | None] = Field(default_factory=dict)
    """Of the reward."""


class Answer(Said):
    """What a stage said to a held-out prompt at its last evaluation."""

    prompt: str
    """JSON: text, or a list of chunks; a picture is one with a `png` in base64."""
    before: Said | None = None
    """What was said at the first one, before any training."""


class Answers(BaseModel):
    """`<stage>/answers.json`."""

    prompts: int | None = None
    """All that were asked, of which these are a few."""
    answers: list[Answer] = Field(default_factory=list)


@dataclass(frozen=True)
class Stage:
    """One stage directory, or the place of one that has not begun."""

    name: str
    do: str
    source: str | None = None
    state: str = "waiting"
    """"finished", "unfinished" (has begun, no finished manifest) or "waiting"."""
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
    asked: int | None = None
    """Prompts of an evaluation."""
    optional: bool = False
    settings: Row = field(default_factory=dict)
    """What it was made with; before it is, what the recipe says."""
    stale: str | None = None
    """Why it is not current, see `comparable.stale_stages`."""

    @property
    def is_spared(self) -> bool:
        """Optional, and nobody has asked for it."""
        return self.optional and self.state == "waiting"

    @property
    def figures(self) -> tuple[Figure, ...]:
        """Of its verb; none where that is not installed."""
        return verbs()[self.do].figures if self.do in verbs() else ()

    @property
    def curve(self) -> Curve | None:
        return verbs()[self.do].curve if self.do in verbs() else None

    @property
    def spec(self) -> ModelSpec | None:
        return self.manifest.spec if self.manifest else None

    @property
    def length(self) -> int | None:
        """Tokens of the rows that it reads."""
        return row_length(self.manifest) if self.manifest else None

    @property
    def data(self) -> str | None:
        """SHA-256 of those rows."""
        return self.manifest.data.digest if self.manifest and self.manifest.data else None

    @property
    def pace(self) -> float | None:
        """Seconds of a step, the mean."""
        steps = self.seen("step")
        return self.time["step"] / steps if steps and "step" in self.time else None

    @property
    def speed(self) -> float | None:
        """Tokens per second, the median of the steps."""
        speeds = [row["tokens_per_second"] for row in self.train if "tokens_per_second" in row]
        return statistics.median(speeds) if speeds else None

    def seen(self, what: str) -> float | None:
        """Tokens or steps so far: `what` is a key of the rows."""
        made = {"tokens": self.manifest.tokens, "step": self.manifest.steps} if self.manifest else {}
        return made.get(what) or max((row[what] for row in self.train + self.evals if what in row), default=None)

    def first(self, key: str) -> float | None:
        """The oldest held-out value of a metric; None when there is at most one."""
        values = [row[key] for row in self.evals if key in row]
        return values[0] if len(values) > 1 else None

    def last(self, key: str) -> float | None:
        """The published value of a metric; of an unfinished stage the newest."""
        values = [row[key] for row in self.evals if key in row]
        return self.manifest.metrics.get(key) if self.manifest else values[-1] if values else None

    def shares(self, figure: Figure) -> dict[str, Share]:
        """With their intervals: the figure, as "", and what it is of each source of held-out prompts."""
        metrics = self.manifest.metrics if self.manifest else self.evals[-1] if self.evals else {}
        whole = share_of(metrics, figure)
        return ({"": whole} if whole else {}) | shares_of(metrics, figure)

    def figure(self, name: str) -> Figure:
        return next((figure for figure in self.figures if figure.name == name), Figure(name, name))

    def has(self, figure: Figure) -> bool:
        return figure in self.figures and self.last(figure.name) is not None


@dataclass(frozen=True)
class Member:
    """A model of the family."""

    name: str
    spec: ModelSpec | None
    """Of the last of its stages that is finished."""
    published: summary.Member | None
    """Its figures in summary.json."""
    stages: dict[str, Stage]
    """By role, see `summary.Child.stages`; of the parent `base` alone."""
    hidden: dict[str, str] = field(default_factory=dict)
    """Figures that may not stand beside those of the others, and why: "stale", "rows of 128"."""

    def figure(self, key: str) -> float | None:
        return None if key in self.hidden else getattr(self.published, key, None)

    def interval(self, key: str) -> tuple[float, float] | None:
        """In which a figure lies when held-out documents are drawn anew."""
        return None if key in self.hidden or not self.published else self.published.intervals.get(key)

    @property
    def stale(self) -> str | None:
        return next((s.stale for role, s in self.stages.items() if s.stale and "scratch" not in role), None)

    @property
    def row_length(self) -> int | None:
        """Tokens of the rows that its figures in the summary were read on."""
        return getattr(self.published, "row_length", None)


@dataclass(frozen=True)
class Run:
    name: str
    members: list[Member]
    """The parent first. Of a recipe without a family: one for each size there is."""
    stages: dict[str, Stage]
    wall_seconds: float | None
    images: list[Sample]
    notes: list[str]
    """What could not be read, or no longer holds."""

    def member_of(self) -> dict[str, str]:
        """Of the stages: the model that a stage belongs to, or that its source belongs to."""
        found = {stage.name: member.name for member in self.members for stage in member.stages.values()}
        for _ in self.stages:  # a recipe may name a stage before its source
            found = {s.name: found[s.source] for s in self.stages.values() if s.source in found} | found
        return found


def read_run(run_dir: Path) -> Run:
    """Everything the report shows.

    Raises:
        UserError: `run_dir` is not a directory, or holds no readable recipe.json.
    """
    notes: list[str] = []
    if not run_dir.is_dir():
        raise UserError(f"run {str(run_dir)!r} is not a directory; give one that `ministral-jax run` wrote")
    if not (path := run_dir / "recipe.json").is_file():
        raise UserError(
            f"{str(run_dir)!r} is not a run: it has no recipe.json; give a directory that `ministral-jax run` wrote"
        )
    if (recipe := _read(RecipeFile, path, notes)) is None:
        raise UserError(f"{str(path)!r} is not a recipe: it must be a JSON object with `name` and `stages`")
    stages = {name: read_stage(run_dir / Path(name).name, name, s, notes) for name, s in recipe.stages.items()}
    told = _read(summary.Summary, run_dir / "summary.json", notes)
    samples = _read(Samples, run_dir / "samples.json", notes) or Samples()
    made = {name: stage.manifest for name, stage in stages.items() if stage.manifest}
    here = {name: stage.digest for name, stage in stages.items() if stage.state != "waiting"}
    for name, why in stale_stages(made, here).items():
        stages[name] = replace(stages[name], stale=why)
        notes.append(f"{name} is stale: it was {why}.")
    members = _comparable(_family(recipe.family, told, stages))
    return Run(recipe.name, members, stages, told and told.wall_seconds, samples.images, notes)


M = TypeVar("M", bound=BaseModel)


def _read(model: type[M], path: Path, notes: list[str]) -> M | None:
    if not path.is_file():
        return None
    try:
        return model.model_validate_json(path.read_bytes())
    except ValidationError:
        notes.append(f"{path.parent.name}/{path.name} could not be read and is left out.")
        return None


def read_stage(directory: Path, name: str, settings: Settings | None = None, notes: list[str] | None = None) -> Stage:
    """Without `settings` its verb is that of the manifest. What cannot be read is told in `notes`."""
    notes = [] if notes is None else notes
    do, source = (settings.do, settings.source) if settings else ("", None)
    optional, given = (settings.optional, settings.model_extra or {}) if settings else (False, {})
    if not directory.is_dir():
        return Stage(name, do, source, optional=optional, settings=given)
    manifest = None
    try:
        manifest = read_manifest(directory)
    except UserError:
        notes.append(f"{name}/manifest.json could not be read and is left out.")
    records = read_jsonl(directory / "metrics.jsonl")
    timed = [record for record in records if record.get("kind") == "time"]
    answers = _read(Answers, directory / "answers.json", notes) or Answers()
    return Stage(
        name,
        do or (manifest.do if manifest else ""),
        source,
        state="finished" if manifest else "unfinished",
        manifest=manifest,
        digest=digest(directory) if manifest else None,
        train=_rows(records, "train"),
        evals=_rows(records, "eval"),
        time=goodput(timed),
        attempts=len({record["attempt"] for record in timed}),
        answers=answers.answers,
        asked=answers.prompts,
        optional=optional,
        settings=manifest.config if manifest else given,
    )


def _rows(records: list[Row], kind: str) -> list[Row]:
    """Of one kind in order of steps; of a step that was run twice (after a crash) the later one."""
    by_step = {record["step"]: record for record in records if record.get("kind") == kind and "step" in record}
    return [by_step[step] for step in sorted(by_step)]


def points(rows: list[Row], key: str, over: str) -> tuple[np.ndarray, np.ndarray]:
    """What to draw against what; without what no axis can show."""
    found = np.array([(row[over], row[key]) for row in rows if key in row and over in row], float).reshape(-1, 2)
    x, y = found[(np.abs(found) < 1e30).all(1)].T
    return x, y


def _family(family: Family | None, told: summary.Summary | None, stages: dict[str, Stage]) -> list[Member]:
    if family is None:
        sizes = {stage.spec.parameters: stage for stage in reversed(stages.values()) if stage.spec}
        return [_member(stage.name, None, {"base": stage}) for stage in reversed(sizes.values())]
    parent = {"base": stages[family.parent]} if family.parent in stages else {}
    members = [_member("parent", told and told.parent, parent)]
    for name, last in family.children.items():
        published = told.children.get(name) if told else None
        roles = published.stages if published else _roles(last, stages)
        found = {role: stages[stage] for role, stage in roles.items() if stage in stages}
        for role, long in (("short", "base"), ("scratch_short", "scratch_base")):
            if found.get(role) is found.get(long):  # one distil stage is both
                found.pop(long, None)
        members.append(_member(name, published, found))
    return members


def _member(name: str, published: summary.Member | None, stages: dict[str, Stage]) -> Member:
    specs = [stages[role].spec for role in ("base", "short", "pruned") if role in stages]
    return Member(name, next((spec for spec in specs if spec), None), published, stages)


def _comparable(members: list[Member]) -> list[Member]:
    """Hides what is stale, and what was read on rows of another length than the same figure of most members."""
    hidden: list[dict[str, str]] = [{} for _ in members]
    for member, why in zip(members, hidden, strict=True):
        if any(stage.stale for role, stage in member.stages.items() if "scratch" in role):
            why |= dict.fromkeys(_OF_BASELINE, "stale")
        if member.stale:
            why |= dict.fromkeys(summary.Child.model_fields, "stale")
    for key in OF_ROWS:
        lengths = [
            m.row_length if replace(m, hidden=h).figure(key) is not None else None
            for m, h in zip(members, hidden, strict=True)
        ]
        common = most_common(length for length in lengths if length)
        for why, length in zip(hidden, lengths, strict=True):
            why |= {key: f"rows of {length}"} if length not in (None, common) else {}
    return [replace(member, hidden=why) for member, why in zip(members, hidden, strict=True)]


def _roles(last: str | None, stages: dict[str, Stage]) -> dict[str, str]:
    """Of a child that is not in the summary yet, walking back from its last stage to the surgery."""
    chain: list[str] = []
    while last in stages and last not in chain:
        chain.insert(0, last)
        verb = verbs().get(stages[last].do)
        last = None if verb and verb.prunes else stages[last].source
    distilled = [name for name in chain if (verb := verbs().get(stages[name].do)) and verb.distils]
    roles = {"pruned": chain[0]} if chain else {}
    for role, name in zip(("short", "base"), (distilled[0], distilled[-1]) if distilled else (), strict=False):
        roles |= {role: name, f"scratch_{role}": scratch_name(name)}
    return roles

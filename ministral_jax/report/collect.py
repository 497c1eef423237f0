"""A run directory as plain values. Reads JSON only; bears what a killed or unfinished run leaves behind."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ministral_jax.errors import UserError
from ministral_jax.files import read_jsonl
from ministral_jax.models.spec import ModelSpec
from ministral_jax.report.style import accent
from ministral_jax.stages.manifest import digest
from ministral_jax.training.goodput import goodput

Row = dict[str, float]
"""One line of metrics.jsonl: the values that are numbers."""

POST_TRAINING = ("sft", "reward", "odpo", "grpo")
"""What the stages do that make a model answer; they belong to no member's curve of KL."""

ROLES = ("pruned", "short", "base", "scratch_short", "scratch_base")
FIGURES = (
    "parameters",
    "decoder_parameters",
    "tokens",
    "tokens_lineage",
    "bits_per_byte",
    "digit_accuracy",
    "kl_after_surgery",
    "kl_final",
    "kl_scratch",
    "token_speedup",
)


@dataclass(frozen=True)
class Stage:
    """One stage directory, or the place of one that has not begun."""

    name: str
    do: str
    source: str | None
    state: str
    """"finished", "unfinished" (has begun, no finished manifest) or "waiting"."""
    spec: ModelSpec | None = None
    manifest: dict[str, Any] = field(default_factory=dict)
    digest: str | None = None
    """SHA-256 of the finished manifest, what later stages name this one by."""
    train: list[Row] = field(default_factory=list)
    evals: list[Row] = field(default_factory=list)
    time: dict[str, float] = field(default_factory=dict)
    """Seconds by kind, see `training.goodput`."""
    attempts: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    """The stage in the recipe."""
    answers: list[dict[str, Any]] = field(default_factory=list)
    """Some of those of the last evaluation: "prompt" (JSON), "answer", "reward", "parts"."""

    def surgery(self, step: str) -> dict[str, Any]:
        """What a prune stage recorded about one of its steps; empty when it did not take that step."""
        steps = mapping(self.manifest.get("prune")).get("steps")
        found = [s for s in steps if mapping(s).get("step") == step] if isinstance(steps, list) else []
        return mapping(found[0]) if found else {}

    @property
    def surgery_kl(self) -> dict[str, float]:
        """Held-out KL from the source after each surgery step, in order."""
        recorded = mapping(mapping(self.manifest.get("prune")).get("kl"))
        return {str(step): kl for step, value in recorded.items() if (kl := number(value)) is not None}

    @property
    def parent_digest(self) -> str | None:
        """Of the source's manifest when this stage was made."""
        recorded = mapping(mapping(self.manifest.get("inputs")).get("parent")) or mapping(self.manifest.get("parent"))
        return str(recorded["digest"]) if "digest" in recorded else None

    @property
    def tokens(self) -> float | None:
        """Tokens seen by this stage."""
        seen = [row["tokens"] for row in self.train + self.evals if "tokens" in row]
        return number(self.manifest.get("tokens")) or (max(seen) if seen else None)

    @property
    def steps(self) -> float | None:
        """Made so far."""
        made = [row["step"] for row in self.train + self.evals if "step" in row]
        return number(self.manifest.get("steps")) or (max(made) if made else None)

    def share_of_time(self, kind: str) -> float | None:
        whole = sum(self.time.values())
        return self.time.get(kind, 0.0) / whole if whole > 0 else None

    def first(self, key: str) -> float | None:
        """The oldest held-out value of a metric; None when there is at most one."""
        values = [row[key] for row in self.evals if key in row]
        return values[0] if len(values) > 1 else None

    def last(self, key: str) -> float | None:
        """The newest held-out value of a metric."""
        values = [row[key] for row in self.evals if key in row]
        return values[-1] if values else number(mapping(self.manifest.get("metrics")).get(key))


@dataclass(frozen=True)
class Crossing:
    """Where a pruned start reached the last held-out KL of its from-scratch baseline."""

    kl: float
    tokens: float | None
    """Tokens the pruned start needed: 0 when it was there before any training, None if it never got there."""
    scratch_tokens: float
    first: float
    """Tokens at the pruned start's first evaluation after an update."""

    @property
    def speedup(self) -> float | None:
        """Baseline's tokens over the pruned start's; when that needed none, a lower bound from its first evaluation."""
        needed = self.tokens or self.first
        return None if self.tokens is None else self.scratch_tokens / needed if needed > 0 else math.inf


@dataclass(frozen=True)
class Model:
    """A member of the family: its sizes, its figures and the stages that made it."""

    name: str
    colour: str
    spec: ModelSpec | None
    figures: dict[str, float | None]
    stages: dict[str, Stage]
    """By role; of the parent "base" alone."""

    @property
    def made(self) -> bool:
        """Whether anything of it exists yet."""
        return self.spec is not None or self.figures["parameters"] is not None

    @property
    def entry(self) -> dict[str, Any]:
        return {**self.figures, "spec": self.spec.model_dump() if self.spec else None}

    @property
    def crossing(self) -> Crossing | None:
        """Over the short stage."""
        if "short" not in self.stages or "scratch_short" not in self.stages:
            return None
        return crossing(self.stages["short"].evals, self.stages["scratch_short"].evals)

    @property
    def speedup(self) -> float | None:
        known = self.figures.get("token_speedup")
        found = self.crossing
        return known if known is not None else found.speedup if found else None


@dataclass(frozen=True)
class Run:
    path: Path
    name: str
    parent: Model | None
    children: list[Model]
    stages: list[Stage]
    wall_seconds: float | None
    samples: dict[str, Any]
    notes: list[str]
    """What could not be read."""

    @property
    def models(self) -> list[Model]:
        return ([self.parent] if self.parent else []) + self.children

    @property
    def colours(self) -> dict[str, str]:
        """Of the stages: that of the model which a stage belongs to, or which its source belongs to."""
        found = {stage.name: model.colour for model in self.models for stage in model.stages.values()}
        for _ in self.stages:  # a recipe may name a stage before its source
            found |= {s.name: found[s.source] for s in self.stages if s.name not in found and s.source in found}
        return found

    @property
    def summary(self) -> dict[str, Any]:
        """What `family_figure` draws: summary.json, completed from the stages, each entry with its "spec"."""
        parent = self.parent.entry if self.parent else None
        return {"parent": parent, "children": {child.name: child.entry for child in self.children}}


def number(value: Any) -> float | None:
    """`value` if it is a number (NaN and infinity are), else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def numbers(values: Any) -> list[float]:
    """A list of numbers, NaN where an entry is something else; empty for anything that is not a list."""
    return [math.nan if (x := number(v)) is None else x for v in values] if isinstance(values, list) else []


def mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def series(
    rows: Iterable[Row], key: str, start: float = 0.0, positive: bool = False, over: str = "tokens"
) -> tuple[list[float], list[float]]:
    """Tokens (counted from `start`), or what else to draw `over`, and values of the rows that have `key`.

    What no axis can show is left out.
    """

    def drawable(value: float) -> bool:
        return math.isfinite(value) and abs(value) < 1e30 and (value > 1e-30 or not positive)

    points = [(start + row[over], row[key]) for row in rows if key in row and over in row]
    points = [p for p in points if drawable(p[1]) and math.isfinite(p[0]) and abs(p[0]) < 1e30]
    return [x for x, _ in points], [y for _, y in points]


def crossing(pruned: list[Row], scratch: list[Row]) -> Crossing | None:
    """First point where the pruned start's held-out KL is at most the last one of `scratch`.

    Between two evaluations KL is taken as linear in tokens, which errs against the pruned start. None when either curve
    is missing.
    """
    (xs, ys), (scratch_xs, scratch_ys) = (series(rows, "kl", positive=True) for rows in (pruned, scratch))
    if not ys or not scratch_ys or scratch_xs[-1] <= 0:
        return None
    level, end = scratch_ys[-1], scratch_xs[-1]
    first = next((x for x in xs if x > 0), 0.0)
    for i, y in enumerate(ys):
        if y <= level:
            share = (ys[i - 1] - level) / (ys[i - 1] - y) if i else 1.0
            return Crossing(level, xs[i - 1] + share * (xs[i] - xs[i - 1]) if i else xs[0], end, first)
    return Crossing(level, None, end, first)


def read_run(run_dir: Path) -> Run:
    """Everything the report shows.

    Raises:
        UserError: `run_dir` is not a directory, or holds no readable recipe.json.
    """
    run_dir = Path(run_dir)
    notes: list[str] = []
    recipe = _recipe(run_dir)
    stages = [_stage(run_dir, name, mapping(raw), notes) for name, raw in mapping(recipe["stages"]).items()]
    summary = mapping(_json(run_dir / "summary.json", notes))
    parent, children = _family(recipe, summary, {stage.name: stage for stage in stages})
    return Run(
        path=run_dir,
        name=str(recipe.get("name", run_dir.name)),
        parent=parent,
        children=children,
        stages=stages,
        wall_seconds=number(summary.get("wall_seconds")),
        samples=mapping(_json(run_dir / "samples.json", notes)),
        notes=notes,
    )


def _recipe(run_dir: Path) -> dict[str, Any]:
    if not run_dir.is_dir():
        raise UserError(f"run {str(run_dir)!r} is not a directory; give one that `ministral-jax run` wrote")
    path = run_dir / "recipe.json"
    if not path.is_file():
        raise UserError(
            f"{str(run_dir)!r} is not a run: it has no recipe.json; give a directory that `ministral-jax run` wrote"
        )
    recipe = mapping(_json(path, []))
    if not isinstance(recipe.get("stages"), dict):
        raise UserError(f"{str(path)!r} is not a recipe: it must be a JSON object with `stages`")
    return recipe


def _json(path: Path, notes: list[str]) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (ValueError, OSError, RecursionError):
        notes.append(f"{path.parent.name}/{path.name} could not be read and is left out")
        return None


def _stage(run_dir: Path, name: str, raw: dict[str, Any], notes: list[str]) -> Stage:
    directory = run_dir / name
    inside = directory.parent == run_dir and directory.is_dir()
    manifest = mapping(_json(directory / "manifest.json", notes)) if inside else {}
    rows = read_jsonl(directory / "metrics.jsonl") if inside else []
    finished = manifest.get("status") == "finished"
    spec = None
    if manifest.get("spec") is not None:
        try:
            spec = ModelSpec.model_validate(manifest["spec"])
        except ValidationError:
            notes.append(f"the sizes in {name}/manifest.json are not those of a model and are left out")
    source = raw.get("from")
    answers = mapping(_json(directory / "answers.json", notes)).get("answers") if inside else None
    return Stage(
        name=name,
        do=str(raw.get("do", "?")),
        source=str(source) if source is not None else None,
        state="finished" if finished else "unfinished" if inside else "waiting",
        spec=spec,
        manifest=manifest,
        digest=digest(directory) if finished else None,
        train=rows_of(rows, "train"),
        evals=rows_of(rows, "eval"),
        time=goodput(timed := [row for row in rows if row.get("kind") == "time"]),
        attempts=len({row.get("attempt") for row in timed}),
        settings=raw,
        answers=[mapping(answer) for answer in answers] if isinstance(answers, list) else [],
    )


def rows_of(rows: list[dict[str, Any]], kind: str) -> list[Row]:
    """Rows of one kind in order of steps; of a step that was run twice (after a crash) the later row."""
    numeric = [
        {k: x for k, v in row.items() if (x := number(v)) is not None} for row in rows if row.get("kind") == kind
    ]
    by_step = {row.get("step", row.get("tokens", i)): row for i, row in enumerate(numeric)}
    return [by_step[step] for step in sorted(by_step)]


def _family(
    recipe: Mapping[str, Any], summary: Mapping[str, Any], stages: dict[str, Stage]
) -> tuple[Model | None, list[Model]]:
    family = mapping(recipe.get("family"))
    ends = {name: str(last) for name, last in mapping(family.get("children")).items()} or _pruned_ends(stages)
    entries = {name: mapping(entry) for name, entry in mapping(summary.get("children")).items()}
    children = []
    for index, name in enumerate(dict.fromkeys([*ends, *entries]), start=1):
        roles = {role: str(s) for role, s in mapping(entries.get(name, {}).get("stages")).items()}
        roles = {**_roles(ends.get(name), stages), **roles}
        found = {role: stages[roles[role]] for role in ROLES if roles.get(role) in stages}
        for role, long in (("short", "base"), ("scratch_short", "scratch_base")):
            if found.get(role) is found.get(long):  # one distil stage is both
                found.pop(long, None)
        children.append(_model(name, accent(index), entries.get(name, {}), found))
    entry = mapping(summary.get("parent"))
    first = next((s.name for s in stages.values() if s.do in ("train", "import")), None)
    stage = stages.get(str(entry.get("stage") or family.get("parent") or first))
    parent = _model("parent", accent(0), entry, {"base": stage} if stage else {})
    return (parent if stage or entry else None), children


def _pruned_ends(stages: dict[str, Stage]) -> dict[str, str]:
    """Without a list of children: one for each prune stage, followed along the distil stages that go on from it."""
    ends = {}
    for stage in stages.values():
        if stage.do == "prune":
            chain = [stage.name]
            while after := [s.name for s in stages.values() if s.do == "distill" and s.source == chain[-1]]:
                if after[0] in chain:
                    break
                chain.append(after[0])
            ends[stage.name.removesuffix("-pruned")] = chain[-1]
    return ends


def _roles(last: str | None, stages: dict[str, Stage]) -> dict[str, str]:
    """Stages of a child by what they do for it, walking back from its last one to the prune stage."""
    chain: list[Stage] = []
    while last in stages and stages[last] not in chain:
        chain.insert(0, stages[last])
        if chain[0].do != "distill":
            break
        last = chain[0].source
    distilled = [stage.name for stage in chain if stage.do == "distill"]
    roles = dict(zip(("short", "base"), distilled, strict=False))
    roles |= {f"scratch_{role}": f"{name}-scratch" for role, name in roles.items()}
    return roles | ({"pruned": chain[0].name} if chain and chain[0].do == "prune" else {})


def _model(name: str, colour: str, entry: Mapping[str, Any], stages: dict[str, Stage]) -> Model:
    made = [stages[role] for role in ("base", "short", "pruned") if role in stages and stages[role].spec]
    spec = made[0].spec if made else None
    figures = {key: number(entry.get(key)) for key in FIGURES}
    derived = _derived(spec, stages)
    return Model(name, colour, spec, {k: derived.get(k) if v is None else v for k, v in figures.items()}, stages)


def _derived(spec: ModelSpec | None, stages: dict[str, Stage]) -> dict[str, float | None]:
    """Figures of a run that has not written its summary yet."""
    figures: dict[str, float | None] = {}
    if spec:
        figures |= {"parameters": float(spec.parameters), "decoder_parameters": float(spec.decoder_parameters)}
    roles = [role for role in ("short", "base") if role in stages and stages[role].evals]
    if not roles:
        return figures
    trained, scratch = [stages[role] for role in roles], stages.get(f"scratch_{roles[-1]}")
    return figures | {
        **{key: trained[-1].last(key) for key in ("bits_per_byte", "digit_accuracy")},
        "tokens": sum(stage.tokens or 0 for stage in trained),
        "kl_after_surgery": next((row["kl"] for row in trained[0].evals if "kl" in row), None),
        "kl_final": trained[-1].last("kl"),
        "kl_scratch": scratch.last("kl") if scratch else None,
    }

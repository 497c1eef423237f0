"""Sweeps, the pure part: which points there are, what they are called, and which stages they share.

A sweep is a recipe and, for some of its keys, several values. Keys of one axis vary together (`zip`); axes multiply
(`product`). Every combination is a point: a recipe of its own. Two points share a stage when its settings and sizes
(`identity.identity`), and those of everything it is made from, are equal; it is then run once, see `sweep_run.py`.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field

from ministral_jax import yaml12
from ministral_jax.errors import UserError
from ministral_jax.explain import suggest, validate
from ministral_jax.files import digest_of
from ministral_jax.recipe.layers import find_recipe, is_overlay, sort_words
from ministral_jax.recipe.load import load_fetched, order, resolve_specs
from ministral_jax.recipe.types import Recipe
from ministral_jax.runs.identity import identity
from ministral_jax.runs.naming import as_yaml, label, point_name, short_keys
from ministral_jax.settings import Frozen
from ministral_jax.stages import figures

_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class Measure(Frozen):
    """What goes into the table. Empty: every figure of the family's children, or of the last stages that were asked."""

    stages: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()


Values = list[Any]


class Sweep(Frozen):
    """A sweep as a YAML file: `configs/sweeps/*.yaml`, or a study. Keys are dotted, as in the overrides of `run`."""

    recipe: str
    overlays: tuple[str, ...] = ()
    """Files that are laid over the recipe, before any value."""
    name: str = Field(default="", pattern=rf"^$|{_NAME}")
    """Of the directory below `runs/`; the file's name when unset."""
    product: dict[str, Values] = Field(default_factory=dict)
    zip: dict[str, Values] = Field(default_factory=dict)
    overrides: dict[str, Any] = Field(default_factory=dict)
    """The same for all points."""
    stages: tuple[str, ...] = ()
    """To run, with what they need; all when empty."""
    measure: Measure = Measure()

    @property
    def axes(self) -> list[dict[str, list[Any]]]:
        """Keys that vary together, each with what it is at every place along the axis."""
        return [*({key: values} for key, values in self.product.items()), *([self.zip] if self.zip else [])]


class Measured(BaseModel):
    """One stage whose figures are compared."""

    stage: str
    metrics: tuple[str, ...]
    """Empty: all that it has."""
    curve: tuple[str, ...]
    """Distil stages from the surgery to it, whose held-out KL makes one curve."""


class PointRecord(BaseModel):
    name: str
    settings: dict[str, Any]
    """The varying keys."""
    error: str | None = None
    """Why it failed."""
    stages: dict[str, str]
    """In order, every stage that is run, and its directory, `shared/<stage>-<hash of what it is made of>`."""
    state: Literal["finished", "unfinished", "failed"] = "unfinished"
    figures: dict[str, dict[str, float]] = Field(default_factory=dict)
    """By measured stage and name of the figure."""


class Point(PointRecord):
    """One combination of values: a directory with a recipe of its own."""

    overrides: tuple[str, ...]
    """Everything that `load_recipe` is given: overlays, then values, the fixed ones first."""
    recipe: Recipe


class SweepRecord(BaseModel):
    """`sweep.json`."""

    name: str
    recipe: str
    keys: dict[str, str]
    """The varying keys, each with its short form."""
    axes: tuple[tuple[str, ...], ...]
    overrides: dict[str, Any]
    wanted: tuple[str, ...]
    """Stages that were asked for; all when empty."""
    measure: tuple[Measured, ...]
    stages: int
    """How many make the points, each shared one once."""
    stages_unshared: int
    """How many the points would have made one by one."""
    points: tuple[PointRecord, ...]
    seconds: float = 0.0
    """Spent on finished stages."""


def read_sweep(path: str | Path, words: Iterable[str] = (), zipped: bool = False, name: str | None = None) -> Sweep:
    """A sweep file, or a recipe and `key=v1,v2` words; words may also narrow or extend a sweep file.

    Args:
        words: `key=v1,v2` (a YAML flow sequence without its brackets: `key=[1,2],[3,4]` has two values), or the name of
            a stage, or an overlay. A key with one value is the same for all points.
        zipped: the words' keys vary together instead of multiplying.
        name: of the sweep's directory.

    Raises:
        UserError: unreadable or inconsistent; nothing is said of the recipe's own keys yet, see `expand`.
    """
    settings, named = sort_words(words)
    overlays = tuple(filter(is_overlay, settings))
    given = _parse_settings(word for word in settings if word not in overlays)
    file = _read_file(find_recipe(path))
    sweep = file or Sweep(recipe=str(path))
    product, zips, fixed = (
        {key: value for key, value in group.items() if key not in given}
        for group in (sweep.product, sweep.zip, sweep.overrides)
    )
    (zips if zipped else product).update({key: values for key, values in given.items() if len(values) > 1})
    fixed |= {key: values[0] for key, values in given.items() if len(values) == 1}
    lengths = {key: len(values) for key, values in zips.items()}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{key} has {count}" for key, count in lengths.items())
        raise UserError(f"keys that vary together need equally many values, but {counts}")
    if not product and not zips:
        raise UserError(f"nothing varies in the sweep of {sweep.recipe}; give a key several values: key=v1,v2")
    if name is not None and not re.match(_NAME, name):
        raise UserError(f"--name {name!r} must be letters, digits, '.', '-' and '_'")
    short = [] if file else [label(text) for text in short_keys((*product, *zips)).values()]
    name = name or sweep.name or "-".join([Path(path).stem, *short])
    said = {"name": name, "product": product, "zip": zips, "overrides": fixed, "overlays": sweep.overlays + overlays}
    return sweep.model_copy(update=said | {"stages": tuple(named) or sweep.stages})


def _read_file(path: Path) -> Sweep | None:
    """None when the file is a recipe (or no YAML at all, which reading the recipe will say)."""
    try:
        raw = yaml12.load(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return None
    if not isinstance(raw, dict) or "recipe" not in raw:
        return None
    sweep = validate(Sweep, raw, f"sweep {path}")
    for group, keys in (("product", sweep.product), ("zip", sweep.zip)):
        for key, values in keys.items():
            if len(values) < 2:
                count = "one value" if values else "no value"
                raise UserError(f"sweep {path}: {group}.{key} has {count} and does not vary; put it under `overrides`")
    for key in sweep.product.keys() & sweep.zip.keys():
        raise UserError(f"sweep {path}: {key} is under `product` and under `zip`; it can vary in one way only")
    for key in sweep.overrides.keys() & (sweep.product.keys() | sweep.zip.keys()):
        raise UserError(f"sweep {path}: {key} is under `overrides` and varies too; keep one of them")
    return sweep


def _parse_settings(words: Iterable[str]) -> dict[str, list[Any]]:
    settings: dict[str, list[Any]] = {}
    for word in words:
        key, _, text = word.partition("=")
        try:
            values = yaml12.load(f"[{text}\n]")
        except yaml.YAMLError:
            values = None
        if not key or not isinstance(values, list):
            raise UserError(f"{word!r} must have the form dotted.key=v1,v2 with values in YAML; quote one with a comma")
        if not values:
            raise UserError(f"{word!r} has no value; give {key} one for all points or several to vary")
        if key in settings:
            raise UserError(f"{key} is given twice; write all its values in one: {key}=v1,v2")
        settings[key] = values
    return settings


def expand(sweep: Sweep) -> list[Point]:
    """Every point, the last key varying fastest, with its recipe read and its stages identified.

    Raises:
        UserError: a point's recipe is wrong (the point is named), two points would have the same name or be the same.
    """
    points: list[Point] = []
    for name, settings in _named(sweep):
        values = (f"{key}={as_yaml(value)}" for key, value in (sweep.overrides | settings).items())
        overrides = (*sweep.overlays, *values)
        try:
            recipe = load_fetched(sweep.recipe, overrides)
            stages = stage_directories(recipe, sweep.stages)
        except UserError as error:
            raise UserError(f"point {name}: {error}") from None
        points.append(Point(name=name, settings=settings, stages=stages, overrides=overrides, recipe=recipe))
    for a, b in itertools.combinations(points, 2):
        if a.stages == b.stages:
            keys = [key for key in a.settings if a.settings[key] != b.settings[key]]
            raise UserError(
                f"points {a.name} and {b.name} are the same in every stage that is run ({', '.join(a.stages)}): "
                f"{' and '.join(keys)} makes no difference there"
            )
    return points


def _named(sweep: Sweep) -> list[tuple[str, dict[str, Any]]]:
    short = short_keys([key for axis in sweep.axes for key in axis])
    axes = [[dict(zip(axis, place, strict=True)) for place in zip(*axis.values(), strict=True)] for axis in sweep.axes]
    named: list[tuple[str, dict[str, Any]]] = []
    for places in itertools.product(*axes):
        settings = {key: value for place in places for key, value in place.items()}
        name = point_name(settings, short)
        for other_name, other in named:
            if other_name.lower() == name.lower():  # some file systems take no notice of case
                raise UserError(_same_name(name, other, settings))
        named.append((name, settings))
    return named


def _same_name(name: str, other: dict[str, Any], settings: dict[str, Any]) -> str:
    differing = [f"{key} = {other[key]!r} and {value!r}" for key, value in settings.items() if other[key] != value]
    if not differing:
        return f"the point {name} occurs twice; give every combination of values once"
    letters = "write these values so that their letters differ"
    return f"two points would both be called {name}: {', '.join(differing)}; {letters}"


def stage_directories(recipe: Recipe, wanted: Iterable[str]) -> dict[str, str]:
    """Stages in the order of their run, each with the directory that its whole making determines.

    Raises:
        UserError: see `order` and `resolve_specs`.
    """
    names, hashes = order(recipe, wanted), {}
    specs = resolve_specs(recipe, names)
    for name in names:
        sources = [hashes[other] for other in recipe.stages[name].inputs().values()]
        made_of = identity(recipe.stages[name], specs[name], anywhere=False)
        hashes[name] = digest_of([{key: made_of[key] for key in ("config", "spec")}, sources])
    return {name: f"shared/{name}-{hashes[name][:10]}" for name in names}


def users(points: Iterable[Point]) -> Counter[str]:
    """Directories below `shared/`, each with the number of points that use it."""
    return Counter(directory for point in points for directory in point.stages.values())


def describe(sweep: Sweep, points: Sequence[Point]) -> SweepRecord:
    """The sweep before anything has run; its points are these very ones.

    Raises:
        UserError: see `measured`.
    """
    used = users(points)
    return SweepRecord(
        name=sweep.name,
        recipe=sweep.recipe,
        keys=short_keys(list(points[0].settings)),
        axes=tuple(tuple(axis) for axis in sweep.axes),
        overrides=sweep.overrides,
        wanted=sweep.stages,
        measure=tuple(measured(sweep, points)),
        stages=len(used),
        stages_unshared=used.total(),
        points=tuple(points),
    )


def measured(sweep: Sweep, points: Sequence[Point]) -> list[Measured]:
    """The stages that the table compares: those asked for, else the family's children, else the last ones.

    Raises:
        UserError: a stage that is not run, a metric that does not exist.
    """
    for metric in sweep.measure.metrics:
        if metric not in figures():
            raise UserError(f"measure.metrics: no metric {metric!r}{suggest(metric, figures())}")
    common = [name for name in points[0].stages if all(name in point.stages for point in points)]
    for stage in sweep.measure.stages:
        if stage not in common:
            raise UserError(f"measure.stages: {stage!r} is not run in every point{suggest(stage, common)}")
    recipe = points[0].recipe
    stages = sweep.measure.stages or _last_stages(recipe, common)
    return [Measured(stage=stage, metrics=sweep.measure.metrics, curve=_curve(recipe, stage)) for stage in stages]


def _last_stages(recipe: Recipe, names: list[str]) -> list[str]:
    children = recipe.family.children.values() if recipe.family else ()
    if found := [name for name in children if name in names]:
        return found
    models = [name for name in names if recipe.stages[name].makes_model or recipe.stages[name].figures]
    used = {other for name in models for other in recipe.stages[name].inputs().values()}
    last = [name for name in models if name not in used]
    return [name for name in last if not name.endswith("-scratch")] or last


def _curve(recipe: Recipe, last: str) -> tuple[str, ...]:
    chain: list[str] = []
    name: str | None = last
    while name is not None and recipe.stages[name].distils:
        chain.insert(0, name)
        name = recipe.stages[name].source
    return tuple(chain)

"""Sweeps, the pure part: which points there are, what they are called, and which stages they share.

A sweep is a recipe and, for some of its keys, several values. Keys of one axis vary together (`zip`); axes multiply
(`product`). Every combination is a point: a recipe of its own. Two points share a stage when its settings and sizes
(`cascade.identity`), and those of everything it is made from, are equal; it is then run once, see `sweep_run.py`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from ministral_jax.errors import UserError
from ministral_jax.explain import explain, suggest
from ministral_jax.recipe.load import find_recipe, load_recipe, order, resolve_specs
from ministral_jax.recipe.types import Recipe
from ministral_jax.runs.cascade import identity
from ministral_jax.settings import Frozen
from ministral_jax.stages import figures

METRICS = tuple(figures())
"""Held-out figures of the verbs, as manifests have them."""

LONGEST_NAME = 120
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class Measure(Frozen):
    """What goes into the table. Empty: every figure of the family's children, or of the last stages that were asked."""

    stages: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()


class SweepFile(Frozen):
    """A sweep as a YAML file: `configs/sweeps/*.yaml`. Keys are dotted, as in the overrides of `run`."""

    recipe: str
    name: str | None = Field(default=None, pattern=_NAME)
    """Of the directory below `runs/`; the file's name when unset."""
    product: dict[str, list[Any]] = Field(default_factory=dict)
    zip: dict[str, list[Any]] = Field(default_factory=dict)
    overrides: dict[str, Any] = Field(default_factory=dict)
    """The same for all points."""
    stages: tuple[str, ...] = ()
    """To run, with what they need; all when empty."""
    measure: Measure = Measure()


@dataclass(frozen=True)
class Axis:
    """Keys that vary together, and what they are at each place along the axis."""

    keys: tuple[str, ...]
    places: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class Sweep:
    recipe: str
    """Path."""
    name: str
    axes: tuple[Axis, ...]
    overrides: dict[str, Any]
    stages: tuple[str, ...]
    measure: Measure

    @property
    def keys(self) -> tuple[str, ...]:
        """Those that vary."""
        return tuple(key for axis in self.axes for key in axis.keys)


@dataclass(frozen=True)
class Point:
    """One combination of values: a directory with a recipe of its own."""

    name: str
    settings: dict[str, Any]
    """The varying keys."""
    overrides: tuple[str, ...]
    """Everything that `load_recipe` is given, the fixed ones first."""
    recipe: Recipe
    shared: dict[str, str]
    """In order, every stage that is run, and its directory below `shared/`: `<stage>-<hash of what it is made of>`."""


def read_sweep(path: str | Path, words: Iterable[str] = (), zipped: bool = False, name: str | None = None) -> Sweep:
    """A sweep file, or a recipe and `key=v1,v2` words; words may also narrow or extend a sweep file.

    Args:
        words: `key=v1,v2` (a YAML flow sequence without its brackets: `key=[1,2],[3,4]` has two values), or the name of
            a stage. A key with one value is the same for all points.
        zipped: the words' keys vary together instead of multiplying.
        name: of the sweep's directory.

    Raises:
        UserError: unreadable or inconsistent; nothing is said of the recipe's own keys yet, see `expand`.
    """
    words = list(words)
    given = _parse_settings(word for word in words if "=" in word)
    file = _read_file(find_recipe(path))
    recipe, stages, measure = str(path), tuple(word for word in words if "=" not in word), Measure()
    product, zips, fixed = {}, {}, {}
    if file is not None:
        recipe, stages, measure = file.recipe, stages or file.stages, file.measure
        product, zips, fixed = dict(file.product), dict(file.zip), dict(file.overrides)
        _check_file(file, str(path))
        for key in given:
            for group in (product, zips, fixed):
                group.pop(key, None)
    varying = {key: values for key, values in given.items() if len(values) > 1}
    fixed |= {key: values[0] for key, values in given.items() if len(values) == 1}
    if zipped:
        zips |= varying
    else:
        product |= varying
    axes = _axes(product, zips)
    if not axes:
        raise UserError(f"nothing varies in the sweep of {recipe}; give a key several values: key=v1,v2")
    if name is not None and not re.match(_NAME, name):
        raise UserError(f"--name {name!r} must be letters, digits, '.', '-' and '_'")
    short = [label(text) for text in short_keys([key for axis in axes for key in axis.keys]).values()]
    stem = Path(path).stem
    name = name or (file.name or stem if file is not None else "-".join([stem, *short]))
    return Sweep(recipe, name, axes, fixed, stages, measure)


def _read_file(path: Path) -> SweepFile | None:
    """None when the file is a recipe (or no YAML at all, which reading the recipe will say)."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return None
    if not isinstance(raw, dict) or "recipe" not in raw:
        return None
    try:
        return SweepFile.model_validate(raw)
    except ValidationError as error:
        problems = "; ".join(explain(problem, SweepFile) for problem in error.errors())
        raise UserError(f"sweep {path}: {problems}") from None


def _check_file(file: SweepFile, path: str) -> None:
    for group, keys in (("product", file.product), ("zip", file.zip)):
        for key, values in keys.items():
            if len(values) < 2:
                count = "one value" if values else "no value"
                raise UserError(f"sweep {path}: {group}.{key} has {count} and does not vary; put it under `overrides`")
    for key in file.product.keys() & file.zip.keys():
        raise UserError(f"sweep {path}: {key} is under `product` and under `zip`; it can vary in one way only")
    for key in file.overrides.keys() & (file.product.keys() | file.zip.keys()):
        raise UserError(f"sweep {path}: {key} is under `overrides` and varies too; keep one of them")


def _parse_settings(words: Iterable[str]) -> dict[str, list[Any]]:
    settings: dict[str, list[Any]] = {}
    for word in words:
        key, _, text = word.partition("=")
        try:
            values = yaml.safe_load(f"[{text}\n]")
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


def _axes(product: dict[str, list[Any]], zips: dict[str, list[Any]]) -> tuple[Axis, ...]:
    axes = [Axis((key,), tuple((_plain(value),) for value in values)) for key, values in product.items()]
    lengths = {key: len(values) for key, values in zips.items()}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{key} has {count}" for key, count in lengths.items())
        raise UserError(f"keys that vary together need equally many values, but {counts}")
    if zips:
        axes.append(Axis(tuple(zips), tuple(tuple(map(_plain, place)) for place in zip(*zips.values(), strict=True))))
    return tuple(axes)


def _plain(value: Any) -> Any:
    """YAML 1.1 takes `1e-4` for text; everyone who writes it means the number."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", value):
        return float(value)
    return value


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """Every dotted key by its last part, with as many of the parts before it as tell it from the others.

    `stages.8b-short.optimizer.lr` is `lr`, and `8b-short.lr` beside `stages.3b-short.optimizer.lr`.
    """

    def forms(key: str) -> list[str]:
        parts = key.split(".")
        pairs = [f"{part}.{parts[-1]}" for part in reversed(parts[:-1])]
        return [parts[-1], *pairs, key]

    longest = max(len(forms(key)) for key in keys)
    padded = {key: forms(key) + [key] * (longest - len(forms(key))) for key in keys}
    counts = [Counter(texts[i] for texts in padded.values()) for i in range(longest)]
    return {
        key: next((text for text, count in zip(texts, counts, strict=True) if count[text] == 1), key)
        for key, texts in padded.items()
    }


def label(value: Any) -> str:
    """A value as part of a file's name: letters, digits, '.', '+' and '-'; numbers in their shortest form."""
    if isinstance(value, float) and math.isfinite(value):
        return _shortest(value)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    safe = re.sub(r"[^A-Za-z0-9.+-]+", "-", text)
    safe = safe if isinstance(value, (int, float)) else safe.strip("-.")
    if len(safe) > 32:
        return f"{safe[:24]}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"
    return safe or "empty"


def _shortest(value: float) -> str:
    """0.0001 is 1e-4, 0.01 and 1.5 stay what they are."""
    if value.is_integer() and abs(value) < 1e6:
        return str(int(value))
    return min(repr(value), format(Decimal(repr(value)).normalize(), "e"), key=len)


def expand(sweep: Sweep) -> list[Point]:
    """Every point, the last key varying fastest, with its recipe read and its stages identified.

    Raises:
        UserError: a point's recipe is wrong (the point is named), two points would have the same name or be the same.
    """
    points = []
    for name, settings in _named(sweep):
        overrides = tuple(f"{key}={as_yaml(value)}" for key, value in (sweep.overrides | settings).items())
        try:
            recipe = load_recipe(sweep.recipe, overrides)
            shared = stage_directories(recipe, sweep.stages)
        except UserError as error:
            raise UserError(f"point {name}: {error}") from None
        points.append(Point(name, settings, overrides, recipe, shared))
    _check_distinct(points)
    return points


def _named(sweep: Sweep) -> list[tuple[str, dict[str, Any]]]:
    short, named = short_keys(sweep.keys), []
    for places in itertools.product(*(axis.places for axis in sweep.axes)):
        settings = dict(zip(sweep.keys, itertools.chain.from_iterable(places), strict=True))
        name = point_name(settings, short)
        for other_name, other in named:
            if other_name.lower() == name.lower():  # some file systems take no notice of case
                raise UserError(_same_name(name, other, settings))
        named.append((name, settings))
    return named


def point_name(settings: dict[str, Any], short: dict[str, str]) -> str:
    """`lr=1e-4_layer-score=random`."""
    name = "_".join(f"{label(short[key])}={label(value)}" for key, value in settings.items())
    if len(name) > LONGEST_NAME:
        name = f"{name[: LONGEST_NAME - 11]}-{hashlib.sha256(name.encode()).hexdigest()[:10]}"
    return name


def as_yaml(value: Any) -> str:
    """One line of YAML that reads back as the value."""
    if isinstance(value, str):
        try:
            if yaml.safe_load(value) == value and value.isprintable():
                return value
        except yaml.YAMLError:
            pass
    return json.dumps(value, ensure_ascii=False)


def _same_name(name: str, other: dict[str, Any], settings: dict[str, Any]) -> str:
    pairs = [(key, other[key], settings[key]) for key in settings if other[key] != settings[key]]
    if not pairs:
        return f"the point {name} occurs twice; give every combination of values once"
    differing = ", ".join(f"{key} = {old!r} and {new!r}" for key, old, new in pairs)
    return f"two points would both be called {name}: {differing}; write these values so that their letters differ"


def stage_directories(recipe: Recipe, wanted: Iterable[str]) -> dict[str, str]:
    """Stages in the order of their run, each with the name of the directory that its whole making determines.

    Raises:
        UserError: see `order` and `resolve_specs`.
    """
    names, specs, hashes = order(recipe, wanted), resolve_specs(recipe), {}
    for name in names:
        made_of = [
            identity(recipe.stages[name], specs[name]),
            [hashes[other] for other in recipe.stages[name].inputs().values()],
        ]
        hashes[name] = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    return {name: f"{name}-{hashes[name][:10]}" for name in names}


def _check_distinct(points: list[Point]) -> None:
    for a, b in itertools.combinations(points, 2):
        if a.shared == b.shared:
            keys = [key for key in a.settings if a.settings[key] != b.settings[key]]
            raise UserError(
                f"points {a.name} and {b.name} are the same in every stage that is run ({', '.join(a.shared)}): "
                f"{' and '.join(keys)} makes no difference there"
            )


def users(points: Iterable[Point]) -> dict[str, list[str]]:
    """Directories below `shared/`, each with the points that use it."""
    found: dict[str, list[str]] = {}
    for point in points:
        for directory in point.shared.values():
            found.setdefault(directory, []).append(point.name)
    return found


@dataclass(frozen=True)
class Measured:
    """One stage whose figures are compared."""

    stage: str
    metrics: tuple[str, ...]
    """Empty: all that it has."""
    curve: tuple[str, ...]
    """Distil stages from the surgery to it, whose held-out KL makes one curve."""


def measured(sweep: Sweep, points: Sequence[Point]) -> list[Measured]:
    """The stages that the table compares: those asked for, else the family's children, else the last ones.

    Raises:
        UserError: a stage that is not run, a metric that does not exist.
    """
    for metric in sweep.measure.metrics:
        if metric not in METRICS:
            raise UserError(f"measure.metrics: no metric {metric!r}{suggest(metric, METRICS)}")
    common = [name for name in points[0].shared if all(name in point.shared for point in points)]
    for stage in sweep.measure.stages:
        if stage not in common:
            raise UserError(f"measure.stages: {stage!r} is not run in every point{suggest(stage, common)}")
    recipe = points[0].recipe
    stages = sweep.measure.stages or _last_stages(recipe, common)
    return [Measured(stage, sweep.measure.metrics, _curve(recipe, stage)) for stage in stages]


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

"""From YAML files and overrides to a checked graph of stages: read, merge, validate, expand, order, resolve sizes."""

from __future__ import annotations

import graphlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ministral_jax.data.config import DataConfig
from ministral_jax.distributed.placement import MeshConfig, Rules
from ministral_jax.errors import UserError
from ministral_jax.explain import suggest, validate
from ministral_jax.models.spec import ModelSpec
from ministral_jax.recipe.layers import is_overlay, read_layers
from ministral_jax.recipe.types import Recipe
from ministral_jax.settings import merge
from ministral_jax.stages import Graph, Stage, verbs

Made = Callable[[str], Mapping[str, ModelSpec]]


def load_recipe(path: str | Path, settings: Iterable[str] = (), made: Made = lambda name: {}) -> Recipe:
    """Read, merge and validate a recipe, and check its graph.

    Args:
        path: a YAML file; `configs/<name>.yaml` that is not in the working directory is looked up in the package.
            Relative paths in it are below its directory, those of the package's recipes below the working directory.
            `extends: other.yaml`, below its directory or packaged, lays it over that recipe, key by key.
        settings: overlays (files that end in `.yaml` or `.yml`, each a mapping that is laid over the recipe, in order),
            and over these `dotted.key=value`, the value in YAML; relative paths there are below the working directory.
        made: called with the recipe's name: sizes of finished stages, for those whose checkpoint is gone since.

    Raises:
        UserError: unreadable file, unknown key, wrong type, unknown stage, cycle; one line for each thing wrong.
    """
    recipe = _read(path, settings)
    return _completed(recipe, made(recipe.name))


def load_fetched(path: str | Path, settings: Iterable[str] = (), made: Made = lambda name: {}) -> Recipe:
    """`load_recipe` with all that is imported here: what is on a hub is downloaded first, for stages that are not made,
    since it has no sizes, and so no companions, before. Every process of a job has the same companions then."""
    recipe = _read(path, settings)
    finished = made(recipe.name)
    lacking = [stage for name, stage in recipe.stages.items() if name not in finished and stage.is_gone]
    if lacking:
        _completed(recipe, finished)  # faults are said before anything is downloaded
    for stage in lacking:
        stage.fetch()
    return _completed(recipe, finished)


def _read(path: str | Path, settings: Iterable[str]) -> Recipe:
    settings = list(settings)
    where = " with ".join([str(path), *filter(is_overlay, settings)])
    return validate(Recipe, _apply_defaults(read_layers(path, settings), where), where)


def _completed(recipe: Recipe, made: Mapping[str, ModelSpec]) -> Recipe:
    recipe = add_companions(recipe, made)
    order(recipe)
    return recipe


def _apply_defaults(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """Fold `defaults:` (by kind of stage) and the recipe's `data:` into every stage."""
    raw = {key: value for key, value in raw.items() if not key.startswith("x-")}  # a home for YAML anchors
    defaults, data = raw.pop("defaults", None) or {}, raw.pop("data", None)
    if not isinstance(defaults, dict):
        raise UserError(f"{where}: `defaults` must map kinds of stage to keys, got {defaults!r}")
    if data is not None:  # its faults are said once here, not once for every stage that inherits it
        validate(DataConfig, data, where, "data.")
    kinds = verbs()
    shared = {key: _shared(raw, key, model, where) for key, model in (("mesh", MeshConfig), ("sharding", Rules))}
    for kind in defaults:
        if kind not in kinds:
            raise UserError(f"{where}: defaults.{kind}: no such kind of stage{suggest(kind, kinds)}")
    stages = {}
    for name, stage in raw["stages"].items():
        if not isinstance(stage, dict) or stage.get("do") not in kinds:
            got = stage.get("do") if isinstance(stage, dict) else stage
            raise UserError(
                f"{where}: stages.{name}.do: {got!r} is not one of {', '.join(kinds)}{suggest(str(got), kinds)}"
            )
        stage = merge(defaults.get(stage["do"], {}), stage)
        if data is not None and "data" in kinds[stage["do"]].model_fields:
            stage["data"] = _without_nulls(merge(data, stage.get("data", {})))
        for key, value in shared.items():
            stage[key] = merge(value, stage.get(key, {}))
        stages[name] = stage
    return {**raw, "stages": stages}


def _without_nulls(data: Any) -> Any:
    """A source that a stage sets to null is not among its sources."""
    if not isinstance(data, dict) or not isinstance(data.get("sources"), dict):
        return data
    return {**data, "sources": {name: source for name, source in data["sources"].items() if source is not None}}


def _shared(raw: dict[str, Any], key: str, model: type[BaseModel], where: str) -> dict[str, Any]:
    """A block of the recipe that every stage inherits, taken out of it; its faults are said once."""
    value = raw.pop(key, None) or {}
    validate(model, value, where, f"{key}.")
    return value


def add_companions(recipe: Recipe, made: Mapping[str, ModelSpec]) -> Recipe:
    """Add what stages bring along, each behind its stage: `<stage>-scratch` after a distil stage with a baseline.

    What comes from a checkpoint that is not there has no sizes yet, and no companions: its fault is said when it is
    wanted.
    """
    gone = {name for name, stage in recipe.stages.items() if stage.is_gone and name not in made}
    for _ in recipe.stages:  # a recipe may name a stage before its source
        gone |= {name for name, stage in recipe.stages.items() if gone & set(stage.inputs().values())}
    stages: dict[str, Stage] = {}
    for name, stage in recipe.stages.items():
        stages[name] = stage
        if name not in gone:
            sizes = partial(_sizes, recipe, name, made)
            stages |= stage.companions(name, recipe.stages, sizes)
    return recipe.model_copy(update={"stages": stages})


def _sizes(recipe: Recipe, name: str, made: Mapping[str, ModelSpec]) -> ModelSpec:
    return resolve_specs(recipe, [name], made)[name]


def order(recipe: Recipe, wanted: Iterable[str] = ()) -> list[str]:
    """Names of the wanted stages (all but the optional ones when none is named) and of what they need, each after what
    it needs.

    Raises:
        UserError: a stage that does not exist, or a cycle.
    """
    graph = {name: list(stage.inputs().values()) for name, stage in recipe.stages.items()}
    for name, needed in graph.items():
        for other in needed:
            if other not in graph:
                raise UserError(f"stages.{name} needs stage {other!r}, which does not exist{suggest(other, graph)}")
    for where, name in recipe.family.named.items() if recipe.family else ():
        if name not in graph:
            raise UserError(f"{where} names stage {name!r}, which does not exist{suggest(name, graph)}")
        if where != "family.parent" and not recipe.stages[name].distils:
            raise UserError(f"{where} = {name!r} must be a distil stage: the family is told by its KL to the parent")
    for name in wanted:
        if name not in graph:
            raise UserError(f"no stage {name!r} in recipe {recipe.name!r}{suggest(name, graph)}")
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        raise UserError(f"the stages form a cycle: {' -> '.join(reversed(error.args[1]))}") from None
    chosen = _with_needs(graph, set(wanted) or [name for name, stage in recipe.stages.items() if not stage.optional])
    return _with_needs(graph, [name for name in recipe.stages if name in chosen])  # reads like the recipe


def _with_needs(graph: dict[str, list[str]], names: Iterable[str]) -> list[str]:
    """Names, each behind what it needs, depth first."""
    done: dict[str, None] = {}

    def visit(name: str) -> None:
        for needed in graph[name]:
            if needed not in done:
                visit(needed)
        done.setdefault(name)

    for name in names:
        visit(name)
    return list(done)


def resolve_specs(
    recipe: Recipe, wanted: Iterable[str] = (), made: Mapping[str, ModelSpec] | None = None
) -> dict[str, ModelSpec]:
    """Sizes of the results of the wanted stages (all when none is named) and of what they need, by walking the graph;
    an imported model's are read from its `config.json`, or when that is gone are those of the stage that was `made`.

    Raises:
        UserError: a source that is no model, or what a stage finds wrong with its inputs, see `Stage.resolve`.
    """
    specs: dict[str, ModelSpec] = {}
    for name in order(recipe, wanted or recipe.stages):
        stage, where = recipe.stages[name], f"stages.{name}"
        if stage.source is not None and not recipe.stages[stage.source].makes_model:
            raise UserError(f"{where}.from = {stage.source!r} must be a stage that makes a model")
        if stage.source is not None and stage.begins_anew:
            raise UserError(
                f"{where}.from = {stage.source!r}: a stage that does {stage.do!r} goes on from no other; leave "
                "`from` out, or train a model further with sft or distill"
            )
        if made and name in made and stage.is_gone:
            specs[name] = made[name]
        else:
            specs[name] = stage.resolve(Graph(recipe.stages, specs), where)
    return specs


def lineage(recipe: Recipe, last: str) -> list[str]:
    """A child's stages from its surgery (or its first stage) to `last`."""
    names = [last]
    while not recipe.stages[names[0]].prunes and (source := recipe.stages[names[0]].source) is not None:
        names.insert(0, source)
    return names

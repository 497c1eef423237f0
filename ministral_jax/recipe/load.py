"""From a YAML file and overrides to a checked graph of stages: read, merge, validate, expand, order, resolve sizes."""

from __future__ import annotations

import graphlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from ministral_jax.config import (
    KINDS,
    DataStage,
    DistillStage,
    ExportStage,
    ImportStage,
    ModelRef,
    ODPOStage,
    OnlineStage,
    PruneStage,
    Recipe,
    RecordStage,
    RewardStage,
    SFTStage,
    Stage,
    TrainStage,
)
from ministral_jax.data.config import DataConfig
from ministral_jax.distributed.placement import MeshConfig, Rules
from ministral_jax.errors import UserError
from ministral_jax.losses.targets import check_options
from ministral_jax.models.spec import PRESETS, ModelSpec
from ministral_jax.recipe.explain import explain, suggest

PACKAGED_CONFIGS = Path(__file__).parents[1] / "configs"
"""Where a wheel keeps the recipes of the repository's `configs/`."""


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read, merge and validate a recipe, and check its graph.

    Args:
        path: a YAML file; `configs/<name>.yaml` that is not in the working directory is looked up in the package.
        overrides: `dotted.key=value`, the value in YAML.

    Raises:
        UserError: unreadable file, unknown key, wrong type, unknown stage, cycle; one line for each thing wrong.
    """
    raw = _read_yaml(find_recipe(path))
    for override in overrides:
        _override(raw, override)
    recipe = expand_baselines(_validate(_apply_defaults(raw), str(path)))
    order(recipe)
    return recipe


def find_recipe(path: str | Path) -> Path:
    path = Path(path)
    if path.is_file():
        return path
    if path.parts[:1] == ("configs",):
        for root in (PACKAGED_CONFIGS, Path(__file__).parents[2] / "configs"):
            if (packaged := root.joinpath(*path.parts[1:])).is_file():
                return packaged
    raise UserError(f"recipe {str(path)!r} is not a file (packaged ones: configs/tiny.yaml, configs/ministral3.yaml)")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("stages"), dict):
        raise UserError(f"recipe {path} must be a mapping with a `stages:` mapping of named stages")
    raw.setdefault("name", path.stem)
    return _unshare(raw)


def _unshare(node: Any) -> Any:
    """YAML aliases are one object; an override of one of its places must not reach the others."""
    if isinstance(node, dict):
        return {key: _unshare(value) for key, value in node.items()}
    return [_unshare(value) for value in node] if isinstance(node, list) else node


def merge(base: Any, over: Any) -> Any:
    """`over` on top of `base`: mappings key by key, anything else replaced."""
    if isinstance(base, dict) and isinstance(over, dict):
        return {**base, **{key: merge(base.get(key), value) for key, value in over.items()}}
    return over


def _override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r} must have the form dotted.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"override {override!r}: the value is not valid YAML") from None
    parts = key.split(".")
    if parts[0] == "stages" and parts[1:2] and parts[1] not in raw["stages"]:
        raise UserError(f"override {override!r}: no stage {parts[1]!r}{suggest(parts[1], raw['stages'])}")
    node = raw
    for part in parts[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise UserError(f"override {override!r}: {part!r} is a value, not a mapping with keys")
    node[parts[-1]] = value


def _apply_defaults(raw: dict[str, Any]) -> dict[str, Any]:
    """Fold `defaults:` (by kind of stage) and the recipe's `data:` into every stage."""
    raw = {key: value for key, value in raw.items() if not key.startswith("x-")}  # a home for YAML anchors
    defaults, data = raw.pop("defaults", None) or {}, raw.pop("data", None)
    if not isinstance(defaults, dict):
        raise UserError(f"recipe {raw['name']}: `defaults` must map kinds of stage to keys, got {defaults!r}")
    try:
        DataConfig.model_validate(data if data is not None else {"sources": {"none": {"kind": "digits"}}})
    except ValidationError as error:  # said once here, not once for every stage that inherits it
        problems = (explain(problem, DataConfig, "data.") for problem in error.errors())
        raise UserError(f"recipe {raw['name']}: " + "; ".join(problems)) from None
    shared = {key: _shared(raw, key, model) for key, model in (("mesh", MeshConfig), ("sharding", Rules))}
    for kind in defaults:
        if kind not in KINDS:
            raise UserError(f"recipe {raw['name']}: defaults.{kind}: no such kind of stage{suggest(kind, KINDS)}")
    stages = {}
    for name, stage in raw["stages"].items():
        if not isinstance(stage, dict) or stage.get("do") not in KINDS:
            got = stage.get("do") if isinstance(stage, dict) else stage
            raise UserError(f"stages.{name}.do: {got!r} is not one of {', '.join(KINDS)}{suggest(str(got), KINDS)}")
        stage = merge(defaults.get(stage["do"], {}), stage)
        if data is not None and stage["do"] not in ("import", "export"):
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


def _shared(raw: dict[str, Any], key: str, model: type[BaseModel]) -> dict[str, Any]:
    """A block of the recipe that every stage inherits, taken out of it; its faults are said once."""
    value = raw.pop(key, None) or {}
    try:
        model.model_validate(value)
    except ValidationError as error:
        problems = (explain(problem, model, f"{key}.") for problem in error.errors())
        raise UserError(f"recipe {raw['name']}: " + "; ".join(problems)) from None
    return value


def _validate(raw: dict[str, Any], where: str) -> Recipe:
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{where}: " + "; ".join(explain(problem, Recipe) for problem in error.errors())) from None


def scratch_name(stage: str) -> str:
    return f"{stage}-scratch"


def expand_baselines(recipe: Recipe) -> Recipe:
    """Add `<stage>-scratch` after every distil stage that asks for a baseline: equal but for its first weights."""
    stages: dict[str, Any] = {}
    for name, stage in recipe.stages.items():
        stages[name] = stage
        if not (isinstance(stage, DistillStage) and stage.baseline):
            continue
        before = recipe.stages.get(stage.source or "")
        if isinstance(before, DistillStage) and before.baseline:
            changes = {"source": scratch_name(stage.source or "")}
        else:
            spec = resolve_specs(recipe, [name])[name]
            changes = {"source": None, "model": spec.model_dump(mode="json")}
        stages[scratch_name(name)] = stage.model_copy(update={"baseline": False, **changes})
    return recipe.model_copy(update={"stages": stages})


def guide(stage: Stage) -> tuple[str, str] | None:
    """The other stage that a stage needs beside its source, after what it does there: ("teacher", name) or ("judge",
    name)."""
    if isinstance(stage, (DistillStage, SFTStage)) and stage.teacher_stage is not None:
        return "teacher", stage.teacher_stage
    if isinstance(stage, ODPOStage) and stage.judge is not None:
        return "judge", stage.judge
    return None


def inputs(stage: Stage) -> dict[str, str]:
    """Stages that must be finished first, by their role: the source is the parent."""
    needed = {} if stage.source is None else {"parent": stage.source}
    if (other := guide(stage)) is not None and other[1] != stage.source:
        needed[other[0]] = other[1]
    return needed


def order(recipe: Recipe, wanted: Iterable[str] = ()) -> list[str]:
    """Names of the wanted stages (all but the optional ones when none is named) and of what they need, each after what
    it needs.

    Raises:
        UserError: a stage that does not exist, or a cycle.
    """
    graph = {name: list(inputs(stage).values()) for name, stage in recipe.stages.items()}
    for name, needed in graph.items():
        for other in needed:
            if other not in graph:
                raise UserError(f"stages.{name} needs stage {other!r}, which does not exist{suggest(other, graph)}")
    for name in recipe.family.children.values() if recipe.family else ():
        if name not in graph:
            raise UserError(f"family.children names stage {name!r}, which does not exist{suggest(name, graph)}")
    for name in wanted:
        if name not in graph:
            raise UserError(f"no stage {name!r} in recipe {recipe.name!r}{suggest(name, graph)}")
    try:
        everything = list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        raise UserError(f"the stages form a cycle: {' -> '.join(reversed(error.args[1]))}") from None
    needed_for = set(wanted) or {name for name, stage in recipe.stages.items() if not stage.optional}
    for name in reversed(everything):
        if name in needed_for:
            needed_for.update(graph[name])
    return _file_order(recipe, graph, needed_for)


def _file_order(recipe: Recipe, graph: dict[str, list[str]], chosen: set[str]) -> list[str]:
    """Depth first in the order of the file, so that a run reads like the recipe."""
    done: dict[str, None] = {}

    def visit(name: str) -> None:
        for needed in graph[name]:
            if needed not in done:
                visit(needed)
        done.setdefault(name)

    for name in recipe.stages:
        if name in chosen:
            visit(name)
    return list(done)


def resolve_model(ref: ModelRef | None, source: ModelSpec | None, where: str) -> ModelSpec:
    """The sizes a stage works on: a preset, or the source's sizes with overrides.

    Raises:
        UserError: unknown preset or key, inconsistent sizes, overrides without anything to override.
    """
    if ref is None:
        if source is None:
            raise UserError(f"{where}.model is required when the stage has no `from`")
        return source
    if isinstance(ref, str):
        return _preset(ref, where)
    changes = dict(ref)
    preset = changes.pop("preset", None)
    base = _preset(preset, where) if preset is not None else source
    raw = merge(base.model_dump(mode="json"), changes) if base is not None else changes
    try:
        return ModelSpec.model_validate(raw)
    except ValidationError as error:
        problems = (explain(problem, ModelSpec, f"{where}.model.") for problem in error.errors())
        raise UserError("; ".join(problems)) from None


def _preset(name: str, where: str) -> ModelSpec:
    if name not in PRESETS:
        raise UserError(f"{where}.model: no preset {name!r}{suggest(name, PRESETS)}")
    return PRESETS[name]


def resolve_specs(recipe: Recipe, wanted: Iterable[str] = ()) -> dict[str, ModelSpec]:
    """Sizes of the results of the wanted stages (all when none is named) and of what they need, by walking the graph;
    an imported model's are read from its `config.json`.

    Raises:
        UserError: see `resolve_model`; also a prune target larger than its source, a teacher with another vocabulary,
            one that was not or not so recorded, a source that is no model.
    """
    specs: dict[str, ModelSpec] = {}
    for name in order(recipe, wanted or recipe.stages):
        stage = recipe.stages[name]
        source = specs[stage.source] if stage.source is not None else None
        where = f"stages.{name}"
        if stage.source is not None and isinstance(recipe.stages[stage.source], (RecordStage, ExportStage)):
            raise UserError(f"{where}.from = {stage.source!r} must be a stage that makes a model")
        if isinstance(stage, ImportStage):
            from ministral_jax.interop.hf import read_spec

            specs[name] = read_spec(Path(stage.path))
        elif isinstance(stage, (TrainStage, PruneStage, DistillStage, SFTStage)):
            specs[name] = resolve_model(stage.model, source, where)
            _check_sizes(stage, specs[name], source, where)
        else:
            assert source is not None
            specs[name] = source
            _check_sizes(stage, source, source, where)
        if (other := guide(stage)) is not None:
            role, guiding = other
            if isinstance(stage, (DistillStage, SFTStage)):
                _check_teacher(stage, guiding, recipe.stages[guiding], where)
            elif not isinstance(recipe.stages[guiding], RewardStage):
                raise UserError(f"{where}.judge = {guiding!r} must be a reward stage")
            theirs = specs[guiding].vocab
            if theirs != specs[name].vocab:
                raise UserError(
                    f"{where}: its vocabulary of {specs[name].vocab} differs from the {theirs} of {role} {guiding!r}; "
                    "both need the same one"
                )
    return specs


def _check_teacher(stage: DistillStage | SFTStage, name: str, teacher: Stage, where: str) -> None:
    """A model teaches directly, a record stage as a store that holds what the student will read."""
    if isinstance(stage.teacher, str):
        if isinstance(teacher, RecordStage):
            raise UserError(f"{where}.teacher = {name!r} is a record stage; write it as {{store: {name}}}")
        if isinstance(teacher, ExportStage):
            raise UserError(f"{where}.teacher = {name!r} must be a stage that makes a model")
        return
    if not isinstance(teacher, RecordStage):
        raise UserError(
            f"{where}.teacher.store = {name!r} must be a record stage; a model is named as `teacher: {name}`"
        )
    try:
        check_options(stage.loss, teacher.codec.kind)
    except UserError as error:
        raise UserError(f"{where}.{error}") from None
    if stage.batch.length != teacher.batch.length:
        raise UserError(
            f"{where}.batch.length = {stage.batch.length} differs from the {teacher.batch.length} of the rows that "
            f"{name!r} records"
        )
    if stage.evaluate.rows > teacher.held_out_rows:
        raise UserError(
            f"{where}.evaluate.rows = {stage.evaluate.rows} is more than stages.{name}.held_out_rows = "
            f"{teacher.held_out_rows}"
        )
    needed = stage.steps * stage.batch.sequences
    if teacher.rows is not None and (stage.seed != teacher.seed or needed > teacher.rows):
        raise UserError(
            f"{where} reads {needed} rows in the order of seed {stage.seed}, {name!r} records the first {teacher.rows} "
            f"in the order of seed {teacher.seed}; raise stages.{name}.rows, leave it out (all rows), or use one seed"
        )


_SHAPE_KEYS = ("layers", "width", "mlp_width", "heads", "kv_heads", "head_width", "vocab", "tied", "vision")


def _check_sizes(stage: Stage, spec: ModelSpec, source: ModelSpec | None, where: str) -> None:
    if isinstance(stage, PruneStage) and source is not None:
        from ministral_jax.pruning.surgery import check_target

        check_target(source, spec, where)
    elif source is not None:
        for key in _SHAPE_KEYS:
            if getattr(spec, key) != getattr(source, key):
                raise UserError(
                    f"{where}.model.{key} = {getattr(spec, key)} differs from the {getattr(source, key)} of its source "
                    f"{stage.source!r}; only a prune stage changes sizes"
                )
    if isinstance(stage, DataStage) and stage.batch.length > spec.context:
        raise UserError(f"{where}.batch.length = {stage.batch.length} exceeds the model's context of {spec.context}")
    if isinstance(stage, OnlineStage) and stage.max_prompt_length >= spec.context:
        raise UserError(
            f"{where}.max_prompt_length = {stage.max_prompt_length} leaves no room in the model's context of "
            f"{spec.context}"
        )

"""The files and words that a recipe is made of, each laid over those before it: the recipe that it extends, itself,
overlays, `key=value`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from ministral_jax import yaml12
from ministral_jax.errors import UserError
from ministral_jax.explain import suggest
from ministral_jax.settings import Rooted, merge

PACKAGED_CONFIGS = Path(__file__).parents[1] / "configs"
"""Where a wheel keeps the recipes of the repository's `configs/`."""
_CONFIGS = (PACKAGED_CONFIGS, Path(__file__).parents[2] / "configs")


def is_overlay(word: str) -> bool:
    """Whether a word of the command line names a file to be laid over the recipe."""
    return "=" not in word and word.endswith((".yaml", ".yml"))


def sort_words(words: Iterable[str]) -> tuple[list[str], list[str]]:
    """Settings (overlays and `key=value`) and names of stages among the words that follow a recipe, each in order."""
    settings, stages = list[str](), list[str]()
    for word in words:
        (settings if "=" in word or is_overlay(word) else stages).append(word)
    return settings, stages


def read_layers(path: str | Path, settings: Iterable[str] = ()) -> dict[str, Any]:
    """The mapping that a recipe is, with all that it extends and with settings laid over it: overlays first.

    Text and numbers in it know the directory of their file, below which they lie where they are relative paths; those
    of the package's files and of `key=value` the working directory.

    Raises:
        UserError: a file that is none or no mapping, a cycle of `extends`, a stage that an overlay or an override names
            and the recipe lacks.
    """
    settings = list(settings)
    raw = _read(*_find(path, "recipe"), "recipe")
    if not isinstance(raw.get("stages"), dict):
        raise UserError(f"recipe {path} must be a mapping with a `stages:` mapping of named stages")
    for word in filter(is_overlay, settings):
        raw = _lay_over(raw, word)
    for word in settings:
        if not is_overlay(word):
            _override(raw, word)
        if not isinstance(raw["stages"], dict):
            raise UserError(f"override {word!r}: stages must be a mapping of named stages")
    return raw


def find_recipe(path: str | Path) -> Path:
    """The file of a recipe: `configs/...` that is not in the working directory is looked up in the package. Raises
    `UserError`: it is none."""
    return _find(path, "recipe")[0]


def _find(path: str | Path, kind: str, below: Path = Path(), root: Path | None = None) -> tuple[Path, Path]:
    """A file, and the directory that its relative paths are below: `root`, or its own where there is none."""
    file, path = below / path, Path(path)
    if file.is_file():
        return file, root or file.parent.absolute()
    if path.parts[:1] == ("configs",):
        for packaged in _CONFIGS:
            if (file := packaged.joinpath(*path.parts[1:])).is_file():
                return file, Path.cwd()
    raise UserError(f"{kind} {str(path)!r} is not a file (packaged ones: {', '.join(_packaged(kind))})")


def _packaged(kind: str) -> list[str]:
    """Recipes in the order in which one meets them; overlays are all of `configs/machines/`."""
    if kind == "recipe":
        return ["configs/tiny.yaml", "configs/ministral3_base.yaml", "configs/ministral3.yaml"]
    return sorted(f"configs/machines/{file.name}" for root in _CONFIGS for file in root.glob("machines/*.yaml"))


def _read(file: Path, root: Path, kind: str, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A file, over what it extends. `above`: the files that extend it, the nearest last."""
    if file.resolve() in (one.resolve() for one in above):
        raise UserError(f"{kind} {file} extends itself: {' -> '.join(map(str, (*above, file)))}")
    raw = _rooted(_load(file, kind), root)
    if kind == "recipe":
        raw.setdefault("name", file.stem)
    if (extends := raw.pop("extends", None)) is None:
        return raw
    if not isinstance(extends, str):
        raise UserError(f"{kind} {file}: extends must be the path of one file, got {extends!r}")
    base = _find(extends, kind, file.parent, None if root == file.parent.absolute() else root)
    return merge(_read(*base, kind, (*above, file)), raw)


def _load(file: Path, kind: str) -> dict[str, Any]:
    try:
        raw = yaml12.load(file.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{kind} {file} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        said = "a mapping with a `stages:` mapping of named stages" if kind == "recipe" else "a mapping of settings"
        raise UserError(f"{kind} {file} must be {said}")
    return raw


def _rooted(node: Any, root: Path) -> Any:
    """A copy whose leaves know where relative paths begin. YAML aliases are one object; an override of one of its
    places must not reach the others."""
    if isinstance(node, dict):
        return {key: _rooted(value, root) for key, value in node.items()}
    if isinstance(node, list):
        return [_rooted(value, root) for value in node]
    return Rooted.at(node, root) if isinstance(node, str) else yaml12.rooted(node, root)


def _lay_over(raw: dict[str, Any], path: str) -> dict[str, Any]:
    over = _read(*_find(path, "overlay"), "overlay")
    stages = over.get("stages", {})
    if not isinstance(stages, dict):
        raise UserError(f"overlay {path}: stages must be a mapping of named stages, got {stages!r}")
    for name in stages:
        _refuse_unknown(name, raw["stages"], f"overlay {path}")
    return merge(raw, over)


def _refuse_unknown(stage: str, stages: Mapping[str, Any], where: str) -> None:
    if stage not in stages:
        raise UserError(f"{where}: no stage {stage!r}{suggest(stage, stages)}")


def _override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r} must have the form dotted.key=value")
    try:
        value = yaml12.load(text)
    except yaml.YAMLError:
        raise UserError(f"override {override!r}: the value is not valid YAML") from None
    parts = key.split(".")
    if parts[0] == "stages" and parts[1:2]:
        _refuse_unknown(parts[1], raw["stages"], f"override {override!r}")
    node = raw
    for part in parts[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise UserError(f"override {override!r}: {part!r} is a value, not a mapping with keys")
    node[parts[-1]] = _rooted(value, Path.cwd())

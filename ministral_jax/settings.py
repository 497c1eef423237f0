"""The base of everything a recipe may say, and how one layer of it lies over another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, SerializationInfo, WrapSerializer

from ministral_jax import yaml12

ANYWHERE = "anywhere"
"""Key of a serialisation context: when true, paths are left empty, for what should not depend on where files lie."""


class Frozen(BaseModel):
    """Immutable, hashable record that refuses unknown keys; the base of every spec and config in the project."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, coerce_numbers_to_str=True)


class Rooted(str):
    """Text that knows the directory below which it lies where it is a relative path: that of its file."""

    root: Path

    @staticmethod
    def at(text: str, root: Path) -> Rooted:
        found = Rooted(text)
        found.root = root
        return found


def _located(value: Any) -> Any:
    number = yaml12.written(value)  # a directory may be called 2026
    if (not isinstance(value, str) and number is None) or value == "bundled" or "://" in str(value):
        return value
    root = value.root if isinstance(value, Rooted) else yaml12.root_of(value)
    return str(value) if root is None else str(Path(root, Path(str(value)).expanduser()))


def _place(value: Any, write: Any, info: SerializationInfo) -> Any:
    return "" if value is not None and (info.context or {}).get(ANYWHERE) else write(value)


Place = Annotated[str, BeforeValidator(_located), WrapSerializer(_place)]
"""The path of a file or directory (or a pattern, or a URL): in a recipe's file relative to the directory of that."""


def merge(base: Any, over: Any) -> Any:
    """`over` on top of `base`: mappings key by key, anything else replaced."""
    if isinstance(base, dict) and isinstance(over, dict):
        return {**base, **{key: merge(base.get(key), value) for key, value in over.items()}}
    return over

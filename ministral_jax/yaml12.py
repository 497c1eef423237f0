"""YAML by the rules of version 1.2, safely: `24:00:00` and `no` are text, `1e-4` is a number.

PyYAML follows 1.1, where the first is 86400, the second false and the third text. Numbers remember how they were
written, so that a setting that is text gets just that: 1.10 is not 1.1 there.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012


class _Int(int):
    text: str
    root: Path | None = None

    def __str__(self) -> str:
        return self.text


class _Float(float):
    text: str
    root: Path | None = None

    def __str__(self) -> str:
        return self.text


def _number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> _Int | _Float:
    text = loader.construct_scalar(node)
    if node.tag.endswith("int"):
        value: _Int | _Float = _Int(text, 0 if text[:2] in ("0x", "0o") else 10)
    else:
        value = _Float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    value.text = text
    return value


for _tag, _pattern, _first in (
    ("null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", "true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?\d+|0x[\da-fA-F]+|0o[0-7]+", list("-+0123456789")),
    ("float", r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.0123456789")),
    ("merge", "<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$", re.ASCII), _first)
for _tag in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _number)


def load(text: str) -> Any:
    """The value of a document. Raises `yaml.YAMLError`: it is none."""
    return yaml.load(text, _Loader)


def rooted(value: Any, root: Path) -> Any:
    """A value, which if it is a number knows the directory below which it lies where it is the name of a file."""
    if isinstance(value, (_Int, _Float)):
        value.root = root
    return value


def root_of(value: Any) -> Path | None:
    return value.root if isinstance(value, (_Int, _Float)) else None


def written(value: Any) -> str | None:
    """How a number was written, where that is known."""
    return value.text if isinstance(value, (_Int, _Float)) else None

"""The templates of `launch/`, filled so that a value can only ever be a value: every one is quoted on its way in."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2

_PACKAGED = Path(__file__).parents[1] / "launch_templates"
"""Where a wheel keeps the repository's `launch/`."""


def fill(template: str, quote: Callable[[Any], str], **values: Any) -> str:
    """`launch/<template>` with `{{ value }}` replaced by `quote(value)`, whatever the value."""
    folder = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[2] / "launch"
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        finalize=quote,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # quoting is `finalize`'s
    )
    return environment.get_template(template).render(**values)


def shell(value: Any) -> str:
    """A word of a shell command; a list is several."""
    if isinstance(value, (list, tuple)):
        return shlex.join(value)
    return shlex.quote(str(value))


def yaml(value: Any) -> str:
    """A YAML scalar, or a list on one line; strings are always double-quoted, so that none reads as something else."""
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(yaml(item) for item in value) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    return '"' + re.sub(r"[^ !#-\[\]-~]", _escaped, str(value)) + '"'


def _escaped(match: re.Match[str]) -> str:
    character = match.group()
    if character in '"\\':
        return "\\" + character
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"

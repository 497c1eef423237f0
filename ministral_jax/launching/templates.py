"""The templates of `launch/`, filled so that a value can only ever be a value: every one is quoted on its way in."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import yaml as pyyaml

_PACKAGE = Path(__file__).parents[1]
_FOLDERS = (_PACKAGE / "launch_templates", _PACKAGE.parent / "launch")
"""Of a wheel, of a checkout."""


def fill(template: str, quote: Callable[[Any], str], **values: Any) -> str:
    """`launch/<template>` with `{{ value }}` replaced by `quote(value)`, whatever the value."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDERS),
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
    """A YAML value on one line; strings are always double-quoted, so that none reads as something else."""
    if isinstance(value, int):
        return str(value)
    line = pyyaml.safe_dump(value, default_style='"', default_flow_style=True, sort_keys=False, width=math.inf)
    return line.removesuffix("\n")

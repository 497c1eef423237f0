"""What the points of a sweep are called: keys as short as they stay distinct, values in letters of a file's name."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from ministral_jax import yaml12

LONGEST_NAME = 120


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """Every dotted key by its last part, with as many of the parts before it as tell it from the others.

    `stages.8b-short.optimizer.lr` is `lr`, and `8b-short.lr` beside `stages.3b-short.optimizer.lr`.
    """

    def forms(key: str) -> list[str]:
        *before, last = key.split(".")
        return [last, *(f"{part}.{last}" for part in reversed(before)), key]

    def short(key: str) -> str:
        others = [forms(other) for other in keys if other != key]
        distinct = (form for i, form in enumerate(forms(key)) if all(form not in o[i : i + 1] for o in others))
        return next(distinct, key)

    return {key: short(key) for key in keys}


def point_name(settings: dict[str, Any], short: dict[str, str]) -> str:
    """`lr=1e-4_layer-score=random`."""
    name = "_".join(f"{label(short[key])}={label(value)}" for key, value in settings.items())
    if len(name) > LONGEST_NAME:
        name = f"{name[: LONGEST_NAME - 11]}-{hashlib.sha256(name.encode()).hexdigest()[:10]}"
    return name


def label(value: Any) -> str:
    """A value as part of a file's name: letters, digits, '.', '+' and '-'; numbers in their shortest form."""
    text = setting(value)
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


def setting(value: Any) -> str:
    """A value as a person would write it."""
    if isinstance(value, str):
        return value
    finite = isinstance(value, float) and math.isfinite(value)
    return _shortest(value) if finite else json.dumps(value, ensure_ascii=False)


def as_yaml(value: Any) -> str:
    """One line of YAML that reads back as the value: a word or a number as it was written, anything else as JSON."""
    if (text := yaml12.written(value)) is not None:
        return text
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z/][\w./-]*", value, re.ASCII) and yaml12.load(value) == value:
        return value
    return json.dumps(value, ensure_ascii=False)

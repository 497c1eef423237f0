"""Configuration files of others, read so that a bad value is refused where it stands."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from ministral_jax.errors import UserError


class Keys:
    """A section of a config file that says where a bad value stands."""

    def __init__(self, values: dict[str, Any], where: str):
        self.values, self.where = values, where

    def section(self, key: str) -> Keys:
        value = self.required(key)
        if not isinstance(value, dict):
            raise UserError(f"{self.where}: {key} is {value!r:.80}, expected an object")
        return Keys(value, f"{self.where}: {key}")

    def get(self, key: str, default: Any = None) -> Any:
        value = self.values.get(key)
        return default if value is None else value

    def required(self, key: str) -> Any:
        if self.values.get(key) is None:
            raise UserError(f"{self.where}: {key} is missing")
        return self.values[key]

    def number(self, key: str) -> float | None:
        value = self.get(key)
        if value is not None and (type(value) not in (int, float) or not math.isfinite(value)):
            raise UserError(f"{self.where}: {key} is {value!r:.80}, expected a number")
        return value

    def sizes(self, names: Mapping[str, str]) -> dict[str, Any]:
        """By our names, of theirs; where the file says null, key-value heads are the heads and the heads fill the
        width."""
        for name in names.values():
            value = self.values.get(name)
            if value is not None and (type(value) is not int or value < 1):
                raise UserError(f"{self.where}: {name} is {value!r:.80}, expected a whole number above 0")
        heads, width = self.required(names["heads"]), self.required(names["width"])
        known = {"kv_heads": heads, "head_width": width // heads}
        return {
            ours: self.get(name, known[ours]) if ours in known else self.required(name) for ours, name in names.items()
        }

    def accept(self, key: str, default: Any, accepted: tuple) -> None:
        """`default` is what a missing key means to other readers."""
        value = self.values.get(key, default)
        if value not in accepted:
            listed = " or ".join(json.dumps(a) for a in accepted)
            raise UserError(f"{self.where}: {key} is {json.dumps(value):.80}, this model family has {listed}")


def refused(error: ValidationError, where: str) -> UserError:
    """The first of what is wrong with sizes that were read at `where`."""
    first = error.errors()[0]
    return UserError(
        ": ".join(
            [where, *filter(None, [".".join(map(str, first["loc"]))]), first["msg"].removeprefix("Value error, ")]
        )
    )


def check_same(said: dict[str, Any], where: str) -> None:
    """Keys that mean the same say the same, where they are there."""
    there = {key: value for key, value in said.items() if value is not None}
    if any(value != next(iter(there.values())) for value in there.values()):
        both = " and ".join(f"{key} is {json.dumps(value):.200}" for key, value in there.items())
        raise UserError(f"{where}: {both}, which mean the same; delete the one that is wrong")

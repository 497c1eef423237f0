"""The base of everything a recipe may say."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """Immutable, hashable record that refuses unknown keys; the base of every spec and config in the project."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

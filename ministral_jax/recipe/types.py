"""The recipe: one YAML file, typed, with `key=value` overrides and one-sentence errors.

Layers, later ones win: field defaults < `defaults:` of the stage's kind < the stage < overrides from the command line.
A stage's `data` is merged over the recipe's. Nothing is read from environment variables.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import Field, field_validator

from ministral_jax.distributed.processes import Limits
from ministral_jax.recipe.launch import LaunchConfig
from ministral_jax.settings import Frozen
from ministral_jax.stages import Stage, verbs

if TYPE_CHECKING:
    AnyStage = Stage
else:
    AnyStage = Annotated[Union[tuple(verbs().values())], Field(discriminator="do")]  # noqa: UP007


class Family(Frozen):
    """Which finished stages the summary and the report compare: the parent and, by name, each child's last stage."""

    parent: str
    children: dict[str, str] = Field(default_factory=dict)

    @property
    def named(self) -> dict[str, str]:
        """Its stages, by where they are named."""
        return {"family.parent": self.parent} | {f"family.children.{key}": name for key, name in self.children.items()}


class Recipe(Frozen):
    """A whole cascade."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    stages: dict[str, AnyStage]
    family: Family | None = None
    limits: Limits = Limits()
    launch: LaunchConfig = LaunchConfig()

    @field_validator("stages")
    @classmethod
    def _names_are_directories(cls, stages: dict[str, Stage]) -> dict[str, Stage]:
        for name in stages:
            if name in ("data", "xla"):
                raise ValueError(f"stage name {name!r} is taken: a run keeps something of its own in that directory")
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
                raise ValueError(f"stage name {name!r} must be letters, digits, '-' and '_'")
        return stages

    def dump(self) -> dict[str, Any]:
        """JSON-ready form with every default filled in; `Recipe.model_validate` reads it back."""
        return self.model_dump(mode="json", by_alias=True)

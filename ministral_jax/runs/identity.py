"""What makes the result of a stage what it is: settings, sizes, what was read from outside, and the stages before it.

Where files lie, what the run is called and on which devices it is computed are not among it. A stage's directory says
what it was begun with in `stage.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ministral_jax.errors import UserError
from ministral_jax.models.spec import ModelSpec
from ministral_jax.recipe.types import AnyStage
from ministral_jax.stages import Stage

Identity = dict[str, Any]
OTHER_CONTENT = "has other content than then"


def identity(
    stage: Stage, spec: ModelSpec, contents: Mapping[str, str | None] | None = None, anywhere: bool = True
) -> Identity:
    """As JSON.

    Args:
        contents: see `Stage.contents`.
        anywhere: whether paths are left out, for a comparison by content.
    """
    config = stage.making(anywhere=anywhere)
    return {"config": config, "spec": spec.model_dump(mode="json"), "contents": dict(contents or {})}


def begun(directory: Path) -> Identity | None:
    """What a stage's directory was begun with, None when it was not. Settings that an older version did not know have
    their defaults. Raises `UserError`: nobody can say, for the file is damaged."""
    path = directory / "stage.json"
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(found.get(part), dict) for part in ("config", "spec")):
        raise UserError(f"{path} does not say what the stage was begun with; delete {directory} to make it again")
    try:
        stage: Any = TypeAdapter(AnyStage).validate_python(found["config"])
        made_of = identity(stage, ModelSpec.model_validate(found["spec"]), found.get("contents"))
        return {**made_of, "inputs": found.get("inputs", {})}
    except ValidationError:
        return found


def differences(old: Identity, new: Identity) -> list[str]:
    """What differs, one clause for each setting; content that is not known on both sides is not compared."""
    found = [change for part in ("config", "spec") for change in _differ(old.get(part), new[part], part)]
    contents = old.get("contents", {})
    for setting, digest in new["contents"].items():
        if None not in (digest, contents.get(setting)) and digest != contents[setting]:
            found.append(f"{setting} {OTHER_CONTENT}")
    return found


def _differ(old: Any, new: Any, path: str) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            change
            for key in dict.fromkeys([*old, *new])
            for change in _differ(old.get(key), new.get(key), f"{path}.{key}")
        ]
    return [] if old == new else [f"{path} was {old!r}, now {new!r}"]

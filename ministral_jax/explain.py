"""What pydantic finds wrong with a recipe, as a user of the file would say it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from ministral_jax.errors import UserError

Model = TypeVar("Model", bound=BaseModel)


def validate(model: type[Model], value: Any, where: str, prefix: str = "") -> Model:
    """`value` (what a file says below the key `prefix`) as a model.

    Raises:
        UserError: it is none; one sentence with `where` and a clause for each thing wrong.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        problems = "; ".join(explain(problem, model, prefix) for problem in error.errors())
        raise UserError(f"{where}: {problems}") from None


def explain(problem: Any, root: type[BaseModel], prefix: str = "") -> str:
    """One clause for one error of pydantic's: the key, what is wrong with it, and the nearest valid one."""
    loc, valid = _resolve([str(part) for part in problem["loc"]], root)
    key = prefix + ".".join(loc)
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key}{suggest(loc[-1], valid)}"
    if problem["type"] == "missing":
        return f"{key} is required"
    if problem["type"] == "union_tag_invalid":
        tags = problem["ctx"]["expected_tags"].replace("'", "").split(", ")
        return f"{key}: {problem['ctx']['tag']!r} is not one of {', '.join(tags)}{near(problem['ctx']['tag'], tags)}"
    if problem["type"] == "secret":
        return f"{key}: {problem['msg']}"  # and not what was given
    message = problem["msg"].removeprefix("Value error, ")
    return f"{key}: {message[0].lower() + message[1:]}, got {problem['input']!r:.80}"


def _resolve(loc: list[str], root: type[BaseModel]) -> tuple[list[str], list[str]]:
    """A pydantic location as the file has it, and the keys that are valid where its last part stands.

    Where a value may be one of several models pydantic names the one it took (a kind of stage, of codec); the file does
    not.
    """
    node: Any = root
    found: list[str] = []
    valid: list[str] = []
    for part in loc:
        models = [t for t in _alternatives(node) if isinstance(t, type) and issubclass(t, BaseModel)]
        tagged = [t for t in _alternatives(node) if part in _tags(t)]
        if tagged and len(_alternatives(node)) > 1:
            node = tagged[0]
            continue
        found.append(part)
        fields = {f.alias or name: f for m in models for name, f in m.model_fields.items()}
        valid = (
            [*fields, "defaults", "data", "mesh", "sharding"]
            if node is root and "stages" in root.model_fields
            else list(fields)
        )
        if part in fields:
            node = fields[part].annotation
        else:
            node = next((get_args(t)[1] for t in _alternatives(node) if get_origin(t) is dict), None)
    return found, valid


def _tags(kind: Any) -> tuple[str, ...]:
    """What pydantic calls a member of a union."""
    if not isinstance(kind, type):
        return ()
    fields = kind.model_fields if issubclass(kind, BaseModel) else {}
    literals = [get_args(fields[key].annotation) for key in ("do", "kind") if key in fields]
    return (kind.__name__, *(tag for tags in literals for tag in tags))


def _alternatives(annotation: Any) -> list[Any]:
    if get_origin(annotation) in (None, dict, list, tuple):
        return [annotation]
    return [alternative for t in get_args(annotation) for alternative in _alternatives(t)]


def suggest(word: str, valid: Iterable[str]) -> str:
    """` (did you mean X?)` for the nearest valid word, else the list of valid ones when it is short."""
    valid = [str(v) for v in valid]
    return near(word, valid) or (f" (one of: {', '.join(valid)})" if 0 < len(valid) <= 24 else "")


def near(word: str, valid: list[str]) -> str:
    """` (did you mean X?)` for the nearest valid word, if one is near."""
    found = difflib.get_close_matches(word, valid, 1, 0.6)
    return f" (did you mean {found[0]}?)" if found else ""

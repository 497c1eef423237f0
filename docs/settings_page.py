"""The page of settings: every key that a recipe may say, with its default and what its class says of it."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import json
import re
import textwrap
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from ministral_jax.distributed.processes import Limits
from ministral_jax.recipe.launch import LaunchConfig
from ministral_jax.stages import Stage, verbs

INTRODUCTION = """# Every setting

What a recipe may say, generated from the classes that read it. A setting without a default must be given. Settings of a
stage stand in the stage or, for all of a kind, under the recipe's `defaults`; [the recipe file](recipe.md) says how
they are merged.

"""


WORDS = {
    "from": "The stage whose model this one begins with; what `train` and `import` have none of.",
    "steps": "Updates of the parameters.",
    "seed": "Of the order of the data and of everything that is drawn.",
    "model": "Sizes: a preset, changes to the sizes of the source, or both; see [the recipe file](recipe.md).",
    "path": "The model's directory, or its name on the hub: hf://org/name[@revision], or mistralai/name.",
    "temperature": "By which logits are divided before a token is drawn; 0 takes the most probable one.",
    "max_completion_length": "Tokens of an answer, at most.",
    "lr": "The learning rate after the warm-up.",
    "beta1": "AdamW's: share of the mean of the gradient that is kept in a step.",
    "beta2": "AdamW's: share of the mean of its square that is kept.",
    "window": "Losses in a row, of whose medians the lowest is the usual loss.",
    "weight": "Of this reward in the sum of all.",
    "thinking": "Whether reasoning is asked for; without it there must be none.",
    "enabled": "Whether programs that a model wrote may be run.",
    "memory_mb": "That a test may take, in MB.",
    "early": "As in [EvaluateConfig](#EvaluateConfig).",
    "every": "Steps between two evaluations.",
    "nodes": "Machines.",
    "gpus_per_node": "GPUs of a machine.",
    "cpus_per_task": "CPU cores of a process.",
    "partition": "Of SLURM.",
    "image": "A container image that has this package.",
    "spot": "Whether machines may be taken away at any time, for a lower price.",
    "service_account": "Of Kubernetes, whose pods may use the bucket.",
    "zone": "Of Google Cloud.",
    "runtime_version": "Software of the VMs, such as `v2-alpha-tpuv6e`.",
    "processes": "How many.",
    "claim": "A persistent volume claim.",
    "bucket": "Of Cloud Storage.",
    "topology": "Chips along each side, such as `4x8`.",
    "secret": "Its name.",
    "key": "The key within it.",
}
"""Of keys whose class says nothing of them, neither below the field nor in its own text."""


class Key(typing.NamedTuple):
    name: str
    default: Any
    annotation: Any
    note: str


def page() -> str:
    """Kinds of stages first, then the groups of settings that they share, each once."""
    titles: dict[type, str] = {Stage: "What every stage has"}
    titles |= {kind: f"do: {name}" for name, kind in verbs().items()}
    titles |= {Limits: "limits", LaunchConfig: "launch"}
    shown = {key.name for key in keys(Stage)} - {"do"}
    sections, waiting = [], list(titles)
    for kind in waiting:  # grows while it is walked
        hidden = shown if issubclass(kind, Stage) and kind is not Stage else set()
        rows = [
            key for key in keys(kind) if key.name not in hidden and not (issubclass(kind, Stage) and key.name == "do")
        ]
        for group in (group for key in rows for group in groups(key.annotation)):
            if group not in titles:
                titles[group] = group.__name__
                waiting.append(group)
        sections.append((kind, rows))
    return INTRODUCTION + "\n".join(section(titles, kind, rows) for kind, rows in sections)


def section(titles: dict[type, str], kind: type, rows: list[Key]) -> str:
    lines = [f"## {titles[kind]} {{ #{kind.__name__} }}", "", inspect.cleandoc(kind.__doc__ or ""), ""]
    if rows:
        lines += ["| setting | default | |", "|---|---|---|"]
    for key in rows:
        links = " ".join(f"[{titles[group]}](#{group.__name__})" for group in groups(key.annotation))
        note = key.note or ("" if links or explains(kind, key) else WORDS.get(key.name, ""))
        note = " ".join(part for part in (note, links or values(key.annotation)) if part)
        lines.append(f"| `{key.name}` | {said(key.default)} | {cell(note)} |")
    return "\n".join([*lines, ""])


def explains(kind: type, key: Key) -> bool:
    """Whether the text of a class, which stands above its table, speaks of a key."""
    return re.search(rf"\b{key.name}\b[`:,]", kind.__doc__ or "") is not None


def keys(kind: type) -> Iterator[Key]:
    notes = {name: note for base in reversed(kind.__mro__) for name, note in documented(base).items()}
    if issubclass(kind, BaseModel):
        for name, field in kind.model_fields.items():
            default = field.default_factory() if field.default_factory else field.default  # type: ignore[call-arg]
            yield Key(field.alias or name, default, field.annotation, notes.get(name, ""))
    else:
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):  # type: ignore[arg-type]
            yield Key(field.name, field.default, hints[field.name], notes.get(field.name, ""))


def documented(kind: type) -> dict[str, str]:
    """The text below each field of a class."""
    if kind.__module__.split(".")[0] != "ministral_jax":
        return {}
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0].body  # type: ignore[attr-defined]
    found = {}
    for field, below in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            found[ast.unparse(field.target)] = " ".join(inspect.cleandoc(below.value.value).split())
    return found


def parts(annotation: Any) -> Iterator[Any]:
    yield annotation
    for part in typing.get_args(annotation):
        yield from parts(part)


def groups(annotation: Any) -> list[type]:
    """Classes of settings within a type."""
    own = [
        part for part in parts(annotation) if isinstance(part, type) and part.__module__.startswith("ministral_jax.")
    ]
    return list(dict.fromkeys(kind for kind in own if issubclass(kind, BaseModel) or dataclasses.is_dataclass(kind)))


def values(annotation: Any) -> str:
    """The words that may be said, where there are a few."""
    words = [
        word
        for part in parts(annotation)
        if typing.get_origin(part) is typing.Literal
        for word in typing.get_args(part)
    ]
    return ", ".join(f"`{word}`" for word in dict.fromkeys(words))


def said(default: Any) -> str:
    """A default as a recipe would say it; a group's stand in its own table."""
    if default is PydanticUndefined or default is dataclasses.MISSING:
        return "**needed**"
    if default is None or isinstance(default, BaseModel) or dataclasses.is_dataclass(default):
        return ""
    return f"`{json.dumps(default, default=str)}`" if not isinstance(default, str) else f"`{default}`"


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")

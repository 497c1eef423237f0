"""`manifest.json`: what a finished stage is and where it comes from. Written last, at once: its presence means done."""

from __future__ import annotations

import hashlib
import importlib.metadata
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ministral_jax.errors import UserError
from ministral_jax.interop.formats import FORMATS
from ministral_jax.losses.held_out import HeldOut
from ministral_jax.models.spec import ModelSpec
from ministral_jax.pruning.report import PruneReport
from ministral_jax.teachers.summary import SplitSummary

_PACKAGES = ("ministral-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class Input(BaseModel):
    """A stage that this one was made from, by the SHA-256 of its manifest."""

    stage: str
    digest: str


class Devices(BaseModel):
    count: int
    kind: str
    hosts: int = 1
    peak_memory: int | None = None
    """Bytes, the most that the first device held since its process began; None where nobody counts."""


class DataIdentity(BaseModel):
    """Of the packed rows (None where a stage reads prompts alone), and of the tokenizer."""

    digest: str | None = None
    tokenizer_digest: str
    left_out: dict[str, int] | None = None
    """Rows that could not be used, of the sources that leave these out."""


class Manifest(BaseModel):
    """A finished stage. What a verb adds beside these fields stands in `details`."""

    model_config = ConfigDict(extra="allow")

    stage: str
    do: str
    status: Literal["finished"]
    config: dict[str, Any]
    """The stage's settings with every default filled in."""
    spec: ModelSpec
    inputs: dict[str, Input] = Field(default_factory=dict)
    """By role; `parent` is the source."""
    tokens: int = 0
    """Trained on."""
    steps: int = 0
    seconds: float = 0.0
    metrics: dict[str, float] = Field(default_factory=dict)
    held_out: HeldOut | None = None
    """What stands behind held-out `metrics`."""
    files: dict[str, Any] = Field(default_factory=dict)
    """Checksums of the parameters' files."""
    devices: Devices | None = None
    data: DataIdentity | None = None
    prune: PruneReport | None = None
    store: dict[str, SplitSummary] | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    git: str | None = None


def read_manifest(stage_directory: Path) -> Manifest | None:
    """The manifest of a finished stage, None when it is not finished. Raises `UserError`: the file is there but is
    not a manifest."""
    path = stage_directory / "manifest.json"
    if not path.is_file():
        return None
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            raise UserError(f"{path} is not valid JSON; delete the stage's directory to run it again") from None
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path} is not a stage's manifest: {where}: {first['msg'].lower()}") from None


def finished(stage_directory: Path) -> Manifest:
    """The manifest of a stage that must be finished. Raises `UserError`: it is not."""
    if (manifest := read_manifest(stage_directory)) is None:
        raise UserError(f"{stage_directory} is not a finished stage: it has no manifest.json that says so")
    return manifest


def ancestry(stage_directory: Path) -> Iterator[Manifest]:
    """The manifest of a finished stage and those of its parents that are still beside it, the nearest first; of a stage
    that was taken from another run, beside it there."""
    directory = stage_directory
    while (manifest := read_manifest(directory)) is not None:
        yield manifest
        if (parent := manifest.inputs.get("parent")) is None:
            return
        directory = directory.resolve().parent / parent.stage


def refuse_export(directory: Path) -> None:
    """Raise `UserError` for the directory of an export stage: the model is one directory further down."""
    for name, layout in FORMATS.items():
        if (directory / name / layout.last).is_file():
            raise UserError(
                f"{directory} is a stage that exported a model; the model is the directory {directory / name}"
            )


def digest(stage_directory: Path) -> str:
    """SHA-256 of a finished stage's manifest: what children name as their parent."""
    return hashlib.sha256((stage_directory / "manifest.json").read_bytes()).hexdigest()


def environment() -> dict[str, Any]:
    """Package versions, and the git commit when the package runs from a checkout."""
    versions, commit, root = {}, None, Path(__file__).parents[2]
    for package in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    if (root / ".git").exists():
        with suppress(OSError, subprocess.SubprocessError):
            command = ["git", "-C", str(root), "rev-parse", "HEAD"]
            commit = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    return {"versions": versions, "git": commit}

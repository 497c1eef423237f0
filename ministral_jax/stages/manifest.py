"""`manifest.json`: what a finished stage is and where it comes from. Written last, at once: its presence means done."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import subprocess
from pathlib import Path
from typing import Any

from ministral_jax.errors import UserError
from ministral_jax.models.spec import ModelSpec

Manifest = dict[str, Any]
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def read_manifest(stage_directory: Path) -> Manifest | None:
    """The manifest of a finished stage, None when it is not finished.

    Raises:
        UserError: the file is there but is not a manifest.
    """
    path = stage_directory / "manifest.json"
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise UserError(f"{path} is not valid JSON; delete the stage's directory to run it again") from None
    if not isinstance(manifest, dict) or "status" not in manifest:
        raise UserError(f"{path} is not a stage's manifest")
    return manifest if manifest["status"] == "finished" else None


def digest(stage_directory: Path) -> str:
    """SHA-256 of a finished stage's manifest: what children name as their parent."""
    return hashlib.sha256((stage_directory / "manifest.json").read_bytes()).hexdigest()


def spec_of(manifest: Manifest) -> ModelSpec:
    return ModelSpec.model_validate(manifest["spec"])


def environment() -> dict[str, Any]:
    """Package versions, and the git commit when the package runs from a checkout."""
    versions = {}
    for package in ("ministral-jax", *_PACKAGES):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"versions": versions, "git": _git_commit()}


def _git_commit() -> str | None:
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None

"""All of Orbax, behind four functions: finished parameters, and the state to resume from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from ministral_jax.errors import UserError

Tree = Any


def save_params(directory: Path, params: Tree) -> None:
    """Write parameters; the directory appears at once and whole, or not at all."""
    if directory.exists():  # left by a run that was killed before its manifest
        shutil.rmtree(directory)
    ocp.save(str(directory.absolute()), params)


def load_params(directory: Path, abstract: Tree) -> Tree:
    """Read parameters into the shapes and dtypes of `abstract`.

    Raises:
        UserError: no checkpoint there, or one of another shape (the first leaf that differs is named).
    """
    if not directory.is_dir():
        raise UserError(f"{directory} is not a checkpoint: there is no such directory")
    try:
        stored = ocp.metadata(str(directory.absolute())).metadata
    except Exception as error:
        raise UserError(f"{directory} is not a readable checkpoint: {str(error).splitlines()[0]}") from None
    _same_shapes(stored, abstract, directory)
    return ocp.load(str(directory.absolute()), _on_device(abstract))


def _same_shapes(stored: Tree, abstract: Tree, directory: Path) -> None:
    found = {
        jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in jax.tree_util.tree_leaves_with_path(stored)
    }
    wanted = {
        jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in jax.tree_util.tree_leaves_with_path(abstract)
    }
    for path in sorted(found.keys() ^ wanted.keys()):
        missing = path in wanted
        raise UserError(f"{directory}: {path} is {'missing' if missing else 'not part of the model'}")
    for path, leaf in wanted.items():
        if tuple(found[path].shape) != tuple(leaf.shape):
            raise UserError(
                f"{directory}: {path} has shape {tuple(found[path].shape)}, the spec needs {tuple(leaf.shape)}"
            )


def _on_device(abstract: Tree) -> Tree:
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=getattr(s, "sharding", None) or device), abstract
    )


class ResumeStore:
    """The newest few training states of a stage, saved without stopping the loop."""

    def __init__(self, directory: Path, keep: int):
        self.directory = directory
        training: Any = ocp.training  # its policies do not match its own protocols for a type checker
        self._checkpointer = training.Checkpointer(
            str(directory.absolute()),
            save_decision_policy=training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )
        self._saving: Any = None

    @property
    def latest(self) -> int | None:
        """Step of the newest complete state."""
        return None if self._checkpointer.latest is None else self._checkpointer.latest.step

    def save(self, step: int, state: Tree, note: dict[str, Any]) -> None:
        """Start saving; waits only for the save before this one. `note` is small JSON kept beside the state."""
        self.wait()
        self._saving = self._checkpointer.save_checkpointables_async(step, {"state": state}, custom_metadata=note)

    def restore(self, abstract: Tree) -> tuple[Tree, dict[str, Any]]:
        """The newest state, bit for bit, and its note."""
        latest = self._checkpointer.latest
        assert latest is not None
        loaded = self._checkpointer.load_checkpointables(latest.step, {"state": _on_device(abstract)})
        note = self._checkpointer.checkpointables_metadata(latest.step).custom_metadata
        return loaded["state"], note or {}

    def wait(self) -> None:
        if self._saving:
            self._saving.result()
            self._saving = None

    def close(self) -> None:
        self.wait()
        self._checkpointer.close()

    def delete(self) -> None:
        """A finished stage needs no state to resume from."""
        shutil.rmtree(self.directory, ignore_errors=True)

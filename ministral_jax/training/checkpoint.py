"""All of Orbax, behind two functions and a class: finished parameters, and the states a stage goes on from.

All processes of a job call the same things at the same points; the directory lies on a file system or in a bucket that
they share. Process 0 alone renames, removes and records checksums, which each process computes of what it wrote. What a
killed or a full machine leaves behind is recognised by checksums that are written last: a state without them, or with a
file that differs, is not used.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from pydantic import Field

from ministral_jax.console import say
from ministral_jax.distributed.collectives import barrier, first_problem, from_first, is_first
from ministral_jax.errors import UserError
from ministral_jax.files import is_remote, write_json
from ministral_jax.lazy import Lazy
from ministral_jax.places import move, remove_tree
from ministral_jax.settings import Frozen
from ministral_jax.training.checksums import Files, damage
from ministral_jax.training.streaming import streaming
from ministral_jax.training.writing import FAILED, TEMPORARY, Writing, discard, reason

if TYPE_CHECKING:
    from orbax.checkpoint import v1 as ocp
else:
    ocp = Lazy("orbax.checkpoint.experimental.v1")

Tree = Any


class CheckpointConfig(Frozen):
    """Resume state every `every` steps and `minutes` after the last one, the newest `keep` kept."""

    every: int = Field(default=100, ge=1)
    minutes: float | None = Field(default=None, gt=0)
    """By process 0's clock, looked at between steps."""
    keep: int = Field(default=2, ge=1)


_LEAVE_SECONDS = 60


def save_params(directory: Path, params: Tree) -> Files:
    """Write parameters; the directory appears at once and whole, or not at all.

    Returns:
        Size and SHA-256 of every file, the same dict on every process: for the manifest, and for `load_params`.

    Raises:
        UserError: they could not be written (on every process); nothing is left of the attempt.
    """
    if is_first():  # left by a run that was killed before its manifest
        discard(directory)
        directory.parent.mkdir(parents=True, exist_ok=True)
    barrier(f"save {directory}")
    files: Files = {}

    def begin() -> Any:
        with streaming(params):
            return ocp.save_async(str(directory.absolute()), params)

    writing = Writing(directory, begin, files.update)
    if (problem := writing.outcome()) is not None:
        if is_first():
            discard(directory)
        raise UserError(f"the parameters could not be saved in {directory}: {problem}") from writing.error
    return from_first(files)


def load_params(directory: Path, abstract: Tree, files: Files | None = None) -> Tree:
    """Read parameters.

    Args:
        abstract: `ShapeDtypeStruct`s; parameters are cast to their dtypes and lie where their shardings say (without
            one, on the first device).
        files: what `save_params` returned; checked before anything is loaded, each process reads its share.

    Raises:
        UserError: no checkpoint there, one of another shape (the first leaf that differs is named), or a file that
            differs from `files`. The same on every process.
    """
    problem = None if directory.is_dir() else f"{directory} is not a checkpoint: there is no such directory"
    if files is not None and first_problem(problem) is None and (found := damage(directory, files)) is not None:
        raise UserError(f"{directory}: {found}; delete {directory.parent} to have the stage made again")
    stored, unread = (None, problem) if problem else _stored(directory)
    if (problem := first_problem(unread or _difference(stored, abstract, directory))) is not None:
        raise UserError(problem)
    placed = _placed(abstract)
    try:
        with streaming(placed, stored):
            return ocp.load(str(directory.absolute()), placed)
    except RuntimeError:  # the connection to other processes
        raise
    except Exception as error:  # Orbax has no type of its own for what it cannot read
        raise UserError(
            f"{directory} cannot be read: {reason(error)}; delete {directory.parent} to have the stage made again"
        ) from error


def _stored(directory: Path) -> tuple[Tree, str | None]:
    """What Orbax says of the arrays of a checkpoint, or why it cannot."""
    try:
        return ocp.metadata(str(directory.absolute())).metadata, None
    except Exception as error:
        return None, f"{directory} is not a readable checkpoint: {reason(error)}"


def _difference(stored: Tree, abstract: Tree, directory: Path, exact: bool = False) -> str | None:
    """The first leaf that only one of two trees has, or that differs in shape; `exact` forbids a cast too."""
    found, wanted = (
        {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (stored, abstract)
    )
    for path in sorted(found.keys() ^ wanted.keys()):
        return f"{directory}: {path} is {'missing' if path in wanted else 'not part of the model'}"
    for path, leaf in wanted.items():
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        if (shape := tuple(found[path].shape)) != tuple(leaf.shape):
            return f"{directory}: {path} has shape {shape}, the spec needs {tuple(leaf.shape)}"
        if exact and (dtype := found[path].dtype) != leaf.dtype:
            return f"{directory}: {path} has dtype {dtype}, the spec needs {leaf.dtype}"
    return None


def _placed(abstract: Tree) -> Tree:
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=getattr(s, "sharding", None) or device), abstract
    )


# ---- states to resume from ------------------------------------------------------------------------------------------


class ResumeStore:
    """Training states of a stage, `directory`/<step>, saved without stopping the loop.

    The newest `keep` stay. A state counts once `checksums`/<step>.json is there; opening looks for the newest one all
    of whose files match it, and moves what is newer to `damaged`/<step>, saying so on stderr. Older states go only
    after a newer one counts, so Orbax, which knows nothing of that, is not asked to remove them. The state of step
    `pinned` stays for good.
    """

    def __init__(self, directory: Path, keep: int, pinned: int | None = None):
        self.directory, self._keep, self._pinned = directory, keep, pinned
        self._saving: tuple[int, Writing] | None = None
        self._latest = self._open()

    @property
    def latest(self) -> int | None:
        """Step of the newest good state; waits for the save in progress. The same on every process."""
        self.wait()
        return self._latest

    def save(self, step: int, state: Tree, note: dict[str, Any]) -> None:
        """Start saving; waits only for the save before this one. `note` is small JSON kept beside the state.

        Raises:
            UserError: the save before this one failed.
        """
        self.wait()
        path = self._path(step)

        def begin() -> Any:
            context = ocp.Context()
            # 8 % smaller at eight times the CPU time, which a stop waits for
            context.array.saving.use_compression = False
            with context:
                return ocp.save_checkpointables_async(str(path.absolute()), {"state": state}, custom_metadata=note)

        self._saving = step, Writing(path, begin, lambda files: self._complete(step, files))

    def restore(self, abstract: Tree) -> tuple[Tree, dict[str, Any]]:
        """The newest state, bit for bit, and its note. Leaves lie where the shardings of `abstract` say.

        Raises:
            UserError: it is the state of a model or an optimiser of other sizes.
        """
        step = self.latest
        assert step is not None
        path = self._path(step)
        stored = ocp.checkpointables_metadata(str(path.absolute()))
        problem = _difference(stored.metadata["state"], abstract, path, exact=True)
        if (problem := first_problem(problem)) is not None:
            raise UserError(f"{problem}; delete {self.directory} to start the stage again")
        loaded = ocp.load_checkpointables(str(path.absolute()), {"state": _placed(abstract)})
        note: Any = stored.custom_metadata
        return loaded["state"], note or {}

    def wait(self) -> None:
        """Until the state that is being saved counts.

        Raises:
            UserError: it could not be saved (on every process). The states before it are as they were.
        """
        if self._saving is None:
            return
        (step, writing), self._saving = self._saving, None
        if (problem := writing.outcome()) is None:
            self._latest = step
            return
        if is_first():
            self._forget(step)
        again = "no state was saved before, the same command starts again"
        if self._latest is not None:
            again = f"the state of step {self._latest} is intact, the same command goes on from there"
        raise UserError(
            f"the state of step {step} could not be saved in {self.directory}: {problem}; {again}"
        ) from writing.error

    def close(self) -> None:
        """Let the save in progress end. Asks no other process, so it may follow an error that only this one met."""
        if self._saving is None:
            return
        (step, writing), self._saving = self._saving, None
        writing.join(None if jax.process_count() == 1 else _LEAVE_SECONDS)
        if writing.is_alive():
            say(f"the state of step {step} was not saved in {self.directory}: other processes did not finish theirs")
        elif writing.error is not None:
            say(f"the state of step {step} could not be saved in {self.directory}: {reason(writing.error)}")
            if is_first():
                self._forget(step)

    def delete(self) -> None:
        """A finished stage needs no state to resume from, but for the one from which it could go on to more steps."""
        self.wait()
        if not is_first():
            return
        if self._pinned is None:
            remove_tree(self.directory)
            return
        for step in set(self._steps()) - {self._pinned}:
            self._forget(step)

    # ---- process 0 ----

    def _path(self, step: int) -> Path:
        return self.directory / str(step)

    def _record(self, step: int) -> Path:
        return self.directory / "checksums" / f"{step}.json"

    def _steps(self) -> list[int]:
        return sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdecimal() and path.is_dir())

    def _forget(self, step: int) -> None:
        self._record(step).unlink(missing_ok=True)  # first: a state that is half removed does not count
        discard(self._path(step))

    def _complete(self, step: int, files: Files) -> None:
        """What makes a written state count; then older ones may go. In a thread of process 0."""
        self._record(step).parent.mkdir(exist_ok=True)
        write_json(self._record(step), files)
        steps = self._steps()
        counting = [step for step in steps if self._record(step).is_file()]
        for old in set(steps) - {*counting[-self._keep :], self._pinned}:
            self._forget(old)

    # ---- opening ----

    def _open(self) -> int | None:
        """The newest good state; what is newer is out of the way."""
        torn = self._tidy() if is_first() else []
        steps: list[int] = from_first(self._steps() if is_first() else None)
        bad: dict[int, str] = {}
        good = None
        for step in reversed(steps):
            problem = self._problem(step)
            if problem is None:
                good = step
                break
            bad[step] = problem
        if is_first():
            instead = "starting from the beginning" if good is None else f"going on from step {good}"
            for step, problem in bad.items():
                say(f"{self._path(step)} is damaged ({problem}); {self._set_aside(step)}; {instead}")
            for step in torn:
                say(f"{self._path(step)} was being written when the run ended; removed; {instead}")
        barrier(f"open {self.directory}")
        return good

    def _tidy(self) -> list[int]:
        """Steps whose writing was cut short; nothing of them is left."""
        self.directory.mkdir(parents=True, exist_ok=True)
        torn = []
        for path in self.directory.iterdir():
            if path.name.endswith((TEMPORARY, FAILED)):
                remove_tree(path)
            if path.name.endswith(TEMPORARY) and (step := path.name.removesuffix(TEMPORARY)).isdecimal():
                torn.append(int(step))
        if is_remote(self.directory):  # where a state is written in its place
            torn += [step for step in self._steps() if not self._record(step).is_file()]
            for step in torn:
                self._forget(step)
        return torn

    def _problem(self, step: int) -> str | None:
        files, problem = from_first(_read_record(self._record(step)) if is_first() else None)
        return problem or damage(self._path(step), files)

    def _set_aside(self, step: int) -> str:
        place = self.directory / "damaged" / str(step)
        remove_tree(place)
        try:
            place.parent.mkdir(exist_ok=True)
            move(self._path(step), place)
        except OSError:  # a full disk may have no room even for a directory
            self._forget(step)
            return "removed"
        self._record(step).unlink(missing_ok=True)
        return f"moved to {place}"


def _read_record(path: Path) -> tuple[Files | None, str | None]:
    try:
        return json.loads(path.read_text(encoding="utf-8")), None
    except FileNotFoundError:
        return None, f"it has no {path.parent.name}/{path.name}: the run ended before that was written"
    except (OSError, ValueError):
        return None, f"{path.parent.name}/{path.name} is not readable"

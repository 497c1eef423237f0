"""What a run has, what it can take from other runs, and what is to be made: looked at before anything is done."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import PlainSerializer, PlainValidator

from ministral_jax.errors import UserError
from ministral_jax.files import append_jsonl, is_remote, read_jsonl
from ministral_jax.interop.checkpoint import read_spec
from ministral_jax.interop.formats import FORMATS
from ministral_jax.interop.hub import hub_name, outline
from ministral_jax.models.spec import ModelSpec
from ministral_jax.places import copy_tree, place
from ministral_jax.recipe.load import order, resolve_specs
from ministral_jax.recipe.types import Recipe
from ministral_jax.runs.identity import OTHER_CONTENT, Identity, begun, differences, identity
from ministral_jax.stages import Stage
from ministral_jax.stages.manifest import Manifest, digest, read_manifest


@dataclass(frozen=True)
class Planned:
    """A stage that is wanted, and what is to be done for it."""

    name: str
    spec: ModelSpec
    identity: Identity
    state: Literal["finished", "taken", "grows", "resumes", "begins"]
    place: Annotated[Any, PlainValidator(lambda text: place(text, "")), PlainSerializer(str)]
    """Its directory; of one that is "taken", the other run's."""
    step: int | None = None
    """Of the saved state from which it goes on."""

    @property
    def is_made(self) -> bool:
        """Whether there is something to be computed."""
        return self.state not in ("finished", "taken")


def made_specs(run_dir: Path) -> dict[str, ModelSpec]:
    """Sizes of the finished stages of a run."""
    found = {path.parent.name: read_manifest(path.parent) for path in run_dir.glob("*/manifest.json")}
    return {name: manifest.spec for name, manifest in found.items() if manifest is not None}


def outlined(recipe: Recipe) -> dict[str, ModelSpec]:
    """Sizes of the imports that are on a hub and not here, of which no more is downloaded than their headers."""
    found: dict[str, ModelSpec] = {}
    for name, stage in recipe.stages.items():
        path = Path(str(getattr(stage, "path", "")))
        if stage.is_gone and hub_name(path) is not None:
            with outline(path) as directory:
                found[name] = read_spec(directory)
    return found


def survey(
    recipe: Recipe,
    run_dir: Path,
    wanted: Iterable[str] = (),
    shelves: Sequence[Path] = (),
    root: Path | None = None,
    made: Mapping[str, ModelSpec] | None = None,
) -> list[Planned]:
    """The wanted stages (all but the optional ones when none is named) and what they need, in the order of their run.

    Args:
        shelves: directories of stages of other runs, from which what is the same is taken.
        root: where a tokenizer's cut file may be written.
        made: sizes of stages whose checkpoints are not here; by default those of the finished ones.

    Raises:
        UserError: the recipe is inconsistent, or a stage in `run_dir` was made with other settings, data or inputs.
    """
    wanted, root = list(wanted), root or run_dir / "data"
    names = order(recipe, wanted)
    specs = resolve_specs(recipe, names, made_specs(run_dir) if made is None else made)
    known: dict[str, Mapping[str, str | None]] = {}
    planned: dict[str, Planned] = {}
    for name in names:
        stage = recipe.stages[name]
        key = stage.model_dump_json(include={"data", "path"})
        contents = known[key] if key in known else known.setdefault(key, stage.contents(root))
        wants = Wanted(name, stage, specs[name], identity(stage, specs[name], contents))
        planned[name] = _plan(wants, run_dir, planned, shelves)
    growing = {name for name, plan in planned.items() if plan.state == "grows"}
    for name, plan in planned.items():
        if plan.state == "finished" and (found := growing & set(recipe.stages[name].inputs().values())):
            raise UserError(
                f"stage {name!r} in {run_dir} was made from {found.pop()!r}, which is to get more steps; delete "
                f"{plan.place} and what was made from it, or name the stage that is to grow and none after it"
            )
    return list(planned.values())


@dataclass(frozen=True)
class Wanted:
    """A stage as the recipe wants it."""

    name: str
    stage: Stage
    spec: ModelSpec
    identity: Identity


def _plan(wanted: Wanted, run_dir: Path, before: Mapping[str, Planned], shelves: Sequence[Path]) -> Planned:
    directory = run_dir / wanted.name
    found, old, step = read_manifest(directory), begun(directory), saved_step(directory)
    results = ("params", "store", *FORMATS)
    is_empty = found is None and step is None and not any((directory / name).exists() for name in results)
    changes = differences(old, wanted.identity) if old is not None and not is_empty else []
    if changes and not (found is not None and _may_grow(wanted, old, changes, directory)):
        is_content = changes[0].endswith(OTHER_CONTENT)
        begun_so = "was begun with other data" if is_content else "was begun with other settings"
        raise UserError(
            f"stage {wanted.name!r} in {run_dir} {begun_so}: {changes[0]}; give another --run-dir "
            f"(with --from {run_dir} for what stays the same), or delete {directory} (and the stages made from it)"
        )
    state, place = "begins" if step is None else "resumes", directory
    inputs = {role: before[other] for role, other in wanted.stage.inputs().items()}
    if found is not None:
        _check_inputs(wanted.name, found, run_dir, before)
        state, step = ("grows", step) if changes else ("finished", None)
    elif is_empty:
        if (other := _same(wanted, inputs, shelves)) is not None:
            state, place = "taken", other
    elif old is not None:
        _check_begun_from(wanted.name, old.get("inputs") or {}, inputs, directory)
    if state not in ("finished", "taken"):
        _refuse_link(directory)
    return Planned(wanted.name, wanted.spec, wanted.identity, state, place, step)


def saved_step(directory: Path) -> int | None:
    """Step of the newest state of a stage that counts."""
    found = [int(path.stem) for path in directory.glob("state/checksums/*.json") if path.stem.isdecimal()]
    return max(found, default=None)


def _may_grow(wanted: Wanted, old: Identity | None, changes: list[str], directory: Path) -> bool:
    """Whether more steps are all that is asked of a finished stage.

    Raises:
        UserError: they are, but it cannot go on from where it stands.
    """
    steps, before = getattr(wanted.stage, "steps", None), (old or {}).get("config", {}).get("steps")
    if len(changes) > 1 or steps is None or before is None or steps <= before:
        return False
    optimizer = wanted.identity["config"]["optimizer"]
    if optimizer["schedule"] == "cosine":
        why = "its learning rate has decayed over them (optimizer.schedule: cosine; constant and wsd can go on)"
    elif saved_step(directory) is None and before < optimizer["warmup"]:
        why = f"its learning rate rose faster than over optimizer.warmup = {optimizer['warmup']} steps"
    elif saved_step(directory) is None:
        why = f"no state of its optimiser is in {directory / 'state'}"
    else:
        return True
    raise UserError(
        f"stage {wanted.name!r} cannot go on from its {before} steps: {why}; give another --run-dir, or delete "
        f"{directory}"
    )


def _check_inputs(name: str, found: Manifest, run_dir: Path, before: Mapping[str, Planned]) -> None:
    for role, other in found.inputs.items():
        place = before[other.stage].place if other.stage in before else run_dir / other.stage
        if read_manifest(place) is None:
            raise UserError(
                f"stage {name!r} in {run_dir} was made from the {role} {other.stage!r}, which is not there any more; "
                f"delete {run_dir / name} to make both again"
            )
        if digest(place) != other.digest:
            raise UserError(
                f"stage {name!r} in {run_dir} was made from another {role} {other.stage!r} than the one there now; "
                f"delete {run_dir / name} to make it again"
            )


def _check_begun_from(name: str, begun_from: Identity, inputs: Mapping[str, Planned], directory: Path) -> None:
    """What is saved of an interrupted stage came of these very inputs."""
    for role, plan in inputs.items():
        then = begun_from.get(role, {}).get("digest")  # which an older version did not write
        if then is not None and (plan.is_made or digest(plan.place) != then):
            other = "the one that is to be made" if plan.is_made else "the one there now"
            raise UserError(
                f"stage {name!r} in {directory.parent} was begun from another {role} {plan.name!r} than {other}; "
                f"delete {directory} to begin it again"
            )


# ---- what other runs have --------------------------------------------------------------------------------------------


def shelves(run_dirs: Iterable[Path]) -> list[Path]:
    """Where the stages of runs and of sweeps lie.

    Raises:
        UserError: a directory that is neither.
    """
    found = []
    for run_dir in run_dirs:
        if (run_dir / "sweep.json").is_file():
            found.append(run_dir / "shared")
        elif (run_dir / "recipe.json").is_file():
            found.append(run_dir)
        else:
            raise UserError(f"--from {run_dir} is neither a run nor a sweep: it has no recipe.json and no sweep.json")
    return found


def _same(wanted: Wanted, inputs: Mapping[str, Planned], shelves: Sequence[Path]) -> Path | None:
    """A finished stage that was made in the same way from the same."""
    if any(plan.is_made for plan in inputs.values()) or None in wanted.identity["contents"].values():
        return None
    needed = {role: digest(plan.place) for role, plan in inputs.items()}
    for shelf in shelves:
        for found in _called(wanted.name, shelf):
            manifest, old = read_manifest(found), begun(found)
            if manifest is None or old is None or differences(old, wanted.identity):
                continue
            made_from = {role: other.digest for role, other in manifest.inputs.items()}
            if old["contents"] == wanted.identity["contents"] and made_from == needed:
                return found
    return None


def _called(name: str, shelf: Path) -> Iterator[Path]:
    """Directories of a stage: in a sweep, what it is made of stands behind its name."""
    yield from (place for place in [shelf / name, *sorted(shelf.glob(f"{name}-*"))] if place.is_dir())


def _owned_place(directory: Path) -> Path:
    """A stage's directory; of a point of a sweep the one to which that is a link, where points share the stage."""
    if not directory.is_symlink():
        return directory
    step, shared = directory.parent / os.readlink(directory), directory.parent.parent / "shared"
    return step if os.path.realpath(step.parent) == os.path.realpath(shared) else directory


def _refuse_link(directory: Path) -> None:
    """Raise `UserError` where what is to be written would be written into another run."""
    place = _owned_place(directory)
    if is_remote(place):  # where there are no links
        return
    refuse_gone(place)
    real = Path(os.path.realpath(place))
    is_run = (real.parent / "recipe.json").exists() or (real.parent.parent / "sweep.json").exists()
    if place.is_symlink() and is_run:
        raise UserError(
            f"{place} is a link to {os.readlink(place)}, a stage of another run, which alone may go on with it; delete "
            "the link to make the stage here"
        )


def refuse_gone(place: Path) -> None:
    """Raise `UserError` for a link to what is not there any more."""
    if place.is_symlink() and not place.exists():
        raise UserError(f"{place} is a link to {os.readlink(place)}, which is gone; delete the link")


def take(plan: Planned, run_dir: Path) -> None:
    """Make a link to another run's stage in the place of what is not made here, and leave a note of it there; where one
    of them lies in an object store, a copy without the states to go on from."""
    if is_remote(run_dir) or is_remote(plan.place):
        copy_tree(plan.place, run_dir / plan.name, last="manifest.json", spare="state")
        return
    place, real = _owned_place(run_dir / plan.name), os.path.realpath(plan.place)
    target = os.path.relpath(real, os.path.realpath(place.parent))
    temporary = place.with_name(f".{place.name}.link")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)  # nothing was made in it
    os.replace(temporary, place)
    with suppress(OSError):  # it may be another user's
        append_jsonl(Path(real) / "taken.jsonl", {"by": os.path.relpath(place.absolute(), real)})


def is_taken(directory: Path) -> bool:
    """Whether a link of another run still leads to a stage."""
    links = (directory / str(note.get("by")) for note in read_jsonl(directory / "taken.jsonl"))
    return any(link.is_symlink() and os.path.realpath(link) == os.path.realpath(directory) for link in links)

"""Checkpoints written as directories, whole or not at all, with one tensor in memory at a time."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import jax.numpy as jnp
import numpy as np

from ministral_jax.distributed.collectives import barrier, is_first
from ministral_jax.errors import UserError
from ministral_jax.files import is_remote, write_json
from ministral_jax.interop import safetensors
from ministral_jax.interop.slots import Slot
from ministral_jax.models.spec import ModelSpec
from ministral_jax.models.vlm import Params, check_params
from ministral_jax.places import put_files

SHARD_BYTES = 5_000_000_000
WRITER = "ministral_jax"


@dataclass(frozen=True)
class Export:
    """A model that is to be written: parameters that may be on the devices of several processes, its sizes, the number
    format, files that are copied beside it, such as the tokenizer's (of directories, those in it), and for FP8 the
    scales of what goes into its linear layers, `models.block.SCALES`."""

    params: Params
    spec: ModelSpec
    dtype: str
    files: Sequence[Path] = ()
    scales: Params | None = None


@dataclass(frozen=True)
class Format:
    """A layout of a checkpoint's directory."""

    dtypes: tuple[str, ...]
    """That can be written."""
    last: str
    """The file without which what is there is no model."""
    check: Callable[[ModelSpec], object]
    """Raises `UserError` for sizes that the format cannot say."""
    write: Callable[[Export, Path], None]
    """Fills an empty directory, one tensor after another; the first process calls it."""
    tensors: Callable[[Export], Iterable[safetensors.Pending]]
    """In the order in which they are written; the other processes fetch them meanwhile."""
    check_values: Callable[[Export], object] = lambda model: None
    """Raises `UserError` for numbers that the format cannot hold; all processes call it, before anything is written."""


def export(model: Export, layout: Format, directory: Path) -> None:
    """Write a checkpoint. All processes must call this. One tensor at a time is fetched, and the first process writes
    it. Everything is written beside `directory` and renamed into place at the end, replacing an earlier export but
    nothing else.

    Raises:
        UserError: parameters that do not fit their sizes, a number format that the layout does not have or that does
            not hold them, a missing file, or a `directory` that holds something else.
    """
    check_params(model.params, model.spec, "export")
    check_dtype(model.dtype, layout)
    layout.check(model.spec)
    check_free(directory)
    files = files_of(model.files)
    for file in files:
        if not file.is_file():
            raise UserError(f"tokenizer file {file} does not exist")
    layout.check_values(model)
    if is_first():
        _write(model, layout, directory, files)
    else:
        for tensor in layout.tensors(model):
            tensor.value()
    barrier("exported")


def check_free(directory: Path) -> None:
    """Raises `UserError`: the directory holds something that an export may not replace, or is `.` or `..`, in whose
    place none can be renamed."""
    if directory.name in ("", ".."):
        raise UserError(f"{directory} has no name of its own; write the directory of an export with its name")
    if directory.exists() and not (directory.is_dir() and is_export(directory)):
        raise UserError(f"{directory} exists and is not an export of this program; choose another directory")


def check_dtype(dtype: str, layout: Format) -> None:
    """Raises `UserError`: the layout has no such numbers."""
    if dtype not in layout.dtypes:
        known = f"{', '.join(layout.dtypes[:-1])} and {layout.dtypes[-1]}"
        raise UserError(f"export dtype is {dtype!r}; {known} can be written")


def pending(slot: Slot, params: Params, dtype: str) -> safetensors.Pending:
    """A tensor that is fetched when its turn comes."""
    return safetensors.Pending(slot.name, np.dtype(jnp.dtype(dtype)), slot.shape, partial(slot.take, params))


def write_shards(
    tensors: Iterable[safetensors.Pending], directory: Path, stem: str, metadata: dict[str, str] | None = None
) -> None:
    """Safetensors files `<stem>.safetensors` of at most `SHARD_BYTES`, larger tensors alone; where there are several,
    with an index that `transformers` reads."""
    shards: list[list[safetensors.Pending]] = []
    weight_map, total, size = {}, 0, SHARD_BYTES
    for tensor in tensors:
        if size + tensor.bytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.bytes
        total += tensor.bytes
    for i, shard in enumerate(shards, 1):
        name = f"{stem}.safetensors" if len(shards) == 1 else f"{stem}-{i:05}-of-{len(shards):05}.safetensors"
        safetensors.write(directory / name, shard, {"format": "pt", "writer": WRITER} | (metadata or {}))
        weight_map |= {t.name: name for t in shard}
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(directory / f"{stem}.safetensors.index.json", index)


_WRITTEN = re.compile(
    r"tekken\.json|chat_template\.jinja|README\.md|certificate\.json|\w+_config\.json|"
    r"\w+(-\d+-of-\d+)?\.safetensors|\w+\.safetensors\.index\.json|mmproj\.gguf"
)
"""Files of an export but for the one that is written last."""
_LAST = ("config.json", "params.json", "model.gguf")


def is_export(directory: Path) -> bool:
    """Whether a directory may be replaced: it is empty, or `WRITER` wrote its weights; in a bucket also where a write
    was cut off, which leaves the file out that is written last."""
    if is_remote(directory) and not any((directory / last).is_file() for last in _LAST):
        return all(_WRITTEN.fullmatch(path.name) for path in directory.iterdir())
    weights = [*directory.glob("*.safetensors"), *directory.glob("*.gguf")]
    return not any(directory.iterdir()) if not weights else all(map(_is_ours, weights))


def _is_ours(file: Path) -> bool:
    if file.suffix == ".safetensors":
        return safetensors.metadata(file).get("writer") == WRITER
    with file.open("rb") as opened:  # GGUF: `WRITER` stands among the first keys
        return WRITER.encode() in opened.read(256)


def files_of(paths: Iterable[Path]) -> list[Path]:
    """Files, and those in directories."""
    return [f for path in paths for f in (sorted(path.iterdir()) if path.is_dir() else [path])]


def _write(model: Export, layout: Format, directory: Path, files: list[Path]) -> None:
    if is_remote(directory):  # by way of a disk; without its last file what is there is no model
        with TemporaryDirectory() as scratch:
            _write(model, layout, Path(scratch, "export"), files)
            for last in _LAST:
                (directory / last).unlink(missing_ok=True)
            cast(Any, directory).rmtree()
            put_files(Path(scratch, "export"), directory, last=layout.last)
        return
    draft = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    for file in files:
        shutil.copy(file, draft / file.name)
    layout.write(model, draft)
    replaced = directory.with_name(f".{directory.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if directory.exists():
        directory.rename(replaced)
    draft.rename(directory)
    shutil.rmtree(replaced, ignore_errors=True)

"""The safetensors files of a checkpoint, whose tensors are found by an index or by the files' names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ministral_jax.errors import UserError
from ministral_jax.interop import safetensors

NATIVE_STEM = "consolidated"
"""How the names of files in Mistral's own format begin; they often lie beside those of `transformers`."""


def weight_files(directory: Path, stem: str) -> list[Path]:
    """Files of `<stem>.safetensors.index.json`, or without one all of the format: those that begin with `NATIVE_STEM`,
    or all others. None where there are none.

    Raises:
        UserError: an index that is damaged or names a file that is not there, or two sets of weights.
    """
    index, whole = directory / f"{stem}.safetensors.index.json", f"{stem}.safetensors"
    if not index.is_file():
        found = sorted((f for f in directory.glob("*.safetensors") if f.is_file()), key=lambda file: file.name)
        return [file for file in found if file.name.startswith(NATIVE_STEM) == (stem == NATIVE_STEM)]
    files = safetensors.named_files(index)
    if whole not in files and (directory / whole).is_file():
        raise UserError(f"{directory} has two sets of weights, {whole} and those of {index.name}; delete one")
    for name in files:
        if not (directory / name).is_file():
            raise UserError(f"{index} names {name}, which is not there")
    return [directory / name for name in files]


def named_tensors(
    directory: Path, stem: str, rename: Callable[[str], str | None] = lambda name: name
) -> dict[str, safetensors.Tensor]:
    """Tensors of a checkpoint under the names that `rename` gives them; None leaves one out. Raises `UserError` as
    `weight_files`; also no files, damaged ones, or a tensor that stands twice."""
    files = weight_files(directory, stem)
    if not files:
        raise UserError(f"{directory} has no {stem}.safetensors")
    found: dict[str, safetensors.Tensor] = {}
    for file in files:
        for name, tensor in safetensors.read(file).items():
            if (short := rename(name)) is None:
                continue
            if short in found:
                raise UserError(f"{directory}: {name} stands twice, in {found[short].path.name} and {file.name}")
            found[short] = tensor
    return found

"""The files of a checkpoint as they are: faults become findings, not errors, so that one does not hide the next."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from ministral_jax.errors import UserError
from ministral_jax.files import read_object, refuse_pointer
from ministral_jax.interop import safetensors

Level = Literal["green", "amber", "red"]
Json = dict[str, Any]


@dataclass(frozen=True)
class Finding:
    """green: as it should be; amber: some loader goes wrong here, or a value to look at; red: it cannot be used, or
    gives wrong results."""

    level: Level
    subject: str
    said: str


@dataclass(frozen=True)
class Source:
    """A directory. Of weights, headers alone are read."""

    directory: Path
    faults: list[Finding] = field(default_factory=list)
    """Met while reading; whatever is read twice is said once."""
    _parsed: dict[str, Json] = field(default_factory=dict)

    def has(self, name: str) -> bool:
        return (self.directory / name).is_file()

    def _fault(self, said: str) -> None:
        if (fault := Finding("red", "files", said)) not in self.faults:
            self.faults.append(fault)

    def json(self, name: str) -> Json:
        """A JSON object; empty where there is none."""
        if name not in self._parsed:
            self._parsed[name] = self._read(name) if self.has(name) else {}
        return self._parsed[name]

    def _read(self, name: str) -> Json:
        try:
            return read_object(self.directory / name)
        except UserError as error:
            self._fault(str(error))
        return {}

    def text(self, name: str) -> str | None:
        if not self.has(name):
            return None
        try:
            refuse_pointer(self.directory / name)
        except UserError as error:
            self._fault(str(error))
            return None
        return (self.directory / name).read_text(encoding="utf-8", errors="replace")

    @cached_property
    def config(self) -> Json:
        return self.json("config.json")

    @cached_property
    def decoder(self) -> Json:
        """The part of `config.json` that is the decoder's."""
        return section(self.config, "text_config") or self.config

    @cached_property
    def weights(self) -> list[str]:
        """Names of safetensors files, without those of Mistral's own format."""
        return [name for name in self._safetensors() if not name.startswith("consolidated")]

    @cached_property
    def native_weights(self) -> list[str]:
        return [name for name in self._safetensors() if name.startswith("consolidated")]

    @property
    def any_weights(self) -> bool:
        return bool(self.weights or self.native_weights)

    def _safetensors(self) -> Iterator[str]:
        return (path.name for path in sorted(self.directory.glob("*.safetensors")) if path.is_file())

    @cached_property
    def tensors(self) -> dict[str, dict[str, safetensors.Tensor]]:
        """Of each weight file that can be read, its tensors."""
        return self._headers(self.weights)

    @cached_property
    def native_tensors(self) -> dict[str, dict[str, safetensors.Tensor]]:
        return self._headers(self.native_weights)

    def _headers(self, names: list[str]) -> dict[str, dict[str, safetensors.Tensor]]:
        found = {}
        for name in names:
            try:
                found[name] = safetensors.read(self.directory / name)
            except UserError as error:
                self._fault(str(error))
        return found


def section(values: Json, key: str) -> Json:
    """An object in an object; empty where it is something else."""
    found = values.get(key)
    return found if isinstance(found, dict) else {}


def some(names: set[str] | list[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    ordered = sorted(name if name.isprintable() else repr(name) for name in names)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(ordered[:most]) + more

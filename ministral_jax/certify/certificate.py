"""A certificate: what was compared, what came out, and what had to fail and did."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from pydantic import BaseModel, Field

import ministral_jax
from ministral_jax.certify.checks import Check, checks, file_digests
from ministral_jax.certify.controls import CONTROLS, copied
from ministral_jax.certify.gguf_file import ask_llama, llama_limit, open_gguf
from ministral_jax.certify.prompts import Prompt, prompts
from ministral_jax.certify.readers import LIMIT, Opened, Read, Reader, opened, readers
from ministral_jax.certify.serving import Serving, serving
from ministral_jax.console import say
from ministral_jax.data.tokenizer import Tokenizer
from ministral_jax.errors import UserError
from ministral_jax.files import read_object
from ministral_jax.interop.llama import has_llama
from ministral_jax.interop.shards import NATIVE_STEM, weight_files
from ministral_jax.models.spec import ModelSpec

FILE = "certificate.json"


class Reading(BaseModel):
    """A file against the checkpoint on one prompt."""

    reader: str
    prompt: str
    positions: int
    kl: float
    """KL(checkpoint ‖ file), nats per token, mean over the positions."""
    max_difference: float
    """max |Δlogit| to the checkpoint."""
    argmax: float
    """Share of positions with the checkpoint's most probable token."""
    to_ours: float
    """max |Δlogit| / max |logit| to our own reading of the file."""
    holds: bool


class Failure(BaseModel):
    """A changed copy, read as the file is."""

    control: str
    reader: str
    difference: float | None = None
    """max |Δlogit| / max |logit| to our reading of the file as it is, the largest over the prompts."""
    refused: str | None = None
    """What the reader said instead of reading it."""
    fails: bool


class Certificate(BaseModel):
    """`certificate.json`."""

    holds: bool
    format: str
    against: str
    limit: float = LIMIT
    checks: list[Check]
    readings: list[Reading] = Field(default_factory=list)
    controls: list[Failure] = Field(default_factory=list)
    not_installed: list[str] = Field(default_factory=list)
    """Readers of the format that were not asked."""
    serving: Serving | None = None
    files: dict[str, str]
    """SHA-256 of every file that is certified."""


def certify(directory: Path, checkpoint: Path) -> Certificate:
    """Compare an export with the finished stage or export that it was made from.

    Raises:
        UserError: one of them is no model, or the export is of a format that is not certified.
    """
    layout = layout_of(directory)
    trained = opened(checkpoint)
    found, tokenizer, ours = checks(directory, checkpoint, trained, layout)
    readings, failures, absent = list[Reading](), list[Failure](), list[str]()
    if ours is not None:  # else nothing can be read
        given = prompts(trained.model.spec, tokenizer)
        case = _Case(directory, layout, trained.model.spec, given, trained.read(given), ours.read(given))
        asked, absent = _asked(case, tokenizer, replace(trained, params={}))
        del trained, ours  # the parameters of copies take their place
        limits = dict[str, float]()
        for reader in asked:
            try:
                here = [*case.readings(reader)]
            except Exception as error:  # whatever another program says to a file that it does not read
                found.append(Check(name=reader.name, holds=False, said=_said(error)))
                continue
            readings += here
            limits[reader.name] = max(LIMIT, 2 * here[-1].to_ours)
        failures = [*case.failures([reader for reader in asked if reader.name in limits], limits)]
    holds = all(check.holds for check in found) and all(r.holds for r in readings) and all(f.fails for f in failures)
    return Certificate(
        holds=holds and bool(readings),
        format=layout,
        against=checkpoint.name,
        checks=found,
        readings=readings,
        controls=failures,
        not_installed=absent,
        serving=serving(directory) if holds and readings else None,
        files=file_digests(directory),
    )


def check_pair(directory: Path, checkpoint: Path) -> None:
    """Raises `UserError`: as `layout_of`, or both are one directory, which holds whatever it is."""
    layout_of(directory)
    if directory == checkpoint:
        raise UserError(f"{directory} is compared with itself; --against is the stage that it was made from")


def layout_of(directory: Path) -> str:
    """The format of an export. Raises `UserError`: no directory, or one of no format that is certified, or of two."""
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory")
    hf, ggufs = (directory / "config.json").is_file(), {path.name for path in directory.glob("*.gguf")}
    if (hf and weight_files(directory, NATIVE_STEM)) or (ggufs and any(directory.glob("*.safetensors"))):
        raise UserError(f"{directory} holds two formats, and a certificate is of one; give each a directory of its own")
    if "model.gguf" in ggufs and (other := sorted(ggufs - {"model.gguf", "mmproj.gguf"})):
        raise UserError(f"{directory} holds {other[0]} too, and a certificate is of model.gguf and mmproj.gguf alone")
    if hf:
        return "fp8" if read_object(directory / "config.json").get("quantization_config") else "hf"
    if (directory / "params.json").is_file():
        return "native"
    if (directory / "model.gguf").is_file():
        if find_spec("gguf") is None:
            raise UserError(
                f"{directory} is read with gguf, which is not installed; in the checkout, pip install -e '.[gguf]'"
            )
        return "gguf"
    raise UserError(f"{directory} is no export that can be certified: no config.json, params.json or model.gguf")


@dataclass(frozen=True)
class _Case:
    """What readers are asked of an export, and by prompt the answers of the checkpoint and our own."""

    directory: Path
    layout: str
    spec: ModelSpec
    given: list[Prompt]
    wanted: dict[str, np.ndarray]
    own: dict[str, np.ndarray]

    def readings(self, reader: Reader) -> Iterator[Reading]:
        say(f"{reader.name} reads {self.directory.name}")
        read = reader.open(self.directory, self.spec)
        for prompt in self.given:
            if prompt.picture is not None and not reader.sees:
                continue
            logits = read(prompt)
            trained, own = (answers[prompt.name][-len(logits) :] for answers in (self.wanted, self.own))
            apart = difference(logits, own)
            yield Reading(
                reader=reader.name,
                prompt=prompt.name,
                positions=len(logits),
                kl=divergence(trained, logits),
                max_difference=float(np.abs(logits - trained).max()),
                argmax=float((logits.argmax(-1) == trained.argmax(-1)).mean()),
                to_ours=apart,
                holds=apart <= reader.limit(prompt),
            )

    def failures(self, readers: list[Reader], limits: dict[str, float]) -> Iterator[Failure]:
        """On the prompt on which all faults show, the longest. `limits`: of each reader, at least twice what the file
        itself differs by from our reading of it."""
        for control in CONTROLS[self.layout]:
            if not control.applies(self.spec):
                continue
            with TemporaryDirectory(prefix=f".{self.directory.name}.", dir=self.directory.parent) as scratch:
                copied(self.directory, copy := Path(scratch, "copy"))
                control.plant(copy, self.spec)
                for reader in readers:
                    say(f"{reader.name} reads a copy: {control.name}")
                    try:
                        logits, refused = reader.open(copy, self.spec)(self.given[-1]), None
                        found = difference(logits, self.own[self.given[-1].name])
                    except Exception as error:  # whatever another program says to a damaged file
                        found, refused = None, _said(error)
                    yield Failure(
                        control=control.name,
                        reader=reader.name,
                        difference=found,
                        refused=refused,
                        fails=found is None or found > limits[reader.name],
                    )


def _asked(case: _Case, tokenizer: Tokenizer | None, like: Opened) -> tuple[list[Reader], list[str]]:
    """What reads an export and is installed, this project first, and what is not."""

    def ours(path: Path, spec: ModelSpec) -> Read:
        if path == case.directory:
            return lambda prompt: case.own[prompt.name]
        copy = open_gguf(path, spec, tokenizer).opened(like) if case.layout == "gguf" else opened(path)
        answers = copy.read(case.given)
        return lambda prompt: answers[prompt.name]

    name = f"ministral_jax {ministral_jax.__version__}"
    if case.layout != "gguf":
        others, absent = readers(case.layout)
        return [Reader(name, ours), *others], absent
    own = Reader(f"{name} with gguf", ours)
    if not has_llama():
        return [own], ["llama.cpp"]
    name = f"llama.cpp in llama-cpp-python {import_module('llama_cpp').__version__}"
    # of a file without a tokenizer llama.cpp ends the process where a picture is asked for
    return [own, Reader(name, ask_llama, llama_limit(case.directory), sees=tokenizer is not None)], []


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error!s:.200}"


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """max |a - b| / max |b|; infinite where one is no number."""
    found = float(np.abs(a - b).max() / np.abs(b).max())
    return found if np.isfinite(found) else float("inf")


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    """KL(p ‖ q) of logits `[n, V]`, nats per position."""
    log_p, log_q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (p, q))
    return float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean())

"""What a stage holds and does, as a few records that the memory model and the roofline both read.

A stage holds models and goes through phases: some work is done so many times, and while it is done its temporaries lie
beside the models. Numbers of rows are global ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from jax.sharding import Mesh

from ministral_jax.data.bins import most_patches
from ministral_jax.distributed.placement import Placement, Rules
from ministral_jax.losses.targets import DEFAULT_CHUNK
from ministral_jax.models.block import Compute
from ministral_jax.models.spec import ModelSpec
from ministral_jax.sampling.engine import SLOTS, rows_at_once

Head = Literal["kl", "ce", "logprobs", "choice", "none"]
"""What is made of a read's final states: KL and cross-entropy against a teacher's, cross-entropy, log-probabilities of
the labels, logits at one position, nothing."""


@dataclass(frozen=True)
class Held:
    """A model that lies in memory while a stage runs.

    role: what the stage calls it, e.g. `student`.
    dtype: of its parameters.
    learns: with a gradient in float32 and AdamW's two moments in `moments`; but for `frozen`, top-level keys of the
    parameters.
    """

    role: str
    spec: ModelSpec
    dtype: str
    rules: Rules
    learns: bool = False
    frozen: tuple[str, ...] = ()
    only: tuple[str, ...] = ("",)
    """What is there of it: parameters whose paths begin so, such as `decoder/head`."""
    moments: str = "float32"


@dataclass(frozen=True)
class Read:
    """A model reads packed rows: forward, and where it `learns` (in this work) backward and an update too.

    patches: the most of a row's pictures, 0 without any. tower: whether this model's own sees them, not another's,
    equal to the last bit, before it. chunk: tokens of a device whose logits are there at once.
    taps: whether every layer's activations are observed, as calibration does.
    taught: whose logits are made beside this model's, for a `kl`: of states read before, or recorded. targets: bytes of
    what was recorded of a teacher for a row. handed: bytes that a teacher on a mesh of its own hands over for it, for
    this batch and the next. streamed: whether the next batch is put on the devices while this one is
    read. at_once: rows of a batch, or as many more as the devices share evenly; 0 where microbatches say it.
    """

    model: Held
    rows: int
    length: int
    compute: Compute
    microbatches: int = 1
    patches: int = 0
    head: Head = "none"
    chunk: int = DEFAULT_CHUNK
    learns: bool = False
    taps: bool = False
    taught: Held | None = None
    targets: int = 0
    handed: int = 0
    streamed: bool = True
    at_once: int = 0
    tower: bool = True

    def bin(self, mesh: Mesh) -> int:
        """Patches for which a device has room in a microbatch where every row has the most pictures (`data.bins`)."""
        if (vision := self.model.spec.vision) is None or not self.patches:
            return 0
        bins = Placement(mesh, self.model.rules).bins(self.microbatches)
        return most_patches(self.rows, self.patches, bins, vision)

    def on(self, mesh: Mesh) -> Read:
        """With the batches that rows `at_once` make on a mesh, the last one padded."""
        if not self.at_once:
            return self
        count = Placement(mesh, self.model.rules).even(self.at_once)
        batches = -(-self.rows // count)
        return replace(self, rows=count * batches, microbatches=batches, at_once=0)


@dataclass(frozen=True)
class Draw:
    """A model answers `prompts` prompts of `prompt` tokens `each` so often, with up to `completion` tokens; `at_once`:
    so many answers are drawn together, 0 for all."""

    model: Held
    prompts: int
    each: int
    prompt: int
    completion: int
    compute: Compute
    patches: int = 0
    at_once: int = 0

    @property
    def waves(self) -> int:
        """Batches of answers, one after the other."""
        return -(-self.prompts * self.each // (self.at_once or self.prompts * self.each))

    def rows(self, place: Placement) -> tuple[int, int]:
        """Of prompts that are read for a wave, and of answers."""
        return rows_at_once(self.prompts, self.each, self.at_once, place)

    @property
    def rooms(self) -> Iterator[tuple[int, int]]:
        """Slots for a completion and how many tokens are drawn while there are so many; they double when they are
        used, up to those of the longest completion."""
        done, room = 0, min(SLOTS, self.completion)
        while done < self.completion:
            yield room, room - done
            done, room = room, min(2 * room, self.completion)


@dataclass(frozen=True)
class Cut:
    """A model is cut to the sizes of another one, which takes its place."""

    source: Held
    target: Held


@dataclass(frozen=True)
class Move:
    """A model is read from or written to disk."""

    model: Held
    whole: bool = False
    """On one host, as an export is."""
    dtype: str | None = None
    """On disk; None is as it is kept."""


Work = Read | Draw | Cut | Move


@dataclass(frozen=True)
class Phase:
    """Work that is done one after the other, `times` in the stage; `beside`: now and then between a loop's steps.

    held: the models that lie in memory, where these are others than the stage's. kept: reads whose final states, of all
    their rows, lie beside.
    """

    name: str
    work: tuple[Work, ...]
    times: float = 1
    beside: bool = False
    held: tuple[Held, ...] | None = None
    kept: tuple[Read, ...] = ()

    def on(self, mesh: Mesh) -> Phase:
        return replace(self, work=tuple(each.on(mesh) if isinstance(each, Read) else each for each in self.work))


@dataclass(frozen=True)
class StageWork:
    """All that a stage does: the models it holds, its phases, and how many states it keeps to go on from."""

    held: tuple[Held, ...]
    phases: tuple[Phase, ...]
    keep: int = 0
    apart: Phase | None = None
    """What a teacher on a mesh of its own does for every step."""

    def on(self, mesh: Mesh) -> StageWork:
        """With rows as the devices of a mesh share them."""
        return replace(self, phases=tuple(phase.on(mesh) for phase in self.phases))

    def phase(self, name: str) -> Phase | None:
        return next((phase for phase in self.phases if phase.name == name), None)

    @property
    def main(self) -> Phase | None:
        """The phase in which most of the stage's time is meant to be spent: its steps, if it has some."""
        return self.phase("step") or (self.phases[0] if self.phases else None)

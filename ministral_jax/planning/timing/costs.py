"""What a device does when a model reads rows, answers, is cut or is moved: costs that `roofline` turns into time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from ministral_jax.distributed.placement import Placement
from ministral_jax.models.spec import ModelSpec
from ministral_jax.planning.memory.shards import ITEMSIZE
from ministral_jax.planning.records import Cut, Draw, Move, Read, Work
from ministral_jax.planning.timing.assumptions import Assumptions
from ministral_jax.planning.timing.blocks import Cost, Layout, Tower, decoder_of, vision_of
from ministral_jax.planning.timing.links import Transfer
from ministral_jax.planning.timing.scores import Passes
from ministral_jax.sampling.engine import by_rows

UPDATED = 16
"""Bytes that AdamW and the gradient's norm read and write for each parameter, beside two moments that are read and
written: it and the gradient, then it written, then the gradient once more; float32."""
ADDED = 12
"""Bytes for each parameter to add a microbatch's gradient to the sum."""


def costs(work: Work, layout: Layout, hosts: int, assume: Assumptions) -> list[Cost]:
    """Of one pass of `work`."""
    if isinstance(work, Read):
        return Reading(work, layout, assume).costs()
    if isinstance(work, Draw):
        return draw_costs(work, layout, assume)
    return _moved(work, layout, hosts, assume)


@dataclass(frozen=True)
class Reading:
    """A `Read` on a device."""

    read: Read
    layout: Layout
    assume: Assumptions

    @property
    def spec(self) -> ModelSpec:
        return self.read.model.spec

    @cached_property
    def rows(self) -> int:
        """Of a microbatch on a device."""
        return self.layout.rows(self.read.rows / self.read.microbatches)

    @cached_property
    def tower(self) -> Tower:
        return decoder_of(self.spec, self.read.length, self.layout, self.read.compute)

    def costs(self) -> list[Cost]:
        """Of all microbatches."""
        learns = self.read.learns
        passes = Passes(1, 1, 1) if learns else Passes()
        found = [*self.tower.costs(self.rows, passes, self.assume, learns), self._embedding(), *self._head()]
        if patches := self.read.bin(self.layout.mesh):
            found += self._vision(patches)
        if self.read.taps:
            found.append(self._taps())
        found = [cost.times(self.read.microbatches) for cost in found]
        return [*found, *self._once()]

    def _once(self) -> Iterator[Cost]:
        """What a step does once, however many microbatches it has."""
        spec, layout, width = self.spec, self.layout, self.tower.bytes
        D, V = layout.axes(spec.width, "embed"), layout.axes(spec.vocab, "vocab")
        table = spec.vocab * spec.width / layout.parts(V)
        sent = [Transfer("gather", D, table * width)]
        if self.read.learns:
            local = layout.shards(spec).size(without=self.read.model.frozen)
            summed = ADDED * self.read.microbatches if self.read.microbatches > 1 else 0
            yield Cost("optimiser", "memory", hbm=local * (UPDATED + 4 * ITEMSIZE[self.read.model.moments] + summed))
            sent.append(Transfer("scatter", D, 4 * table))  # of the loss head's gradient
            copies = tuple(axis for axis in (*layout.batch, *self.tower.cut["T"]) if axis not in D)
            for axes in (tuple(a for a in copies if a != "slice"), tuple(a for a in copies if a == "slice")):
                sent.append(Transfer("reduce", axes, 4 * table / layout.parts(D)))
        yield Cost("tables", "memory", sent=tuple(t for t in sent if t.axes))

    def _embedding(self) -> Cost:
        """Rows looked up; their gradients summed in float32 into the table."""
        spec, layout, tower = self.spec, self.layout, self.tower
        D, V = layout.axes(spec.width, "embed"), layout.axes(spec.vocab, "vocab")
        states = self.rows * tower.tokens * spec.width
        sent = [Transfer("reduce", V, states * tower.bytes, waits=True)]
        moved = 2 * states * tower.bytes
        if self.read.learns:
            shared = (*layout.batch, *tower.cut["T"])
            sent.append(Transfer("exchange", tuple(a for a in D if a in shared), 4 * states, waits=True))
            copies = tuple(a for a in (*shared, *V) if a not in D)
            part = 4 * spec.vocab * spec.width / layout.parts(D)
            sent += [Transfer("reduce", tuple(a for a in copies if a != "slice"), part)]
            sent += [Transfer("reduce", tuple(a for a in copies if a == "slice"), part)]
            moved += 3 * 4 * states + 2 * part
        return Cost("embedding", "memory", hbm=moved, sent=tuple(t for t in sent if t.axes))

    def _head(self) -> Iterator[Cost]:
        """Products of states and head by chunks of tokens, and what is made of their logits."""
        read, spec, layout, width = self.read, self.spec, self.layout, self.tower.bytes
        if read.head == "none":
            return
        D = layout.axes(spec.width, "embed")
        V = tuple(axis for axis in layout.axes(spec.vocab, "vocab") if axis not in layout.batch)
        table = spec.vocab / layout.parts(V) * spec.width
        tokens = self.rows * (1 if read.head == "choice" else self.tower.tokens)
        sides = [model.spec.width for model in (read.model, read.taught) if model is not None]
        again = 1 if read.head == "logprobs" and read.learns else 0
        products = sum(sides) + spec.width * ((2 if read.learns else 0) + again)
        flops = 2 * tokens * spec.vocab / layout.parts(V) * products
        chunks = math.ceil(tokens / max(1, min(tokens, read.chunk)))
        passes = self.assume.logit_passes * (len(sides) + again)
        passes += self.assume.logit_passes_back if read.learns else 0
        logits = 4 * tokens * spec.vocab / layout.parts(V)
        # Each chunk reads the head for every product, and the sum of its gradient is read and written in float32.
        matrices = chunks * table * (width * products / spec.width + (8 if read.learns else 0))
        sent = [Transfer("gather", D, side / spec.width * table * width) for side in sides]
        if read.learns:
            sent.append(Transfer("reduce", V, self.rows * self.tower.tokens * spec.width * width, waits=True))
        yield Cost("loss head", "head", flops, matrices, chunks, tuple(t for t in sent if t.axes))
        yield Cost("logits", "memory", hbm=passes * logits)

    def _vision(self, patches: int) -> list[Cost]:
        """The tower over the pictures in a device's bin; frozen, it only runs forward. The devices that share rows tell
        each other merged tokens."""
        read, v = self.read, self.spec.vision
        assert v is not None
        learns = read.learns and "vision" not in read.model.frozen
        tower = vision_of(self.spec, patches, self.layout, read.compute)
        found, embed = list[Cost](), 0.0
        if read.tower:
            found = tower.costs(1, Passes(1, 1, 1) if learns else Passes(), self.assume, learns)
            embed = v.patch_width * v.width * patches
        merged = patches / v.merge**2
        wide = self.spec.width / self.layout.parts(self.layout.axes(self.spec.width, "projector"))
        weights = v.merge**2 * v.width**2 + v.width * wide + self.spec.width * wide
        passes = 3 if read.learns and "projector" not in read.model.frozen else 1
        flops = 2 * (merged * weights * passes + embed)
        made = merged * self.spec.width * tower.bytes
        cut = self.layout.axes(self.spec.width, "projector")
        sent = [Transfer("reduce", cut, made, passes, waits=True)]
        bins = tuple(axis for axis in read.model.rules.bins if self.layout.sizes[axis] > 1)
        sent.append(Transfer("gather", bins, made * self.layout.parts(bins), passes, waits=True))
        sent = [transfer for transfer in sent if transfer.axes]
        return [*found, Cost("projector", "vision", flops, weights * tower.bytes, sent=tuple(sent))]

    def _taps(self) -> Cost:
        """Moments of both norms' inputs in every layer, in float32 of the highest precision. Where FSDP cuts D the
        program gathers these activations of all devices."""
        tokens, width, layers = self.rows * self.tower.tokens, self.spec.width, self.spec.layers
        flops = 2 * 2 * tokens * width**2 * self.assume.highest * layers
        D = self.tower.cut["D"]
        whole = 4 * tokens * self.layout.parts(D) * width
        sent = (Transfer("gather", D, whole, 2 * layers, waits=True),) if D else ()
        return Cost("moments", "matmul", flops, 4 * layers * (2 * width**2 + 8 * tokens), sent=sent)


# ---- answers ---------------------------------------------------------------------------------------------------------


def draw_costs(draw: Draw, layout: Layout, assume: Assumptions) -> list[Cost]:
    """Of each wave prompts are read; then, token by token, its answers go on together until the longest one ends."""
    place = by_rows(Placement(layout.mesh, layout.rules))
    layout, (prompts, answers) = Layout(layout.mesh, place.rules), draw.rows(place)
    read = Read(draw.model, prompts, draw.prompt, draw.compute, patches=draw.patches)
    found = [replace(c, name=f"prompt {c.name}") for c in Reading(read, layout, assume).costs()]
    spec, rows = draw.model.spec, layout.rows(answers)
    tower = decoder_of(spec, 1, layout, draw.compute)
    width, tokens = tower.bytes, draw.completion
    heads = tower.heads / tower.parts("H")
    slots = draw.prompt + sum(room * count for room, count in draw.rooms) / tokens
    V = layout.axes(spec.vocab, "vocab")
    table = spec.vocab * spec.width / layout.parts(V)
    one = tower.costs(rows, Passes(), assume, learns=False)
    layers = next(c for c in one if c.name == "layers")
    # Masters are narrowed, and what FSDP cuts is gathered, for every token again.
    masters = layout.shards(spec).size("decoder") * (ITEMSIZE[draw.model.dtype] + width)
    cache = 2 * rows * spec.layers * spec.kv_heads / tower.parts("K") * spec.head_width * slots * width
    scores = 2 * 2 * rows * heads * spec.layers * slots * spec.head_width
    head = 2 * rows * table
    gathered = Transfer("gather", layout.axes(spec.width, "embed"), table * width * (1 if spec.tied else 2))
    sent = tuple(t for c in one for t in c.sent) + ((gathered,) if gathered.axes else ())
    each = [
        replace(layers, hbm=layers.hbm + masters, sent=sent),
        Cost("cache", "attention", scores, cache, spec.layers),
        Cost("next token", "head", head, table * width + 4 * assume.logit_passes * rows * spec.vocab, 1),
    ]
    return [cost.times(draw.waves) for cost in (*found, *(cost.times(tokens) for cost in each))]


# ---- the rest --------------------------------------------------------------------------------------------------------


def _moved(work: Cut | Move, layout: Layout, hosts: int, assume: Assumptions) -> list[Cost]:
    """A cut reads one model and writes the other; a move waits for the disks of all hosts, or of one."""
    if isinstance(work, Cut):
        read, written = (layout.shards(held.spec).size() * ITEMSIZE[held.dtype] for held in (work.source, work.target))
        return [Cost("surgery", "memory", hbm=2 * read + written)]
    count = work.model.spec.parameters * ITEMSIZE[work.model.dtype]
    return [Cost("disk", "memory", seconds=count / assume.disk / (1 if work.whole else hosts))]

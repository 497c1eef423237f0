"""Moments of the programs that read rows: an update, an evaluation, a pass of calibration, and surgery."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
from jax.sharding import Mesh

from ministral_jax.data.batch import image_shapes, shapes
from ministral_jax.planning.memory.shards import ITEMSIZE, Shards
from ministral_jax.planning.memory.temporaries import FLOAT, Moment, Rows, together
from ministral_jax.planning.records import Cut, Read

_FLOATS = ("loss_mask", "answer_mask", "text_bytes")


def row_bytes(read: Read) -> int:
    """Of a row of a batch without its pictures; with what was recorded of a teacher, most of it of tokens."""
    slots = "image_slot" if read.patches and read.model.spec.vision is not None else "tokens"
    arrays = {*shapes(1, read.length, _FLOATS), slots}
    return 4 * read.length * len(arrays) + read.targets


def bin_bytes(read: Read, mesh: Mesh) -> int:
    """Of a device's pictures in all microbatches."""
    if (v := read.model.spec.vision) is None:
        return 0
    arrays = image_shapes((1, 1), read.bin(mesh), v).values()
    return read.microbatches * sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in arrays)


def placed(rows: Rows) -> int:
    """A batch on a device, over all microbatches; and the next one, which is put there meanwhile."""
    count, tokens = Rows(replace(rows.read, microbatches=1), rows.mesh).shape
    of_rows = count * (row_bytes(rows.read) + rows.read.handed) * tokens // rows.read.length
    return (1 + rows.read.streamed) * (of_rows + bin_bytes(rows.read, rows.mesh))


def _patches(rows: Rows) -> int:
    """Patches of all microbatches in the dtype that is computed in: a cast that is taken out of their loop."""
    v = rows.spec.vision
    if v is None or not rows.read.patches:
        return 0
    return rows.read.microbatches * rows.read.bin(rows.mesh) * v.patch_width * rows.width


# ---- an update -------------------------------------------------------------------------------------------------------


def step_moments(reads: tuple[Read, ...], mesh: Mesh) -> Iterator[Moment]:
    """One program: a microbatch is read by those that teach, then forward and backward by the one that learns."""
    (learner,) = (Rows(read, mesh) for read in reads if read.learns)
    teachers = [Rows(read, mesh) for read in reads if not read.learns]
    loops = learner.read.microbatches > 1
    always = {
        "batch": placed(learner),
        "gradients": _accumulated(learner) if loops else 0,
        "activations": learner.casts + _patches(learner) + sum(each.casts for each in teachers),
    }
    if loops:
        always["activations"] += learner.table + sum(each.table for each in teachers)
    states, (tower, kept) = sum(each.stream for each in teachers), learner.vision
    for teacher in teachers:
        yield together(always, {"activations": teacher.vision[0] + teacher.stream})
    yield together(always, {"activations": states + tower})
    kept += learner.residuals + learner.angles
    for teacher in teachers:  # whose states may be made before the learner's or after them
        yield together(always, {"activations": kept + 2 * learner.stream + teacher.layer})
    yield together(always, {"activations": states + kept + learner.stream, "loss head": _loss_head(learner)})
    gradient = _gradient(learner)
    yield together(always, {"activations": kept + learner.layer_backward, "gradients": gradient})
    # the cotangents of the embedding's rows in float32, before and after they are sent to where its columns lie
    rows = 2 * learner.stream * FLOAT // learner.width
    yield together(always, {"activations": rows + learner.stream + learner.hole, "gradients": gradient})


def _gradient(rows: Rows) -> int:
    """Of a microbatch, float32: the head's whole in D, until it is added."""
    sharded = rows.shards.size(without=(*rows.read.model.frozen, "decoder/head", "decoder/embed"))
    return sharded * FLOAT + rows.head(FLOAT)


def _accumulated(rows: Rows) -> int:
    """Over microbatches, float32."""
    frozen = rows.read.model.frozen
    if rows.spec.tied or not rows.sums_late:
        return rows.shards.size(without=frozen) * FLOAT
    return rows.shards.size(without=(*frozen, "decoder/head")) * FLOAT + rows.head(FLOAT)


def _loss_head(rows: Rows) -> int:
    """Logits of a chunk and their gradient; the learner's head in float32 as it was gathered and cast, its gradient,
    the teacher's head; states cut into chunks and the gradient in them."""
    found = rows.logits(FLOAT + rows.width) + rows.head(2 * FLOAT + rows.width) + 2 * rows.stream
    if (teacher := rows.taught) is not None:
        found += rows.logits(FLOAT) + teacher.head(teacher.width) + teacher.stream
    return found


# ---- reading alone ---------------------------------------------------------------------------------------------------


def read_moments(reads: tuple[Read, ...], mesh: Mesh) -> Iterator[Moment]:
    """Programs one after the other: the states of each model, and then what is read off them."""
    every = [Rows(read, mesh) for read in reads]
    batch = {"batch": placed(every[-1])}
    states = 0
    for rows in every:
        tower, kept = rows.vision
        # states leave the program, unless it reads them itself
        fixed = rows.casts + states + (0 if rows.read.head in ("logprobs", "choice") else rows.stream)
        for moment in (rows.layer, tower + kept, rows.table + rows.stream, _observed(rows) if rows.read.taps else 0):
            yield together(batch, {"activations": fixed + moment})
        states += rows.stream
    last = every[-1]
    readers = [rows for rows in (last, last.taught) if rows is not None]
    logits = last.logits(FLOAT * (len(readers) + (last.read.head == "logprobs")))
    heads = sum(rows.head(rows.width) for rows in readers) if last.read.head != "none" else 0
    # figures of every position, whole on every device
    told = 11 * 4 * last.read.rows * last.read.length if last.read.head in ("kl", "ce") else 0
    yield together(batch, {"activations": states, "loss head": logits + heads + told})


def _observed(rows: Rows) -> int:
    """What calibration makes of a layer: sums of x xᵀ over tokens, float32, text apart from images. They are cut in D
    as an embedding is, and so is the product: a device multiplies all rows of the batch, with all of D, by its part of
    theirs; its own rows are there as they came, in order and exchanged. And the sums of all layers, [2, L, D, D]."""
    domains, D = 2 if rows.read.patches else 1, rows.spec.width
    product = rows.read.rows * rows.read.length * D * FLOAT + 3 * rows.stream * FLOAT // rows.width
    return product + domains * rows.spec.layers * D * rows.shards.cut(D, "embed") * FLOAT + rows.hole


# ---- surgery ---------------------------------------------------------------------------------------------------------


def cut_moments(cut: Cut, mesh: Mesh) -> Iterator[Moment]:
    """Beside the source: a step makes a model of the one before it, which goes then. Neurons are taken along an axis
    that is cut, and come whole in it: three matrices, and the one that they are put in."""
    specs = [cut.source.spec]
    for size in ("layers", "width", "mlp_width"):
        if (smaller := getattr(cut.target.spec, size)) != getattr(specs[-1], size):
            specs.append(specs[-1].model_copy(update={size: smaller}))
    bytes_of = [Shards(spec, cut.target.rules, mesh).size() * ITEMSIZE[cut.target.dtype] for spec in specs]
    target = Shards(cut.target.spec, cut.target.rules, mesh)
    spec, D = cut.target.spec, cut.source.spec.width
    taken = 0
    if spec.mlp_width != cut.source.spec.mlp_width:
        size = ITEMSIZE[cut.source.dtype]
        taken = 4 * spec.layers * spec.mlp_width * target.cut(spec.width, "embed") * size
    both = max((before + after for before, after in pairwise(bytes_of)), default=bytes_of[0])
    yield {"surgery": both - bytes_of[0] + taken, "basis": D * D * FLOAT}

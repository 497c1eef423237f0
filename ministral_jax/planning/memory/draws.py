"""Moments of the sampler's programs: prompts are read, answers begin, room is made for more, and tokens are drawn."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

from jax.sharding import Mesh

from ministral_jax.distributed.placement import Placement
from ministral_jax.planning.memory.shards import ITEMSIZE, local_shape
from ministral_jax.planning.memory.temporaries import FLOAT, Moment, Rows
from ministral_jax.planning.records import Draw, Read
from ministral_jax.sampling.engine import by_rows

_VOCABULARIES = 4
"""Arrays [rows, V] in float32 of which a token is drawn: logits, what is drawn from, its noise, their sum."""


def draw_moments(draw: Draw, mesh: Mesh) -> Iterator[Moment]:
    """The cache of a wave's answers begins with `SLOTS` places for them and doubles them when they are used: keys, and
    then values, whose old places are there until the new ones are."""
    place = by_rows(Placement(mesh, draw.model.rules))
    model = replace(draw.model, rules=place.rules)
    prompts, answers = draw.rows(place)
    width = ITEMSIZE[draw.compute.dtype]

    def cache(count: int, slots: int) -> int:
        """Keys and values of all layers; segments are small beside them."""
        shape = (model.spec.layers, count, model.spec.kv_heads, slots, model.spec.head_width)
        axes = ("layers", "batch", "kv_heads", None, None)
        return 2 * width * math.prod(local_shape(shape, axes, place.rules, mesh))

    read = Rows(Read(model, prompts, draw.prompt, draw.compute, patches=draw.patches), mesh)
    of_prompts = cache(prompts, draw.prompt)
    fixed, (tower, kept) = read.casts + read.stream, read.vision
    for moment in (read.layer + of_prompts, tower + kept, read.table + read.stream):
        yield {"activations": fixed + moment, "cache": 0}

    rooms = [room for room, _ in draw.rooms]
    # rows are taken of what is on their device, and then room is made for them
    yield {"cache": of_prompts + cache(answers, draw.prompt) + cache(answers, draw.prompt + rooms[0])}
    for room, larger in pairwise(rooms):
        yield {"cache": cache(answers, draw.prompt + room) // 2 + cache(answers, draw.prompt + larger)}
    rows = local_shape((answers,), ("batch",), place.rules, mesh)[0]
    fixed = read.casts + read.weights + read.table
    # logits are whole in V on the devices of a row, for which the head is too
    head = read.head(width) + model.spec.vocab * model.spec.width * width
    logits = _VOCABULARIES * rows * model.spec.vocab * FLOAT
    yield {"cache": cache(answers, draw.prompt + rooms[-1]), "activations": fixed + max(head, logits)}

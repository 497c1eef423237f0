"""What attention's scores cost on one device, by how they are computed: all at once, tile by tile, or in a kernel."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from ministral_jax.models.attention import KERNELS
from ministral_jax.models.kernels import splash
from ministral_jax.planning.timing.assumptions import Assumptions

GPU_BLOCK = 128
"""Queries that a kernel of a GPU holds while keys go by."""
UNKEPT = ("cudnn", "triton")
"""Kernels whose results have no name to be kept by, so that a recomputation runs them again."""


@dataclass(frozen=True)
class Scores:
    """Sizes of a device's queries and of the keys that they meet.

    span: keys of the longest document. chunks: equal parts of the row in which the queries lie. kept: attention's
    result and its log-sum-exp are kept for the backward pass.
    """

    rows: int
    heads: float
    head_width: int
    queries: float
    keys: int
    span: int
    chunks: int
    causal: bool
    bytes: int
    kept: bool


class Passes(NamedTuple):
    """How often a stack's layers run: forward, forward again for the backward pass, backward."""

    forward: int = 1
    again: int = 0
    backward: int = 0


class ScoreCost(NamedTuple):
    """FLOPs, bytes of memory, trips of loops, and seconds of a kernel's steps in which nothing is computed."""

    flops: float
    hbm: float
    trips: float = 0.0
    idle: float = 0.0


def score_cost(scores: Scores, implementation: str, block: int, passes: Passes, assume: Assumptions) -> ScoreCost:
    """Of all passes through one layer; `block` is that of the loop of tiles."""
    if implementation == "xla":
        return _at_once(scores, passes, assume)
    if scores.kept and implementation not in UNKEPT:
        passes = passes._replace(again=0)
    if implementation == "blockwise":
        return _by_tiles(scores, block, passes, assume)
    assert implementation in KERNELS, implementation
    return _splash(scores, passes, assume) if implementation == "splash" else _gpu(scores, implementation, passes)


def _at_once(s: Scores, passes: Passes, assume: Assumptions) -> ScoreCost:
    """Every pair of the row, whatever sees what."""
    numbers = s.rows * s.heads * s.queries * s.keys
    products = 2 * passes.forward + 2 * passes.again + 4 * passes.backward
    if s.kept:
        products -= passes.again  # what the scores are multiplied into is kept, they are not
    return ScoreCost(2 * numbers * s.head_width * products, _passed(s, numbers, numbers, passes, assume))


def _by_tiles(s: Scores, block: int, passes: Passes, assume: Assumptions) -> ScoreCost:
    """Whole tiles up to the diagonal, each a trip; backward five products."""
    block = min(block, max(1, int(s.queries) // s.chunks))
    tiles = _tiles(s, block)
    numbers = s.rows * s.heads * tiles * block**2
    products = 2 * passes.forward + 2 * passes.again + 5 * passes.backward
    moved = _passed(s, numbers, s.rows * s.heads * block**2, passes, assume)
    return ScoreCost(2 * numbers * s.head_width * products, moved, tiles * sum(passes))


def _splash(s: Scores, passes: Passes, assume: Assumptions) -> ScoreCost:
    """Forward two products, backward three in the kernel of d_q and four in that of d_k and d_v, over whole blocks.

    A step of the grid reads a block of keys and values (of queries and cotangents for d_k and d_v); steps above the
    diagonal read and compute nothing, but the grid still goes through them.
    """
    block = splash.block_of(int(s.queries) // s.chunks)
    visited, grid = _tiles(s, block), math.ceil(s.queries / block) * math.ceil(s.keys / block)
    if s.causal and s.chunks == 2:  # the first of a shard's chunks meets the first half of the row
        grid *= 0.75
    runs = passes.forward + passes.again
    numbers, heads = s.rows * s.heads * visited * block**2, s.rows * s.heads
    moved = heads * visited * 2 * block * s.head_width * s.bytes * (runs + 2 * passes.backward)
    moved += heads * s.queries * s.head_width * s.bytes * (2 * runs + 8 * passes.backward)
    idle = heads * (grid - visited) * (runs + 2 * passes.backward) * assume.idle_step
    return ScoreCost(2 * numbers * s.head_width * (2 * runs + 7 * passes.backward), moved, idle=idle)


def _gpu(s: Scores, implementation: str, passes: Passes) -> ScoreCost:
    """As FlashAttention: five products backward; keys that many blocks of queries read come from the second cache.

    Where a row is cut, mosaic's backward kernels go over all keys: on Hopper they pass over none but those after the
    queries of whole rows.
    """
    runs = passes.forward + passes.again
    every = s.causal and implementation == "mosaic" and s.queries < s.keys
    back = (2 if every else 1) * 5 * passes.backward
    numbers = s.rows * s.heads * _tiles(s, GPU_BLOCK) * GPU_BLOCK**2
    arrays = s.rows * s.heads * (s.queries + s.keys) * s.head_width * s.bytes
    return ScoreCost(2 * numbers * s.head_width * (2 * runs + back), 2 * arrays * (runs + 2 * passes.backward))


def _tiles(s: Scores, block: int) -> float:
    """Tiles of queries and keys of one document that are visited: in zig-zag order all devices visit as many."""
    mine = s.chunks * math.ceil(s.queries / s.chunks / block)
    every = math.ceil(s.span / block)
    return mine * (every + 1) / 2 if s.causal else mine * every


def _passed(s: Scores, numbers: float, at_once: float, passes: Passes, assume: Assumptions) -> float:
    """Bytes of `numbers` scores in float32 that go to memory and back, where those at once do not stay near."""
    if 4 * at_once <= assume.near:
        return 0.0
    often = assume.score_passes * (passes.forward + passes.again) + assume.score_passes_back * passes.backward
    return 4 * numbers * often

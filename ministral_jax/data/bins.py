"""Which device computes which picture of a batch: whole pictures in bins, as many bins as there are devices.

The rows of a batch lie in shards; the devices that share a shard's rows share its pictures too, so that only they tell
each other features. A bin has room for P patches, a bucket of what the fullest one of all devices holds: batches of
text have no bins at all, and every process finds the same P by itself.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from ministral_jax.data.batch import Batch, bucket, image_shapes, shapes
from ministral_jax.data.images import ImagePatches, patch_positions
from ministral_jax.distributed.placement import Bins, Placement
from ministral_jax.models.spec import VisionSpec

Sizes = Mapping[Hashable, int]
"""Patches of the pictures of a row."""
_FEWEST = 1024
"""Patches of a bin, so that small runs compile one step with pictures: less than one picture of 640 x 480 has."""
T = TypeVar("T")


def sizes_of(images: ImagePatches | None, vision: VisionSpec) -> Sizes:
    """Of a row's pictures; rows that share the object share the pictures."""
    if images is None:
        return {}
    return {(id(images), n): count for n, count in enumerate((images.grids.prod(axis=1) * vision.merge**2).tolist())}


def most_patches(rows: int, patches: int, bins: Bins, vision: VisionSpec) -> int:
    """P of the fullest batch of `rows` rows that hold `patches` each: a picture goes to the emptiest bin, which is then
    no fuller than the mean and one picture more."""
    per_group = rows // (bins.shards * bins.microbatches) * patches
    largest = min(patches, largest_picture(vision))
    return _room(min(per_group, -(-per_group // bins.each) + largest * (bins.each > 1)), vision)


def largest_picture(vision: VisionSpec) -> int:
    """Patches of a square picture of the largest size."""
    return (-(-vision.max_image_size // vision.stride) * vision.merge) ** 2


def batch_shapes(
    rows: int, length: int, floats: Sequence[str], patches: int, bins: Bins, vision: VisionSpec | None
) -> dict[str, tuple[tuple[int, ...], type]]:
    """`data.batch.shapes` of the fullest global batch of rows that hold `patches` patches each."""
    room = most_patches(rows, patches, bins, vision) if patches and vision is not None else 0
    found = shapes(rows, length, floats, room, vision)
    if room and vision is not None:
        found |= image_shapes((bins.shards * bins.microbatches, bins.each), room, vision)
    return found


def _room(patches: int, vision: VisionSpec) -> int:
    block = vision.merge**2
    return -(-bucket(max(patches, _FEWEST)) // block) * block if patches else 0


def binned(batch: Batch, bins: Bins, vision: VisionSpec | None) -> Batch:
    """A batch as it goes to the devices: its `images` in bins, which `image_slot` points into; see `data.batch`.

    `image_sizes`, where the batch has it, are the `Sizes` of every row of the global batch of which it holds some:
    whole shards, in their order.
    """
    batch = dict(batch)
    images, sizes = batch.pop("images", None), batch.pop("image_sizes", None)
    if images is None or vision is None:
        return batch
    own = [sizes_of(one, vision) for one in images]
    every: Sequence[Sizes] = own if sizes is None else [*sizes]
    most = max(max(_fill(group, bins.each)[1]) for group in _groups(every, bins.shards, bins.microbatches))
    slots = batch.pop("image_slot")
    if not most:
        return batch
    shards = bins.shards * len(own) // len(every)
    groups = _groups(range(len(own)), shards, bins.microbatches)
    arrays = image_shapes((len(groups), bins.each), _room(most, vision), vision)
    found = {name: np.zeros(shape, dtype) for name, (shape, dtype) in arrays.items()}
    slots = slots.copy()
    for number, rows in enumerate(groups):
        places, _ = _fill([own[row] for row in rows], bins.each)
        _write({name: array[number] for name, array in found.items()}, [images[row] for row in rows], places, vision)
        for row in rows:
            slots[row] = _pointed(slots[row], own[row], places, _room(most, vision), vision)
    return batch | found | {"image_slot": slots}


def _groups(rows: Sequence[T], shards: int, microbatches: int) -> list[Sequence[T]]:
    """Rows that share bins: of a shard those of one microbatch, which takes every m-th row (`training.state`)."""
    size = len(rows) // shards
    return [rows[s * size + k : (s + 1) * size : microbatches] for s in range(shards) for k in range(microbatches)]


def _fill(rows: Sequence[Sizes], bins: int) -> tuple[dict[Hashable, tuple[int, int]], list[int]]:
    """Bin and first patch of each picture, which keep their order within a bin; and what the bins hold. The largest
    goes first, always into the emptiest bin. A picture that several rows share stands in one."""
    sizes = {key: count for row in rows for key, count in row.items()}
    chosen, loads = dict[Hashable, int](), [0] * bins
    for key, count in sorted(sizes.items(), key=lambda item: -item[1]):
        chosen[key] = loads.index(min(loads))
        loads[chosen[key]] += count
    places, filled = dict[Hashable, tuple[int, int]](), [0] * bins
    for key, count in sizes.items():
        places[key] = chosen[key], filled[chosen[key]]
        filled[chosen[key]] += count
    return places, loads


def _write(
    arrays: Batch, images: Sequence[ImagePatches | None], places: Mapping[Hashable, tuple[int, int]], vision: VisionSpec
) -> None:
    """Pictures into the arrays `[G, P, ..]` of their group, where padding is what is left."""
    numbers = {key: number for number, key in enumerate(places, 1)}
    for row in images:
        first = 0
        for n, (key, count) in enumerate(sizes_of(row, vision).items()):
            assert row is not None
            if number := numbers.pop(key, None):
                at, begin = places[key]
                there = (at, slice(begin, begin + count))
                arrays["patches"][there] = row.patches[first : first + count]
                arrays["patch_row"][there], arrays["patch_col"][there] = patch_positions(
                    *row.grids[n].tolist(), vision.merge
                )
                arrays["patch_image"][there] = number
            first += count


def _pointed(
    slots: np.ndarray, sizes: Sizes, places: Mapping[Hashable, tuple[int, int]], patches: int, vision: VisionSpec
) -> np.ndarray:
    """`image_slot` of a row, from merged tokens of the row to those of its group's bins."""
    block = vision.merge**2
    firsts = [((at * patches + begin) // block, sizes[key] // block) for key in sizes for at, begin in [places[key]]]
    table = np.concatenate([np.zeros(0, np.int32), *(first + np.arange(count) for first, count in firsts)])
    known = (slots >= 0) & (slots < len(table))
    return np.where(known, np.append(table, -1)[np.where(known, slots, -1)], -1).astype(np.int32)


def place(
    placement: Placement, batch: Batch, count: int, vision: VisionSpec | None, microbatches: int = 1
) -> dict[str, jax.Array]:
    """`Placement.place` of this process's rows of a global batch of `count`, their pictures in bins."""
    return placement.place(binned(batch, placement.bins(microbatches), vision), count)


def place_whole(
    placement: Placement, batch: Batch, vision: VisionSpec | None, microbatches: int = 1
) -> dict[str, jax.Array]:
    """`place` of a global batch that every process has whole; it makes the patches of its own rows alone."""
    count = len(batch["tokens"])
    rows = placement.rows(count)
    own: dict[str, Any] = {name: array[rows] for name, array in batch.items()}
    if "images" in batch and vision is not None:
        own["image_sizes"] = [sizes_of(one, vision) for one in batch["images"]]
    return place(placement, own, count, vision, microbatches)

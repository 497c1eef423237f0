"""The batch that the model reads, for every stage: the one place where its arrays are made.

Shapes are static: B rows of T tokens; a row holds documents one after the other.

tokens, positions, segments int32 `[B, T]`: segment 0 is padding, documents are 1, 2, ..; positions restart in each.
labels int32 `[B, T]`: `tokens[t + 1]`.
loss_mask float32 `[B, T]`: 1 where position t predicts a label that counts.

And where rows have pictures:

images object `[B]`: a row's `ImagePatches`, None without any. Rows may share one.
image_slot int32 `[B, T]`: which merged token of the row's pictures stands at this `[IMG]`, -1 elsewhere.

On the devices pictures do not lie with their rows but in G bins of P patches for each of S groups of rows, B/S in each;
`data.bins` puts them there:

patches uint8 `[S, G, P, 3pp]`: pixels in merge-block order, so that `merge**2` neighbours make one merged token.
patch_image, patch_row, patch_col int32 `[S, G, P]`: the pictures of a bin are numbered ascending from 1 or more, and 0
    is padding, behind them; row and column in the picture's own patch grid.
image_slot int32 `[B, T]`: which merged token of the group's bins, one after the other, stands at this `[IMG]`, -1
    elsewhere.

What a source or a stage adds stands beside these: see `pipeline.batches` for packed rows, `rollout.training_rows` for
answers. The functions here are pure and know of one row, or of rows of one document each.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ministral_jax.data.images import ImagePatches
from ministral_jax.models.spec import VisionSpec

Batch = dict[str, np.ndarray]
SMALLEST = 32
"""Tokens to which the shortest row of one document is padded."""


def shapes(
    rows: int, length: int, floats: Sequence[str] = ("loss_mask",), patches: int = 0, vision: VisionSpec | None = None
) -> dict[str, tuple[tuple[int, ...], type]]:
    """Shape and dtype of each array of a batch, with these float32 arrays `[B, T]`; where there are `patches`, of which
    a bin holds so many, of one bin of pictures."""
    integers = ["tokens", "positions", "segments", "labels"]
    found: dict[str, tuple[tuple[int, ...], type]] = {}
    if patches and vision is not None:
        integers.append("image_slot")
        found |= image_shapes((1, 1), patches, vision)
    found |= dict.fromkeys(integers, ((rows, length), np.int32))
    return found | dict.fromkeys(floats, ((rows, length), np.float32))


def image_shapes(bins: tuple[int, int], patches: int, vision: VisionSpec) -> dict[str, tuple[tuple[int, ...], type]]:
    """Shape and dtype of the arrays of pictures in `bins`, S groups of G."""
    places = dict.fromkeys(("patch_image", "patch_row", "patch_col"), ((*bins, patches), np.int32))
    return {"patches": ((*bins, patches, vision.patch_width), np.uint8), **places}


def bucket(size: int) -> int:
    """The next of 32, 48, 64, 96, 128, ..: a third is padding at most, and few shapes are compiled."""
    power = max(SMALLEST, 1 << (size - 1).bit_length())
    return power * 3 // 4 if power > SMALLEST and size <= power * 3 // 4 else power


def following(array: np.ndarray) -> np.ndarray:
    """`array[1:]` `[n]` and a 0: what comes after each place."""
    return np.concatenate([array[1:], np.zeros_like(array[:1])])


def padded(array: np.ndarray, size: int) -> np.ndarray:
    """`[size, ..]`, zeros at the end."""
    return np.pad(array, [(0, size - len(array)), *[(0, 0)] * (array.ndim - 1)])


def stack(rows: Sequence[Batch]) -> Batch:
    """Rows with equal keys and shapes as one batch."""
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def text_row(tokens: np.ndarray, sizes: Sequence[int] | np.ndarray, length: int) -> Batch:
    """tokens, positions, segments and labels `[T]` of a row that holds documents of `sizes` tokens."""
    sizes, tokens = np.asarray(sizes, np.int32), tokens.astype(np.int32)
    starts = np.repeat(np.cumsum(sizes, dtype=np.int32) - sizes, sizes)
    row = dict(
        tokens=tokens,
        positions=np.arange(len(tokens), dtype=np.int32) - starts,
        segments=np.repeat(np.arange(1, len(sizes) + 1, dtype=np.int32), sizes),
        labels=following(tokens),
    )
    return {key: padded(array, length) for key, array in row.items()}


def image_slots(is_image: np.ndarray) -> np.ndarray:
    """image_slot `[.., T]` from where the `[IMG]` tokens of images stand, bool `[.., T]`."""
    return np.where(is_image, np.cumsum(is_image, axis=-1) - 1, -1).astype(np.int32)


def one_per_row(documents: Sequence[Sequence[int] | np.ndarray], shortest: int = SMALLEST, rows: int = 0) -> Batch:
    """tokens, positions, segments and labels of rows that hold one document each, T the bucket of the longest and of
    `shortest`; rows of padding are added until there are `rows`."""
    length = bucket(max(shortest, *(len(document) for document in documents)))
    every = [*documents, *[()] * (rows - len(documents))]
    return stack([text_row(np.asarray(document, np.int32), [len(document)], length) for document in every])


def images_of_rows(images: Sequence[ImagePatches | None], is_image: np.ndarray) -> Batch:
    """`images` and `image_slot` of rows that hold these pictures; none at all when no row has one. `is_image` `[B, T]`
    is where their tokens stand; rows beyond `images` have none."""
    return with_images(images, is_image) if any(images) else {}


def with_images(images: Sequence[ImagePatches | None], is_image: np.ndarray) -> Batch:
    """`images_of_rows`, whether a row has a picture or not."""
    every = np.full(len(is_image), None)
    for row, one in enumerate(images):
        every[row] = one
    return {"images": every, "image_slot": image_slots(is_image)}

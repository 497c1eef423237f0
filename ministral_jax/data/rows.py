"""One packed row as bytes, and as the arrays of the batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from safetensors.numpy import load, save

from ministral_jax.data.chat import ANSWER, TEXT, TRAINABLE
from ministral_jax.data.documents import Documents
from ministral_jax.data.images import normalise, patch_positions
from ministral_jax.data.packing import Piece
from ministral_jax.data.tokenizer import Tokenizer
from ministral_jax.models.spec import VisionSpec

Row = dict[str, np.ndarray]


def encode_row(pieces: Sequence[Piece], sources: Sequence[Documents], bos: int) -> bytes:
    """A row as safetensors: `tokens` uint32 and `flags` uint8 without padding, `sizes` int32 of its pieces, and of its
    pictures in order `grids` int32 `[I, 2]` and `patches` uint8 `[P, 3pp]`."""
    tokens, flags, grids, patches = [], [], [], []
    for piece in pieces:
        documents, d = sources[piece.source], piece.document
        first = int(documents.starts[d])
        if piece.start > 0:
            tokens.append(np.array([bos], np.uint32))
            flags.append(np.zeros(1, np.uint8))
        tokens.append(documents.tokens[first + piece.start : first + piece.stop])
        flags.append(documents.flags[first + piece.start : first + piece.stop])
        if documents.picture_starts[d] < documents.picture_starts[d + 1]:
            grids.append(documents.grids[documents.picture_starts[d] : documents.picture_starts[d + 1]])
            patches.append(documents.patches[documents.patch_starts[d] : documents.patch_starts[d + 1]])
    record = dict(
        tokens=np.concatenate(tokens),
        flags=np.concatenate(flags),
        sizes=np.array([piece.size for piece in pieces], np.int32),
    )
    if patches:
        record |= dict(grids=np.concatenate(grids), patches=np.concatenate(patches))
    return save(record)


def content_hash(record: bytes) -> bytes:
    """16 bytes of SHA-256 over all that a row holds: tokens, which of them count, documents, images. Rows are equal,
    on whatever machine and in whatever order they were packed, when these are."""
    stored = load(record)
    sha = hashlib.sha256()
    for key in ("tokens", "flags", "sizes", "grids", "patches"):
        if key in stored:
            sha.update(f"{key}{stored[key].dtype.str}{stored[key].shape}".encode())
            sha.update(np.ascontiguousarray(stored[key]).data)
    return sha.digest()[:16]


def decode_row(record: bytes | None, length: int, patches: int, tokenizer: Tokenizer, vision: VisionSpec | None) -> Row:
    """Arrays of one row of the batch, without the leading B (see `pipeline.batches`); None is an empty row."""
    stored = (
        load(record)
        if record is not None
        else dict(tokens=np.zeros(0, np.uint32), flags=np.zeros(0, np.uint8), sizes=np.zeros(0, np.int32))
    )
    tokens, flags, sizes = stored["tokens"].astype(np.int32), stored["flags"], stored["sizes"]
    count = len(tokens)
    segments = np.repeat(np.arange(1, len(sizes) + 1, dtype=np.int32), sizes)
    positions = np.arange(count, dtype=np.int32) - np.repeat(np.cumsum(sizes) - sizes, sizes).astype(np.int32)
    # Position t predicts t + 1, which counts when it belongs to the same document; the first token of one never does.
    targets = np.where(_next(positions) > 0, _next(flags), 0)
    text_bytes = np.where(targets & TEXT, tokenizer.byte_lengths[_next(tokens)], 0)
    row = dict(
        tokens=_pad(tokens, length),
        positions=_pad(positions, length),
        segments=_pad(segments, length),
        labels=_pad(_next(tokens), length),
        loss_mask=_pad((targets & TRAINABLE > 0).astype(np.float32), length),
        answer_mask=_pad((targets & ANSWER > 0).astype(np.float32), length),
        text_bytes=_pad(text_bytes.astype(np.float32), length),
    )
    if patches:
        assert vision is not None
        image = tokens == tokenizer.image_ids[0]
        slots = np.where(image, np.cumsum(image) - 1, -1).astype(np.int32)
        row |= dict(image_slot=_pad(slots, length, -1), **_images(stored, patches, vision))
    return row


def _images(stored: Row, patches: int, vision: VisionSpec) -> Row:
    grids = stored.get("grids", np.zeros((0, 2), np.int32))
    pixels = stored.get("patches", np.zeros((0, vision.patch_width), np.uint8))
    counts = grids.prod(axis=1) * vision.merge**2
    places = [patch_positions(rows, columns, vision.merge) for rows, columns in grids.tolist()]
    none = np.zeros(0, np.int32)
    return dict(
        patches=_pad(normalise(pixels), patches),
        patch_image=_pad(np.repeat(np.arange(1, len(grids) + 1, dtype=np.int32), counts), patches),
        patch_row=_pad(np.concatenate([none, *(y for y, _ in places)]), patches),
        patch_col=_pad(np.concatenate([none, *(x for _, x in places)]), patches),
    )


def _next(array: np.ndarray) -> np.ndarray:
    """`array` one place to the left, 0 at the end."""
    return np.concatenate([array[1:], np.zeros_like(array[:1])])


def _pad(array: np.ndarray, size: int, value: int = 0) -> np.ndarray:
    padded = np.full((size, *array.shape[1:]), value, array.dtype)
    padded[: len(array)] = array
    return padded

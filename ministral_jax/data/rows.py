"""One packed row as bytes, and as the arrays of the batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from safetensors.numpy import load, save

from ministral_jax.data.batch import Batch, following, padded, text_row
from ministral_jax.data.chat import ANSWER, SECOND, TEXT, TRAINABLE
from ministral_jax.data.documents import Documents
from ministral_jax.data.images import ImagePatches
from ministral_jax.data.packing import Piece
from ministral_jax.data.tokenizer import Tokenizer

_NONE = np.zeros(0, np.int32)
_EMPTY = dict(tokens=np.zeros(0, np.uint32), flags=np.zeros(0, np.uint8), sizes=_NONE, documents=_NONE)


def encode_row(pieces: Sequence[Piece], sources: Sequence[Documents], bos: int) -> bytes:
    """A row as safetensors: `tokens` uint32 and `flags` uint8 without padding, `sizes` int32 of its pieces and
    `documents` int32 of which they are (of hashes), and of its pictures in order `grids` int32 `[I, 2]` and `patches`
    uint8 `[P, 3pp]`; where the pieces are pairs, `margins` float32 of them."""
    tokens, flags, grids, patches = [], [], [], []
    for piece in pieces:
        source, d = sources[piece.source], piece.document
        first = int(source.starts[d])
        if piece.start > 0:
            tokens.append(np.array([bos], np.uint32))
            flags.append(np.zeros(1, np.uint8))
        tokens.append(source.tokens[first + piece.start : first + piece.stop])
        flags.append(source.flags[first + piece.start : first + piece.stop])
        if source.picture_starts[d] < source.picture_starts[d + 1]:
            grids.append(source.grids[source.picture_starts[d] : source.picture_starts[d + 1]])
            patches.append(source.patches[source.patch_starts[d] : source.patch_starts[d + 1]])
    sizes = np.array([piece.size for piece in pieces], np.int32)
    keys = np.array([sources[piece.source].keys[piece.document] for piece in pieces], np.uint64)
    documents = (keys >> np.uint64(33)).astype(np.int32)
    record = dict(tokens=np.concatenate(tokens), flags=np.concatenate(flags), sizes=sizes, documents=documents)
    if patches:
        record |= dict(grids=np.concatenate(grids), patches=np.concatenate(patches))
    known = [(sources[piece.source].margins, piece.document) for piece in pieces]
    margins = [margins[document] for margins, document in known if margins is not None]
    return save(record | ({"margins": np.array(margins, np.float32)} if margins else {}))


def pairs_per_row(length: int) -> int:
    """The most that a row can hold: a question and the beginning of an answer have five tokens."""
    return length // 10


def _parts(stored: Batch) -> np.ndarray:
    """Sizes of the conversations of a row of pairs."""
    begins = np.cumsum(stored["sizes"]) - stored["sizes"]
    begins = np.union1d(begins, np.flatnonzero(stored["flags"] & SECOND))
    return np.diff(begins, append=len(stored["tokens"])).astype(np.int32)


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


def decode_row(
    record: bytes | None,
    length: int,
    tokenizer: Tokenizer,
    pairs: bool = False,
) -> tuple[Batch, ImagePatches | None]:
    """Arrays of one row of `pipeline.batches` and `document`, without the leading B, and its pictures; None is an empty
    row. Of `pairs`
    each conversation is a segment, the chosen ones are the odd segments, and `margin` float32 `[pairs_per_row]` is the
    pairs'."""
    stored = _EMPTY if record is None else load(record)
    row = text_row(stored["tokens"], _parts(stored) if pairs else stored["sizes"], length)
    # Position t predicts t + 1, which counts when it belongs to the same document; the first token of one never does.
    targets = np.where(following(row["positions"]) > 0, following(padded(stored["flags"], length)), 0)
    row |= dict(
        loss_mask=(targets & TRAINABLE > 0).astype(np.float32),
        answer_mask=(targets & ANSWER > 0).astype(np.float32),
        text_bytes=np.where(targets & TEXT, tokenizer.byte_lengths[row["labels"]], 0).astype(np.float32),
        document=padded(np.repeat(stored["documents"], stored["sizes"]), length),
    )
    if pairs:
        row["margin"] = padded(stored.get("margins", np.zeros(0, np.float32)), pairs_per_row(length))
    return row, ImagePatches(stored["grids"], stored["patches"]) if "grids" in stored else None

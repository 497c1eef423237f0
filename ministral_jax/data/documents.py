"""Documents of one source as tokens, on disk: tokenised once, packed for any row length.

A store is a directory of flat arrays that are memory-mapped, so that neither tokenising nor packing holds more than a
few documents: `tokens.bin` uint32, `flags.bin` uint8, `patches.bin` uint8 `[*, 3pp]`, `documents.safetensors` with the
offsets, `where.txt` to say where a document came from when it cannot be packed, and `left_out.json`, the rows that the
source was read without.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from ministral_jax.data.bad_rows import BadRows, LeftOut, Unusable, say_once, settle
from ministral_jax.data.chat import Rendered, render, render_interleaved, render_pair, render_text
from ministral_jax.data.conversation import Document
from ministral_jax.data.images import MOST_PIXELS, to_patches
from ministral_jax.data.sources import Source, read_rows
from ministral_jax.data.tokenizer import Tokenizer
from ministral_jax.errors import UserError
from ministral_jax.files import digest_of, stable_key, write_json
from ministral_jax.models.spec import VisionSpec
from ministral_jax.places import is_complete, new_directory, on_disk

Progress = Callable[[str, int], None]
"""Called as (what, how many so far)."""

_FORMAT = 5
_LAST = "documents.safetensors"
_DRAW = 2**32  # a salt that no pass of packing reaches
_KNOWN = {"answer", "chosen", "rejected", "probability", "score_chosen", "score_rejected", "tokens", "image", "images"}
"""Columns that are learnt all the same."""
_BATCH = 64
_THREADS = 8


@dataclass(frozen=True, eq=False)
class Documents:
    """The D documents of a source; document d is `tokens[starts[d]:starts[d + 1]]`, with its flags beside it.

    Its pictures are rows `picture_starts[d]:picture_starts[d + 1]` of `grids` (rows and columns of decoder tokens), and
    their patches rows `patch_starts[d]:patch_starts[d + 1]` of `patches`. `keys` and `groups`, uint64, are of a hash of
    its key and group.
    """

    directory: Path
    digest: str
    tokens: np.ndarray
    flags: np.ndarray
    patches: np.ndarray
    starts: np.ndarray
    picture_starts: np.ndarray
    patch_starts: np.ndarray
    grids: np.ndarray
    keys: np.ndarray
    groups: np.ndarray
    plain: np.ndarray
    """bool `[D]`: plain text, which may be cut anywhere."""
    left_out: LeftOut
    margins: np.ndarray | None = None
    """float32 `[D]` of pairs, see `pairwise.pair_document`, which are never cut; None where documents are none."""

    def drawn(self, share: float) -> np.ndarray:
        """bool `[D]`: a part of the documents, the same for the same groups, independent of the order by `keys`."""
        return drawn(self.groups, share)

    def where(self, document: int) -> str:
        """The file and row of a document."""
        with (self.directory / "where.txt").open(encoding="utf-8", errors="surrogateescape") as file:
            return next(islice(file, document, None)).rstrip("\n")


def group_key(document: Document) -> int:
    """64 bits by which a document is held out: those of its group."""
    return stable_key(document.group or document.key or document.name)


def drawn(groups: np.ndarray, share: float) -> np.ndarray:
    """bool `[D]`: about this share of documents of these groups (uint64), always the same ones."""
    return mix(groups, _DRAW) / 2.0**64 < share


def mix(keys: np.ndarray, salt: int) -> np.ndarray:
    """SplitMix64's finaliser over uint64 keys: another order for each salt, the same with any version of NumPy."""
    z = keys + np.uint64(salt * 0x9E3779B97F4A7C15 % 2**64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def tokenise(
    source: Source,
    tokenizer: Tokenizer,
    vision: VisionSpec | None,
    root: Path,
    progress: Progress | None = None,
    pairs: bool = False,
) -> Documents:
    """Tokenise a source, as `pairs` or not, into `root/<digest>`, or open what an earlier call left there. Raises
    `UserError`: documents or images cannot be used, all of which are read first, or there is none."""
    digest = documents_digest(source.digest, tokenizer.digest, vision)
    digest = digest_of([digest, "pairs"]) if pairs else digest
    directory = root / digest[:16]
    if not is_complete(directory, _LAST):
        with new_directory(directory, _LAST) as draft:
            _write(draft, source, tokenizer, vision, progress, pairs)
    directory = on_disk(directory)
    tokens, flags, patches = (
        _map(directory / f"{name}.bin", dtype)
        for name, dtype in (("tokens", np.uint32), ("flags", np.uint8), ("patches", np.uint8))
    )
    patches = patches.reshape(-1, vision.patch_width if vision is not None else 1)
    left_out: LeftOut = json.loads((directory / "left_out.json").read_text(encoding="utf-8"))
    settle(left_out, source.name, source.config)  # the same rows may have been read by other settings
    arrays = load_file(directory / _LAST)
    return Documents(directory, digest, tokens, flags, patches, **arrays, left_out=left_out)


def documents_digest(source: str, tokenizer: str, vision: VisionSpec | None) -> str:
    """Of the documents of a source, from its digest and the tokenizer's."""
    layout = vision and [vision.patch_size, vision.merge, vision.max_image_size]
    return digest_of([_FORMAT, source, tokenizer, layout, MOST_PIXELS])


def _write(
    directory: Path,
    source: Source,
    tokenizer: Tokenizer,
    vision: VisionSpec | None,
    progress: Progress | None,
    pairs: bool,
) -> None:
    def rendering(row: Document | Unusable) -> tuple[Document, Rendered] | Unusable:
        if isinstance(row, Unusable):
            return row
        try:
            return row, _render(row, tokenizer, vision)
        except UserError as error:
            return Unusable(row.where, error)

    bad, rows = BadRows(source.name, source.config), read_rows(source, pairs=pairs)
    sizes, grids, keys, groups, plain, margins, columns = [], [], [], [], [], [], set[str]()
    with ExitStack() as stack:
        tokens, flags, patches = (
            stack.enter_context((directory / f"{name}.bin").open("wb")) for name in ("tokens", "flags", "patches")
        )
        where = stack.enter_context((directory / "where.txt").open("w", encoding="utf-8", errors="surrogateescape"))
        pool = stack.enter_context(ThreadPoolExecutor(_THREADS))
        while batch := list(islice(rows, _BATCH)):
            for found in pool.map(rendering, batch):
                if isinstance(found, Unusable):
                    bad.add(*found)
                    continue
                document, rendered = found
                bad.good(document.where)
                tokens.write(rendered.tokens.tobytes())
                flags.write(rendered.flags.tobytes())
                count = 0
                if vision is not None and rendered.pictures:
                    images = to_patches(rendered.pictures, vision)
                    patches.write(images.patches.tobytes())
                    grids.append(images.grids)
                    count = len(images.patches)
                sizes.append((len(rendered.tokens), len(rendered.pictures), count))
                keys.append(stable_key(document.key or document.name))
                groups.append(group_key(document))
                plain.append(document.text is not None)
                margins.append(document.margin)
                columns |= document.columns.keys() - _KNOWN
                where.write(document.where.replace("\n", " ") + "\n")
            if progress is not None:
                progress(f"tokenise {source.name}", len(sizes))
    if columns and source.config.kind == "jsonl":
        say_once(f"data.sources.{source.name}: keys that are not learnt, but for rewards: {', '.join(sorted(columns))}")
    write_json(directory / "left_out.json", bad.settle())
    if not sizes:
        raise UserError(f"data.sources.{source.name} ({source.config.path}) has no documents")
    ends = np.concatenate([np.zeros((1, 3), np.int64), np.cumsum(np.array(sizes, np.int64), axis=0)])
    starts = {name: ends[:, n].copy() for n, name in enumerate(("starts", "picture_starts", "patch_starts"))}
    arrays = starts | dict(
        grids=np.concatenate([np.zeros((0, 2), np.int32), *grids]),
        keys=np.array(keys, np.uint64),
        groups=np.array(groups, np.uint64),
        plain=np.array(plain, bool),
        **({"margins": np.array(margins, np.float32)} if pairs else {}),
    )
    save_file(arrays, directory / _LAST)


def _render(document: Document, tokenizer: Tokenizer, vision: VisionSpec | None) -> Rendered:
    if document.text is not None:
        return render_text(document.text, tokenizer, document.where)
    if document.parts:
        return render_interleaved(document.parts, tokenizer, vision, document.where)
    if document.rejected:
        return render_pair(document, tokenizer, vision)
    return render(document.messages, tokenizer, vision, document.where, document.tools)


def _map(path: Path, dtype: type) -> np.ndarray:
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.zeros(0, dtype)
    return np.asarray(np.memmap(path, dtype, "r"))

"""Packed data, made once from a config: rows on disk in a directory that is named by its content."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from ministral_jax.data.bad_rows import added, settle
from ministral_jax.data.config import DataConfig
from ministral_jax.data.documents import Documents, Progress, tokenise
from ministral_jax.data.packing import Tally, fitting, pack
from ministral_jax.data.pictures import picture_sizes, write_pictures
from ministral_jax.data.rows import encode_row
from ministral_jax.data.sources import open_source
from ministral_jax.data.tokenizer import Tokenizer, load_tokenizer
from ministral_jax.errors import UserError
from ministral_jax.files import digest_of
from ministral_jax.models.spec import VisionSpec
from ministral_jax.places import is_complete, new_directory, on_disk

SPLITS = ("train", "held_out")
_LAST = "index.json"
_FORMAT = 6


@dataclass(frozen=True, eq=False)
class PackedData:
    """Rows on disk: `<split>.array_record` and `index.json` in `directory`, named by its content.

    `counts[split]` is `{"rows", "tokens", "padding", "sources": {name: {"documents", "tokens", "pictures", "passes",
    "share"}}}`: `padding` the empty share of the rows, `passes` how often the source was gone through, `share` its part
    of the tokens. `counts["left_out"]` has a `bad_rows.LeftOut` for each source.
    """

    directory: Path
    digest: str
    tokenizer: Tokenizer
    vision: VisionSpec | None
    length: int
    patches: int
    counts: dict[str, Any]
    pairs: bool = False
    """Whether every document is a pair; `counts["unjudged"]` then says where the first without a margin stands."""


def prepare(
    config: DataConfig,
    length: int,
    vision: VisionSpec | None,
    root: Path,
    progress: Progress | None = None,
    pairs: bool = False,
) -> PackedData:
    """Tokenise and pack the sources into `root/<digest>`, or open what an earlier call left there.

    The digest covers the config, the tokenizer, the row length, the image layout and the content of every source. What
    is written appears complete or not at all, so hosts that share a file system may all call this.

    Args:
        length: tokens per row, T.
        vision: image layout of the model; None for a text model, which then must have `config.patches == 0`.
        progress: called as (what, how many so far).
        pairs: whether sources are read as pairs of answers.

    Raises:
        UserError: a file, row, image or document cannot be used, or the sources cannot be mixed as asked.
    """
    if config.patches and vision is None:
        raise UserError(
            f"data.patches = {config.patches} but the model has no vision; set it to 0 or use a model that has"
        )
    if vision is not None and config.patches % vision.merge**2:
        raise UserError(
            f"data.patches = {config.patches} must be a multiple of {vision.merge**2}, the patches of one image token"
        )
    tokenizer = load_tokenizer(config.tokenizer, root)
    opened = {name: open_source(name, source, root) for name, source in config.sources.items()}
    sources = {
        name: tokenise(source, tokenizer, vision, root / "documents", progress, pairs)
        for name, source in opened.items()
    }
    # the order of the sources decides between equals, and so belongs to it
    inputs = [[name, sources[name].digest, source.weight] for name, source in config.sources.items()]
    digest = digest_of([_FORMAT, inputs, config.held_out, length, config.patches, tokenizer.digest])
    directory = root / digest[:16]
    if not is_complete(directory, _LAST):
        with new_directory(directory, _LAST) as draft:
            _write(draft, config, sources, tokenizer.bos, length, progress)
    directory = on_disk(directory)
    counts = json.loads((directory / _LAST).read_text())
    for name, source in config.sources.items():
        settle(counts["left_out"][name], name, source)
    return PackedData(directory, digest, tokenizer, vision, length, config.patches, counts, pairs)


def _write(
    directory: Path,
    config: DataConfig,
    sources: dict[str, Documents],
    bos: int,
    length: int,
    progress: Progress | None,
) -> None:
    weights = {name: source.weight for name, source in config.sources.items()}
    outside = {name: d.drawn(config.held_out) for name, d in sources.items()}
    fits, left_out = {}, {}
    for name, documents in sources.items():
        fits[name], too_large = fitting(documents, name, length, config.patches)
        left_out[name] = added(documents.left_out, too_large)
        settle(left_out[name], name, config.sources[name])
        if not (fits[name] & ~outside[name]).any():
            raise UserError(
                f"data.sources.{name} has no document left to train on with data.held_out = {config.held_out}; "
                "give it more documents or hold out fewer"
            )
    counts: dict[str, Any] = {"left_out": left_out, **_unjudged(sources)}
    for split in SPLITS:
        members = {name: np.flatnonzero(fits[name] & (outside[name] == (split == "held_out"))) for name in sources}
        rows, tallies = pack(sources, members, weights, length, config.patches, spread=split == "held_out")
        writer = ArrayRecordWriter(str(directory / f"{split}.array_record"), "group_size:1")
        written, pictures = 0, list[np.ndarray]()
        for row in rows:
            writer.write(encode_row(row, list(sources.values()), bos))
            pictures.append(picture_sizes(row, list(sources.values())))
            written += 1
            if written % 1000:
                continue
            if split == "train":  # a mix that cannot be held may never end
                _check_shares(tallies, weights, length, config.patches)
            if progress is not None:
                progress(f"pack {split}", written)
        writer.close()
        write_pictures(directory, split, pictures)
        if split == "train":
            _check_shares(tallies, weights, length, config.patches)
        tokens = sum(tally.tokens for tally in tallies.values())
        used = {name: {**asdict(tally), "share": tally.tokens / max(tokens, 1)} for name, tally in tallies.items()}
        padding = 1 - tokens / max(written * length, 1)
        counts[split] = dict(rows=written, tokens=tokens, padding=padding, sources=used)
    (directory / _LAST).write_text(json.dumps(counts, indent=1) + "\n")


def _unjudged(sources: dict[str, Documents]) -> dict[str, str]:
    for documents in sources.values():
        if documents.margins is not None and (without := np.flatnonzero(np.isnan(documents.margins))).size:
            return {"unjudged": documents.where(int(without[0]))}
    return {}


def _check_shares(tallies: dict[str, Tally], weights: dict[str, float], length: int, patches: int) -> None:
    """Images can fall short of their share when rows have no room for their patches."""
    tokens, total = sum(tally.tokens for tally in tallies.values()), sum(weights.values())
    for name, tally in tallies.items():
        share = weights[name] / total
        if tally.tokens < 0.9 * share * tokens - 2 * length:
            raise UserError(
                f"data.sources.{name} gets {tally.tokens / tokens:.1%} of the tokens where its weight asks for "
                f"{share:.1%}, because a row holds only data.patches = {patches} image patches; raise that or lower "
                "the weight"
            )

"""Packed data: made once from a config, read by Grain so that batch n is a function of (seed, n) alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from ministral_jax.data.config import DataConfig
from ministral_jax.data.documents import Documents, Progress, tokenise
from ministral_jax.data.packing import Tally, pack
from ministral_jax.data.rows import Row, content_hash, decode_row, encode_row
from ministral_jax.data.sources import open_source
from ministral_jax.data.tokenizer import Tokenizer, load_tokenizer
from ministral_jax.errors import UserError
from ministral_jax.files import digest_of, new_directory
from ministral_jax.models.spec import ModelSpec, VisionSpec

SPLITS = ("train", "held_out")
Indices = Sequence[int] | np.ndarray
Join = Callable[[list[bytes]], Row]
"""Arrays `[n, ..]` that belong to n rows of these content hashes; called from several threads."""
_FORMAT = 1
_ENDLESS = 2**40


@dataclass(frozen=True, eq=False)
class PackedData:
    """Rows on disk: `<split>.array_record` and `index.json` in `directory`, named by its content.

    `counts[split]` is `{"rows", "tokens", "padding", "sources": {name: {"documents", "tokens", "pictures", "passes",
    "share"}}}`: `padding` the empty share of the rows, `passes` how often the source was gone through, `share` its part
    of the tokens.
    """

    directory: Path
    digest: str
    tokenizer: Tokenizer
    vision: VisionSpec | None
    length: int
    patches: int
    counts: dict[str, Any]


def prepare(
    config: DataConfig, length: int, vision: VisionSpec | None, root: Path, progress: Progress | None = None
) -> PackedData:
    """Tokenise and pack the sources into `root/<digest>`, or open what an earlier call left there.

    The digest covers the config, the tokenizer, the row length, the image layout and the content of every source. What
    is written appears complete or not at all, so hosts that share a file system may all call this.

    Args:
        length: tokens per row, T.
        vision: image layout of the model; None for a text model, which then must have `config.patches == 0`.
        progress: called as (what, how many so far).

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
    opened = {name: open_source(name, source) for name, source in config.sources.items()}
    sources = {
        name: tokenise(source, tokenizer, vision, config.max_pixels, root / "documents", progress)
        for name, source in opened.items()
    }
    inputs = {name: [sources[name].digest, source.weight] for name, source in config.sources.items()}
    digest = digest_of([_FORMAT, inputs, config.held_out, length, config.patches, tokenizer.digest])
    directory = root / digest[:16]
    if not directory.is_dir():
        with new_directory(directory) as draft:
            _write(draft, config, sources, tokenizer.bos, length, progress)
    counts = json.loads((directory / "index.json").read_text())
    return PackedData(directory, digest, tokenizer, vision, length, config.patches, counts)


def batches(
    data: PackedData,
    split: str,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    stop_step: int | None = None,
    rows: Indices | None = None,
    join: Join | None = None,
) -> Iterator[Row]:
    """The global batches `start_step, start_step + 1, ..`, shuffled anew each epoch, without end; or of each only
    `rows`, those that the devices of this host hold.

    Batch n holds rows `n B .. (n + 1) B` of an endless sequence that depends on the seed alone: any number of hosts
    reads the same global batch, and resuming is starting at a step. What `join` gives for the rows stands beside them.
    Closing the iterator ends its reading threads.

    Yields:
        Arrays of the batch, `[len(rows), T]` unless said otherwise:
            tokens, positions, segments int32: segment 0 is padding, documents are 1, 2, ..; positions restart in each.
            labels int32: `tokens[t + 1]`.
            loss_mask float32: 1 where position t predicts a counted target, `tokens[t + 1]` of the same document: any
                token of plain text, what the assistant says in a conversation.
            answer_mask float32: 1 where position t predicts a token of an answer after an image, without its `</s>` and
                without reasoning: exact match is argmax equal to `tokens[t + 1]` at all of them within a segment.
            text_bytes float32: UTF-8 bytes of `tokens[t + 1]` where it is counted plain text, else 0: bits per byte is
                `sum(cross-entropy where text_bytes > 0) / ln 2 / sum(text_bytes)`.
        And unless `data.patches` is 0, with `[len(rows), P]`:
            patches float32 `[.., P, 3pp]` normalised, in merge-block order; patch_image, patch_row, patch_col int32:
                image 0 is padding, images of the row are 1, 2, ..; row and column in the image's own patch grid.
            image_slot int32 `[.., T]`: which merged token of the row stands at this `[IMG]`, -1 elsewhere.

    Raises:
        UserError: the split is empty.
    """
    records = _open(data, split)
    order = _order(data, split, seed)
    wanted = range(batch_size) if rows is None else rows

    def batch(step: int) -> Row:
        first = step * batch_size
        return _batch([records[cast(int, order[first + int(i)])] for i in wanted], data, join)

    return _prefetched(grain.MapDataset.range(start_step, _ENDLESS if stop_step is None else stop_step).map(batch))


def held_out(
    data: PackedData,
    batch_size: int,
    limit_rows: int | None = None,
    rows: Indices | None = None,
    join: Join | None = None,
) -> Iterator[Row]:
    """The held-out rows (or the first `limit_rows`) in file order, once, in batches like those of `batches`.

    The last one is padded with empty rows.

    Raises:
        UserError: nothing was held out.
    """
    records = _open(data, "held_out")
    count = data.counts["held_out"]["rows"]
    if limit_rows is not None:
        count = min(count, limit_rows)
    wanted = range(batch_size) if rows is None else rows
    for first in range(0, count, batch_size):
        indices = [first + int(i) for i in wanted]
        yield _batch([records[i] if i < count else None for i in indices], data, join)


def training_order(data: PackedData, seed: int) -> np.ndarray:
    """In which `batches` with that seed goes through the training rows the first time."""
    order = _order(data, "train", seed)
    return np.array([order[i] for i in range(data.counts["train"]["rows"])])


def chosen_rows(data: PackedData, split: str, steps: Sequence[Indices]) -> Iterator[tuple[Row, list[bytes | None]]]:
    """A batch of the rows that each step names by number, -1 for an empty one, with their content hashes."""
    records = _open(data, split)

    def batch(step: int) -> tuple[Row, list[bytes | None]]:
        chosen = [records[int(i)] if i >= 0 else None for i in steps[step]]
        return _batch(chosen, data, None), [None if record is None else content_hash(record) for record in chosen]

    return _prefetched(grain.MapDataset.range(len(steps)).map(batch))


def check_vocab(tokenizer: Tokenizer, spec: ModelSpec) -> None:
    """Check that a model can embed every id of a tokenizer, and that both mean the same token by an image.

    Raises:
        UserError: naming both numbers.
    """
    if tokenizer.vocab > spec.vocab:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab} tokens but the model's vocab is {spec.vocab}; "
            f"set data.tokenizer.vocab to at most {spec.vocab} or use a model with a larger vocab"
        )
    if spec.vision is not None and tokenizer.image_ids[0] != spec.image_token:
        raise UserError(
            f"the tokenizer's [IMG] is id {tokenizer.image_ids[0]} but the model's image_token is {spec.image_token}; "
            "they must be equal"
        )


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
    counts = {}
    for split in SPLITS:
        members = {name: np.flatnonzero(out == (split == "held_out")) for name, out in outside.items()}
        if split == "train":
            _check_train(members, config)
        rows, tallies = pack(sources, members, weights, length, config.patches, repeat=split == "train")
        writer = ArrayRecordWriter(str(directory / f"{split}.array_record"), "group_size:1")
        written = 0
        for row in rows:
            writer.write(encode_row(row, list(sources.values()), bos))
            written += 1
            if progress is not None and written % 1000 == 0:
                progress(f"pack {split}", written)
        writer.close()
        counts[split] = _count(written, tallies, length)
    _check_shares(counts["train"], weights, length, config.patches)
    (directory / "index.json").write_text(json.dumps(counts, indent=1) + "\n")


def _count(rows: int, tallies: dict[str, Tally], length: int) -> dict[str, Any]:
    tokens = sum(tally.tokens for tally in tallies.values())
    sources = {name: {**asdict(tally), "share": tally.tokens / max(tokens, 1)} for name, tally in tallies.items()}
    return dict(rows=rows, tokens=tokens, padding=1 - tokens / max(rows * length, 1), sources=sources)


def _check_train(members: dict[str, np.ndarray], config: DataConfig) -> None:
    for name, documents in members.items():
        if not len(documents):
            raise UserError(
                f"data.sources.{name} has no document left to train on with data.held_out = {config.held_out}; "
                "give it more documents or hold out fewer"
            )


def _check_shares(counts: dict[str, Any], weights: dict[str, float], length: int, patches: int) -> None:
    """Images can fall short of their share when rows have no room for their patches."""
    total = sum(weights.values())
    for name, source in counts["sources"].items():
        share = weights[name] / total
        if source["tokens"] < 0.9 * share * counts["tokens"] - 2 * length:
            raise UserError(
                f"data.sources.{name} gets {source['share']:.1%} of the tokens where its weight asks for {share:.1%}, "
                f"because a row holds only data.patches = {patches} image patches; raise that or lower the weight"
            )


def _open(data: PackedData, split: str) -> grain.sources.ArrayRecordDataSource:
    path = data.directory / f"{split}.array_record"
    if not path.is_file():
        raise UserError(f"{path} is missing; delete {data.directory} to have the data packed again")
    if not data.counts[split]["rows"]:
        raise UserError(f"no document is in the {split} split; change data.held_out or give the sources more documents")
    return grain.sources.ArrayRecordDataSource([str(path)])


def _order(data: PackedData, split: str, seed: int) -> grain.MapDataset:
    return grain.MapDataset.range(data.counts[split]["rows"]).seed(seed).shuffle().repeat()


def _batch(records: list[bytes | None], data: PackedData, join: Join | None) -> Row:
    """The rows' arrays, stacked; empty rows are the last ones, and zero in what is joined."""
    rows = [decode_row(record, data.length, data.patches, data.tokenizer, data.vision) for record in records]
    batch = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    if join is None:
        return batch
    joined = join([content_hash(record) for record in records if record is not None])
    missing = {key: [(0, len(rows) - len(array)), *[(0, 0)] * (array.ndim - 1)] for key, array in joined.items()}
    return batch | {key: np.pad(array, missing[key]) for key, array in joined.items()}


def _prefetched(steps: grain.MapDataset) -> Iterator[Any]:
    iterator = iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)))
    try:
        yield from iterator
    finally:
        iterator.close()

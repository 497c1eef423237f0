"""Batches of packed data, read by Grain so that batch n is a function of (seed, n) alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ministral_jax.data.batch import Batch, padded, stack, with_images
from ministral_jax.data.pictures import Pictures, read_pictures
from ministral_jax.data.prepare import PackedData
from ministral_jax.data.rows import content_hash, decode_row
from ministral_jax.errors import UserError
from ministral_jax.lazy import Lazy

if TYPE_CHECKING:
    import grain
else:
    grain = Lazy("grain")

Indices = Sequence[int] | np.ndarray
Join = Callable[[list[bytes]], Batch]
"""Arrays `[n, ..]` that belong to n rows of these content hashes; called from several threads."""
ENDLESS = range(2**40)


@dataclass(frozen=True)
class Order:
    """An endless sequence of training rows: every epoch is shuffled anew, by `seed`; it is read from `first` on."""

    seed: int = 0
    first: int = 0


def batches(
    data: PackedData,
    batch_size: int,
    order: Order,
    steps: range = ENDLESS,
    rows: Indices | None = None,
    join: Join | None = None,
) -> Iterator[Batch]:
    """The global batches of training rows of these steps, shuffled anew each epoch; or of each only `rows`, those that
    the devices of this host hold.

    Batch n holds rows `n B .. (n + 1) B` of the sequence: any number of hosts reads the same global batch, and resuming
    is starting at a step. What `join` gives for the rows stands beside them.
    Closing the iterator ends its reading threads.

    Yields:
        The arrays of `batch`, pictures where the global batch has any, with `image_sizes` (see `bins.binned`) of all of
        its rows, and beside them `[len(rows), T]` float32:
            loss_mask: any token of plain text counts as a label, and what the assistant says in a conversation.
            answer_mask: 1 where position t predicts a token of an answer after an image, without its `</s>` and without
                reasoning: exact match is argmax equal to the label at all of them within a segment.
            text_bytes: UTF-8 bytes of a label that is counted plain text, else 0: bits per byte is
                `sum(cross-entropy where text_bytes > 0) / ln 2 / sum(text_bytes)`.

    Raises:
        UserError: there are no rows.
    """
    split, sequence = _open(data, "train"), _order(data, order.seed)

    def batch(step: int) -> Batch:
        first = order.first + step * batch_size
        return split.batch([cast(int, sequence[first + i]) for i in range(batch_size)], rows, join)[0]

    return _prefetched(grain.MapDataset.range(steps.start, steps.stop).map(batch))


def held_out(
    data: PackedData,
    batch_size: int,
    limit_rows: int | None = None,
    rows: Indices | None = None,
    join: Join | None = None,
) -> Iterator[Batch]:
    """The held-out rows (or the first `limit_rows`) in file order, once, in batches like those of `batches`, with
    `document` int32 `[len(rows), T]` beside them: a number of the document that each token is of.

    The last one is padded with empty rows.

    Raises:
        UserError: nothing was held out.
    """
    split, count = _open(data, "held_out"), data.counts["held_out"]["rows"]
    count = count if limit_rows is None else min(count, limit_rows)
    for first in range(0, count, batch_size):
        numbers = [i if i < count else -1 for i in range(first, first + batch_size)]
        yield split.batch(numbers, rows, join, documents=True)[0]


def row_numbers(data: PackedData, order: Order, count: int | None) -> np.ndarray:
    """Numbers of the training rows that are read in that order, each once, as they first come: among `count` from its
    first on, or all there are."""
    sequence, whole = _order(data, order.seed), data.counts["train"]["rows"]
    # an epoch that is read whole lies within two epochs' rows
    read = range(whole) if count is None else range(order.first, order.first + min(count, 2 * whole))
    return np.array([*dict.fromkeys(cast(int, sequence[i]) for i in read)])


def chosen_rows(
    data: PackedData, split: str, steps: Sequence[Indices], rows: Indices | None = None
) -> Iterator[tuple[Batch, list[bytes | None]]]:
    """A global batch of the rows that each step names by number, -1 for an empty one, with their content hashes; or of
    each only `rows`."""
    opened = _open(data, split)

    def batch(step: int) -> tuple[Batch, list[bytes | None]]:
        found, records = opened.batch([int(i) for i in steps[step]], rows)
        return found, [None if record is None else content_hash(record) for record in records]

    return _prefetched(grain.MapDataset.range(len(steps)).map(batch))


def row_hashes(data: PackedData, split: str, numbers: Indices) -> list[bytes]:
    """Content hashes of the rows of these numbers; -1 is none."""
    records = _open(data, split).records
    return [content_hash(cast(bytes, records[int(i)])) for i in numbers if i >= 0]


@dataclass(frozen=True)
class _Split:
    """The rows of a split, opened."""

    data: PackedData
    records: Any
    pictures: Pictures | None

    def batch(
        self, numbers: list[int], rows: Indices | None, join: Join | None = None, documents: bool = False
    ) -> tuple[Batch, list[bytes | None]]:
        """Of a global batch of rows, -1 for an empty one, the arrays of `rows` (None: all), and what they are read
        from; empty rows are the last ones, and zero in what is joined."""
        data, own = self.data, range(len(numbers)) if rows is None else rows
        records = [self.records[numbers[int(i)]] if numbers[int(i)] >= 0 else None for i in own]
        found, images = zip(*(decode_row(one, data.length, data.tokenizer, data.pairs) for one in records), strict=True)
        batch = stack(found)
        if not documents:
            del batch["document"]
        if any(sizes := self._sizes(numbers)):
            batch |= with_images(images, batch["tokens"] == data.tokenizer.image_ids[0]) | {"image_sizes": sizes}
        joined = join([content_hash(record) for record in records if record is not None]) if join else {}
        return batch | {key: padded(array, len(records)) for key, array in joined.items()}, records

    def _sizes(self, numbers: list[int]) -> Any:
        """Patches of every picture of each row."""
        if self.pictures is None or self.data.vision is None:
            return []
        block, of = self.data.vision.merge**2, self.pictures.of
        return [
            {(place, n): block * size for n, size in enumerate(of(row) if row >= 0 else [])}
            for place, row in enumerate(numbers)
        ]


def _open(data: PackedData, split: str) -> _Split:
    path = data.directory / f"{split}.array_record"
    if not path.is_file():
        raise UserError(f"{path} is missing; delete {data.directory} to have the data packed again")
    if not data.counts[split]["rows"]:
        raise UserError(f"no document is in the {split} split; change data.held_out or give the sources more documents")
    records: Any = grain.sources.ArrayRecordDataSource([str(path)])
    return _Split(data, records, read_pictures(data.directory, split) if data.patches else None)


def _order(data: PackedData, seed: int) -> grain.MapDataset:
    return grain.MapDataset.range(data.counts["train"]["rows"]).seed(seed).shuffle().repeat()


def _prefetched(steps: grain.MapDataset) -> Iterator[Any]:
    iterator = iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)))
    try:
        yield from iterator
    finally:
        iterator.close()

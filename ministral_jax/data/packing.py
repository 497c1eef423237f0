"""Packing documents of several sources into rows of at most T tokens and P image patches.

Each row begins with the source that is furthest behind its share of the tokens and takes documents from it until none
fits, then goes on with the next. So every prefix of the rows has the mix to within two rows, and a row with images is
full of them (up to P) while the others hold none. Plain text is cut where a row ends; a conversation only when it is
longer than a row, and a window of it in which the assistant says nothing is left out; a pair or a document with images
never.
Every window that continues a document begins with `<s>`, as the models always see it.

Held-out rows are `spread`: a row begins with a window of whichever document comes next, and each document gives one
before any gives another, so that the first rows are of as many documents as there can be.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from operator import itemgetter

import numpy as np

from ministral_jax.data.bad_rows import SHOWN, LeftOut
from ministral_jax.data.chat import TRAINABLE
from ministral_jax.data.documents import Documents, mix
from ministral_jax.errors import UserError

_LOOKAHEAD = 64
"""Documents of a source among which the best fit is looked for."""


@dataclass(frozen=True)
class Piece:
    """Tokens `start` to `stop` of a document, after `<s>` when `start > 0`; `size` counts what stands in the row."""

    source: int
    document: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start + (self.start > 0)


@dataclass
class Tally:
    """What one source put into a split."""

    documents: int = 0
    tokens: int = 0
    pictures: int = 0
    passes: float = 0.0


@dataclass
class _Queue:
    """Documents of one source in the order of a hash, another order on each pass."""

    index: int
    documents: Documents
    members: np.ndarray
    length: int
    spread: bool
    tally: Tally = field(default_factory=Tally)
    window: list[Piece] = field(default_factory=list)
    """What comes next of each document in turn; what is taken may be less of it."""
    waiting: deque[Piece] = field(default_factory=deque)
    begun: int = 0
    finished: int = 0

    def __post_init__(self) -> None:
        d = self.documents
        self.sizes = np.diff(d.starts).tolist()
        self.patches = np.diff(d.patch_starts).tolist()
        self.pictures = np.diff(d.picture_starts).tolist()
        # Shorter windows are not worth the `<s>` and the lost context; a row may end in that much padding instead.
        self.shortest = np.where(d.plain, self.length // 8, self.length).tolist()

    @property
    def done(self) -> bool:
        """Every document was placed at least once."""
        if self.spread and self.begun:
            return not self.window and not self.waiting
        return self.finished >= len(self.members)

    def take(self, tokens: int, patches: int, repeat: bool) -> Piece | None:
        """The piece that fills most of the space left; `repeat` allows another pass."""
        while True:
            self._refill(repeat)
            best, size = self._best(tokens, patches)
            if best < 0:
                return None
            whole = self.window[best]
            piece = replace(whole, stop=whole.start + size - (whole.start > 0))
            if piece.stop == whole.stop:
                del self.window[best]
                self.finished += whole.stop == self.sizes[whole.document]
            else:
                self.window[best] = replace(whole, start=piece.stop)
            if self._teaches(piece):
                self.tally.documents += piece.start == 0
                self.tally.tokens += size
                self.tally.pictures += self.pictures[piece.document]
                return piece

    def _best(self, tokens: int, patches: int) -> tuple[int, int]:
        """Place in the window of what fills most of the space, and how much; place -1 where nothing fits."""
        best, size = -1, 0
        for position, piece in enumerate(self.window):
            if piece.size > tokens:
                if tokens >= self.shortest[piece.document] and not self.spread:
                    return position, tokens
            elif piece.size > size and self.patches[piece.document] <= patches:
                best, size = position, piece.size
                if size == tokens or (self.spread and tokens == self.length):
                    break
        return best, size

    def _teaches(self, piece: Piece) -> bool:
        """A window of a long conversation in which only others speak would be an update by nothing."""
        if piece.stop - piece.start == self.sizes[piece.document] or self.documents.plain[piece.document]:
            return True
        begin = self.documents.starts[piece.document]
        return bool((self.documents.flags[begin + piece.start : begin + piece.stop] & TRAINABLE).any())

    def _refill(self, repeat: bool) -> None:
        # Another pass begins only when all of this one is placed, so that no document is ahead of another by two.
        if not self.window and not self.waiting and len(self.members) and (repeat or self.begun == 0):
            keys = mix(self.documents.keys[self.members], self.begun)
            members = self.members[np.argsort(keys, kind="stable")].tolist()
            self.waiting.extend(self._windows(members) if self.spread else map(self._whole, members))
            self.begun += 1
        while self.waiting and len(self.window) < _LOOKAHEAD:
            self.window.append(self.waiting.popleft())

    def _whole(self, document: int) -> Piece:
        return Piece(self.index, document, 0, self.sizes[document])

    def _windows(self, members: list[int]) -> Iterator[Piece]:
        """Windows of a row's length, one of each document before a second of any; which of them is left to chance."""
        turns: list[tuple[int, int, Piece]] = []
        for place, document in enumerate(members):
            size = self.sizes[document]
            starts = [0, *range(self.length, size, self.length - 1)]  # each but the first is preceded by `<s>`
            pieces = [Piece(self.index, document, *ends) for ends in pairwise([*starts, size])]
            keys = mix(self.documents.keys[document] + np.arange(len(pieces), dtype=np.uint64), 0)
            turns.extend((turn, place, pieces[n]) for turn, n in enumerate(np.argsort(keys, kind="stable").tolist()))
        return (piece for _, _, piece in sorted(turns, key=itemgetter(0, 1)))


def pack(
    sources: dict[str, Documents],
    members: dict[str, np.ndarray],
    weights: dict[str, float],
    length: int,
    patches: int,
    spread: bool,
) -> tuple[Iterator[list[Piece]], dict[str, Tally]]:
    """Rows as lists of pieces, and tallies that are complete when the rows are exhausted.

    Args:
        members: documents of each source to pack, `[D']` indices, all of them `fitting`.
        weights: shares of the tokens, relative to each other.
        spread: as held-out rows are: every document is placed exactly once, the mix holds as long as no source is
            exhausted. Otherwise the smaller sources are gone round again so that it holds until each document was
            placed once.

    Raises:
        UserError: `length` is too short to pack.
    """
    if length < 16:
        raise UserError(f"batch.length = {length} is too short to pack documents; use at least 16 tokens")
    queues = []
    for index, (name, documents) in enumerate(sources.items()):
        queues.append(_Queue(index, documents, members[name], length, spread))
    total = sum(weights[name] for name in sources)
    shares = [weights[name] / total for name in sources]
    tallies = {name: queue.tally for name, queue in zip(sources, queues, strict=True)}
    return _rows(queues, shares, length, patches, repeat=not spread), tallies


def _rows(queues: list[_Queue], shares: list[float], length: int, patches: int, repeat: bool) -> Iterator[list[Piece]]:
    def behind(queue: _Queue) -> float:
        return shares[queue.index] * sum(q.tally.tokens for q in queues) - queue.tally.tokens

    while not all(queue.done for queue in queues):
        row: list[Piece] = []
        tokens_left, patches_left = length, patches
        for queue in sorted(queues, key=behind, reverse=True):
            while tokens_left and (
                piece := queue.take(tokens_left, patches_left, repeat and not all(q.done for q in queues))
            ):
                row.append(piece)
                tokens_left -= piece.size
                patches_left -= queue.patches[piece.document]
        if row:
            yield row
    for queue in queues:
        queue.tally.passes = queue.finished / max(len(queue.members), 1)


def fitting(documents: Documents, name: str, length: int, patches: int) -> tuple[np.ndarray, LeftOut]:
    """bool `[D]`: documents that rows of `length` tokens and `patches` image patches can hold; and of those that they
    cannot, because a pair or a document with images is never cut, how many and why."""
    sizes, needed = np.diff(documents.starts), np.diff(documents.patch_starts)
    is_pair = documents.margins is not None
    bad = (needed > patches) | (((needed > 0) | is_pair) & (sizes > length))
    reasons = []
    for d in np.flatnonzero(bad)[:SHOWN]:
        place = f"{documents.where(int(d))} (data.sources.{name})"
        if needed[d] > patches:
            reasons.append(
                f"{place} needs {needed[d]} image patches but a row holds data.patches = {patches}; raise data.patches "
                "or make the image smaller"
            )
        else:
            reasons.append(
                f"{place} makes {sizes[d]} tokens {'in two answers' if is_pair else 'with images'} but a row holds "
                f"batch.length = {length}; raise batch.length or make the document shorter"
            )
    return ~bad, LeftOut(rows=int(bad.sum()), of=len(bad), reasons=reasons)

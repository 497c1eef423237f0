"""Prompts for stages that sample: conversations up to what is to be answered. Batch n is a function of (seed, n)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ministral_jax.data.bad_rows import BadRows, Unusable, settle
from ministral_jax.data.chat import Rendered, render
from ministral_jax.data.config import DataConfig
from ministral_jax.data.conversation import Document, Message, spell
from ministral_jax.data.documents import Progress, documents_digest, drawn, group_key
from ministral_jax.data.sources import Source, open_source, read_rows
from ministral_jax.data.tokenizer import Tokenizer, load_tokenizer
from ministral_jax.errors import UserError
from ministral_jax.files import digest_of, write_json
from ministral_jax.lazy import Lazy
from ministral_jax.models.spec import VisionSpec

if TYPE_CHECKING:
    import grain
else:
    grain = Lazy("grain")

_PROGRESS_EVERY = 1000
Place = tuple[str, int]
"""A prompt's source, and its number among those of it."""


class PromptRow(NamedTuple):
    """A conversation that ends where the model is to go on.

    `columns` are the other keys of its row, `reference` the answer that was cut off where prompts were opened as
    `answered` ones, else "".
    """

    messages: tuple[Message, ...]
    rendered: Rendered
    columns: dict[str, Any]
    reference: str
    source: str
    where: str
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, eq=False)
class PromptData:
    """Conversations by source, in memory as read; each is rendered, and its images opened, when it is used."""

    tokenizer: Tokenizer
    vision: VisionSpec | None
    weights: dict[str, float]
    train: dict[str, list[Document]]
    held_out: dict[str, list[Document]]

    def batch(self, seed: int, step: int, count: int) -> list[PromptRow]:
        """The training prompts of a step (from 0)."""
        return self.drawn(seed, step * count, count)

    def drawn(self, seed: int, first: int, count: int) -> list[PromptRow]:
        """Training prompts `first` to `first + count - 1` of an order: each source's in an order of its own, anew in
        each pass, the sources by their weights."""
        order: Any = self._order(self.train, seed)
        return self.rows([order[first + i] for i in range(count)])

    @property
    def places(self) -> list[Place]:
        """Of all training prompts."""
        return [(name, number) for name, documents in self.train.items() for number in range(len(documents))]

    def rows(self, places: Iterable[Place]) -> list[PromptRow]:
        """Training prompts."""
        return [self._row(self.train[name][number], name) for name, number in places]

    def only(self, places: Iterable[Place]) -> PromptData:
        """With these training prompts alone."""
        train: dict[str, list[Document]] = {name: [] for name in self.train}
        for name, number in places:
            train[name].append(self.train[name][number])
        return replace(self, train=train)

    def evaluation(self, count: int) -> list[PromptRow]:
        """The first `count` held-out prompts, or all of them: always the same, the sources by their weights. Raises
        `UserError`: nothing was held out."""
        available = sum(len(documents) for documents in self.held_out.values())
        if not available:
            raise UserError("no prompt is held out; raise data.held_out or give the sources more documents")
        chosen = dict[tuple[str, int], None]()
        for place in self._order(self.held_out, 0):
            if len(chosen) == min(count, available):
                break
            chosen.setdefault(place)
        return [self._row(self.held_out[name][number], name) for name, number in chosen]

    def held_out_rows(self) -> list[PromptRow]:
        """All held-out prompts, in the order of the sources."""
        return [self._row(document, name) for name, documents in self.held_out.items() for document in documents]

    def _order(self, documents: dict[str, list[Document]], seed: int) -> grain.MapDataset:
        """`(source, number)` of one prompt after the other."""
        present = [name for name, of_source in documents.items() if of_source]
        sources = [
            grain.MapDataset.range(len(documents[name])).seed(seed + n).shuffle().repeat().map(lambda i, s=name: (s, i))
            for n, name in enumerate(present)
        ]
        return grain.MapDataset.mix(sources, [self.weights[name] for name in present])

    def _row(self, document: Document, source: str) -> PromptRow:
        return _row(document, source, self.tokenizer, self.vision)


def _row(document: Document, source: str, tokenizer: Tokenizer, vision: VisionSpec | None) -> PromptRow:
    messages, reference = document.messages, ""
    if messages[-1].role == "assistant":
        messages, reference = messages[:-1], spell(messages[-1])
    rendered = render(messages, tokenizer, vision, document.where, document.tools)
    return PromptRow(messages, rendered, document.columns, reference, source, document.where, document.tools)


class RowCheck(NamedTuple):
    """What a prompt must be, beyond being one.

    `row` is called with a prompt, as it will be used, and whether it is held out, and raises `UserError`, which begins
    with where the prompt stands if it is that one's fault; `wanted`, a JSON value, says all that this depends on.
    """

    wanted: Any
    row: Callable[[PromptRow, bool], object]


def open_prompts(
    config: DataConfig,
    vision: VisionSpec | None,
    root: Path,
    answered: bool = False,
    check: RowCheck | None = None,
    progress: Progress | None = None,
) -> PromptData:
    """Read the conversations of all sources, without the rows that cannot be used where sources leave these out.

    Args:
        root: the data directory: what `check` found is kept in `root/prompts/<digest>.json`, and found once.
        answered: whether every row must end with the assistant's answer, which becomes `PromptRow.reference`.
        check: of every prompt; None looks at none, nor at images.

    Raises:
        UserError: rows that are malformed, no conversations or refused by `check`, naming their files; or a source
            without training prompts.
    """
    tokenizer = load_tokenizer(config.tokenizer, root)
    train, held_out = {}, {}
    for name, settings in config.sources.items():
        source = open_source(name, settings, root)

        def problem(document: Document, name: str = name) -> UserError | None:
            if not document.messages:
                return UserError(f"{document.where}: is a text, not a conversation; stages that sample need 'messages'")
            try:
                if check is not None:
                    is_out = bool(_drawn([document], config.held_out)[0])
                    check.row(_row(document, name, tokenizer, vision), is_out)
            except UserError as error:
                return error

        identity = [documents_digest(source.digest, tokenizer.digest, vision), answered, config.held_out]
        kept = root / "prompts" / f"{digest_of([*identity, check.wanted])[:16]}.json" if check is not None else None
        documents = _read(source, not answered, problem, kept, progress)
        out = _drawn(documents, config.held_out)
        train[name] = [d for d, is_out in zip(documents, out, strict=True) if not is_out]
        held_out[name] = [d for d, is_out in zip(documents, out, strict=True) if is_out]
        if not train[name]:
            raise UserError(
                f"data.sources.{name} has no prompt left to train on with data.held_out = {config.held_out}; give it "
                "more rows or hold out fewer"
            )
    weights = {name: source.weight for name, source in config.sources.items()}
    return PromptData(tokenizer, vision, weights, train, held_out)


def _drawn(documents: Sequence[Document], share: float) -> np.ndarray:
    return drawn(np.array([group_key(document) for document in documents], np.uint64), share)


def _read(
    source: Source,
    prompts: bool,
    problem: Callable[[Document], UserError | None],
    kept: Path | None,
    progress: Progress | None,
) -> list[Document]:
    """The documents of a source that have no problem; which rows do is written to `kept`, and read from there."""
    known = json.loads(kept.read_text(encoding="utf-8")) if kept is not None and kept.is_file() else None
    if known is not None:
        settle(known["left_out"], source.name, source.config)
    bad, documents, refused = BadRows(source.name, source.config), list[Document](), list[int]()
    skipped = frozenset[int](known["refused"] if known is not None else ())
    for number, row in enumerate(read_rows(source, prompts)):
        if number in skipped:
            continue
        # What a machine cannot do is no fault of a row, and looked for each time.
        asked = known is None or not documents
        error = row.error if isinstance(row, Unusable) else problem(row) if asked else None
        if error is not None:
            if known is not None:
                raise error
            bad.add(row.where, error)
            refused.append(number)
        elif isinstance(row, Document):
            bad.good(row.where)
            documents.append(row)
            if progress is not None and len(documents) % _PROGRESS_EVERY == 0:
                progress(f"read prompts of {source.name}", len(documents))
    if known is None:
        left_out = bad.settle()
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_json(kept, {"left_out": left_out, "refused": refused})
    return documents

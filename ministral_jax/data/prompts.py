"""Prompts for stages that sample: conversations up to what is to be answered. Batch n is a function of (seed, n)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np

from ministral_jax.data.chat import Rendered, render
from ministral_jax.data.config import DataConfig
from ministral_jax.data.conversation import Document, Message, spell
from ministral_jax.data.documents import Progress, drawn
from ministral_jax.data.sources import open_source, read_documents
from ministral_jax.data.tokenizer import Tokenizer, load_tokenizer
from ministral_jax.errors import UserError
from ministral_jax.files import stable_key
from ministral_jax.models.spec import VisionSpec

_PROGRESS_EVERY = 1000


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


@dataclass(frozen=True, eq=False)
class PromptData:
    """Conversations by source, in memory as read; each is rendered, and its images opened, when it is used."""

    tokenizer: Tokenizer
    vision: VisionSpec | None
    weights: dict[str, float]
    train: dict[str, list[Document]]
    held_out: dict[str, list[Document]]

    def batch(self, seed: int, step: int, count: int) -> list[PromptRow]:
        """The training prompts of a step (from 0): each source's in an order of its own, anew in each pass, the sources
        by their weights."""
        order = self._order(self.train, seed)
        places: list[Any] = [order[step * count + i] for i in range(count)]
        return [self._row(self.train[name][number], name) for name, number in places]

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

    def check(self, longest: int, bound: str, progress: Progress | None = None) -> None:
        """Render every prompt once, as it will be used.

        Args:
            longest: tokens that a prompt may have.
            bound: what allows no more, for error messages.

        Raises:
            UserError: an image that cannot be used or a prompt that is too long, naming its file and row.
        """
        for name in self.train:
            for number, document in enumerate([*self.train[name], *self.held_out[name]], 1):
                tokens = len(self._row(document, name).rendered.tokens)
                if tokens > longest:
                    raise UserError(f"{document.where}: the prompt has {tokens} tokens, {bound} is {longest}")
                if progress is not None and number % _PROGRESS_EVERY == 0:
                    progress(f"check prompts of {name}", number)

    def _row(self, document: Document, source: str) -> PromptRow:
        messages, reference = document.messages, ""
        if messages[-1].role == "assistant":
            messages, reference = messages[:-1], spell(messages[-1])
        rendered = render(messages, self.tokenizer, self.vision, document.where, document.tools)
        return PromptRow(messages, rendered, document.columns, reference, source, document.where)


def open_prompts(
    config: DataConfig,
    vision: VisionSpec | None,
    root: Path,
    answered: bool = False,
    progress: Progress | None = None,
) -> PromptData:
    """Read the conversations of all sources; `PromptData.check` says whether they can be used.

    Args:
        root: where the tokenizer's file is kept.
        answered: whether every row must end with the assistant's answer, which becomes `PromptRow.reference`.

    Raises:
        UserError: a row that is malformed or is no conversation, naming its file; or a source without training prompts.
    """
    train, held_out = {}, {}
    for name, source in config.sources.items():
        documents = []
        for document in read_documents(open_source(name, source), prompts=not answered):
            if not document.messages:
                raise UserError(f"{document.where}: is a text, not a conversation; stages that sample need 'messages'")
            documents.append(document)
            if progress is not None and len(documents) % _PROGRESS_EVERY == 0:
                progress(f"read prompts of {name}", len(documents))
        out = drawn(np.array([stable_key(d.key or d.name) for d in documents], np.uint64), config.held_out)
        train[name] = [d for d, is_out in zip(documents, out, strict=True) if not is_out]
        held_out[name] = [d for d, is_out in zip(documents, out, strict=True) if is_out]
        if not train[name]:
            raise UserError(
                f"data.sources.{name} has no prompt left to train on with data.held_out = {config.held_out}; give it "
                "more rows or hold out fewer"
            )
    weights = {name: source.weight for name, source in config.sources.items()}
    return PromptData(load_tokenizer(config.tokenizer, root), vision, weights, train, held_out)

"""What to read: a tokenizer, named sources with their shares, and how much image a row may hold."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from ministral_jax.settings import Frozen, Place


class TokenizerConfig(Frozen):
    """A Tekken file, whole or cut to its first entries.

    `file` is the path of a `tekken.json`, or `bundled`: the vocabulary that comes with mistral-common, which has the
    family's merges but not the special tokens of a released checkpoint. To train on from released weights, give the
    `tekken.json` that came with them.
    """

    file: Place = "bundled"
    vocab: int | None = Field(default=None, ge=276)
    """Entries to keep, special tokens included: the same encoding with fewer merges. Unset keeps the file's."""
    special: int | None = Field(default=None, ge=20)
    """Special tokens to keep, at ids 0, 1, ..; at least the family's first 20. Unset keeps the file's number."""


class SourceConfig(Frozen):
    """One source of documents.

    python-library: the running interpreter's own standard library, one document per module, tests left out.
    digits: scikit-learn's 1797 handwritten 8x8 digits, each as a question about an image.
    text: UTF-8 files, one document each. jsonl: one document per row, see `jsonl.py`.
    arithmetic, digit-sum, needle, instructions, repeat: questions made here whose answers can be verified; preferences:
    pairs of answers to such questions, for a judge. See `tasks.py`.
    """

    kind: Literal[
        "python-library",
        "digits",
        "text",
        "jsonl",
        "arithmetic",
        "digit-sum",
        "needle",
        "instructions",
        "repeat",
        "preferences",
    ]
    path: Place | None = None
    """For text and jsonl: a file, a glob, or a directory (searched for *.txt and *.md, or *.jsonl)."""
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Share of the tokens of the mix, relative to the other sources' weights."""
    limit: int | None = Field(default=None, ge=1)
    """Documents to read at most: a fixed sample of the files or digits, the first rows of a JSONL file; of questions
    made here the number, 4000 if unset."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """What becomes of rows and files that cannot be used, of which there may be at most half: all are named and nothing
    is begun, or they are left out, which is said and counted."""
    thinking: bool = True
    """For arithmetic and digit-sum: whether the answer's working stands before it as reasoning."""
    words: int | None = Field(default=None, ge=1)
    """For needle: how many words stand around the picture at most, 40 if unset."""

    @model_validator(mode="after")
    def _path_belongs_to_files(self) -> Self:
        if (self.path is not None) != (self.kind in ("text", "jsonl")):
            raise ValueError(f"kind {self.kind!r} {'takes no' if self.path is not None else 'needs a'} path")
        if not self.thinking and self.kind not in ("arithmetic", "digit-sum"):
            raise ValueError(f"kind {self.kind!r} has no thinking that could be left out")
        if self.words is not None and self.kind != "needle":
            raise ValueError(f"kind {self.kind!r} takes no words; only 'needle' has some around its picture")
        return self


class DataConfig(Frozen):
    """Sources and how they are packed; the row length comes from the stage's batch, the image layout from the model."""

    tokenizer: TokenizerConfig = TokenizerConfig()
    sources: dict[str, SourceConfig] = Field(min_length=1)
    held_out: float = Field(default=0.05, ge=0, lt=1)
    """Share of the documents kept for evaluation, chosen by a hash of their content; those made here that share a
    question or a picture go together."""
    patches: int = Field(default=0, ge=0)
    """Image patches a row may hold (P); 0 is text only. Rows with images are filled with them up to this budget."""

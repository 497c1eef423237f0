"""What a run says of itself beside its manifests: `summary.json`, `samples.json`, `<stage>/answers.json`."""

from __future__ import annotations

from pydantic import BaseModel, Field

from ministral_jax.models.spec import ModelSpec


class Entry(BaseModel):
    """A model in `summary.json`."""

    parameters: float | None = None
    decoder_parameters: float | None = None
    tokens: float | None = None
    """Of its own distillation; of the parent, of its training."""
    tokens_lineage: float | None = None
    """Of the distillation of the models it was cut from too."""
    bits_per_byte: float | None = None
    digit_accuracy: float | None = None
    kl_after_surgery: float | None = None
    kl_final: float | None = None
    kl_scratch: float | None = None
    token_speedup: float | None = None
    stages: dict[str, str] = Field(default_factory=dict)
    """By role: "pruned", "short", "base", "scratch_short", "scratch_base"."""
    spec: ModelSpec | None = None
    """Of its last stage; not in the file."""


class Summary(BaseModel):
    """`summary.json`: the published figures of the family."""

    parent: Entry | None = None
    children: dict[str, Entry] = Field(default_factory=dict)
    wall_seconds: float | None = None


class Sample(BaseModel):
    """A held-out image and what the models say to it."""

    png: str
    """Base64."""
    question: str
    label: str
    answers: dict[str, str]
    """By model."""


class Samples(BaseModel):
    images: list[Sample] = Field(default_factory=list)


class Answer(BaseModel):
    """What a stage said to a held-out prompt."""

    prompt: str
    """JSON: text, or a list of chunks."""
    answer: str
    reward: float | None = None
    parts: dict[str, float | None] = Field(default_factory=dict)
    """Of the reward."""


class Answers(BaseModel):
    answers: list[Answer] = Field(default_factory=list)

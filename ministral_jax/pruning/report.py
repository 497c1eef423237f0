"""What a prune stage says of each step: the scores, what was kept, and how much of it that was."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from ministral_jax.settings import Frozen


class Kept(Frozen):
    """Scores of neurons in a layer: minimum, quartiles and maximum of all and of the kept ones."""

    all: tuple[float, ...]
    kept: tuple[float, ...]
    kept_share: float
    """Of the total score."""


class Spectrum(Frozen):
    """Energy of the residual stream along some of the basis directions, and the share of all energy up to each."""

    index: tuple[int, ...]
    energy: tuple[float, ...]
    cumulative: tuple[float, ...]


class LayersStep(Frozen):
    step: Literal["layers"] = "layers"
    score: str
    scores: tuple[float, ...]
    kept: tuple[int, ...]


class WidthStep(Frozen):
    step: Literal["width"] = "width"
    basis: str
    retained_energy: float
    gain: float
    """The mean where every norm has its own."""
    spectrum: Spectrum
    projector: Kept | None = Field(default=None, exclude_if=lambda kept: kept is None)
    """Hidden neurons of the projector, which is narrowed with the width."""


class MlpStep(Frozen):
    step: Literal["mlp"] = "mlp"
    score: str
    kept: int
    """Neurons per layer."""
    layers: tuple[Kept, ...]


class TieStep(Frozen):
    step: Literal["tie"] = "tie"
    seed: str


class ProjectorStep(Frozen):
    step: Literal["projector"] = "projector"
    drawn: Literal["fresh"] = "fresh"


class RopeStep(Frozen):
    step: Literal["rope"] = "rope"
    to: dict[str, Any]


Step = Annotated[LayersStep | WidthStep | MlpStep | TieStep | ProjectorStep | RopeStep, Field(discriminator="step")]


class PruneReport(Frozen):
    """`manifest.json`, under `prune`."""

    tokens: dict[str, float] | None = None
    """Calibration tokens of the first pass, by kind."""
    steps: tuple[Step, ...] = ()
    kl: dict[str, float] = Field(default_factory=dict)
    """Held-out KL from the source after each step, nats per token."""

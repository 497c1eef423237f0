"""Which prompts are of use to a policy: those that its starting model solves sometimes, neither never nor always."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import numpy as np
from pydantic import Field, model_validator

from ministral_jax.data.prompts import PromptData, PromptRow
from ministral_jax.distributed.collectives import from_first, is_first
from ministral_jax.files import write_json
from ministral_jax.settings import Frozen


class DifficultyConfig(Frozen):
    """Training prompts whose pass rate, the share of right answers, under the model that a stage starts from lies
    outside a band are left out (Magistral, arXiv 2506.10910, §4.1, which draws 16 answers too)."""

    completions: int = Field(default=16, ge=1)
    """Drawn of each prompt, with the temperature, length and rewards of the stage's first step."""
    min_pass_rate: float = Field(default=0.05, ge=0, le=1)
    """Prompts below it are too hard."""
    max_pass_rate: float = Field(default=0.95, ge=0, le=1)
    """Prompts above it are too easy."""

    @model_validator(mode="after")
    def _is_a_band(self) -> Self:
        if self.min_pass_rate > self.max_pass_rate:
            raise ValueError(f"min_pass_rate = {self.min_pass_rate} is above max_pass_rate = {self.max_pass_rate}")
        return self


def pass_rates(
    prompts: PromptData,
    rate: Callable[[int, list[PromptRow]], np.ndarray],
    path: Path,
    identity: Any,
    together: int,
) -> list[float]:
    """Of every training prompt, in the order of `prompts.places`. Measured once: `path` keeps those that are known.

    Args:
        rate: the pass rates of the prompts from a place on.
        identity: a JSON value that says all that the rates depend on; those of another one are not used.
        together: prompts that are measured, and kept, at a time.
    """
    rates: list[float] = []
    with suppress(OSError, ValueError, KeyError):
        kept = json.loads(path.read_text(encoding="utf-8"))
        rates = kept["rates"] if kept["identity"] == identity else []
    rates = from_first(rates)
    for first in range(len(rates), len(places := prompts.places), together):
        rates += rate(first, prompts.rows(places[first : first + together])).tolist()
        if is_first():
            write_json(path, {"identity": identity, "rates": rates})
    return rates

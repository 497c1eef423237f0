"""What a completion is rewarded for, as a recipe says it: a mapping of names to settings, `kind` the name by default.

    rewards:
      accuracy: {weight: 0.9}
      format: {weight: 0.1}
      brevity: {kind: length, cache: 16}

`scoring.Scorer` checks the rows of the prompts against them and scores samples. Free of JAX.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ministral_jax.alignment.sandbox import Isolation
from ministral_jax.settings import Frozen

DottedPath = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
"""`package.module:function`."""


class Reward(Frozen):
    """What all rewards have: the total of a sample is the sum of weight * reward, unless a `gate` makes it 0."""

    weight: float = Field(default=1.0, allow_inf_nan=False)


class AccuracyReward(Reward):
    """1 for the row's `answer`, by text or by mathematics, else 0. See `mathematics.accuracy`."""

    kind: Literal["accuracy"] = "accuracy"
    exact: bool = False
    """Compare answers that are no mathematics as text; without it such a row is refused."""


class FormatReward(Reward):
    """1 for a completion that ended by itself and has its reasoning where it belongs, else 0."""

    kind: Literal["format"] = "format"
    thinking: bool = True
    gate: bool = True
    """A completion without the format earns 0 and is not graded further, as in Magistral (arXiv 2506.10910, §2.2).
    false: it earns what the other rewards give."""


class ConstraintsReward(Reward):
    """Share of the constraints in the row's column `constraints` that the answer satisfies."""

    kind: Literal["constraints"] = "constraints"


class LanguageReward(Reward):
    """1 for reasoning and answer in the script of the prompt, else 0."""

    kind: Literal["language"] = "language"


class LengthReward(Reward):
    """0 down to -1 over the last `cache` tokens before the limit."""

    kind: Literal["length"] = "length"
    cache: int = Field(ge=1)


class CodeReward(Reward):
    """1 for a program that passes the row's `tests`, else 0. Runs what the model wrote: off unless asked.

    The limits are Magistral's (arXiv 2506.10910, §2.2).
    """

    kind: Literal["code"] = "code"
    enabled: bool = False
    seconds: float = Field(default=4, gt=0, le=600)
    """Of a test."""
    memory_mb: int = Field(default=300, ge=64)
    isolation: Isolation = "bubblewrap"


class RubricReward(Reward):
    """Mean of a judge's verdicts `judge(sample, rubric)`, true, false or from 0 to 1, over the column `rubrics`."""

    kind: Literal["rubric"] = "rubric"
    judge: DottedPath


class UserReward(Reward):
    """`function(sample, **options)`."""

    kind: Literal["user"] = "user"
    function: DottedPath
    options: dict[str, Any] = Field(default_factory=dict)


AnyReward = Annotated[
    AccuracyReward
    | FormatReward
    | ConstraintsReward
    | LanguageReward
    | LengthReward
    | CodeReward
    | RubricReward
    | UserReward,
    Field(discriminator="kind"),
]


def _kind_by_name(rewards: Any) -> Any:
    """`{"accuracy": {..}}` -> `{"accuracy": {"kind": "accuracy", ..}}`; a name without settings has the defaults."""
    if not isinstance(rewards, Mapping):
        return rewards
    return {
        name: {"kind": name, **(given or {})} if given is None or isinstance(given, Mapping) else given
        for name, given in rewards.items()
    }


CHECKABLE = ("accuracy", "constraints", "code")
"""Kinds by which an answer is right, where they give 1, or wrong."""

RewardsConfig = Annotated[dict[str, AnyReward], BeforeValidator(_kind_by_name), Field(min_length=1)]

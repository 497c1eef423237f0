"""Which figures may stand side by side."""

from __future__ import annotations

import numpy as np
import pytest

from ministral_jax.models.spec import PRESETS
from ministral_jax.runs.comparable import differ, most_common, row_length, stale_stages
from ministral_jax.stages.manifest import Input, Manifest


def made(**inputs: str) -> Manifest:
    """A stage made from others, by role `stage_digest`."""
    given = {role: Input(stage=told.split("_")[0], digest=told.split("_")[1]) for role, told in inputs.items()}
    spec = PRESETS["tiny-3b"]
    return Manifest(stage="a", do="train", status="finished", config={}, spec=spec, inputs=given)


def test_what_is_made_from_what_was_made_anew_is_stale():
    stages = {
        "parent": made(),
        "pruned": made(parent="parent_p1"),
        "short": made(parent="pruned_c1", teacher="parent_p1"),
        "reward": made(parent="other_o1"),
        "instruct": made(parent="short_s1", judge="reward_r1"),
    }
    here: dict[str, str | None] = {"parent": "p1", "pruned": "c1", "short": "s1", "reward": "r1", "instruct": "i1"}
    assert stale_stages(stages, here) == {}  # what is not there is not newer: `other` was deleted
    assert stale_stages(stages, here | {"reward": "r2"}) == {
        "instruct": "made from another reward than the one that is here now"
    }
    anew = "made from another pruned than the one that is being made"
    stages.pop("pruned")
    told = {"short": anew, "instruct": "made from short, which is stale"}
    assert stale_stages(stages, here | {"pruned": None}) == told
    loop = {"a": made(parent="b_1"), "b": made(parent="a_1")}
    assert stale_stages(loop, {"a": "2", "b": "1"}).keys() == {"a", "b"}


def test_row_lengths():
    stage = made()
    assert row_length(stage) is None
    assert row_length(stage.model_copy(update={"config": {"batch": {"length": 128}}})) == 128
    assert row_length(stage.model_copy(update={"config": {"batch": None}})) is None
    assert most_common([512, 128, 128]) == 128 and most_common([512, 128]) == 512 and most_common([]) is None


@pytest.mark.parametrize(
    ("before", "after", "count", "sure"),
    [
        (0.643, 0.639, 100, False),
        (0.1, 0.9, 10, True),
        (0.5, 0.5, 10**6, False),
        (0.5, 0.6, 100, False),
        (0.5, 0.6, 1000, True),
        (0.0, 1.0, 1, False),
        (0.0, 0.0, 5, False),
        (1.0, 0.9, 16, False),
    ],
)
def test_shares_differ_beyond_chance(before, after, count, sure):
    assert differ(before, after, count) == differ(after, before, count) == sure


def test_chance_is_taken_for_a_difference_one_time_in_twenty():
    drawn = np.random.default_rng(0).binomial(64, 0.3, (2000, 2)) / 64
    assert 0.02 < sum(differ(a, b, 64) for a, b in drawn) / 2000 < 0.07

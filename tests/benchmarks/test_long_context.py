"""The table of the study of long context."""

import sys

import pytest
from paths import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import long_context

from ministral_jax.losses.held_out import Octave
from ministral_jax.models.spec import RopeSpec
from ministral_jax.runs.sweep import expand, read_sweep

SEEDS = (0.01, -0.01, 0.0)


def test_arms_are_named_by_what_they_add():
    name = lambda **rope: long_context.arm_name(RopeSpec(original_context=128, **rope))
    assert name() == "plain" and name(yarn_factor=4) == "YaRN 4"
    assert name(yarn_factor=4, temperature_beta=0.1) == "YaRN 4 + temperature 0.1"


def test_a_table_says_what_differs_from_the_first_arm_at_the_same_seed():
    """A difference that is equal for every seed stands out, though the seeds differ by more."""

    def arm(ce: float, right: float) -> dict[str, list[float]]:
        octaves = (Octave(0, 9, 1.0), Octave(128, 9, ce, None, 7, right), Octave(256, 9, ce))
        return {key: [value + seed for seed in SEEDS] for key, value in long_context.columns(octaves).items()}

    before = {key: values[2:] * 3 for key, values in arm(5, 0.125).items()}
    found = {("plain", "before"): before, ("plain", "long"): arm(3, 0.5), ("YaRN 4", "before"): before}
    far = arm(2.999, 0.5)
    lines = long_context.table(found | {("YaRN 4", "long"): far}).splitlines()
    assert lines[0].split(" | ")[1:] == [
        "long stage",
        "loss at 128 to 255",
        "loss at 256 to 511",
        "needles at 128 to 255 (7) |",
    ]
    assert lines[2] == "| plain | before | 5.000 | 5.000 | 0.125 |"
    assert lines[4] == "| plain | after | 3.000 ± 0.025 | 3.000 ± 0.025 | 0.500 ± 0.025 |"
    assert lines[5] == "| YaRN 4 | after | **2.999 ± 0.025** | **2.999 ± 0.025** | 0.500 ± 0.025 |"


@pytest.mark.parametrize("stage", ["before", "long"])
def test_the_study_varies_both_stages_alike_and_makes_all_else_once(stage):
    points = expand(read_sweep(ROOT / "configs" / "studies" / "long_context.yaml"))
    assert len({point.stages["14b-short"] for point in points}) == 1
    ropes = [point.recipe.stages[stage].model["rope"] for point in points]
    assert len(points) == 20 and len({str(rope) for rope in ropes}) == 4
    assert all(rope == points[n - n % 5].recipe.stages["long"].model["rope"] for n, rope in enumerate(ropes))

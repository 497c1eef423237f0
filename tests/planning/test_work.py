"""What stages of the shipped recipe do, as records."""

from functools import cache

import pytest
from paths import ROOT

from ministral_jax.models.spec import PRESETS
from ministral_jax.planning.work import stage_work
from ministral_jax.recipe.load import load_recipe, resolve_specs
from ministral_jax.stages.base import Graph


@cache
def work_of(stage, *overrides):
    made = dict.fromkeys(
        ("parent", "teacher", "instruct-teacher", "reasoning-teacher"), PRESETS["mistral-small-3.1-24b"]
    )
    recipe = load_recipe(ROOT / "configs" / "ministral3.yaml", overrides, lambda name: made)
    specs = resolve_specs(recipe, [stage], made)
    return stage_work(recipe.stages[stage], specs[stage], Graph(recipe.stages, specs))


@pytest.mark.parametrize(
    ("stage", "beside"),
    [("14b-short", {"evaluate"}), ("14b-reward", {"evaluate", "judge"}), ("14b-instruct", {"examine"})],
)
def test_evaluations_come_beside_steps_and_judging_a_steps_answers_with_them(stage, beside):
    assert {phase.name for phase in work_of(stage).phases if phase.beside} == beside

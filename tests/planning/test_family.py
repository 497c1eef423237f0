"""The base family on the machines of configs/machines: what docs/plan.md says of it."""

import pytest
from paths import ROOT

from ministral_jax.planning.machine import parse_machine
from ministral_jax.planning.plan import make_plan
from ministral_jax.recipe.load import load_recipe, order

MACHINES = {
    "v5p-128": "v5p:4x4x4",
    "v5p-256": "v5p:4x4x8",
    "v5p-1024": "v5p:8x8x8",
    "v6e-256": "v6e:16x16",
    "h100-32": "h100:32",
}


def test_every_machine_has_a_plan():
    assert {path.stem for path in ROOT.joinpath("configs/machines").glob("*.yaml")} == MACHINES.keys()


@pytest.mark.parametrize("name", MACHINES)
def test_every_stage_fits_with_room_at_four_million_tokens_a_step(name):
    recipe = load_recipe("configs/ministral3_base.yaml", [f"configs/machines/{name}.yaml"])
    plan = make_plan(recipe, order(recipe), parse_machine(MACHINES[name]))
    assert plan.is_possible, [str(finding) for finding in plan.findings]
    assert len(plan.stages) == 13 and min(plan.free(stage) for stage in plan.stages) >= 0.08
    page, rows = ROOT.joinpath("docs/plan.md").read_text(), [s for s in plan.stages if s.stage.do == "distill"]
    for stage, length in zip(rows, (16_384, 262_144) * 3, strict=True):
        assert stage.stage.batch.length == length and stage.time.tokens >= 4_000_000
        assert f"{stage.memory.peak.total / 2**30:.1f} | {plan.free(stage):.0%}" in page
        assert f"| {plan.mfu(stage):.1%} |" in page

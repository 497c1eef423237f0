"""The base family on the machines of configs/machines: what docs/plan.md says of it."""

import pytest
from paths import ROOT

from ministral_jax.planning.machine import parse_machine
from ministral_jax.planning.plan import make_plan
from ministral_jax.planning.table import duration, mesh_text
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
    rows, said = [s for s in plan.stages if s.stage.do == "distill"], table_rows(f"`{MACHINES[name]}`, {name}.yaml")
    for stage, length, row in zip(rows, (16_384, 262_144) * 3, said, strict=True):
        assert stage.stage.batch.length == length and stage.time.tokens >= 4_000_000
        figures = [f"{stage.memory.peak.total / 2**30:.1f}", f"{plan.free(stage):.0%}"]
        figures += [duration(stage.time.step_seconds), f"{plan.mfu(stage):.1%}", f"{stage.seconds / 86400:.1f}"]
        assert row == [stage.name, mesh_text(stage.mesh), *figures]


def table_rows(machine):
    """Cells of the six rows of a machine in docs/plan.md, the first of which names it."""
    lines = ROOT.joinpath("docs/plan.md").read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith(f"| {machine} |"))
    return [[cell.strip() for cell in line.split("|")[2:-1]] for line in lines[first : first + 6]]

"""A kernel of attention that a stage names and its devices do not have is refused with the stage's name, at once."""

import re

import pytest
from finding_cases import GRPO, H100, LONG, SHORT, TEACHERS, V5P, planted

from ministral_jax.errors import UserError
from ministral_jax.planning.findings.find import impossible
from ministral_jax.planning.findings.finding import Context
from ministral_jax.planning.machine import parse_machine
from ministral_jax.planning.plan import make_plan
from ministral_jax.recipe.load import order

CASES = {
    "another platform's": (
        H100, SHORT, "splash", ["mesh={fsdp: -1}"],
        "tpu devices; here are gpu devices, chunks of 16384 tokens",
    ),
    "online": (V5P, GRPO, "cudnn", [], "gpu devices; here are tpu devices"),
    "a row that is cut": (
        H100, LONG, "cudnn", ["mesh={fsdp: 4, context: 8}"], r"rows that no mesh cuts \(mesh.context 1\)"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_named_kernel_that_does_not_serve(case, family):
    machine, stage, kernel, settings, words = CASES[case]
    recipe = planted(family[0], [f"stages.{stage}.{setting}" for setting in [f"compute.attention={kernel}", *settings]])
    context = Context(recipe, family[1], (stage,), parse_machine(machine))
    sentence = rf"^stages\.{stage}\.compute\.attention = {kernel} needs .*{words}"
    with pytest.raises(UserError, match=sentence):
        context.jobs[stage].stage.prepare(context.jobs[stage], None)  # there are no rows to pack
    on = parse_machine(machine)
    plan = make_plan(recipe, order(recipe, [stage]), on)
    assert [finding.level for finding in plan.findings if re.search(sentence, finding.text)] == ["error"]
    assert plan.stages[-1].time is None
    assert any(re.search(sentence, finding.text) for finding in impossible(recipe, [stage], on, TEACHERS))

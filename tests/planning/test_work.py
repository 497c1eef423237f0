"""What stages of the shipped recipe do, as records."""

from dataclasses import replace
from functools import cache

import jax
import pytest
from paths import ROOT, TESTS

from ministral_jax.distributed.placement import MeshConfig, make_mesh
from ministral_jax.models.spec import PRESETS
from ministral_jax.planning.machine import parse_machine
from ministral_jax.planning.memory.stage import stage_memory
from ministral_jax.planning.records import StageWork
from ministral_jax.planning.timing.roofline import stage_time
from ministral_jax.planning.work import stage_work
from ministral_jax.recipe.load import load_recipe, resolve_specs
from ministral_jax.stages.base import Graph, Job


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


@pytest.mark.parametrize(
    ("machine", "mesh", "batches", "rows"), [("v5p:4x4x4", {}, 4, 64), ("v6e:16x16", {"fsdp": 256}, 1, 256)]
)
def test_a_judge_reads_batches_that_the_devices_share_evenly(machine, mesh, batches, rows):
    """128 prompts of two answers are 256 questions, in both orders."""
    machine = parse_machine(machine)
    placed = machine.mesh(MeshConfig(**mesh))
    found = work_of("14b-instruct", "stages.14b-instruct.prompts=128").on(placed)
    (read,) = found.phase("judge").work
    assert (read.microbatches, read.rows) == (batches, batches * rows)


@pytest.mark.parametrize("name", ["reward", "instruct", "pairs"])
def test_a_judges_questions_are_planned_as_they_are_compiled(name, tmp_path):
    recipe = load_recipe(TESTS / "micro_post.yaml")
    specs = resolve_specs(recipe)
    stage, graph = recipe.stages[name], Graph(recipe.stages, specs)
    job = Job(name, stage, specs[name], graph, tmp_path, make_mesh(MeshConfig(), jax.devices()[:1]))
    _, batch = stage.programs(job)["judge"].arguments
    (read,) = stage_work(stage, specs[name], graph).phase("judge").work
    assert batch["tokens"].shape == (read.at_once, read.length)


def test_more_devices_hold_less_of_a_judges_questions():
    work = work_of("14b-instruct", "stages.14b-instruct.prompts=128")
    needs = {}
    for shape in ("8x8", "16x16"):
        machine = parse_machine(f"v6e:{shape}")
        memory = stage_memory(work, machine.mesh(MeshConfig(fsdp=machine.devices)), machine.hosts)
        needs[shape] = next(phase for phase in memory.phases if phase.phase == "judge")
    activations = {shape: sum(i.bytes for i in p.items if i.name == "activations") for shape, p in needs.items()}
    assert activations["16x16"] <= activations["8x8"]


def test_a_head_makes_a_teachers_logits_anew_of_recorded_states_alone():
    """Held-out rows are always recorded as hidden states, training rows where the codec says so."""
    machine = parse_machine("v5p:2x2x1")
    for codec, anew in (("{kind: hidden}", True), ("{kind: topk, entries: 16}", False)):
        recipe = load_recipe(TESTS / "micro_stored.yaml", [f"stages.logits.codec={codec}", "data.patches=0"])
        specs = resolve_specs(recipe, ["short"])
        work = stage_work(recipe.stages["short"], specs["short"], Graph(recipe.stages, specs))
        mesh = machine.mesh(MeshConfig())
        (step,), (seen,) = work.phase("step").work, work.phase("evaluate").work
        assert (step.taught is not None, seen.taught is not None) == (anew, True)
        bare = StageWork(work.held, tuple(replace(p, work=(replace(p.work[0], taught=None),)) for p in work.phases))
        for place, counted in ((0, anew), (1, True)):
            heads = [_heads(stage_memory(each, mesh, 1).phases[place]) for each in (work, bare)]
            times = [_head_seconds(stage_time(each, mesh, machine).phases[place]) for each in (work, bare)]
            assert (heads[0] > heads[1], times[0] > times[1]) == (counted, counted)


def _heads(phase):
    return sum(item.bytes for item in phase.items)


def _head_seconds(phase):
    return sum(part.seconds for part in phase.parts if part.name == "loss head")


def test_an_fp8_export_reads_the_rows_that_its_model_has_learnt_from():
    """Beside its parameters, some batches of the nearest stage before it that has packed rows."""
    fp8, learnt = work_of("14b-instruct-hf", "stages.14b-instruct-hf.format=fp8"), work_of("14b-sft")
    machine = parse_machine("v5p:4x4x4")
    mesh = machine.mesh(MeshConfig(fsdp=64))
    (read,), (*_, theirs) = fp8.on(mesh).phase("calibrate").work, learnt.phase("step").work
    assert (read.rows, read.length, read.patches) == (theirs.rows, theirs.length, theirs.patches)
    assert read.compute.dtype == "bfloat16" and not read.learns
    export, calibrate = stage_memory(fp8, mesh, machine.hosts).phases
    items = {item.name: item.bytes for item in calibrate.items}
    assert items["model: weights"] == {item.name: item.bytes for item in export.items}["model: weights"]
    assert items["activations"] > 0 and items["batch"] > 0
    plain, whole = (stage_time(work, mesh, machine).seconds for work in (work_of("14b-instruct-hf"), fp8))
    (passes,) = (phase for phase in stage_time(fp8, mesh, machine).phases if phase.phase == "calibrate")
    assert passes.times == 16 and whole == plain + passes.total > plain

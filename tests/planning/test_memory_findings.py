"""Memory and time that are predicted of the real family, and what is said to mend them."""

import pytest
from finding_cases import GRPO, LONG, SHORT, V5P, found, holding, new, of_stage, predicted

from ministral_jax.planning.memory.stage import StageMemory

PREDICTED = {
    # of real models of memory and time: stage, what is there before, what is planted, words of the finding
    "GRPO's caches": (
        GRPO,
        [
            *("max_prompt_length=2048", "max_completion_length=1024"),
            *("evaluate.max_completion_length=1024", "evaluate.completions=0"),
        ],
        ["max_completion_length=32768"],
        ["14b-stem needs", "in phase 'sample' (cache", "set stages.14b-stem.answers_at_once=512, with"],
    ),
    "the loss head": (
        SHORT, ["mesh.tensor=1", "batch.microbatches=1"], ["loss.chunk=65536"],
        ["in phase 'step' (loss head", "set stages.14b-short.loss.chunk=8192, with which it needs"],
    ),
    "activations": (
        SHORT, ["mesh.tensor=1"], ["mesh.tensor=1", "compute.remat=none"],
        ["in phase 'step' (activations", "set stages.14b-short.compute.remat=full, with which it needs"],
    ),
    "surgery": (
        "14b-pruned", [], ["mesh={data: 64, fsdp: 1, tensor: 1}"],
        ["of a v5p in phase", "set stages.14b-pruned.mesh={slice: 1, data: 32, fsdp: 2"],
    ),
    "a long step and the watchdog": (
        LONG, [], ["limits.slow=60"], ["limits.slow = 60 ends stages.14b-base, of which 'step' takes"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PREDICTED)
def test_predicted_memory_and_time_are_held_against_the_machine(family, name):
    stage, before, plant, words = PREDICTED[name]
    without = predicted(family, stage, of_stage(stage, before))
    told = [one for one in predicted(family, stage, of_stage(stage, before + plant)) if one.level == "error"]
    assert [one.text for one in without if one.level == "error"] == []
    assert any(all(word in one.text for word in words) for one in told), told


@pytest.mark.parametrize(
    ("stage", "memory", "level", "words"),
    [
        (
            SHORT,
            holding("step", 60, 60),
            "error",
            ["120.0 GB of the 102.0 GB", "activations 60.0"],
        ),
        (SHORT, holding("step", 60, 37), "warning", ["97.0 GB", "less than 8% is spare"]),
        (GRPO, holding("sample", 20, 90), "error", ["phase 'sample'"]),
        (GRPO, holding("examine", 20, 90), "error", ["phase 'examine'"]),
        ("14b-pruned", holding("calibrate", 20, 90), "error", ["phase 'calibrate'"]),
        (GRPO, holding("step", 20, 20, host=500), "error", ["500 GB of the 481 GB of a host", "14b-stem.prompts"]),
    ],
)
def test_what_does_not_fit_into_memory_is_told_with_its_largest_items(family, stage, memory, level, words):
    enough = found(family, V5P, stage, memory=holding("step", 50, 40, host=100))
    told = new(enough, found(family, V5P, stage, memory=memory))
    assert [finding.level for finding in told] == [level] and all(word in told[0].text for word in words), told


def test_every_phase_that_does_not_fit_is_told(family):
    parts = [holding(phase, 60, 60).phases[1] for phase in ("step", "evaluate")]
    told = found(family, V5P, SHORT, memory=StageMemory((*parts, *holding("x", 1, 1).phases), 0, 0))
    assert [one.text.split("in phase ")[1].split()[0] for one in told if one.level == "error"] == [
        "'step'",
        "'evaluate'",
    ]


def test_rows_that_do_not_divide_are_all_that_is_said_of_a_stage(family):
    rows = of_stage(SHORT, ["batch={sequences: 250, length: 16384, microbatches: 2}"])
    (told,) = (x for x in found(family, V5P, SHORT, rows, memory=holding("step", 60, 60)) if x.level == "error")
    assert "batch.sequences = 250 must be a multiple of 32" in told.text and "batch.sequences to 256" in told.text


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ("{}", []),
        ("{XLA_PYTHON_CLIENT_MEM_FRACTION: '0.8'}", ["MEM_FRACTION is 0.8 of a GPU, 64.0 GB", "needs 70.0", "to 0.92"]),
        ("{XLA_PYTHON_CLIENT_PREALLOCATE: 'false'}", []),
    ],
)
def test_jax_takes_as_much_of_a_gpu_as_a_stage_needs(family, environment, words):
    settings = [f"launch.slurm={{nodes: 4, gpus_per_node: 8, environment: {environment}}}"]
    settings += of_stage(SHORT, ["mesh.fsdp=-1", "mesh.data=1", "mesh.tensor=1"])
    told = found(family, "h100:32", SHORT, settings, memory=holding("step", 40, 30))
    errors = [one.text for one in told if one.level == "error"]
    assert len(errors) == bool(words) and all(word in text for text in errors for word in words), errors


def test_a_share_of_a_gpu_is_not_mended_by_itself(family):
    settings = ["launch.slurm={nodes: 4, gpus_per_node: 8}", *of_stage(SHORT, ["mesh={fsdp: -1}"])]
    told = found(family, "h100:32", SHORT, settings, memory=holding("step", 45, 30))
    assert not [finding for finding in told if "MEM_FRACTION" in finding.text]

"""What is found wrong with a recipe on a machine: each fault planted as a setting, and nothing said without it."""

from types import SimpleNamespace

import pytest
from finding_cases import (
    GRPO,
    H100,
    LONG,
    NODES,
    ODPO,
    SHORT,
    TEACHERS,
    TORUS,
    V5P,
    found,
    holding,
    new,
    of_stage,
    planted,
    taking,
)
from paths import ROOT

from ministral_jax.planning.findings.clock import tasks_are_left_out
from ministral_jax.planning.findings.find import find, impossible
from ministral_jax.planning.findings.finding import Context, Finding, merged
from ministral_jax.planning.findings.site import Need, needed
from ministral_jax.planning.machine import parse_machine
from ministral_jax.recipe.load import load_recipe, order
from ministral_jax.stages.asking import LoopTasks
from ministral_jax.stages.evaluate import Evaluate, TasksConfig
from ministral_jax.stages.looped import LoopEvaluateConfig
from ministral_jax.stages.train import Train

TPU_VM = "launch.tpu_vm={zone: z, accelerator_type: %s, runtime_version: r, bucket: b, setup: s, spot: false}"
BARE = "launch.tpu_vm={zone: z, accelerator_type: v5p-128, runtime_version: r, spot: false, %s}"
PLANTS = {
    # name: machine, stage, what is there before, what is planted, level, words of the finding
    "fp8": (V5P, SHORT, [], ["compute.matmul=fp8"], "warning", [".compute.matmul = fp8 is predicted as bfloat16"]),
    "quantize": (V5P, SHORT, [], ["quantize=fp8"], "warning", [".quantize = fp8 is predicted as bfloat16"]),
    "a side is split": (
        TORUS, SHORT, ["mesh.fsdp=32"], ["mesh.fsdp=16"],
        "warning", [".mesh on v5p:4x4x8 splits a side", "fsdp 16 has 2 of the 4 places of side y",
                    "tensor: 4, context: 1} has whole ones"],
    ),
    "both sides of a flat torus are split": (
        "v6e:16x16", SHORT, ["mesh.tensor=16"], ["mesh.tensor=4"],
        "warning", ["tensor 4 has 4 of the 16 places of side", "no sizes with whole ones are better"],
    ),
    "gathers over three sides": (
        V5P, SHORT, [], ["mesh.fsdp=64", "mesh.tensor=1"], "warning", [".mesh on v5p:4x4x4 gathers", "over fsdp 64"],
    ),
    "gathers over context too": (
        V5P, LONG, ["sharding.embed=[fsdp]"], ["sharding.embed=[fsdp, context]"],
        "warning", ["fsdp 4 * context 16", ".sharding.embed"],
    ),
    "sizes do not multiply": (V5P, SHORT, [], ["mesh.fsdp=24"], "error", [".mesh {data: -1, fsdp: 24", "64 devices",
                                                       "{slice: 1, data: 2, fsdp: 8, tensor: 4, context: 1} fits"]),
    "slices that are not there": (
        V5P, SHORT, [], ["mesh={slice: 2, data: 1, fsdp: 16, tensor: 4}"],
        "error", [".mesh {slice: 2, fsdp: 16, tensor: 4} does not fit 64 devices", "with --slices 2 it fits"],
    ),
    "a slice too many": (V5P, SHORT, ["mesh.fsdp=4"], ["mesh.slice=4"], "warning", [".mesh.slice = 4 on one slice"]),
    "tensor over nodes": (
        H100, SHORT, ["mesh.fsdp=2", "mesh.context=2"], ["mesh.context=4"],
        "warning", [".mesh.tensor = 4 reaches over 2 nodes"],
    ),
    "nodes are no slices": (
        H100, SHORT, [*NODES], ["mesh.slice=3"], "error", [".mesh", "slice: 3"],
    ),
    "rows and microbatches": (
        TORUS, LONG, ["batch.microbatches=2"], ["batch.microbatches=4"],
        "error", [".batch.sequences = 16 must be a multiple of 32", ".batch.microbatches to 2"],
    ),
    "rows and chips": (
        V5P, SHORT, [], ["batch.sequences=72"], "error", [".batch.sequences = 72 must be a multiple of 64"],
    ),
    "answers and microbatches": (
        V5P, GRPO, [], ["prompts=24"], "error", [".prompts = 24 with 16 answers each", "microbatches"],
    ),
    "length and context": (
        V5P, LONG, ["batch.length=131072"], ["batch.length=131056"],
        "error", [".batch.length = 131056 must be a multiple of 32"],
    ),
    "answers and context": (
        V5P, ODPO, ["mesh.fsdp=4", "mesh.tensor=2", "mesh.context=8", "sharding.embed=[fsdp]"],
        ["mesh.tensor=1", "mesh.context=16"], "warning",
        [".compute.shortest_row = 32 lets rows of 32 and 48", "mesh.context = 16", "set it to 64"],
    ),
    "padded evaluation": (
        V5P, SHORT, ["evaluate.rows=256"], ["evaluate.rows=64"],
        "warning", [".evaluate.rows = 64 is padded to 256"],
    ),
    "padded questions": (
        V5P, "14b-reward", [], ["pairs=16"], "warning", [".pairs = 16 asks the judge 32 questions", "batch of 64"],
    ),
    "idle samplers": (
        V5P, ODPO, [], ["evaluate.prompts=4", "evaluate.completions=0"],
        "warning", ["4 answers are drawn at once (evaluate.prompts)"],
    ),
    "key-value heads": (
        V5P, SHORT, [], ["mesh.fsdp=4", "mesh.tensor=16"],
        "warning", ["mesh.tensor = 16 does not divide the kv_heads of its student (8)"],
    ),
    "few tokens": (
        "v6e:8x8", SHORT, [], ["batch.length=128"],
        "warning", [".batch.sequences: 256 rows of 128 tokens and microbatches = 4 leave 512 tokens"],
    ),
    "teacher's context is refused": (
        V5P, LONG, ["beyond_teacher=mask"], ["beyond_teacher=refuse"],
        "error",
        [".batch.length = 262144 exceeds the context of 131072 of its teacher", "set stages.14b-base.beyond_teacher"],
    ),
    "teacher's context": (
        V5P, LONG, ["batch.length=131072"], ["batch.length=262144"],
        "warning", [".beyond_teacher = labels", "131072", "50%"],
    ),
    "student's context": (
        V5P, SHORT, [], ["batch.length=32768"], "error", [".batch.length = 32768 exceeds the model's"],
    ),
    "judge's context": (
        V5P, ODPO, [], ["max_completion_length=131072"],
        "warning", [".max_completion_length = 131072 makes questions of up to 270336", "'14b-reward' reads 262144"],
    ),
    "answers beyond the context": (
        V5P, GRPO, [], ["evaluate.max_completion_length=262144"],
        "warning", [".evaluate.max_completion_length = 262144 after a prompt of 8192", "context of 262144"],
    ),
    "YaRN for nothing": (
        V5P, LONG, ["batch.length=32768"], ["batch.length=16384"],
        "warning", [".batch.length = 16384 is within model.rope.original_context = 16384", "yarn_factor = 16"],
    ),
    "chips of a TPU VM": (
        V5P, SHORT, [TPU_VM % "v5p-128"], [TPU_VM % "v5p-256"],
        "error", ["launch.tpu_vm.accelerator_type = v5p-256 asks for the 128 chips of v5p:4x4x8", "64 chips of v5p"],
    ),
    "chips of GKE": (
        V5P, SHORT, [],
        ["launch.gke={image: i, volume: {bucket: b}, tpu: {type: v5p, topology: 2x4x4, slices: 1}}"],
        "error", ["launch.gke.tpu.topology = 2x4x4 asks for the 32 chips of v5p:2x4x4"],
    ),
    "another kind of TPU": (
        "v4:4x4x4", SHORT, [TPU_VM % "v4-128"], [TPU_VM % "v5p-128"],
        "error", ["v5p-128 asks for the 64 chips of v5p:4x4x4, but the plan is for the 64 chips of v4:4x4x4"],
    ),
    "no directory for all hosts": (
        V5P, SHORT, [TPU_VM % "v5p-128"], [BARE % "setup: s"],
        "warning", ["launch.tpu_vm.bucket is not set, and 16 hosts need"],
    ),
    "nothing is installed": (
        V5P, SHORT, [TPU_VM % "v5p-128"], [BARE % "bucket: b"],
        "warning", ["launch.tpu_vm.setup is not set, and a host"],
    ),
    "GPUs of SLURM": (
        H100, SHORT, [*NODES], ["launch.slurm={nodes: 2, gpus_per_node: 8}"],
        "error", ["launch.slurm.nodes = 2 with gpus_per_node = 8 asks for 16 chips"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_fault_is_found_and_nothing_else(family, name):
    machine, stage, before, plant, level, words = PLANTS[name]
    without = found(family, machine, stage, of_stage(stage, before))
    told = new(without, found(family, machine, stage, of_stage(stage, before + plant)))
    assert [finding.level for finding in told] == [level], told
    assert told[0].stage == (None if plant[0].startswith("launch.") else stage)
    for word in words:
        assert word in told[0].text, told[0].text
        assert not any(word in finding.text for finding in without)


def test_tasks_are_said_to_be_left_out():
    stage = Evaluate.model_construct(tasks=TasksConfig(names=("digits", "mmlu@5")))
    (told,) = tasks_are_left_out(SimpleNamespace(stage=lambda name: stage), "asked")
    assert told.text.startswith("stages.asked.tasks = digits, mmlu@5 are left out of its time and memory")
    looped = Train.model_construct(evaluate=LoopEvaluateConfig(tasks=LoopTasks(names=("digits",))))
    (told,) = tasks_are_left_out(SimpleNamespace(stage=lambda name: looped), "trained")
    assert told.text.startswith("stages.trained.evaluate.tasks = digits are left out")


SPOT = "launch.tpu_vm={zone: z, accelerator_type: v5p-128, runtime_version: r, bucket: b, setup: s, spot: true}"
RESTARTS = "launch.slurm={nodes: 4, gpus_per_node: 8, time: '15:00', restarts: %d}"
SLURM = "launch.slurm={nodes: 4, gpus_per_node: 8, time: '%s'}"
TIMED = {
    # name: machine, stage, times, what is there before, what is planted, level, words of the finding
    "the watchdog ends a step": (
        V5P, LONG, taking(1150), ["checkpoint.every=2"], ["limits.slow=900"],
        "error", ["limits.slow = 900 ends stages.14b-base", "1,150 s", "set it to 2900"],
    ),
    "the watchdog leaves no time to compile": (
        V5P, LONG, taking(10, evaluate=800), ["checkpoint.every=2"], ["limits.slow=900"],
        "warning", ["limits.slow = 900 leaves 100 s for compiling 'evaluate'"],
    ),
    "hours between checkpoints": (
        V5P, LONG, taking(200), ["checkpoint.minutes=null", "checkpoint.every=9"], ["checkpoint.every=100"],
        "warning", [".checkpoint.every = 100 saves every 5.6 hours", "9 is half an hour"],
    ),
    "no checkpoint before the end": (
        V5P, LONG, taking(135), ["checkpoint.minutes=null", "checkpoint.every=9", "steps=50"], ["checkpoint.every=100"],
        "warning", [".checkpoint.every = 100 saves nothing before its end after 1.9 hours", "13 is half an hour"],
    ),
    "hours between checkpoints by minutes": (
        V5P, LONG, taking(200), ["checkpoint.every=100"], ["checkpoint.minutes=90"],
        "warning", [".checkpoint.minutes = 90 saves every 1.5 hours", "30 is half an hour"],
    ),
    "checkpoints on spot machines": (
        V5P, LONG, taking(20), ["checkpoint.minutes=null", "checkpoint.every=100"], [SPOT],
        "warning", [".checkpoint.every = 100 saves every 33 minutes", "launch.tpu_vm.spot", "90 is half an hour"],
    ),
    "grace": (
        V5P, LONG, taking(40), ["checkpoint.every=10"],
        ["launch.gke={image: i, volume: {bucket: b}, tpu: {type: v5p, topology: 4x4x4}, spot: true}"],
        "warning", ["launch.gke.grace = 30 s is too short", "(40 s)", "GB by 16 hosts"],
    ),
    "the job's restarts": (
        H100, SHORT, taking(190), [*NODES, "checkpoint.every=1", RESTARTS % 1], [RESTARTS % 0],
        "error", ["launch.slurm.restarts = 0 ends the job for good after 1 start of", "0.1 hours; set it to 2"],
    ),
    "the job's time": (
        H100, SHORT, taking(10), [*NODES, "checkpoint.every=100", SLURM % "1:00:00"], [SLURM % "25:00"],
        "error", ["launch.slurm.time = 25:00 ends before", "1,000 s"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TIMED)
def test_limits_are_held_against_predicted_times(family, name):
    machine, stage, times, before, plant, level, words = TIMED[name]
    without = found(family, machine, stage, of_stage(stage, before), times=times)
    told = new(without, found(family, machine, stage, of_stage(stage, before + plant), times=times))
    assert [finding.level for finding in told] == [level], told
    for word in words:
        assert word in told[0].text and not any(word in finding.text for finding in without), told[0].text


def test_one_process_has_no_watchdog_and_sampling_may_stop_between_chunks(family):
    slow = taking(2000, sample=100_000)
    assert any("limits.slow" in one.text for one in found(family, V5P, GRPO, times=taking(5000)))
    sampled = [one.text for one in found(family, V5P, GRPO, times=slow) if "limits.slow" in one.text]
    assert sampled == []
    assert not any("limits" in one.text for one in found(family, "v5p:2x2x1", GRPO, times=taking(5000)))


def test_slices_of_the_recipe_are_those_of_the_machine(family):
    told = found(family, V5P, SHORT, slices=2)
    assert [one.text for one in told if one.level == "error"] == [
        "stages.14b-short.mesh.slice = 1 but the devices form 2 slices; they must be equal; "
        "{slice: 2, data: 1, fsdp: 16, tensor: 4, context: 1} fits"
    ]
    assert not any(
        one.level == "error" for one in found(family, V5P, SHORT, [f"stages.{SHORT}.mesh.slice=2"], slices=2)
    )


def test_the_whole_recipe_on_the_chips_that_it_is_written_for_has_no_error(family):
    recipe, specs = family
    told = find(Context(recipe, specs, tuple(order(recipe)), parse_machine(V5P)))
    assert told and all(one.level == "warning" for one in told), told
    assert not any("14b-short.evaluate.rows" in one.text for one in told)
    beyond = [one for one in told if "14b-base.beyond_teacher" in one.text]
    assert [one.others for one in beyond] == [("8b-base", "3b-base")]  # said once, of all three


def test_a_finding_names_a_few_of_the_stages_that_share_it():
    same = [Finding("warning", name, f"stages.{name}.mesh is odd") for name in "abcdef"]
    told = merged([*same, Finding("error", None, "x")])
    assert [str(one) for one in told] == ["stages.a.mesh is odd (the same in 5 more stages: b, c, d, ..)", "x"]


def test_a_setting_of_all_stages_is_told_once_with_the_largest_need(family):
    recipe, specs = family
    times = {SHORT: taking(250), LONG: taking(900), "8b-base": taking(700)}
    context = Context(planted(recipe, ["limits.slow=800"]), specs, tuple(times), parse_machine(V5P), times=times)
    (told,) = (one for one in find(context) if "limits.slow" in one.text)
    assert (told.level, told.stage, told.others) == ("error", LONG, (SHORT, "8b-base"))
    assert "set it to 2400" in told.text and "(less so in 2 more stages: " in str(told)


def test_on_this_machine_what_is_not_there_is_an_error(family, tmp_path):
    recipe, specs = family
    names, machine = ("parent", "14b-pruned", "14b-general"), parse_machine(V5P)
    needs = {need.what: need for need in needed(recipe, names)}
    assert needs["judges:satisfies"].setting == "stages.14b-general.rewards.rubric.judge"
    assert needs["/data/mix"].stages == ("14b-pruned",)
    elsewhere = find(Context(recipe, specs, names, machine))
    assert not any("is not on this machine" in one.text for one in elsewhere)
    here = find(
        Context(recipe, specs, names, machine, {"parent": holding("x", 1, 1, written=1e9)}, here=tmp_path / "r")
    )
    missing = [one.text for one in new(elsewhere, here)]
    assert len(missing) == len(needs) + 1 and any("judges:satisfies" in text for text in missing)
    assert any("GB free, and the stages write 1,000,000,000 GB" in text for text in missing)


def test_a_path_may_be_a_pattern_or_look_like_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a[1].jsonl").touch()
    for there in ("a[1].jsonl", "a*.jsonl", f"{tmp_path}/a[1].jsonl", f"{tmp_path}/*.jsonl"):
        assert Need("path", there, ()).is_here
    assert not Need("path", "b*.jsonl", ()).is_here and not Need("path", f"{tmp_path}/b", ()).is_here


def test_what_is_impossible_needs_no_file(family):
    recipe, _ = family
    names = order(recipe)
    assert impossible(recipe, names, parse_machine(V5P)) == []
    on_nodes = impossible(recipe, names, parse_machine(H100))
    assert {one.stage for one in on_nodes} == {names[0], LONG}
    assert all("does not fit 32 devices" in one.text for one in on_nodes)


def test_the_settings_are_planted_as_the_command_line_would():
    words = [f"stages.{SHORT}.mesh.fsdp=8", "limits.slow=900"]
    base, loaded = (
        load_recipe(ROOT / "configs" / "ministral3.yaml", given, lambda name: TEACHERS) for given in ([], words)
    )
    with_words = planted(base, words)
    assert (with_words.stages[SHORT], with_words.limits) == (loaded.stages[SHORT], loaded.limits)
    assert base.stages[SHORT] != loaded.stages[SHORT]


def test_no_mesh_is_proposed_where_a_teacher_has_its_own(family):
    (fault,) = (
        f for f in found(family, V5P, SHORT, [f"stages.{SHORT}.teacher_mesh={{fsdp: 24}}"]) if f.level == "error"
    )
    assert "teacher_mesh {fsdp: 24" in fault.text and not fault.text.endswith("} fits")

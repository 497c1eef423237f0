"""A job whose stages do not fit the accelerators that it asks for is refused before anything is printed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launch_cases import GKE, RECIPE, TPU_VM, render
from paths import ROOT

from ministral_jax.cli import main
from ministral_jax.recipe.load import load_recipe, resolve_specs

BASE, V5P, H100 = (
    str(ROOT / "configs" / f"{name}.yaml") for name in ("ministral3_base", "machines/v5p-128", "machines/h100-32")
)
ROWS = "stages.parent.batch.sequences = 8 must be a multiple of 16, over which the mesh splits it (fsdp 16)"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory, monkeypatch):
    """Where no run has made stages, of which a job makes no more."""
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["slurm", "launch.slurm={nodes: 2, gpus_per_node: 8}"], ["launch.slurm.nodes = 2", ROWS]),
        (["tpu-vm", *TPU_VM, "launch.tpu_vm.accelerator_type=v5p-32"], ["accelerator_type = v5p-32: ", ROWS]),
        (["tpu-vm", *TPU_VM, "launch.tpu_vm.accelerator_type=v6e-16"], ["accelerator_type = v6e-16: ", ROWS]),
        (["gke", *GKE, "launch.gke.gpu={type: nvidia-l4, nodes: 4, per_node: 4}"], ["launch.gke.gpu.nodes = 4", ROWS]),
        (
            ["gke", *GKE, "launch.gke.tpu={type: v6e, topology: 2x2, slices: 2}"],
            ["slices = 2: stages.parent.mesh.slice = 1 but the devices form 2 slices; they must be equal"],
        ),
        (
            ["slurm", "launch.slurm={nodes: 3, gpus_per_node: 4}", "mesh.tensor=8"],
            ["launch.slurm.nodes = 3", "stages.parent.mesh {fsdp: -1, tensor: 8} does not fit 12 devices"],
        ),
        (
            ["slurm", "launch.slurm.gpus_per_node=4", "stages.parent.batch.microbatches=4"],
            ["stages.parent.batch.sequences = 8 must be a multiple of 16", "microbatches 4"],
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_its_stage_and_setting(capsys, tmp_path, words, told):
    scheduler, *rest = words
    assert main(["launch", scheduler, RECIPE, "parent", *rest, "--output", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.strip().splitlines()
    assert captured.out == "" and not list(tmp_path.iterdir())
    assert all(text in line for text in told), line


def test_only_stages_that_the_command_would_run_are_looked_at(tmp_path, monkeypatch):
    tight = ("launch.slurm.gpus_per_node=8", "stages.3b-base.mesh={fsdp: 3}")
    render("slurm", "8b-short", *tight)  # which needs no `3b-base`
    monkeypatch.chdir(tmp_path)
    wanted = ["launch", "slurm", RECIPE, "parent", "launch.slurm.gpus_per_node=16"]
    assert main(wanted) == 2
    stage, spec = Path("runs/tiny/parent"), resolve_specs(load_recipe(RECIPE), ["parent"])["parent"]
    stage.mkdir(parents=True)
    told = {"stage": "parent", "do": "train", "status": "finished", "spec": spec.model_dump(mode="json")}
    (stage / "manifest.json").write_text(json.dumps(told | {"config": {}, "files": {}, "metrics": {}}))
    assert main(wanted) == 0  # made already, on whatever machine


def test_of_a_job_without_accelerators_nothing_is_known():
    assert "--nodes=7" in render("slurm", "launch.slurm.nodes=7")


@pytest.mark.parametrize(
    "machine", sorted(ROOT.joinpath("configs/machines").glob("*.yaml")), ids=lambda path: path.stem
)
def test_the_shipped_machines_are_not_refused(machine):
    scheduler = "slurm" if machine.stem.startswith("h") else "tpu-vm"
    render(scheduler, str(machine), recipe=BASE)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["tpu-vm", V5P, "defaults.distill.compute.remat=none"], ["stages.14b-short needs", "in phase 'step'"]),
        (["tpu-vm", V5P, "limits.slow=100"], ["limits.slow = 100 ends stages.14b-base"]),
        (["slurm", H100, "defaults.distill.compute.remat=none"], ["of the 80.0 GB of a h100"]),
        (["slurm", H100, "launch.slurm.time=00:30:00"], ["launch.slurm.time = 00:30:00 ends before"]),
        (["slurm", H100, "launch.slurm.time=24:00:00"], ["launch.slurm.restarts = 20 ends the job for good"]),
    ],
)
def test_memory_and_times_are_predicted_of_imports_that_are_not_here(capsys, words, told):
    scheduler, *rest = words
    assert main(["launch", scheduler, BASE, *rest]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and all(text in captured.err for text in told), captured.err


def test_what_hosts_of_a_tpu_vm_lack_is_said(capsys):
    render("tpu-vm", V5P, recipe=BASE)
    told = capsys.readouterr().err
    assert "launch.tpu_vm.bucket is not set, and 16 hosts" in told and "launch.tpu_vm.setup is not set" in told
    render("tpu-vm", V5P, "launch.tpu_vm.setup=pip install x", recipe=BASE, run_dir="gs://my-runs/base")
    assert capsys.readouterr().err == ""
    render("tpu-vm", V5P, "launch.tpu_vm.bucket=b", "launch.tpu_vm.setup=pip install x", recipe=BASE)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        ("slurm", [H100, "launch.slurm.gpu=null", "defaults.distill.compute.remat=none"]),  # GPUs of an unknown kind
        ("tpu-vm", [V5P, "stages.parent.path=/odd/name", "defaults.distill.compute.remat=none"]),  # sizes nobody knows
        ("tpu-vm", [V5P, "launch.slurm={gpus_per_node: 8, time: '1'}"]),  # another scheduler's clock
    ],
)
def test_what_is_not_known_is_not_refused(scheduler, words):
    render(scheduler, *words, recipe=BASE)


def test_a_stage_whose_source_is_finished_is_still_looked_at(tmp_path, capsys):
    """What runs has the sizes of its sources, wherever they lie."""
    recipe, words = load_recipe(RECIPE), ["launch.slurm={nodes: 4, gpus_per_node: 8}", "mesh.fsdp=-1"]
    specs = resolve_specs(recipe)
    child = next(name for name, stage in recipe.stages.items() if stage.source == "parent" and stage.prunes)
    wanted = ["launch", "slurm", RECIPE, child, *words, f"stages.{child}.model.layers=99", "--run-dir", str(tmp_path)]
    (tmp_path / "parent").mkdir()
    told = {"stage": "parent", "do": "train", "status": "finished", "spec": specs["parent"].model_dump(mode="json")}
    (tmp_path / "parent" / "manifest.json").write_text(json.dumps(told | {"config": {}, "files": {}, "metrics": {}}))
    assert main(wanted) == 2
    assert f"stages.{child}" in capsys.readouterr().err


def test_another_schedulers_block_may_ask_for_another_machine():
    other = "launch.slurm={nodes: 3, gpus_per_node: 8}"
    render("tpu-vm", *TPU_VM, other)
    render("gke", *GKE, "launch.gke.tpu={type: v5e, topology: 2x2}", *TPU_VM, "launch.tpu_vm.accelerator_type=v6e-8")

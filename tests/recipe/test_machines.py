"""Every machine of configs/machines: each stage of the real recipes divides over its mesh."""

import json
from pathlib import Path

import numpy as np
import pytest
from jax.sharding import Mesh
from safetensors.numpy import save_file

from ministral_jax.distributed.placement import AXES
from ministral_jax.errors import UserError
from ministral_jax.interop.hf_config import to_config
from ministral_jax.launching.launch import launch
from ministral_jax.models.spec import PRESETS
from ministral_jax.recipe.load import load_recipe, resolve_specs
from ministral_jax.stages import Graph, Job

MACHINES = {"v5p-128": 64, "v5p-256": 128, "v5p-1024": 512, "v6e-256": 256, "h100-32": 32}
"""Devices of each."""
RECIPES = ("ministral3_base", "ministral3")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """What is read of the 24B for its sizes."""
    directory = tmp_path_factory.mktemp("24b")
    config = to_config(PRESETS["mistral-small-3.1-24b"], "bfloat16")
    (directory / "config.json").write_text(json.dumps(config))
    save_file({"lm_head.weight": np.zeros((1, 1), np.float32)}, directory / "model.safetensors")
    return directory


def jobs(recipe: str, machine: str, model: Path, *more: str):
    """Every stage of a recipe, on described devices."""
    settings = [f"configs/machines/{machine}.yaml", *more]
    imports = [name for name, stage in load_recipe(recipe).stages.items() if stage.do == "import"]
    loaded = load_recipe(recipe, [*settings, *(f"stages.{name}.path={model}" for name in imports)])
    specs, count = resolve_specs(loaded), MACHINES[machine]
    for name, stage in loaded.stages.items():
        mesh = Mesh(np.arange(count).reshape(stage.mesh.shape(count)), AXES)  # numbers for devices: only sizes matter
        yield Job(name, stage, specs[name], Graph(loaded.stages, specs), Path(), mesh)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_stage_divides_at_four_million_tokens_a_step(recipe, machine, model):
    checked = list(jobs(f"configs/{recipe}.yaml", machine, model))
    for job in checked:
        job.stage.check_mesh(job)
    for job in checked:
        if job.stage.do == "distill":
            assert job.stage.batch.tokens >= 4_000_000
            assert job.stage.batch.length == (262_144 if job.name.endswith("-base") else 16_384)
    assert {"parent-evaluated", "14b-pruned", "3b-base"} <= {job.name for job in checked}


def test_what_does_not_divide_is_found(model):
    override = "defaults.distill.batch.microbatches=4"
    found = {job.name: job for job in jobs("configs/ministral3_base.yaml", "v5p-256", model, override)}
    with pytest.raises(UserError, match=r"batch.sequences = 256 must be a multiple of 512, over which the mesh splits"):
        found["14b-short"].stage.check_mesh(found["14b-short"])


@pytest.mark.parametrize("machine", MACHINES)
def test_what_was_made_on_one_machine_goes_on_on_another(machine):
    """Meshes, microbatches and how many positions the loss takes at a time are all that differs."""
    plain = load_recipe("configs/ministral3.yaml")
    for name, stage in load_recipe("configs/ministral3.yaml", [f"configs/machines/{machine}.yaml"]).stages.items():
        assert stage.making() == plain.stages[name].making(), name
    longer = load_recipe("configs/ministral3.yaml", ["stages.14b-short.batch.sequences=512"]).stages["14b-short"]
    assert longer.making() != plain.stages["14b-short"].making()


@pytest.mark.parametrize("machine", MACHINES)
def test_a_machine_is_launched_as_its_file_says(machine, capsys):
    scheduler = "slurm" if machine == "h100-32" else "tpu-vm"
    assert launch(scheduler, "configs/ministral3_base.yaml", [f"configs/machines/{machine}.yaml", "14b-hf"]) == 0
    job = capsys.readouterr().out
    assert f"configs/machines/{machine}.yaml" in job and "14b-hf" in job
    assert (f"--accelerator-type={machine}" if scheduler == "tpu-vm" else "--nodes=4") in job

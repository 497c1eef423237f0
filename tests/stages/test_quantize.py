"""Distillation of what an FP8 export multiplies, and the export of a finished stage with scales found on its rows."""

import json

import jax
import numpy as np
import pytest
from mesh_cases import placement
from model_cases import random_params
from paths import TESTS

from ministral_jax.errors import UserError
from ministral_jax.files import write_json
from ministral_jax.interop import safetensors
from ministral_jax.recipe.load import load_recipe, resolve_specs
from ministral_jax.stages import Graph, Job
from ministral_jax.stages.export import export_stage
from ministral_jax.training.checkpoint import save_params

MICRO, QUANTIZED = TESTS / "micro.yaml", "stages.14b-short.quantize=fp8"


def test_step_and_evaluation_round_what_an_export_rounds(tmp_path):
    recipe = load_recipe(MICRO, [QUANTIZED])
    graph = Graph(recipe.stages, resolve_specs(recipe))
    stage = graph.stages["14b-short"]
    job = Job("14b-short", stage, graph.specs["14b-short"], graph, tmp_path, placement(devices=1).mesh)
    with jax.set_mesh(job.mesh):
        texts = {name: program.lower().as_text() for name, program in stage.programs(job).items()}
    rounds = {name for name, text in texts.items() if "f8E4M3FN" in text}
    assert rounds == {"step", "evaluate/states"} and len(texts) == 3


def test_two_ways_to_round_the_same_products_are_refused():
    with pytest.raises(
        UserError, match=r"stages\.14b-short\.quantize = fp8 and .*compute\.matmul = fp8 round the same"
    ):
        resolve_specs(load_recipe(MICRO, [QUANTIZED, "stages.14b-short.compute.matmul=fp8"]))


def test_an_export_that_has_no_rows_to_find_scales_on_is_refused():
    imported = "stages={parent: {do: import, path: nowhere}, out: {do: export, from: parent, format: fp8}}"
    recipe = load_recipe(MICRO, [imported, "family=null"])
    spec = resolve_specs(load_recipe(MICRO))["parent"]
    with pytest.raises(UserError, match=r"stages\.out\.format = fp8 needs rows .*'parent' nor a stage"):
        resolve_specs(recipe, made={"parent": spec})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A stage of random parameters that has read digits, and one that was made of it and has read nothing."""
    run_dir, recipe = tmp_path_factory.mktemp("run"), load_recipe(MICRO)
    spec = resolve_specs(recipe)["parent"]
    config = recipe.stages["parent"].model_dump(mode="json", by_alias=True)
    config["data"]["sources"] = {"digits": {**config["data"]["sources"]["digits"], "limit": 40}}
    for name in ("parent", "pruned"):
        (run_dir / name).mkdir()
    files = save_params(run_dir / "pruned/params", random_params(spec))
    told = {"status": "finished", "spec": spec.model_dump(mode="json"), "files": files}
    write_json(run_dir / "parent/manifest.json", told | {"stage": "parent", "do": "train", "config": config})
    inputs = {"parent": {"stage": "parent", "digest": "0"}}
    write_json(
        run_dir / "pruned/manifest.json", told | {"stage": "pruned", "do": "other", "config": {}, "inputs": inputs}
    )
    return run_dir, spec


def test_scales_are_found_on_the_rows_of_the_nearest_stage_that_reads_some(finished, tmp_path):
    """Of batches of four rows, on eight devices: eight are read at once."""
    run_dir, spec = finished
    export_stage(run_dir / "pruned", tmp_path / "fp8", "float32", placement(fsdp=8), "fp8")
    tensors = {name: t.read() for name, t in safetensors.read(tmp_path / "fp8/model.safetensors").items()}
    scales = {name: float(t.astype(np.float32)) for name, t in tensors.items() if name.endswith("activation_scale")}
    assert len(scales) == 7 * spec.layers and len({*scales.values()}) > 1
    assert all(np.log2(scale) % 1 == 0 for scale in scales.values())
    config = json.loads((tmp_path / "fp8/config.json").read_text())
    assert config["quantization_config"]["activation_scheme"] == "static"

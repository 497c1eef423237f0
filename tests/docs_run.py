"""A finished run of random weights, for commands that read one."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import jax
import numpy as np
from report_run import write_rows

from ministral_jax.distributed.placement import MeshConfig, Placement, Rules, make_mesh
from ministral_jax.files import write_json
from ministral_jax.models.vlm import abstract_params
from ministral_jax.recipe.load import load_recipe, resolve_specs
from ministral_jax.stages.export import export_stage
from ministral_jax.training.checkpoint import save_params

FIGURES = {"ce": 2.0, "bits_per_byte": 3.0, "kl": 0.5}


def finished_run(run_dir: Path, recipe_file: str, named: Collection[str]) -> None:
    """Stages of a recipe as if they were made: manifests and figures; of those that are `named`, and of what they
    export, random parameters of one layer."""
    recipe = load_recipe(recipe_file)
    specs, rng = resolve_specs(recipe), np.random.default_rng(0)
    draw = lambda leaf: (0.02 * rng.standard_normal(leaf.shape)).astype(np.float32)
    exported = {stage.source for name, stage in recipe.stages.items() if name in named and not stage.makes_model}
    run_dir.mkdir(parents=True)
    write_json(run_dir / "recipe.json", recipe.dump())
    for name, stage in recipe.stages.items():
        if stage.optional:
            continue
        spec, directory, files = specs[name].model_copy(update={"layers": 1}), run_dir / name, {}
        directory.mkdir()
        if stage.makes_model and name in {*named, *exported}:
            files = save_params(directory / "params", jax.tree.map(draw, abstract_params(spec)))
        elif name in named and stage.source is not None:
            export_stage(
                run_dir / stage.source, directory / "hf", "float32", Placement(make_mesh(MeshConfig()), Rules())
            )
        told = {"stage": name, "do": stage.do, "status": "finished", "spec": spec.model_dump(mode="json")}
        told |= {"config": stage.model_dump(mode="json", by_alias=True), "files": files, "metrics": FIGURES}
        write_rows(directory / "metrics.jsonl", [{"kind": "eval", "step": n, "tokens": n, **FIGURES} for n in (0, 1)])
        write_json(directory / "manifest.json", told | {"steps": 1, "tokens": 1, "data": {"tokenizer_digest": "0"}})

"""A finished run of random weights, for commands that read one."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np

from ministral_jax.files import write_json
from ministral_jax.models.vlm import abstract_params
from ministral_jax.recipe.load import load_recipe, resolve_specs
from ministral_jax.stages.export import export_stage
from ministral_jax.training.checkpoint import save_params


def finished_run(run_dir: Path, recipe_file: str, stages: tuple[str, ...] = ()) -> None:
    """Stages of a recipe as if they were made: random parameters of two layers, manifests, exports."""
    recipe = load_recipe(recipe_file)
    specs, rng = resolve_specs(recipe), np.random.default_rng(0)
    run_dir.mkdir(parents=True)
    write_json(run_dir / "recipe.json", recipe.dump())
    for name, stage in recipe.stages.items():
        if stage.optional or name.endswith("-scratch"):
            continue
        spec = specs[name].model_copy(update={"layers": 1})
        if stage.makes_model:
            draw = lambda leaf: (0.02 * rng.standard_normal(leaf.shape)).astype(np.float32)
            files = save_params(run_dir / name / "params", jax.tree.map(draw, abstract_params(spec)))
        else:
            files = {}
            export_stage(run_dir / stage.source, run_dir / name / "hf", "float32")
        told = {"stage": name, "do": stage.do, "status": "finished", "spec": spec.model_dump(mode="json")}
        told |= {"config": stage.model_dump(mode="json", by_alias=True), "files": files, "tokens": 1, "steps": 1}
        write_json(run_dir / name / "manifest.json", told | {"data": {"tokenizer_digest": "0"}})

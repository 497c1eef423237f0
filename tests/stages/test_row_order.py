"""Stages of one lineage read rows that none before them has read."""

from itertools import chain

import jax
import numpy as np
import pytest
from mesh_cases import placement
from paths import ROOT, TESTS

from ministral_jax.recipe.load import load_recipe, resolve_specs
from ministral_jax.stages.base import Graph, Job
from ministral_jax.stages.rows import first_row, open_data, train_batches

SHORT = ("14b-short", "8b-short", "3b-short")


def spans(recipe, names):
    """Which places of the sequence of rows each stage reads."""
    firsts = {name: first_row(recipe.stages[name], recipe.stages) for name in names}
    return {name: range(first, first + recipe.stages[name].rows_read) for name, first in firsts.items()}


@pytest.mark.parametrize("recipe", ["tiny", "ministral3"])
def test_the_short_stages_of_the_family_read_different_rows(recipe):
    loaded = load_recipe(ROOT / "configs" / f"{recipe}.yaml")
    found = spans(loaded, SHORT)
    assert all(len(span) for span in found.values())
    assert len({*chain(*found.values())}) == sum(map(len, found.values()))
    if recipe == "tiny":
        assert spans(loaded, (f"{name}-scratch" for name in SHORT)) == {f"{k}-scratch": v for k, v in found.items()}


def test_pairs_are_rows_of_their_own():
    """Of the data that fine-tuning read, a stage that reads pairs reads others, and of another stage's pairs, again."""
    data = ("stages.offline.batch.length=64", "stages.offline.data.patches=64")
    short = ("stages.pairs.max_prompt_length=20", "stages.pairs.max_completion_length=12")
    recipe = load_recipe(TESTS / "micro_post.yaml", (*data, *short))
    sft, offline = recipe.stages["sft"], recipe.stages["offline"]
    assert (sft.data, sft.batch.length, sft.seed) == (offline.data, offline.batch.length, offline.seed)
    assert sft.rows_read and first_row(offline, recipe.stages) == 0
    again = {**recipe.stages, "again": offline.model_copy(update={"source": "offline"})}
    assert first_row(again["again"], again) == offline.rows_read
    other = again["again"].model_copy(update={"pairs": "others"})
    assert first_row(other, again) == 0


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """`stage -> ` the rows that it reads in order, as bytes, of a recipe of two sizes."""
    recipe, root = load_recipe(TESTS / "micro.yaml"), tmp_path_factory.mktemp("run")
    specs, mesh = resolve_specs(recipe), placement(devices=1).mesh

    def rows(name):
        stage = recipe.stages[name]
        job = Job(name, stage, specs[name], Graph(recipe.stages, specs), root, mesh)
        found = train_batches(job, open_data(job), stop=stage.rows_read // stage.batch.sequences)
        return [row.tobytes() for batch in found for row in np.asarray(jax.device_get(batch["tokens"]))]

    return rows


def test_every_stage_of_a_lineage_reads_other_rows(read):
    lineage = ("parent", "14b-pruned", "14b-short", "3b-pruned", "3b-short")
    found = {name: read(name) for name in lineage}
    assert [len(rows) for rows in found.values()] == [32, 8, 24, 8, 24]
    assert len({*chain(*found.values())}) == 96
    assert read("3b-short-scratch") == found["3b-short"]
    assert len({*read("14b-base")} & {*read("14b-base-scratch")}) == 8  # rows of another length are another sequence

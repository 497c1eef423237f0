"""Recipes over recipes and overlays over these: who wins, whose directory a path is below, and errors that say the
file."""

from pathlib import Path

import pytest
import yaml

from ministral_jax.errors import UserError
from ministral_jax.recipe.layers import sort_words
from ministral_jax.recipe.load import load_recipe

BASE = {
    "name": "base",
    "data": {"tokenizer": {"file": "tekken.json"}, "sources": {"mix": {"kind": "jsonl", "path": "rows"}}},
    "defaults": {"train": {"steps": 2, "batch": {"sequences": 4, "length": 64}}},
    "stages": {"a": {"do": "train", "model": "tiny-24b"}, "b": {"do": "import", "path": "models/b"}},
}


def write(path: Path, raw: object) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text(raw if isinstance(raw, str) else yaml.safe_dump(raw))
    return str(path)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """`base.yaml`, with the working directory elsewhere."""
    write(tmp_path / "base.yaml", BASE)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def test_the_later_layer_wins_key_by_key(folder):
    write(folder / "middle.yaml", {"extends": "base.yaml", "defaults": {"train": {"steps": 3, "seed": 1}}})
    top = write(
        folder / "top.yaml", {"extends": "middle.yaml", "defaults": {"train": {"steps": 4}}, "mesh": {"data": 2}}
    )
    first = write(folder / "first.yml", {"defaults": {"train": {"steps": 5, "batch": {"length": 32}}}})
    second = write(folder / "second.yaml", {"stages": {"a": {"steps": 6}}, "mesh": {"tensor": 2}})
    stage = load_recipe(top).stages["a"]
    assert (stage.steps, stage.seed, stage.batch.sequences, stage.batch.length) == (4, 1, 4, 64)
    stage = load_recipe(top, ["stages.a.batch.sequences=7", first, second]).stages["a"]
    assert (stage.steps, stage.batch.sequences, stage.batch.length) == (6, 7, 32)
    assert (stage.mesh.data, stage.mesh.tensor) == (2, 2)
    assert load_recipe(top, [second, first, "stages.a.steps=8"]).stages["a"].steps == 8


def test_a_recipe_that_extends_another_has_its_own_name(folder):
    assert load_recipe(write(folder / "mine.yaml", {"extends": "base.yaml"})).name == "mine"
    assert load_recipe(folder / "base.yaml", [write(folder / "over.yaml", {"mesh": {"data": 2}})]).name == "base"


def test_a_path_is_below_the_directory_of_the_file_that_says_it(folder):
    top = write(
        folder / "recipes" / "top.yaml", {"extends": "../base.yaml", "stages": {"c": {"do": "import", "path": "c"}}}
    )
    over = write(folder / "machines" / "over.yaml", {"data": {"sources": {"mix": {"path": 2026}}}})
    recipe = load_recipe(top, [over, "stages.b.path=typed"])
    assert recipe.stages["c"].path == str(folder / "recipes" / "c")
    assert Path(recipe.stages["a"].data.tokenizer.file).resolve() == folder / "tekken.json"
    assert recipe.stages["a"].data.sources["mix"].path == str(folder / "machines" / "2026")
    assert recipe.stages["b"].path == str(folder / "here" / "typed")


def test_files_of_the_package_are_found_from_anywhere_and_have_paths_below_the_working_directory(folder):
    changes = {"stages": {"parent": {"path": "p"}}}
    mine = write(folder / "mine.yaml", {"extends": "configs/ministral3_base.yaml", **changes})
    recipe = load_recipe(mine, ["configs/machines/v5p-128.yaml"])
    assert recipe.stages["parent"].path == str(folder / "p")
    assert recipe.stages["14b-short"].mesh.data == 4 and recipe.launch.tpu_vm.accelerator_type == "v5p-128"
    full = load_recipe("configs/ministral3.yaml", ["stages.parent.path=q"])  # extends a neighbour in the package
    assert full.stages["parent"].path == str(folder / "here" / "q")


def test_words_after_a_recipe_are_settings_or_stages():
    words = ["14b-hf", "machines/a.yaml", "x.y=b.yaml", "8b-hf", "b.yml"]
    assert sort_words(words) == (["machines/a.yaml", "x.y=b.yaml", "b.yml"], ["14b-hf", "8b-hf"])


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"stages": {"aa": {"steps": 1}}}, "overlay {path}: no stage 'aa' (did you mean a?)"),
        ({"stages": {"a": {"step": 1}}}, "with {path}: unknown key stages.a.step (did you mean steps?)"),
        ({"defaults": {"trian": {}}}, "with {path}: defaults.trian: no such kind of stage (did you mean train?)"),
        ({"mehs": {}}, "with {path}: unknown key mehs (did you mean mesh?)"),
        ({"stages": {"a": None}}, "with {path}: stages.a.do: None is not one of"),
        ({"stages": 3}, "overlay {path}: stages must be a mapping of named stages, got 3"),
        ([1], "overlay {path} must be a mapping of settings"),
        ("a: [", "overlay {path} is not valid YAML"),
        ({"extends": "none.yaml"}, "overlay 'none.yaml' is not a file"),
    ],
)
def test_an_error_of_an_overlay_is_one_sentence_that_names_its_file(folder, raw, message):
    path = write(folder / "over.yaml", raw)
    with pytest.raises(UserError) as error:
        load_recipe(folder / "base.yaml", [path])
    assert message.format(path=path) in str(error.value) and "\n" not in str(error.value)


def test_errors_of_what_a_recipe_extends(folder):
    one, other = folder / "one.yaml", folder / "other.yaml"
    write(one, {"extends": "other.yaml"})
    write(other, {"extends": "one.yaml"})
    with pytest.raises(UserError, match=rf"recipe {one} extends itself: {one} -> {other} -> {one}$"):
        load_recipe(one)
    with pytest.raises(UserError, match=r"extends must be the path of one file, got \['base.yaml'\]"):
        load_recipe(write(one, {"extends": ["base.yaml"]}))
    with pytest.raises(UserError, match=r"recipe 'none.yaml' is not a file \(packaged ones: configs/tiny.yaml"):
        load_recipe(write(one, {"extends": "none.yaml"}))
    with pytest.raises(UserError, match=r"recipe .* must be a mapping with a `stages:` mapping"):
        load_recipe(write(one, {"extends": write(other, {"mesh": {}})}))
    with pytest.raises(UserError, match=r"overlay 'v5p.yaml' is not a file .*v5p-1024.yaml, configs/machines/v5p-128"):
        load_recipe(folder / "base.yaml", ["v5p.yaml"])

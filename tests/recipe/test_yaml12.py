"""What is typed is what is meant: text stays text where a setting is text, and a number is a number everywhere."""

import copy
import json
import pickle

import pytest
import yaml
from paths import TESTS

from ministral_jax import yaml12
from ministral_jax.errors import UserError
from ministral_jax.recipe.load import load_recipe
from ministral_jax.runs.naming import as_yaml

MICRO = TESTS.joinpath("micro.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("24:00:00", "24:00:00"), ("12:30", "12:30"), ("2024-01-31", "2024-01-31"), ("no", "no"), ("on", "on"),
        ("1_000", "1_000"), ("1e-4", 1e-4), ("1E5", 1e5), ("-.5", -0.5), ("1.", 1.0), (".inf", float("inf")),
        ("010", 10), ("0x1F", 31), ("0o17", 15), ("-3", -3), ("+7", 7), ("true", True), ("False", False), ("~", None),
        ("", None), ("null", None), ("'3'", "3"), ("[1, a, 2:30]", [1, "a", "2:30"]),
        ("{a: {b: 1.5}}", {"a": {"b": 1.5}}), ("1.2.3", "1.2.3"), ("1e", "1e"), ("١", "١"),
    ],
)  # fmt: skip
def test_values_are_those_of_yaml_1_2(text, value):
    found = yaml12.load(text)
    assert found == value and json.dumps(found) == json.dumps(value)


def test_nothing_but_plain_values_is_made():
    with pytest.raises(yaml.YAMLError):
        yaml12.load("!!python/object/apply:os.system [true]")
    assert yaml12.load("a: &x {b: 1}\nc: {<<: *x, d: 2}") == {"a": {"b": 1}, "c": {"b": 1, "d": 2}}


def test_a_number_remembers_how_it_was_written():
    for text in ("1.10", "007", "1e-4", "0x10"):
        value = yaml12.load(text)
        for same in (value, copy.deepcopy(value), pickle.loads(pickle.dumps(value))):
            assert as_yaml(same) == text and yaml12.load(as_yaml(same)) == value


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("launch.slurm.time=24:00:00", "24:00:00"),
        ("launch.slurm.time=01:30:00", "01:30:00"),
        ("launch.slurm.time=90", "90"),
        ("launch.slurm.partition=1.10", "1.10"),
        ("launch.slurm.partition=007", "007"),
        ("launch.slurm.partition=1e3", "1e3"),
        ("launch.slurm.partition=no", "no"),
        ("launch.slurm.nodes=2", 2),
        ("name=2024-01-31", "2024-01-31"),
        ("stages.parent.optimizer.lr=1e-4", 1e-4),
        ("stages.parent.evaluate.early=no", False),
    ],
)
def test_settings_get_what_was_typed(override, found):
    recipe = load_recipe(MICRO, [override]).dump()
    for key in override.partition("=")[0].split("."):
        recipe = recipe[key]
    assert recipe == found and type(recipe) is type(found)


def test_a_directory_whose_name_is_a_number(tmp_path, monkeypatch):
    data, batch = "{sources: {a: {kind: jsonl, path: 2026}}}", "{sequences: 1, length: 64}"
    stage = f"{{do: train, model: tiny-24b, data: {data}, steps: 1, batch: {batch}}}"
    (tmp_path / "r.yaml").write_text(f"stages: {{p: {stage}}}")
    monkeypatch.chdir("/")
    in_file = load_recipe(tmp_path / "r.yaml").dump()["stages"]["p"]
    typed = load_recipe(tmp_path / "r.yaml", ["stages.p.data.sources.a.path=007"]).dump()["stages"]["p"]
    assert tuple(stage["data"]["sources"]["a"]["path"] for stage in (in_file, typed)) == (
        str(tmp_path / "2026"),
        "/007",
    )


def test_stages_are_not_taken_away():
    with pytest.raises(UserError, match=r"override 'stages=.*': stages must be a mapping of named stages"):
        load_recipe(MICRO, ["stages=null"])


def test_a_recipe_that_was_written_is_the_same_recipe(tmp_path):
    """JSON writes 1e-05, which YAML 1.1 takes for text."""
    recipe = load_recipe(MICRO, ["stages.parent.optimizer.lr=1e-5"])
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe.dump()))
    assert load_recipe(tmp_path / "recipe.yaml").dump() == recipe.dump()

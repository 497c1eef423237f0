"""Every fenced block of README and docs is of a known language, and what it says is so: python runs, YAML is a recipe
or lies over one, rows are rows."""

import json
import tomllib
from pathlib import Path

import pytest
from docs_blocks import TEXTS, Block, blocks
from paths import ROOT

from ministral_jax import yaml12
from ministral_jax.data.jsonl import parse_row
from ministral_jax.recipe.load import load_recipe
from ministral_jax.runs.sweep import expand, read_sweep
from ministral_jax.settings import merge
from ministral_jax.stages import Stage, verbs

BASE = """
data: {tokenizer: {file: bundled, vocab: 2048, special: 64}, sources: {digits: {kind: digits}}}
stages:
  parent: {do: train, model: tiny-24b, steps: 1}
  14b-base: {do: distill, from: parent, teacher: parent, steps: 1}
  8b-base: {do: distill, from: parent, teacher: parent, steps: 1}
  8b-instruct: {do: distill, from: parent, teacher: parent, steps: 1}
"""
"""What blocks lie over that are not whole: no defaults, so that a key which a stage needs is missed."""
ELSEWHERE = ("docs/own_model.md",)
"""Pages whose python is run by a test of their own, test_own_model.py and parity/test_docs.py."""


def named(*languages: str) -> list:
    return [pytest.param(block, id=f"{block.page}:{block.line}") for block in blocks(*languages)]


@pytest.mark.parametrize("page", TEXTS)
def test_blocks_say_what_they_are(page):
    known = {"bash", "python", "yaml", "toml", "json", "text"}
    assert [
        (block.line, block.language) for block in blocks() if block.page == page and block.language not in known
    ] == []
    assert TEXTS[page].count("```") == 2 * sum(block.page == page for block in blocks())


def run(block: Block) -> dict:
    names = {"__name__": "snippet"}
    exec(compile(block.text, f"{ROOT / block.page}:{block.line}", "exec"), names)
    return names


@pytest.mark.parametrize("block", [block for block in named("python") if block.values[0].page not in ELSEWHERE])
def test_python_runs(block, checkout, monkeypatch):
    monkeypatch.chdir(checkout)
    run(block)


@pytest.mark.parametrize("block", named("yaml"))
def test_yaml_is_a_recipe_or_lies_over_one(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    raw = yaml12.load(block.text)
    if "recipe" in raw:
        Path("sweep.yaml").write_text(block.text)
        assert expand(read_sweep("sweep.yaml"))
        return
    for name, stage in list(raw.get("stages", {}).items()):
        if stage.get("do", "train") not in verbs():  # a verb that the page itself defines
            (own,) = (
                kind for b in blocks("python") if b.page == block.page for kind in run(b).values() if is_verb(kind)
            )
            own.model_validate(raw["stages"].pop(name))
    whole = "name" in raw or "extends" in raw
    Path("recipe.yaml").write_text(block.text if whole else json.dumps(merge(yaml12.load(BASE), raw)))
    recipe = load_recipe("recipe.yaml")
    assert raw.get("stages", {}).keys() <= recipe.stages.keys()


def is_verb(kind) -> bool:
    return isinstance(kind, type) and issubclass(kind, Stage) and kind.__module__ == "snippet"


@pytest.mark.parametrize("block", named("toml"))
def test_toml_is_toml(block):
    assert tomllib.loads(block.text)


@pytest.mark.parametrize("block", named("json"))
def test_rows_are_rows(block):
    for line in block.text.splitlines():
        row = json.loads(line)
        prompt = row.keys() == {"prompt"} or ("messages" in row and row["messages"][-1]["role"] != "assistant")
        assert parse_row(line.encode(), ROOT / "rows.jsonl", "row", "row", prompt)

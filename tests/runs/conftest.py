"""A finished run beside what it reads, and copies of it."""

import json
import shutil
from pathlib import Path

import pytest
from reuse_cases import RECIPE, run, write

from ministral_jax.recipe.load import load_recipe


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A recipe beside what it reads, and a finished run of it."""
    home = tmp_path_factory.mktemp("home")
    text = " ".join(f"word{n} and some more of it" for n in range(40))
    rows = [{"text": f"{n} {text}"} for n in range(24)]
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    bundled = load_recipe(write(home, {**RECIPE, "data": {**RECIPE["data"], "tokenizer": {"file": "bundled"}}}))
    from ministral_jax.data import tokenizer

    shutil.copy(tokenizer._bundled(), home / "tekken.json")
    assert bundled.stages["parent"].data.sources["web"].path == str(home / "rows.jsonl")
    write(home, RECIPE)
    run(home, "first")
    return home


@pytest.fixture
def moved(home, tmp_path) -> Path:
    """A copy of everything in another place, and nothing left in the first one."""
    there = tmp_path / "there"
    shutil.copytree(home, there, symlinks=True)
    for path in there.glob("*/recipe.json"):  # in which the first place stands
        assert str(home) in path.read_text()
    return there

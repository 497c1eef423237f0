"""What README and docs name is there: files, links, make targets, modules, commands with their overrides."""

import ast
import importlib
import re
import shlex

import pytest
from paths import ROOT

from ministral_jax.recipe.load import load_recipe

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("launch/*.md")])
PAGES = [page for page in PAGES if page.name != "CHANGELOG.md"]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
ROOMS = "|".join(path.parent.name for path in ROOT.glob("ministral_jax/*/__init__.py"))
PLACES = rf"(?:(?:ministral_jax|configs|benchmarks|tests|launch|examples)/[\w./*-]*\w|(?:{ROOMS})/\w+\.py)"


def code(text: str) -> str:
    """What stands in blocks and between backticks."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    return "\n".join([*blocks, *re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))])


@pytest.mark.parametrize("page", TEXTS)
def test_files_are_there(page):
    names = [name for name in re.findall(rf"(?<![\w/.\-]){PLACES}", code(TEXTS[page])) if "..." not in name]
    missing = {name for name in names if not any([*ROOT.glob(name), *ROOT.glob(f"ministral_jax/{name}")])}
    assert not missing


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", TEXTS[page])
    made = ("notebooks/", "reference/")  # while the site is built, which checks them
    assert not {link for link in links if not link.startswith(made) and not ((ROOT / page).parent / link).exists()}


@pytest.mark.parametrize("page", TEXTS)
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    commands = re.findall(r"(?:^|&& )make ([a-z ]+?)(?= *(?:#|&|$))", code(TEXTS[page]), re.M)
    assert {target for command in commands for target in command.split()} <= targets


@pytest.mark.parametrize("page", TEXTS)
def test_python_imports_what_there_is(page):
    for block in re.findall(r"^```python\n(.*?)^```", TEXTS[page], re.M | re.S):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module:
                module = importlib.import_module(node.module)
                assert not [alias.name for alias in node.names if not hasattr(module, alias.name)]


def test_commands_of_recipes_load():
    """`ministral-jax run|launch RECIPE [STAGE...] [key=value...]` with a recipe of the repository."""
    lines = [line for text in TEXTS.values() for line in code(text).splitlines()]
    found = [re.match(r"ministral-jax (?:run|launch [a-z-]+) (configs/[^#]+)", line) for line in lines]
    texts = {match[1] for match in found if match and not re.search(r"\.\.\.|\[", match[1])}
    assert len(texts) >= 6
    for text in texts:
        recipe, *rest = shlex.split(re.split(r" --(?:run-dir|output)", text)[0])
        words = [word for word in rest if not word.startswith("-")]
        loaded = load_recipe(ROOT / recipe, [word for word in words if "=" in word])
        assert {word for word in words if "=" not in word} <= loaded.stages.keys(), text

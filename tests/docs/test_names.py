"""What README and docs name is there: files, links, make targets."""

import ast
import re

import pytest
from docs_blocks import FENCE, TEXTS, inline
from paths import ROOT

ROOMS = "|".join(path.parent.name for path in ROOT.glob("ministral_jax/*/__init__.py"))
PLACES = rf"(?:(?:ministral_jax|configs|benchmarks|tests|launch|examples)/[\w./*-]*\w|(?:{ROOMS})/\w+\.py)"


def code(text: str) -> str:
    """What stands in blocks and between backticks."""
    return "\n".join([*(fence[2] for fence in FENCE.finditer(text)), *inline(text)])


@pytest.mark.parametrize("page", TEXTS)
def test_files_are_there(page):
    names = [name for name in re.findall(rf"(?<![\w/.\-]){PLACES}", code(TEXTS[page])) if "..." not in name]
    missing = {name for name in names if not any([*ROOT.glob(name), *ROOT.glob(f"ministral_jax/{name}")])}
    assert not missing


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", TEXTS[page])
    made = ("notebooks/", "reference/", "settings.md")  # while the site is built, which checks them
    assert not {link for link in links if not link.startswith(made) and not ((ROOT / page).parent / link).exists()}


@pytest.mark.parametrize("page", TEXTS)
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    commands = re.findall(r"(?:^|&& )make ([a-z ]+?)(?= *(?:#|&|$))", code(TEXTS[page]), re.M)
    assert {target for command in commands for target in command.split()} <= targets


def test_messages_that_are_explained_are_those_of_the_program():
    """First column of the page: what is not from elsewhere stands in the code, but for the values in it."""
    sources = [ast.parse(path.read_text(encoding="utf-8")) for path in ROOT.glob("ministral_jax/**/*.py")]
    constants = (node.value for tree in sources for node in ast.walk(tree) if isinstance(node, ast.Constant))
    said = "\n".join(text for text in constants if isinstance(text, str))
    rows = re.findall(r"^\| (`.*?) \|", TEXTS["docs/troubleshooting.md"], re.M)
    messages = [code for row in rows for code in re.findall(r"`([^`]+)`", row)]
    elsewhere = ("command not found", "RESOURCE_EXHAUSTED")
    ours = [message for message in messages if not message.endswith(elsewhere)]
    assert len(ours) > 10
    parts = [part.strip(" '?%") for message in ours for part in message.split("…")]
    assert not [part for part in parts if part not in said]


def test_the_table_and_the_picture_of_the_family_are_of_one_run():
    """What both show is written alike: KL after distillation, bits per byte, digits read."""
    told = re.findall(r"<text[^>]*>([^<]+)<", (ROOT / "docs/family.svg").read_text(encoding="utf-8"))
    drawn = [word.replace("\u202f", " ") for word in told]
    for name in ("parent", "14b", "8b", "3b"):
        (row,) = re.findall(rf"^\| {name} \|(.*)\|$", TEXTS["README.md"], re.M)
        _, _, _, kl, _, bits, read = (cell.strip(" *") for cell in row.split("|"))
        at = drawn.index(name)
        until = next(
            (i for i, word in enumerate(drawn) if i > at and word in ("parent", "14b", "8b", "3b")), len(drawn)
        )
        assert {kl or bits, bits, read} <= set(drawn[at:until]), name

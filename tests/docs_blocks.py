"""What README and docs print: fenced blocks by language, and the commands in them and between backticks."""

from __future__ import annotations

import re
import shlex
from typing import NamedTuple

from paths import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("launch/*.md")])
TEXTS = {p.relative_to(ROOT).as_posix(): p.read_text(encoding="utf-8") for p in PAGES if p.name != "CHANGELOG.md"}
PROGRAMS = ("ministral-jax", "make", "python", "pytest", "pip", "tensorboard", "git", "mkdocs", "sh")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


class Block(NamedTuple):
    page: str
    line: int
    language: str
    text: str


def blocks(*languages: str) -> list[Block]:
    """Fenced blocks of all pages, of some languages or of any."""
    found = []
    for page, text in TEXTS.items():
        for fence in FENCE.finditer(text):
            if not languages or fence[1] in languages:
                found.append(Block(page, text.count("\n", 0, fence.start()) + 1, fence[1], fence[2]))
    return found


def inline(text: str) -> list[str]:
    """What stands between backticks, outside of blocks."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


def commands() -> dict[str, list[str]]:
    """Every command as it is printed, with the pages that print it: each line of a bash block, and what begins with the
    name of a program between backticks, or stands in a comment of a recipe. Forms, which have a place to fill in, are
    not commands: `run RECIPE`."""
    found: dict[str, list[str]] = {}

    def add(line: str, page: str) -> None:
        for command in line.split(" && "):
            found.setdefault(command, []).append(page)

    for block in blocks("bash"):
        for line in block.text.replace("\\\n", " ").splitlines():
            if words(line):
                add(line.split(" #")[0].strip(), block.page)
    for page, text in TEXTS.items():
        for code in inline(text):
            if code.startswith(tuple(f"{name} " for name in PROGRAMS)) and not is_form(code):
                add(code, page)
    for path in ROOT.glob("configs/**/*.yaml"):
        for code in re.findall(r"^# +(ministral-jax .*)", path.read_text(encoding="utf-8"), re.M):
            add(code, path.name)
    return found


def words(line: str) -> list[str]:
    return shlex.split(line, comments=True)


def is_form(code: str) -> bool:
    """Whether a command has a place to fill in (`RUN`, `[STAGE...]`), or is the name of one alone."""
    places = re.search(r"(?<![\w.-])[A-Z]{2,}(?![\w=:.-])|\.\.\.|…|\||=v1,v2", re.sub(r"\"[^\"]*\"|'[^']*'", "", code))
    return bool(places) or (len(code.split()) == 2 and code.startswith("ministral-jax "))

"""How tests read a page: it is XML as well as HTML, so that an XML parser judges its nesting and escaping."""

import re
from pathlib import Path
from xml.etree import ElementTree

from ministral_jax.report import build_report
from ministral_jax.report.units import THIN


def parse(page: str) -> ElementTree.Element:
    return ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>\n"))


def anchors(page: str) -> list[str | None]:
    return [node.get("id") for node in parse(page).iter("section")]


def section(page: str, anchor: str) -> ElementTree.Element:
    return next(node for node in parse(page).iter("section") if node.get("id") == anchor)


def text_of(node: ElementTree.Element) -> str:
    return " ".join(" ".join(node.itertext()).split())


def plain(text: str) -> str:
    return text.replace(THIN, " ")


def rows(page: str, anchor: str) -> dict[str, list[ElementTree.Element]]:
    """Of a section's tables, by the first word of each."""
    return {text_of(row[0]).split(" ")[0]: list(row)[1:] for row in section(page, anchor).iter("tr")}


def check(page: str) -> str:
    """One file that loads nothing, runs nothing and holds together; every picture is described, and drawable."""
    root = parse(page)
    assert page.startswith("<!DOCTYPE html>\n") and len(page.encode()) < 3_000_000
    assert not re.search(r"(?:src|href|data|action)=\"(?!#|data:image/png;base64,)", page)
    assert not re.search(
        r"https?://(?!www\.w3\.org/2000/svg\")|<script|\son\w+=\"|javascript:|@import|url\((?!#)", page
    )
    ids = [node.get("id") for node in root.iter() if node.get("id")]
    assert len(ids) == len(set(ids)) and set(re.findall(r'(?:href="|url\()#([\w-]+)', page)) <= set(ids)
    pictures = [node for node in root.iter() if node.tag.endswith("svg") or node.tag == "img"]
    assert all(node.get("aria-label") or node.get("alt") for node in pictures)
    assert not re.search(r'[dxy]="[^"]*(nan|inf)', page)
    assert 'loading="lazy"' not in page  # what is not loaded when a page is printed is missing on paper
    return page


def page_of(run: Path) -> str:
    return check(build_report(run).read_text(encoding="utf-8"))

"""Building HTML and SVG from Python values: text is escaped unless it is `Html` already, so no caller can forget to."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_EMPTY = {"br", "circle", "hr", "img", "line", "link", "meta", "path", "polygon", "rect", "wbr"}


class Html(str):
    """Markup, as opposed to text."""

    __slots__ = ()


Child = str | Iterable["Child"] | None


def escape(text: object) -> Html:
    """`text` as character data or attribute value.

    What XML cannot hold (control characters, lone surrogates) becomes U+FFFD.
    """
    return text if isinstance(text, Html) else Html(html.escape(_NOT_XML.sub("\ufffd", str(text))))


def join(children: Child) -> Html:
    """Children in order; None is nothing, an iterable is its items."""
    if children is None:
        return Html()
    if isinstance(children, str):
        return escape(children)
    return Html("".join(join(child) for child in children))


def el(tag: str, *children: Child, **attributes: object) -> Html:
    """One element. `class_` is class, `_` in a name is `-`; an attribute that is None or False is left out."""
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for name, value in attributes.items()
        if value is not None and value is not False
    )
    if tag in _EMPTY:
        return Html(f"<{tag}{written} />")
    return Html(f"<{tag}{written}>{join(children)}</{tag}>")


def section(anchor: str, eyebrow: str, finding: str, lead: Child, *content: Child) -> Html:
    """A part of the page: its subject small, what was found large, one paragraph, then what shows it."""
    return el("section", el("p", eyebrow, class_="eyebrow"), el("h2", finding), paragraph(lead), *content, id=anchor)


def paragraph(text: Child, class_: str = "lead") -> Html:
    return el("p", text, class_=class_) if text else Html()


def figure(title: str, picture: Html, caption: str, class_: str | None = None) -> Html:
    return el("figure", el("h3", title), picture, el("figcaption", caption), class_=class_)


def _is(child: Child, tag: str) -> bool:
    return isinstance(child, Html) and child.startswith(f"<{tag}")


def table(caption: str, headers: list[Child], rows: list[Html]) -> Html:
    """A table that scrolls sideways by itself on a narrow page; the first column names the row."""
    heads = [
        header if _is(header, "th") else el("th", header, scope="col", class_=None if i else "text")
        for i, header in enumerate(headers)
    ]
    made = el("table", el("thead", el("tr", heads)), el("tbody", rows), aria_label=caption)
    return join([paragraph(caption, "note caption"), el("div", made, class_="scroll", tabindex="0")])


def row(head: Child, cells: list[Child], class_: str | None = None) -> Html:
    """A row; a cell that is a `td` already stays what it is."""
    made = [cell if _is(cell, "td") else el("td", cell) for cell in cells]
    return el("tr", el("th", head, scope="row"), made, class_=class_)


def model_name(name: str, colour: str) -> Html:
    """A model's name with its colour beside it."""
    return el("span", name, class_="name", style=f"--accent:var(--{colour})")

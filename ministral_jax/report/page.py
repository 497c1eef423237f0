"""Templates to files: one self-contained page, no script, nothing fetched, readable in the dark and on paper."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from ministral_jax.report import units
from ministral_jax.report.plots import variables
from ministral_jax.stages.figures import Figure

_HERE = Path(__file__).parent
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_CONTROL = re.compile(r"(\[/?[A-Z][A-Z_]*\]|<SPECIAL_\d+>|</?(?:s|unk|pad)>)")
_LONGEST = 600
"""Characters of an answer."""
_LARGEST = 27_000
"""Characters of an image in base64, 20 kB; together they keep a page below 2 MB of images."""


def show(value: float | None, figure: Figure) -> str:
    return units.percent(value) if figure.unit == "share" else units.decimal(value)


def is_shown(png: str) -> bool:
    """Whether a picture in base64 is one, and small enough."""
    return png.startswith("iVBORw0KGgo") and len(png) <= _LARGEST


def prompt(content: str) -> Markup:
    """Of a prompt as JSON the text and the pictures; one that is not there is `[IMG]`."""
    try:
        chunks = json.loads(content)
        chunks = [{"text": chunks}] if isinstance(chunks, str) else chunks
        return Markup(" ").join(_chunk(chunk) for chunk in chunks)
    except (ValueError, TypeError, AttributeError, RecursionError):
        return marked(content)


def _chunk(chunk: dict[str, Any]) -> Markup:
    if is_shown(png := str(chunk.get("png", ""))):
        return Markup('<img src="data:image/png;base64,{}" alt="picture of the prompt" />').format(png)
    return marked(str(chunk.get("text", "[IMG]")))


def marked(text: str) -> Markup:
    """Text with its control tokens framed and what lies between [THINK] and [/THINK] in grey."""
    made, thinking = Markup(), False
    for i, piece in enumerate(_CONTROL.split(text if len(text) <= _LONGEST else f"{text[:_LONGEST]}\u2026")):
        if i % 2:
            thinking = piece == "[THINK]" or (thinking and piece != "[/THINK]")
            made += Markup("<code>{}</code>").format(piece)
        else:
            made += Markup('<span class="thinking">{}</span>').format(piece) if thinking else escape(piece)
    return made


_TEMPLATES = Environment(
    loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
_TEMPLATES.filters |= {name: getattr(units, name) for name in ("count", "decimal", "percent", "duration")}
_TEMPLATES.filters |= {"show": show, "prompt": prompt, "marked": marked}
_TEMPLATES.globals["css"] = Markup(variables(":root") + (_HERE / "page.css").read_text(encoding="utf-8"))


def render(template: str, **values: Any) -> str:
    """What XML cannot hold (control characters, lone surrogates) becomes U+FFFD."""
    return _NOT_XML.sub("\ufffd", _TEMPLATES.get_template(template).render(**values))

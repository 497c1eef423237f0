"""The family as a picture: towers with a slab per layer, area as parameters, arrows as the cascade."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ministral_jax.models.spec import ModelSpec
from ministral_jax.report.markup import Html, el, join
from ministral_jax.report.style import SANS, accent, variables
from ministral_jax.report.units import count, decimal, percent

Slab = list[tuple[str, int]]
"""Kinds and parameters that lie side by side in one row of a tower."""

_CSS = f""".family text {{ font: 12px {SANS}; fill: var(--muted); }}
.family .name {{ font-size: 17px; font-weight: 650; }}
.family .size {{ font-size: 14px; fill: var(--ink); }}
.family .figure {{ font-size: 14px; font-weight: 600; fill: var(--ink); }}
.family .end {{ text-anchor: end; }}
.family .middle {{ text-anchor: middle; }}
.family .ground {{ fill: var(--paper); }}
.family .arrow {{ stroke-width: 1.6; fill: none; }}
.family .mlp {{ fill-opacity: .42; }}
.family .embeddings {{ fill-opacity: .16; stroke-width: 1; }}
.family .vision {{ fill: none !important; stroke-width: 1; stroke-dasharray: 2.5 2; }}
"""
_KEY = (
    ("attention", "attention"),
    ("mlp", "feed-forward"),
    ("embeddings", "embedding, head"),
    ("vision", "vision, projector"),
)


@dataclass(frozen=True)
class _Member:
    name: str
    colour: str
    slabs: list[Slab]
    """From the ground up."""
    size: str
    shape: str
    figures: list[tuple[str, str]]
    cuts: list[str]
    """What was cut from the member before."""


@dataclass(frozen=True)
class _Scale:
    pitch: float
    """Height of a slab."""
    width: float
    """Width for one parameter, so that area is proportional to parameters."""


def family_figure(summary: Mapping[str, Any], portrait: bool = False) -> str:
    """A stand-alone SVG of parent and children, light and dark by the viewer's preference.

    Args:
        summary: {"parent": entry, "children": {name: entry}}; an entry holds "parameters", "kl_final", "bits_per_byte",
            "digit_accuracy" where known, and "spec" (a `ModelSpec` or its JSON); without a spec it is one block.
        portrait: one member below the other, for a phone.
    """
    members = _members(summary)
    tallest = max([1, *(len(m.slabs) for m in members)])
    widest = max([1, *(sum(size for _, size in slab) for m in members for slab in m.slabs)])
    if portrait:
        scale = _Scale(pitch=min(14.0, 190 / tallest), width=150 / widest)
        parts, width, height = _portrait(members, scale)
    else:
        scale = _Scale(pitch=min(24.0, 250 / tallest), width=142 / widest)
        parts, width, height = _landscape(members, scale)
    ground = el("rect", class_="ground", width=width, height=height)
    return str(
        el(
            "svg",
            el("style", Html(variables(".family") + _CSS)),
            ground,
            *parts,
            xmlns="http://www.w3.org/2000/svg",
            class_="family",
            role="img",
            aria_label=_description(members),
            viewBox=f"0 0 {width} {height}",
            style=f"max-width:{width}px;margin:0 auto",
        )
    )


def _members(summary: Mapping[str, Any]) -> list[_Member]:
    parent = summary.get("parent") or {}
    entries = [("parent", parent), *(summary.get("children") or {}).items()]
    members: list[_Member] = []
    before: ModelSpec | None = None
    for i, (name, entry) in enumerate(entries):
        spec, parameters = _spec(entry), entry.get("parameters")
        if spec is None and parameters is None:
            continue
        members.append(
            _Member(
                name=name,
                colour=accent(i),
                slabs=_slabs(spec, parameters),
                size=f"{count(parameters)} parameters",
                shape=_shape(spec),
                figures=_figures(entry, is_parent=i == 0),
                cuts=_cuts(before, spec),
            )
        )
        before = spec
    return members


def _spec(entry: Mapping[str, Any]) -> ModelSpec | None:
    spec = entry.get("spec")
    return ModelSpec.model_validate(spec) if isinstance(spec, Mapping) else spec


def _slabs(spec: ModelSpec | None, parameters: float | None) -> list[Slab]:
    if spec is None:
        rows = 8
        return [[("mlp", int(parameters / rows))] for _ in range(rows)] if parameters and 0 < parameters < 1e18 else []
    attention = spec.width * spec.head_width * 2 * (spec.heads + spec.kv_heads)
    layer: Slab = [("attention", attention), ("mlp", 3 * spec.width * spec.mlp_width)]
    table: list[Slab] = [[("embeddings", spec.vocab * spec.width)]]
    vision: list[Slab] = [[("vision", spec.vision_parameters)]] if spec.vision else []
    return vision + table + [layer] * spec.layers + ([] if spec.tied else table)


def _shape(spec: ModelSpec | None) -> str:
    return f"{spec.layers} layers, {spec.width} wide, {spec.mlp_width} feed-forward" if spec else ""


def _figures(entry: Mapping[str, Any], is_parent: bool) -> list[tuple[str, str]]:
    rows = [] if is_parent else [(decimal(entry.get("kl_final")), "nats KL to parent")]
    rows.append((decimal(entry.get("bits_per_byte"), 3), "bits per byte"))
    if entry.get("digit_accuracy") is not None:
        rows.append((percent(entry["digit_accuracy"]), "images read right"))
    return rows


def _cuts(before: ModelSpec | None, after: ModelSpec | None) -> list[str]:
    if before is None or after is None:
        return []
    names = (("layers", "layers"), ("width", "width"), ("mlp_width", "feed-forward"))
    cuts = [
        f"{label} {getattr(before, key)} \u2192 {getattr(after, key)}"
        for key, label in names
        if getattr(before, key) != getattr(after, key)
    ]
    return cuts + (["head tied to embedding"] if after.tied and not before.tied else [])


def _description(members: list[_Member]) -> str:
    lines = [", ".join([m.size, m.shape, *(f"{value} {label}" for value, label in m.figures)]) for m in members]
    return "The family, largest first. " + ". ".join(
        f"{m.name}: {line}" for m, line in zip(members, lines, strict=True)
    )


def _text(x: float, y: float, text: str, class_: str = "", style: str | None = None) -> Html:
    return el("text", text, x=round(x, 1), y=round(y, 1), class_=class_ or None, style=style)


def _tower(member: _Member, centre: float, ground: float, scale: _Scale) -> Html:
    """Slabs from the ground up, each centred."""
    colour = f"fill:var(--{member.colour});stroke:var(--{member.colour})"
    blocks = []
    for row, slab in enumerate(member.slabs):
        x = centre - sum(size for _, size in slab) * scale.width / 2
        y = ground - (row + 1) * scale.pitch
        gap = min(2.0, scale.pitch * 0.16)
        for kind, size in slab:
            width = size * scale.width
            box = dict(
                x=round(x, 2), y=round(y + gap / 2, 2), width=round(width, 2), height=round(scale.pitch - gap, 2)
            )
            blocks.append(el("rect", class_=kind, stroke_width=0, **box))
            x += width
    return el("g", blocks, style=colour)


def _waist(member: _Member) -> int:
    """Parameters of one layer, as wide as the tower is between its ends."""
    return next((sum(size for _, size in slab) for slab in member.slabs if slab[0][0] in ("attention", "mlp")), 0)


def _arrow(line: str, tip: str, colour: str) -> Html:
    return el("path", class_="arrow", d=line + tip, style=f"stroke:var(--{colour})")


def _figure_rows(member: _Member, x: float, y: float, step: float) -> Html:
    """Values end and their labels begin at `x`."""
    return join(
        [_text(x - 5, y + i * step, value, "figure end"), _text(x + 3, y + i * step, label)]
        for i, (value, label) in enumerate(member.figures)
    )


def _landscape(members: list[_Member], scale: _Scale) -> tuple[list[Html], float, float]:
    column = 275
    ground = max([len(m.slabs) for m in members], default=0) * scale.pitch + 16
    parts = []
    for i, member in enumerate(members):
        centre = column * (i + 0.5)
        name_style = f"fill:var(--{member.colour})"
        parts += [
            _tower(member, centre, ground, scale),
            _text(centre, ground + 30, member.name, "name middle", name_style),
            _text(centre, ground + 52, member.size, "size middle"),
            _text(centre, ground + 70, member.shape, "middle"),
            _figure_rows(member, centre - 26, ground + 102, 21),
        ]
        if i:
            x = column * i + (_waist(members[i - 1]) - _waist(member)) * scale.width / 4
            y = ground - 2 * scale.pitch - 20
            parts.append(
                _arrow(f"M{x - 26} {y}H{x + 26}", f"M{x + 19} {y - 5}L{x + 26} {y}L{x + 19} {y + 5}", member.colour)
            )
            parts += [_text(x, y - 12 - 17 * k, cut, "middle") for k, cut in enumerate(reversed(member.cuts))]
    width = column * max(len(members), 1)
    y = ground + 196
    parts.append(_key(width / 2 - 275, y, 1))
    return parts, width, y + 14


def _portrait(members: list[_Member], scale: _Scale) -> tuple[list[Html], float, float]:
    y, parts = 8.0, []
    for i, member in enumerate(members):
        if i:
            gap = max(34, 16 * len(member.cuts))
            arrow = y + gap / 2 - 17
            parts.append(
                _arrow(f"M80 {arrow}V{arrow + 34}", f"M75 {arrow + 27}L80 {arrow + 34}L85 {arrow + 27}", member.colour)
            )
            top = y + gap / 2 - 8 * len(member.cuts) + 12
            parts += [_text(178, top + 16 * k, cut) for k, cut in enumerate(member.cuts)]
            y += gap + 18
        tower, lines = len(member.slabs) * scale.pitch, 86 + 19 * len(member.figures)
        height = max(tower, lines)
        name = y + (height - lines) / 2 + 15
        parts += [
            _tower(member, 80, y + (height + tower) / 2, scale),
            _text(178, name, member.name, "name", f"fill:var(--{member.colour})"),
            _text(178, name + 21, member.size, "size"),
            *(_text(178, name + 39 + 16 * k, line) for k, line in enumerate(_two_lines(member.shape))),
            _figure_rows(member, 234, name + 82, 19),
        ]
        y += height + 18
    parts.append(_key(178, y + 14, 4))
    return parts, 360, y + 14 + 20 * len(_KEY)


def _two_lines(shape: str) -> list[str]:
    head, _, tail = shape.rpartition(", ")
    return [head + ",", tail] if head else []


def _key(x: float, y: float, rows: int) -> Html:
    """What the fills mean, in the colour of text."""
    per_row = len(_KEY) // rows
    items, offsets = [], (0, 120, 255, 410)
    for i, (kind, label) in enumerate(_KEY):
        left, line = x + offsets[i % per_row], y + 20 * (i // per_row)
        items.append(el("rect", class_=kind, stroke_width=0, x=left, y=line - 10, width=18, height=11))
        items.append(el("text", label, x=left + 26, y=line, style="stroke:none"))
    return el("g", items, style="fill:var(--muted);stroke:var(--muted)")

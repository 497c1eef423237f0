"""The family as a picture: towers with a slab per layer, area as parameters, arrows as the cascade."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ministral_jax.models.spec import ModelSpec
from ministral_jax.report.page import render
from ministral_jax.report.plots import accent, variables
from ministral_jax.report.units import decimal, percent
from ministral_jax.runs.reading import Member

COLUMN = 285.0
XY = tuple[float, float]


@dataclass(frozen=True)
class Tower:
    """A member; lengths in pixels."""

    name: str
    colour: str
    spec: ModelSpec
    figures: list[tuple[str, str]]
    """Values and what they are."""
    cuts: list[str]
    """From the tower before."""
    parts: list[dict[str, float | str]]
    """Rectangles: `kind`, `x` from the tower's middle, `y` from its top, `width`, `height`."""
    at: XY
    """Middle of its top."""
    text: XY
    arrow: XY
    """Middle of the arrow from the tower before."""


def family_figure(members: Sequence[Member], portrait: bool = False) -> str:
    """A stand-alone SVG of parent and children, light and dark by the viewer's preference.

    Args:
        members: the parent first; one without sizes is left out.
        portrait: one below the other, for a phone.
    """
    named = [(m, accent(i, len(members) - 1), m.spec) for i, m in enumerate(members) if m.spec]
    slabs = [_slabs(spec) for *_, spec in named]
    tallest, widest = max(map(len, slabs), default=1), max((sum(s.values()) for t in slabs for s in t), default=1)
    pitch, scale = (min(14.0, 190 / tallest), 140 / widest) if portrait else (min(24.0, 250 / tallest), 142 / widest)
    made: list[Tower] = []
    y = 8.0
    for i, ((member, colour, spec), tower) in enumerate(zip(named, slabs, strict=True)):
        parts = [part for row, slab in enumerate(tower) for part in _row(slab, row * pitch, pitch, scale)]
        cuts, figures, height = _cuts(made[-1].spec, spec) if made else [], _figures(member), len(tower) * pitch
        x, ground = COLUMN * (i + 0.5), tallest * pitch + 16
        at, text, arrow = (x, ground - height), (x, ground), (x - COLUMN / 2, ground - 70)
        if portrait:
            lines, gap = 92.0 + 19 * len(figures), 26 + max(34, 16 * len(cuts)) if made else 0
            arrow, y, room = (80, y + gap / 2), y + gap, max(height, lines)
            at, text, y = (80, y + (room - height) / 2), (170, y + (room - lines) / 2 - 12), y + room + 8
        made.append(Tower(member.name, colour, spec, figures, cuts, parts, at, text, arrow))
    size = (360, y + 90) if portrait else (COLUMN * max(len(made), 2), tallest * pitch + 226)
    return render("family.svg.j2", towers=made, style=variables(".family"), portrait=portrait, size=size)


def _slabs(spec: ModelSpec) -> list[dict[str, int]]:
    """From the top: parameters by kind of what lies side by side."""
    sizes, vision = spec.components, [{"vision": spec.vision_parameters}] if spec.vision else []
    layer = {"attention": sizes["attention"] // spec.layers, "mlp": sizes["feed-forward"] // spec.layers}
    head = [{"embeddings": sizes["head"]}] if sizes["head"] else []
    return [*head, *[layer] * spec.layers, {"embeddings": sizes["embedding"]}, *vision]


def _row(slab: dict[str, int], top: float, pitch: float, scale: float) -> list[dict[str, float | str]]:
    x, gap, made = -sum(slab.values()) * scale / 2, min(2.0, 0.16 * pitch), []
    for kind, size in slab.items():
        box = {"x": x, "y": top + gap / 2, "width": size * scale, "height": pitch - gap}
        made.append({"kind": kind, **{side: round(length, 2) for side, length in box.items()}})
        x += size * scale
    return made


def _figures(member: Member) -> list[tuple[str, str]]:
    told = (
        ("kl_final", decimal, "nats KL to parent"),
        ("bits_per_byte", lambda bits: decimal(bits, 3), "bits per byte"),
        ("digit_accuracy", percent, "images, teacher-forced"),
    )
    return [(write(value), label) for key, write, label in told if (value := member.figure(key)) is not None]


def _cuts(before: ModelSpec, after: ModelSpec) -> list[str]:
    names = {"layers": "layers", "width": "width", "mlp_width": "feed-forward"}
    sizes = [(label, getattr(before, key), getattr(after, key)) for key, label in names.items()]
    cuts = [f"{label} {old} \u2192 {new}" for label, old, new in sizes if old != new]
    return cuts + (["head tied to embedding"] if after.tied and not before.tied else [])

"""One palette for page and plots, light and dark."""

from __future__ import annotations

PALETTE: dict[str, tuple[str, str]] = {
    "paper": ("#fdfdfc", "#15181c"),
    "panel": ("#f4f4f1", "#1c2026"),
    "ink": ("#1b1f24", "#e7e9ec"),
    "muted": ("#5f6872", "#9aa4af"),
    "faint": ("#a4abb3", "#5d6772"),
    "rule": ("#e2e3df", "#2d333b"),
    "wrong": ("#b1261d", "#ff8f85"),
    "model-0": ("#47505c", "#b4bfcc"),
    "model-1": ("#0069a8", "#5db7ee"),
    "model-2": ("#00795a", "#3cc79a"),
    "model-3": ("#bd4b00", "#ff9850"),
    "model-4": ("#9c4280", "#e39bc8"),
    "model-5": ("#7a6300", "#dfc24a"),
}
"""Name of a colour to its light and dark value. The `model-n` follow Okabe and Ito, so that colour-blind readers tell
them apart, and reach a contrast of 4.5 on paper. No light value occurs twice: plots find their variable by it."""


def accent(index: int) -> str:
    """The colour of the parent (0) or of child 1, 2, ...; they repeat after the fifth, the parent's never."""
    return f"model-{index and (index - 1) % 5 + 1}"


def light(name: str) -> str:
    return PALETTE[name][0]


def variables(selector: str) -> str:
    """The palette as CSS custom properties of `selector`: dark on dark screens, light elsewhere (on paper too)."""
    values = ["".join(f"--{name}:{pair[tone]};" for name, pair in PALETTE.items()) for tone in (0, 1)]
    dark = "@media screen and (prefers-color-scheme:dark)"
    return f"{selector}{{{values[0]}}}\n{dark}{{{selector}{{{values[1]}}}}}\n"

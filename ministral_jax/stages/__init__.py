"""The verbs: each a file with its settings, its checks, its programs, its run and its figures.

The project's own are listed here. A package adds one by an entry point of the group `ministral_jax.stages` that names
the class, a subclass of `Stage`; its name there is what a recipe says after `do:`.
"""

from __future__ import annotations

import importlib
from functools import cache
from importlib.metadata import entry_points

from ministral_jax.errors import UserError
from ministral_jax.stages.base import Graph, Job, Program, Result, Stage
from ministral_jax.stages.figures import Figure

GROUP = "ministral_jax.stages"
_OWN = {
    "train": "train:Train",
    "import": "import_:Import",
    "prune": "prune:Prune",
    "record": "record:Record",
    "distill": "distill:Distill",
    "sft": "sft:SFT",
    "reward": "reward:Reward",
    "pairs": "pairs:Pairs",
    "dpo": "dpo:DPO",
    "odpo": "odpo:ODPO",
    "grpo": "grpo:GRPO",
    "evaluate": "evaluate:Evaluate",
    "export": "export:Export",
}


@cache
def verbs() -> dict[str, type[Stage]]:
    """Every verb, by what a recipe says after `do:`. Raises `UserError`: an entry point names something that is no
    verb, or one that is there already."""
    found: dict[str, type[Stage]] = {}
    for name, place in _OWN.items():
        module, _, kind = place.partition(":")
        found[name] = getattr(importlib.import_module(f"{__name__}.{module}"), kind)
    for point in entry_points(group=GROUP):
        kind = point.load()
        if not (isinstance(kind, type) and issubclass(kind, Stage)):
            raise UserError(f"entry point {point.name} = {point.value} of {GROUP} is not a class derived from Stage")
        if point.name in found:
            raise UserError(f"entry point {point.name} = {point.value} of {GROUP}: that verb exists already")
        found[point.name] = kind
    return found


def figures() -> dict[str, Figure]:
    """Every figure of every verb, by name, in the order in which tables show them."""
    return {figure.name: figure for verb in verbs().values() for figure in verb.figures}


__all__ = ["GROUP", "Figure", "Graph", "Job", "Program", "Result", "Stage", "figures", "verbs"]

"""A whole run: the cascade, its summary, and the table at the end."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import jax
from rich.table import Table

from ministral_jax.errors import UserError
from ministral_jax.recipe.types import Recipe
from ministral_jax.runs.cascade import run_cascade
from ministral_jax.runs.summary import Summary


def run_recipe(recipe: Recipe, run_dir: Path, stages: Iterable[str] = ()) -> None:
    """Run the stages of a recipe in `run_dir`, with the programs that an earlier attempt has compiled."""
    cache_compilations(run_dir / "xla")
    run_cascade(recipe, run_dir, stages)


def cache_compilations(directory: Path) -> None:
    """Keep compiled programs in `directory`, so that going on does not compile again."""
    jax.config.update("jax_compilation_cache_dir", str(directory.absolute()))
    if jax.default_backend() == "cpu":  # else the key names the directory, and a copy of it serves nobody
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


def recipe_of(run_dir: Path) -> Recipe:
    """The recipe that a run was made by.

    Raises:
        UserError: not a run's directory.
    """
    path = run_dir / "recipe.json"
    if not path.is_file():
        raise UserError(f"{run_dir} is not a run: it has no recipe.json")
    return Recipe.model_validate(json.loads(path.read_text(encoding="utf-8")))


def family_table(summary: Summary) -> Table:
    """Size, parameters, tokens and held-out figures of every finished member of the family."""
    table = Table(title=f"{summary.name}: {summary.wall_seconds:,.0f} s")
    columns = ("size", "parameters", "tokens", "KL pruned", "KL final", "KL scratch", "speed-up", "bits/byte", "digits")
    for column in columns:
        table.add_column(column, justify="left" if column == "size" else "right")
    members = ({"parent": summary.parent} if summary.parent else {}) | summary.children
    for name, member in members.items():
        row = member.model_dump()
        table.add_row(
            name,
            f"{member.parameters / 1e6:,.2f} M",
            f"{member.tokens / 1e6:,.2f} M",
            *(_number(row.get(key), ".4f") for key in ("kl_after_surgery", "kl_final", "kl_scratch")),
            _number(row.get("token_speedup"), ".1f", "x"),
            _number(member.bits_per_byte, ".3f"),
            _number(member.digit_accuracy, ".1%"),
        )
    return table


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else format(value, form) + unit

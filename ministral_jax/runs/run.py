"""A whole run: the cascade, its summary, its report, and the table at the end."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from ministral_jax.config import Recipe
from ministral_jax.distributed.collectives import barrier, is_first
from ministral_jax.errors import UserError
from ministral_jax.report import build_report
from ministral_jax.runs.cascade import run_cascade
from ministral_jax.runs.summary import write_summary


def run_recipe(recipe: Recipe, run_dir: Path, stages: Iterable[str] = ()) -> None:
    """Run the stages of a recipe in `run_dir`, then write its report and print the family's table."""
    cache_compilations(run_dir / "xla")
    run_cascade(recipe, run_dir, stages)
    if is_first():
        _finish(recipe, run_dir)
    barrier("reported")


def cache_compilations(directory: Path) -> None:
    """Keep compiled programs in `directory`, so that going on does not compile again."""
    jax.config.update("jax_compilation_cache_dir", str(directory.absolute()))
    if jax.default_backend() == "cpu":  # else the key names the directory, and a copy of it serves nobody
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


def report_run(run_dir: Path) -> None:
    """Write the summary and the report of a run from what is in its directory.

    Raises:
        UserError: not a run's directory.
    """
    path = run_dir / "recipe.json"
    if not path.is_file():
        raise UserError(f"{run_dir} is not a run: it has no recipe.json")
    _finish(Recipe.model_validate(json.loads(path.read_text(encoding="utf-8"))), run_dir)


def _finish(recipe: Recipe, run_dir: Path) -> None:
    summary = write_summary(recipe, run_dir)
    page = build_report(run_dir)
    if summary["parent"] or summary["children"]:
        width = None if sys.stdout.isatty() else 120  # in a log, rich would cut the columns at 80
        Console(width=width).print(family_table(summary))
    print(f"report: {page}", file=sys.stderr)


def family_table(summary: dict[str, Any]) -> Table:
    """Size, parameters, tokens and held-out figures of every finished member of the family."""
    table = Table(title=f"{summary['name']}: {summary['wall_seconds']:,.0f} s")
    columns = ("size", "parameters", "tokens", "KL pruned", "KL final", "KL scratch", "speed-up", "bits/byte", "digits")
    for column in columns:
        table.add_column(column, justify="left" if column == "size" else "right")
    rows = {"parent": summary["parent"], **summary["children"]} if summary["parent"] else summary["children"]
    for name, row in rows.items():
        table.add_row(
            name,
            f"{row['parameters'] / 1e6:,.2f} M",
            f"{row['tokens'] / 1e6:,.2f} M",
            *(_number(row.get(key), ".4f") for key in ("kl_after_surgery", "kl_final", "kl_scratch")),
            _number(row.get("token_speedup"), ".1f", "x"),
            _number(row["bits_per_byte"], ".3f"),
            _number(row["digit_accuracy"], ".1%"),
        )
    return table


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else format(value, form) + unit

"""What a terminal shows of runs: what is planned, what is there, the family, and two runs side by side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.table import Table

from ministral_jax.errors import UserError
from ministral_jax.recipe.types import Recipe
from ministral_jax.runs.comparable import OF_LENGTH, most_common
from ministral_jax.runs.lock import named, owner
from ministral_jax.runs.overview import flat
from ministral_jax.runs.reading import Run, Stage, read_run
from ministral_jax.runs.survey import Planned, saved_step
from ministral_jax.stages.asking import TASK_FIGURES
from ministral_jax.stages.figures import Figure

_NUMBERS = {"parameters", "tokens", "disk", "steps", "time", "difference"}
_FAMILY = (
    ("KL pruned", "kl_after_surgery", ".4f"),
    ("KL final", "kl_final", ".4f"),
    ("KL scratch", "kl_scratch", ".4f"),
    ("bits/byte", "bits_per_byte", ".3f"),
    ("images", "digit_accuracy", ".1%"),
)
_SHOWN = 3
"""Figures of a stage."""


def plan_table(recipe: Recipe, plans: Sequence[Planned]) -> Table:
    """What a run would do: what is made, from where what is not, and how large it is."""
    table = _table("nothing is run", "stage", "do", "what", "parameters", "tokens", "disk")
    for plan in plans:
        stage = recipe.stages[plan.name]
        steps, batch = getattr(stage, "steps", None), getattr(stage, "batch", None)
        tokens = steps * batch.tokens if steps and batch is not None else None
        what = {"finished": "finished already", "taken": f"taken from {plan.place}", "begins": "is made"}.get(
            plan.state
        )
        if what is None:
            what = f"{'goes on' if plan.state == 'resumes' else 'gets more steps'} from step {plan.step}"
        size = 4 * plan.spec.parameters * (4 if steps else 1) if stage.makes_model and plan.is_made else 0
        # float32 parameters; while it trains, a saved state of them and two moments too
        table.add_row(
            plan.name,
            stage.do,
            what,
            _count(plan.spec.parameters if stage.makes_model else None),
            _count(tokens),
            _bytes(size) if size else "",
        )
    return table


def stage_table(run: Run, names: Iterable[str] = ()) -> Table:
    """Stages of a run (those that have begun when none is named): how far they are, and their held-out figures."""
    chosen = list(names) or [name for name, stage in run.stages.items() if stage.state != "waiting"]
    table = _table(run.name, "stage", "do", "state", "steps", "tokens", "time", "held-out figures")
    common = most_common(
        stage.length for stage in map(run.stages.get, chosen) if stage and stage.length and _told(stage)
    )
    if any(run.stages[name].length not in (None, common) and _told(run.stages[name]) for name in chosen):
        table.caption = (
            f"KL, cross-entropy and bits per byte compare on rows of one length only: here of {common} tokens"
        )
    for stage in (run.stages[name] for name in chosen):
        tokens, steps = stage.seen("tokens"), stage.seen("step")
        seconds = stage.manifest.seconds if stage.manifest else sum(stage.time.values())
        table.add_row(
            stage.name,
            stage.do,
            f"{stage.state}, stale" if stage.stale else stage.state,
            _count(steps),
            _count(tokens),
            f"{seconds:,.0f} s" if seconds else "",
            "\n".join(_said(figure, stage, common) for figure in _told(stage)),
        )
    return table


def family_table(run: Run) -> Table:
    """Size, parameters, tokens and held-out figures of every finished member of the family; "-" where a figure is not
    to be compared with those of the others."""
    table = _table(f"{run.name}: {run.wall_seconds or 0:,.0f} s", "size", "parameters", "tokens")
    for title, *_ in _FAMILY:
        table.add_column(title, justify="right")
    hidden: dict[str, str] = {}
    for member in run.members:
        if member.published is None:
            continue
        figures = [_number(member.figure(key), form, "-" * (key in member.hidden)) for _, key, form in _FAMILY]
        hidden |= {f"{member.name}, {title}": member.hidden[key] for title, key, _ in _FAMILY if key in member.hidden}
        table.add_row(member.name, _count(member.published.parameters), _count(member.published.tokens), *figures)
    table.caption = "; ".join(f"{what}: {why}" for what, why in hidden.items()) or None
    return table


def status_table(run_dirs: Iterable[Path]) -> Table:
    """Runs, a line each."""
    table = _table("runs", "run", "finished", "going on", "written by")
    for run_dir in run_dirs:
        try:
            run = read_run(run_dir)
        except UserError as error:  # of one run, which must not hide the others
            table.add_row(str(run_dir), str(error))
            continue
        states = [stage.state for stage in run.stages.values() if not stage.is_spared]
        table.add_row(
            str(run_dir),
            f"{states.count('finished')} of {len(states)} stages",
            ", ".join(_progress(run_dir, stage) for stage in run.stages.values() if stage.state == "unfinished"),
            _owner(run_dir),
        )
    return table


def status_lines(run_dir: Path, run: Run) -> list[str]:
    """What stands below the table of one run's stages."""
    spared = [name for name, stage in run.stages.items() if stage.is_spared]
    waiting = [name for name, stage in run.stages.items() if stage.state == "waiting" and name not in spared]
    found = {"not begun": waiting, "optional and not run": spared}
    lines = [f"{what}: {', '.join(names)}" for what, names in found.items() if names]
    return [*lines, *run.notes, f"written by: {_owner(run_dir) or 'nobody now'}"]


def comparison_tables(run_dirs: Sequence[Path]) -> list[Table]:
    """Settings in which two runs differ, and the figures of the stages that both have finished."""
    runs = [read_run(run_dir) for run_dir in run_dirs]
    names = [name for name in runs[0].stages if name in runs[1].stages]
    settings = _table("settings that differ", "stage", "setting", *map(str, run_dirs))
    figures = _table("held-out figures", "stage", "figure", *map(str, run_dirs), "difference")
    for name in names:
        pair = [run.stages[name] for run in runs]
        if pair[0].manifest is None or pair[1].manifest is None:
            continue
        ours, theirs = (dict(flat(stage.manifest.config)) for stage in pair if stage.manifest)
        for key in dict.fromkeys([*ours, *theirs]):
            if (a := ours.get(key)) != (b := theirs.get(key)):
                settings.add_row(name, key, str(a), str(b))
        for figure in pair[0].figures:
            if (a := pair[0].last(figure.name)) is not None and (b := pair[1].last(figure.name)) is not None:
                difference = _incomparable(figure, *pair) or f"{b - a:+.4f}"
                figures.add_row(name, figure.label, f"{a:.4f}", f"{b:.4f}", difference)
    return [settings, figures]


def _incomparable(figure: Figure, a: Stage, b: Stage) -> str | None:
    """Why a figure of two stages may not be compared."""
    if a.stale or b.stale:
        return "stale"
    if figure.name in OF_LENGTH and a.length != b.length:
        return f"rows of {a.length}, {b.length}"
    return "other data" if a.data != b.data else None


def _progress(run_dir: Path, stage: Stage) -> str:
    saved = saved_step(run_dir / stage.name)
    return stage.name + (f" (saved at step {saved})" if saved is not None else "")


def _owner(run_dir: Path) -> str:
    said = owner(run_dir)
    return named(said) if said else ""


def _told(stage: Stage) -> list[Figure]:
    found = [figure for figure in stage.figures if stage.has(figure)]
    return [figure for number, figure in enumerate(found) if number < _SHOWN or figure in TASK_FIGURES]


def _said(figure: Figure, stage: Stage, common: int | None) -> str:
    """The figure, unless it would stand beside those of rows of another length."""
    if figure.name in OF_LENGTH and stage.length not in (None, common):
        return f"{figure.label} \u2013 (rows of {stage.length})"
    value, shares = stage.last(figure.name), stage.shares(figure)
    if shares:
        return "\n".join(f"{f'  {source}' if source else figure.label} {share}" for source, share in shares.items())
    return f"{figure.label} " + (f"{value:.1%}" if figure.unit == "share" else f"{value:.4g}")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title)
    words = {
        "size",
        "stage",
        "do",
        "state",
        "what",
        "held-out figures",
        "run",
        "going on",
        "written by",
        "setting",
        "figure",
    }
    for column in columns:
        table.add_column(column, justify="left" if column in words else "right", overflow="fold")
    return table


def _number(value: float | None, form: str, instead: str) -> str:
    return instead if value is None else format(value, form)


def _count(count: float | None) -> str:
    if not count:
        return ""
    return f"{count:,.0f}" if count < 1e5 else f"{count / 1e6:,.2f} M"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"

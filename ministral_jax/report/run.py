"""The page of a run, from whatever it has produced so far."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markupsafe import Markup

from ministral_jax.files import write_text
from ministral_jax.report import charts
from ministral_jax.report.family import family_figure
from ministral_jax.report.page import is_shown, render
from ministral_jax.report.plots import accent
from ministral_jax.report.units import count, decimal, percent
from ministral_jax.runs import overview
from ministral_jax.runs.reading import OF_ROWS, Run, Stage, read_run
from ministral_jax.stages.figures import Figure
from ministral_jax.training.goodput import KINDS

Colours = dict[str, str]
"""Of members and stages, by name."""
_KINDS = "loading/compiling/waiting for data/generating/judging/steps/saving/evaluating/lost to restarts/not running"
_CUTS = {"layers": "layers", "width": "width", "mlp": "feed-forward", "tie": "tying", "projector": "projector"}
_WORDS = dict(zip(OF_ROWS, ("KL after surgery", "KL distilled", "KL from scratch", "bits per byte"), strict=True))


def build_report(run_dir: Path) -> Path:
    """Write `<run_dir>/report.html` and `<run_dir>/family.svg`.

    Returns:
        path of the page.

    Raises:
        UserError: `run_dir` is not a run's directory.
    """
    run, page = read_run(run_dir), run_dir / "report.html"
    pictures = [Markup(family_figure(run.members, portrait)) for portrait in (False, True)]
    if any(member.spec for member in run.members):
        write_text(run_dir / "family.svg", pictures[0])
    write_text(page, render("run.html.j2", run=run, pictures=pictures, **_sections(run)))
    return page


def _sections(run: Run) -> dict[str, Any]:
    """What the template asks for beside the run; what is empty is left out."""
    stages, children = list(run.stages.values()), len(run.members) - 1
    members = {member.name: accent(i, children) for i, member in enumerate(run.members)}
    colours = {name: members.get(run.member_of().get(name, ""), accent(0)) for name in run.stages} | members
    groups, parent = _post_training(run, colours), run.members[0].stages.get("base") if run.members else None
    shown = [parent, *(stage for group in groups for stage in group["stages"])]
    made = [(stage, stage.manifest, colours[stage.name]) for stage in stages if stage.manifest]
    timed, words = [stage for stage in stages if stage.time], dict(zip(KINDS, _KINDS.split("/"), strict=True))
    return {
        "colours": colours,
        "findings": _findings(run, groups, colours),
        "spared": [stage.name for stage in stages if stage.is_spared],
        "published": any(member.published for member in run.members),
        "heads": [word + overview.length(run.members, key) for key, word in _WORDS.items()],
        "alone": overview.alone(run),
        "octaves": [
            (s, {at.start: at for at in m.held_out.positions}) for s, m, _ in made if m.held_out and not s.stale
        ],
        "images": [image for image in run.images if is_shown(image.png)],
        "recoveries": charts.charts(*(charts.recovery(member, colours[member.name]) for member in run.members[1:])),
        "groups": groups,
        "parts": charts.parts,
        "chance": overview.beyond_error,
        "read": overview.sources_read(stages),
        "flat": overview.flat,
        "parents": charts.charts(parent and charts.curve(parent, colours[parent.name], wide=True)),
        "stores": [(s, charts.left_out(s.name, next(iter(m.store.values())), c)) for s, m, c in made if m.store],
        "surgeries": [(s, charts.cuts(m, c), run.stages.get(s.source or "", s).spec) for s, m, c in made if m.prune],
        "steps": {f"KL after {w}": s for s, w in _CUTS.items() if any(s in m.prune.kl for _, m, _ in made if m.prune)},
        "sized": [member for member in run.members if member.spec],
        "machines": overview.machines([m for _, m, _ in made]),
        "memory": {s.name: m.devices.peak_memory for s, m, _ in made if m.devices and m.devices.peak_memory},
        "timed": timed,
        "kinds": {kind: word for kind, word in words.items() if any(kind in stage.time for stage in timed)},
        "others": charts.charts(*(charts.curve(s, colours[s.name]) for s in stages if s not in shown)),
        "steering": [(stage, told) for stage in stages if len(told := charts.steering(stage)) == 2],
    }


def _findings(run: Run, groups: list[dict[str, Any]], colours: Colours) -> list[tuple[str, str, str]]:
    """What a reader should know first: name, colour, sentence. Of a change only what chance does not explain."""
    told: list[tuple[str, str]] = []
    parent = run.members[0].spec if run.members else None
    for member in run.members[1:]:
        kl, scratch = member.figure("kl_final"), member.figure("kl_scratch")
        if parent and member.spec and kl is not None:
            size = f"{percent(member.spec.parameters / parent.parameters, 0)} of the parent\u2019s parameters"
            other = f"; {decimal(scratch)} from random weights" if scratch is not None else ""
            tokens = count(member.figure("tokens"))
            told.append((member.name, f"{size}. KL to the parent {decimal(kl)} after {tokens} tokens{other}."))
        elif member.stale:
            told.append((member.name, f"is stale: it was {member.stale}."))
    for stage in (stage for group in groups for stage in group["stages"] if not stage.stale):
        words: list[str] = []
        for figure in overview.learned(stage):
            sure, ends = overview.beyond_error(stage, figure), (stage.first(figure.name), stage.last(figure.name))
            if sure or (sure is False and not words):  # the chief one in any case
                change = " \u2192 ".join(map(percent, ends)) if sure else "no difference beyond the error"
                words.append(f"{figure.label}: {change}")
        if words:
            told.append((stage.name, f"{'; '.join(words)} (n\u202f=\u202f{stage.asked})."))
    return [(name, colours[name], words) for name, words in told]


def _post_training(run: Run, colours: Colours) -> list[dict[str, Any]]:
    """Stages that learn to answer or judge, by the stage they begin from, where any has begun."""
    learning = {stage.name: stage for stage in run.stages.values() if overview.learned(stage)}
    roots: dict[str, list[Stage]] = {}
    for name in learning:
        chain = [name]
        while (source := run.stages[chain[-1]].source) in learning and source not in chain:
            chain.append(source)
        roots.setdefault(chain[-1], []).append(learning[name])
    begun = {root: group for root, group in roots.items() if any(stage.state != "waiting" for stage in group)}
    return [_group(run.stages[root].source, group, colours) for root, group in begun.items()]


def _group(source: str | None, group: list[Stage], colours: Colours) -> dict[str, Any]:
    figures: dict[Figure, list[Stage]] = {}
    for stage in group:
        for figure in filter(stage.has, overview.learned(stage)):
            figures.setdefault(figure, []).append(stage)
    return {
        "source": source,
        "stages": group,
        "shared": [figure for figure, stages in figures.items() if len(stages) > 1 or len(group) == 1],
        "besides": [figure for figure, stages in figures.items() if len(stages) == 1 < len(group)],
        "charts": [chart for stage in group for chart in charts.learning(stage, colours[stage.name])],
        "answers": overview.answers(group),
    }

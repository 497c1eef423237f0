"""The page of a run, from whatever it has produced so far."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ministral_jax.files import write_text
from ministral_jax.report import charts
from ministral_jax.report.family import family_figure
from ministral_jax.report.page import is_shown, render, show
from ministral_jax.report.plots import accent
from ministral_jax.report.units import count, decimal, percent
from ministral_jax.runs.comparable import differ, most_common
from ministral_jax.runs.reading import Run, Said, Stage, read_run
from ministral_jax.stages.figures import Figure
from ministral_jax.training.goodput import KINDS

Colours = dict[str, str]
"""Of members and stages, by name."""
_KINDS = "loading/compiling/waiting for data/generating/judging/steps/saving/evaluating/lost to restarts/not running"
_CUTS = {"layers": "layers", "width": "width", "mlp": "feed-forward", "tie": "tying", "projector": "projector"}
_PROMPTS = 2
"""Of each stage, that many without a picture and that many with one."""
_WORDS = {
    "kl_after_surgery": "KL after surgery",
    "kl_final": "KL distilled",
    "kl_scratch": "KL from scratch",
    "bits_per_byte": "bits per byte",
}
"""Figures of the family that depend on the length of the rows."""


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
        "published": any(member.published for member in run.members),
        "heads": [word + _length(run, key) for key, word in _WORDS.items()],
        "alone": _alone(run),
        "images": [image for image in run.images if is_shown(image.png)],
        "recoveries": charts.charts(*(charts.recovery(member, colours[member.name]) for member in run.members[1:])),
        "groups": groups,
        "parts": charts.parts,
        "chance": _chance,
        "read": _data(stages),
        "flat": _flat,
        "parents": charts.charts(parent and charts.curve(parent, colours[parent.name], wide=True)),
        "stores": [(s, charts.left_out(s.name, next(iter(m.store.values())), c)) for s, m, c in made if m.store],
        "surgeries": [(s, charts.cuts(m, c), run.stages.get(s.source or "", s).spec) for s, m, c in made if m.prune],
        "steps": {f"KL after {w}": s for s, w in _CUTS.items() if any(s in m.prune.kl for _, m, _ in made if m.prune)},
        "sized": [member for member in run.members if member.spec],
        "versions": dict.fromkeys(f"{name} {version}" for _, m, _ in made for name, version in m.versions.items()),
        "commits": dict.fromkeys(f"commit {m.git[:10]}" for _, m, _ in made if m.git),
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
            other = f", {decimal(scratch)} from random weights after as many" if scratch is not None else ""
            told.append(
                (member.name, f"{size}; KL {decimal(kl)} after {count(member.figure('tokens'))} tokens{other}.")
            )
        elif member.stale:
            told.append((member.name, f"stale, made again to be current: {member.stale}."))
    for stage in (stage for group in groups for stage in group["stages"]):
        figure = next((f for f in charts.learned(stage) if f.unit == "share" and stage.has(f)), None)
        if figure is None or (sure := _chance(stage, figure)) is None or stage.stale:
            continue
        change = f"{percent(stage.first(figure.name))} \u2192 {percent(stage.last(figure.name))}"
        words = change if sure else "no difference beyond the error"
        told.append((stage.name, f"{figure.label}: {words} (n\u202f=\u202f{stage.asked})."))
    return [(name, colours[name], words) for name, words in told]


def _chance(stage: Stage, figure: Figure) -> bool | None:
    """Whether training changed a share by more than chance; None where nobody can say."""
    before, after = stage.first(figure.name), stage.last(figure.name)
    known = figure.unit == "share" and stage.asked and all(v is not None and 0 <= v <= 1 for v in (before, after))
    return differ(before or 0.0, after or 0.0, stage.asked or 1) if known else None


def _length(run: Run, key: str) -> str:
    """Of the rows that a figure of the family was read on, for the head of its column."""
    found = (member.length_of(key) for member in run.members if member.figure(key) is not None)
    return next((f", rows of {length}" for length in found if length), "")


def _alone(run: Run) -> tuple[list[Figure], list[tuple[Stage, list[tuple[str, str]]]]]:
    """Where not every member has its row in the family's table: figures of the finished stages, each a text or why it
    may not stand in its column."""
    made = [s for s in run.stages.values() if s.manifest and (s.figures or s.source is None)]
    if all(member.published for member in run.members):
        made = []
    learned = {figure for stage in made for figure in charts.learned(stage)}
    figures = [
        figure for figure in dict.fromkeys(f for s in made for f in s.figures if s.has(f)) if figure not in learned
    ]
    cells: list[list[tuple[str, str]]] = []
    for figure in figures:
        read = {s.name: (s.length, s.data) for s in made if s.has(figure) and not s.stale}
        common = most_common(read.values()) or (None, None)
        why = {
            name: "other data" if own[0] == common[0] else f"rows of {own[0]}"
            for name, own in read.items()
            if own != common
        }
        why |= {s.name: "stale" for s in made if s.stale}
        cells.append([("", why[s.name]) if s.name in why else (show(s.last(figure.name), figure), "") for s in made])
    return figures, [(stage, [column[i] for column in cells]) for i, stage in enumerate(made)]


def _data(stages: list[Stage]) -> list[dict[str, Any]]:
    """What finished stages read: sources, length of the rows, digest, and of every stage how many rows or prompts."""
    found: dict[str, dict[str, Any]] = {}
    for stage in (stage for stage in stages if stage.manifest and isinstance(stage.settings.get("data"), dict)):
        data, batch = stage.settings["data"], stage.settings.get("batch") or {}
        count_of = stage.seen("step") or 0
        rows = f"{count(count_of * batch['sequences'])} rows" if "sequences" in batch else ""
        rows = rows or (f"{count(count_of * stage.settings['prompts'])} prompts" if "prompts" in stage.settings else "")
        told = {"sources": data.get("sources", {}), "length": stage.length, "digest": stage.data, "by": {}}
        found.setdefault(json.dumps([told, data.get("held_out")], default=str), told)["by"][stage.name] = rows
    return list(found.values())


def _flat(settings: Any, at: str = "") -> list[tuple[str, Any]]:
    """Settings by dotted key."""
    if not isinstance(settings, dict) or not settings:
        return [(at, settings)]
    return [pair for key, value in settings.items() for pair in _flat(value, f"{at}.{key}" if at else str(key))]


def _post_training(run: Run, colours: Colours) -> list[dict[str, Any]]:
    """Stages that learn to answer or judge, by the stage they begin from, where any has begun."""
    learning = {stage.name: stage for stage in run.stages.values() if charts.learned(stage)}
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
    said: dict[str, dict[str, Said]] = {}
    for stage in group:
        for figure in filter(stage.has, charts.learned(stage)):
            figures.setdefault(figure, []).append(stage)
        for answer in stage.answers:
            if answer.before and stage.source:
                said.setdefault(answer.prompt, {}).setdefault(stage.source, answer.before)
            said.setdefault(answer.prompt, {}).setdefault(stage.name, answer)
    asked = sorted(said, key=lambda prompt: -len(said[prompt]))
    chosen = [
        prompt
        for stage in group
        for pictured in (False, True)
        for prompt in [p for p in asked if stage.name in said[p] and ('"png"' in p) == pictured][:_PROMPTS]
    ]
    return {
        "source": source,
        "stages": group,
        "shared": [figure for figure, stages in figures.items() if len(stages) > 1 or len(group) == 1],
        "besides": [figure for figure, stages in figures.items() if len(stages) == 1 < len(group)],
        "charts": [chart for stage in group for chart in charts.learning(stage, colours[stage.name])],
        "answers": [(prompt, said[prompt]) for prompt in dict.fromkeys(chosen)],
    }

"""What a run is told by beside the figures of its family: which figures its stages have in common, what they read, what
they ran on, what they answer."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ministral_jax.data.config import SourceConfig
from ministral_jax.runs.comparable import differ, most_common
from ministral_jax.runs.reading import Member, Run, Said, Stage
from ministral_jax.stages.asking import TASK_FIGURES
from ministral_jax.stages.figures import HELD_OUT, KL, Figure
from ministral_jax.stages.manifest import Manifest


def learned(stage: Stage) -> list[Figure]:
    """The figures by which post-training is told: all but those of every loop, such as tasks that it asks."""
    packed = {figure.name for figure in (*HELD_OUT, KL, *TASK_FIGURES)}
    return [figure for figure in stage.figures if figure.name not in packed] if stage.curve else []


def beyond_error(stage: Stage, figure: Figure) -> bool | None:
    """Whether training changed a share of the held-out prompts by more than chance does; None where nobody can say."""
    before, after = stage.first(figure.name), stage.last(figure.name)
    if figure.unit != "share" or not stage.asked or before is None or after is None:
        return None
    return differ(before, after, stage.asked) if 0 <= before <= 1 and 0 <= after <= 1 else None


def length(members: Sequence[Member], key: str) -> str:
    """Of the rows that a figure of the family was read on, for the head of its column: ", rows of 512"."""
    found = (member.row_length for member in members if member.figure(key) is not None)
    return next((f", rows of {length}" for length in found if length), "")


Cell = tuple[float | None, str]
"""A figure, or why it may not stand in its column."""


def alone(run: Run) -> tuple[list[Figure], list[tuple[Stage, list[Cell]]]]:
    """Where not every member of a family has its figures, or there is no family: those of the finished stages, each
    column on rows of one length and of the same data."""
    made = [s for s in run.stages.values() if s.manifest and (s.figures or s.source is None)]
    if run.members and all(member.published or member.stale for member in run.members):
        made = []
    post = {figure for stage in made for figure in learned(stage)}
    figures = [f for f in dict.fromkeys(f for s in made for f in s.figures if s.has(f)) if f not in post]
    columns = [_column(figure, made) for figure in figures]
    return figures, [(stage, [column[i] for column in columns]) for i, stage in enumerate(made)]


def _column(figure: Figure, made: list[Stage]) -> list[Cell]:
    read = {stage.name: (stage.length, stage.data) for stage in made if stage.has(figure) and not stage.stale}
    common, found = most_common(read.values()), list[Cell]()
    for stage in made:
        own = read.get(stage.name)
        if own is None or common is None:
            found.append((None, "stale" if stage.stale and stage.has(figure) else ""))
        elif own == common:
            found.append((stage.last(figure.name), ""))
        else:
            found.append((None, f"rows of {own[0]}" if own[0] != common[0] else "other data"))
    return found


def answers(group: Sequence[Stage], each: int = 2) -> list[tuple[str, dict[str, Said]]]:
    """Held-out prompts with what was said to them, by stage, and by the stage that one goes on from before its own
    training. Of every stage `each` prompts without a picture and as many with one, those first that most answered."""
    said: dict[str, dict[str, Said]] = {}
    for stage in group:
        for answer in stage.answers:
            if answer.before and stage.source:
                said.setdefault(answer.prompt, {}).setdefault(stage.source, answer.before)
            said.setdefault(answer.prompt, {}).setdefault(stage.name, answer)
    asked, chosen = sorted(said, key=lambda prompt: -len(said[prompt])), dict[str, None]()
    for stage in group:
        own = [prompt for prompt in asked if stage.name in said[prompt]]
        for pictured in (False, True):
            chosen |= dict.fromkeys([prompt for prompt in own if ('"png"' in prompt) == pictured][:each])
    return [(prompt, said[prompt]) for prompt in chosen]


def machines(made: Sequence[Manifest]) -> list[str]:
    """On what stages ran, and what made them."""
    devices = [manifest.devices for manifest in made if manifest.devices]
    on = Counter(f"{d.count} \u00d7 {d.kind}{f' on {d.hosts} hosts' if d.hosts > 1 else ''}" for d in devices)
    versions = dict.fromkeys(f"{name} {version}" for m in made for name, version in m.versions.items())
    versions |= dict.fromkeys(f"commit {m.git[:10]}" for m in made if m.git)
    ran = ", ".join(f"{device} ({stages} stages)" for device, stages in on.items())
    return [f"{verb} {what}." for verb, what in (("Ran on", ran), ("Made with", " \u00b7 ".join(versions))) if what]


def sources_read(stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """What finished stages read: `sources` by name with their settings, `length` of the rows, `digest`, and `by`: of
    every stage that reads them so, how many rows or prompts it has trained on."""
    found: dict[str, dict[str, Any]] = {}
    for stage in stages:
        data, batch = stage.settings.get("data"), stage.settings.get("batch")
        if stage.manifest is None or not isinstance(data, dict):
            continue
        each, what = (
            (batch.get("sequences"), "rows") if isinstance(batch, dict) else (stage.settings.get("prompts"), "prompts")
        )
        sources = {name: _said(source) for name, source in (data.get("sources") or {}).items()}
        told = {"sources": sources, "length": stage.length, "digest": stage.data, "by": {}}
        made = found.setdefault(json.dumps([told, data.get("held_out")], default=str), told)
        made["by"][stage.name] = f"{each * stage.manifest.steps:,} {what}" if each and stage.manifest.steps else ""
    return list(found.values())


def _said(source: dict[str, Any]) -> dict[str, Any]:
    """Of a source what is not as it is by itself."""
    fields = SourceConfig.model_fields
    return {key: value for key, value in source.items() if key not in fields or value != fields[key].default}


def flat(settings: Any, at: str = "") -> list[tuple[str, Any]]:
    """Settings by dotted key."""
    if not isinstance(settings, dict) or not settings:
        return [(at, settings)]
    return [pair for key, value in settings.items() for pair in flat(value, f"{at}.{key}" if at else str(key))]

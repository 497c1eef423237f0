"""What a model answers to held-out prompts, and how good that is."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from pydantic import Field

from ministral_jax.alignment.answer import Sample
from ministral_jax.alignment.rewards import RewardsConfig
from ministral_jax.alignment.rollout import Params, Sampler, seeds
from ministral_jax.alignment.scoring import Scorer, Scores, check_enough
from ministral_jax.data.images import thumbnail
from ministral_jax.data.prompts import PromptData
from ministral_jax.distributed.collectives import first_problem, gathered, is_first
from ministral_jax.distributed.processes import announce
from ministral_jax.errors import UserError
from ministral_jax.files import write_json
from ministral_jax.settings import Frozen

SHOWN = 12
"""Answers kept for the report."""
_SALT = 1
"""The random numbers of an evaluation are others than those of any step."""


class GenerateConfig(Frozen):
    """Held-out prompts, answered at every evaluation, and how the answers are scored."""

    prompts: int = Field(default=64, ge=1)
    """Held-out ones, in a fixed order, the sources by their weights."""
    completions: int = Field(default=1, ge=1)
    """Of each prompt."""
    max_completion_length: int = Field(default=256, ge=1)
    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    rewards: RewardsConfig


class Examiner:
    """Answers the same held-out prompts with the same random numbers whenever it is asked. A context manager."""

    def __init__(
        self,
        sampler: Sampler,
        prompts: PromptData,
        config: GenerateConfig,
        directory: Path,
        workers: int = 2,
        seconds: float = 10,
    ):
        self._sampler = replace(sampler, temperature=config.temperature)
        self._rows, self._config, self._directory = prompts.evaluation(config.prompts), config, directory
        self._scorer = Scorer(config.rewards, workers, seconds, "stop")

    def __enter__(self) -> Examiner:
        return self

    def __exit__(self, *_: object) -> None:
        self._scorer.__exit__()

    def examine(self, params: Params) -> tuple[dict[str, float], np.ndarray]:
        """`figures_of` the answers with `prompts_by_source`, and their rewards `[N]`. A few are left in the directory,
        as `answers.json`, beside what was said to the same prompts at the first evaluation.
        """
        config, rows = self._config, self._rows
        numbers = seeds(0, 0, len(rows), _SALT)
        answers = self._sampler.answers(params, rows, numbers, config.completions, config.max_completion_length)
        samples, scores = answers.samples, score_together(self._scorer, answers.samples)
        if is_first():
            told = [
                {"prompt": _asked(samples[i], answers.rows[i].rendered.pictures), **_said(samples[i], scores, i)}
                for i in _shown([row.source for row in rows], config.completions)
            ]
            _leave(self._directory / "answers.json", told, len(rows))
        asked = prompts_by_source([row.source for row in rows])
        return figures_of(samples, scores, [row.source for row in answers.rows]) | asked, scores.total


def figures_of(samples: Sequence[Sample], scores: Scores, sources: Sequence[str]) -> dict[str, float]:
    """`reward` (mean), each of its parts as `reward_<part>`, in all and of each source as `reward_<part>_<source>`;
    `loop_rate`, `truncated` and the mean `completion_length` in tokens."""
    found = {"reward": float(np.nanmean(scores.total)), **conduct(samples)}
    names = np.array(sources)
    for part, values in scores.parts.items():
        found[f"reward_{part}"] = float(np.nanmean(values))
        if len(set(sources)) > 1:
            for source in dict.fromkeys(sources):
                found[f"reward_{part}_{source}"] = float(np.nanmean(values[names == source]))
    return found


def prompts_by_source(sources: Sequence[str]) -> dict[str, float]:
    """How many prompts, given the source of each: `prompts`, and of several sources `prompts_<source>`."""
    counts = Counter(sources)
    by_source = {f"prompts_{source}": float(count) for source, count in counts.items()} if len(counts) > 1 else {}
    return {"prompts": float(len(sources)), **by_source}


def conduct(samples: Sequence[Sample]) -> dict[str, float]:
    """How answers end, and how long they are."""
    return {
        "loop_rate": float(np.mean([sample.looping for sample in samples])),
        "truncated": float(np.mean([sample.stopped == "length" for sample in samples])),
        "completion_length": float(np.mean([len(sample.tokens) for sample in samples])),
    }


def score_together(scorer: Scorer, samples: Sequence[Sample]) -> Scores:
    """Scores of all samples on every process, each having judged its share. Raises `UserError`: a reward failed, on any
    of them, or too many did where they may."""
    announce("scoring")
    count, index = jax.process_count(), jax.process_index()
    if count == 1:
        return scorer.score(samples)
    problem, own = None, Scores(np.zeros(0), {}, [])
    try:
        own = scorer.score_share(samples[index::count])
    except UserError as error:
        problem = str(error)
    if (said := first_problem(problem)) is not None:
        raise UserError(said)
    names = list(own.parts)
    share = np.full((-(-len(samples) // count), 1 + len(names)), np.nan)
    share[: len(own.total)] = np.stack([own.total, *(own.parts[name] for name in names)], axis=1)
    whole = gathered(share).swapaxes(0, 1).reshape(-1, 1 + len(names))[: len(samples)]
    scores = Scores(whole[:, 0], {name: whole[:, 1 + n] for n, name in enumerate(names)}, own.problems)
    if np.isnan(scores.total).any():
        check_enough(scores, first_problem(next(iter(own.problems), None)))
    return scores


def _shown(sources: Sequence[str], completions: int) -> list[int]:
    """Which answers are kept: one to each of the first prompts of every source, so that stages that ask the same
    sources keep the same prompts."""
    each = -(-SHOWN // max(len(set(sources)), 1))
    chosen = {name: [i for i, source in enumerate(sources) if source == name][:each] for name in dict.fromkeys(sources)}
    return [completions * i for i in sorted(i for first in chosen.values() for i in first)]


def _said(sample: Sample, scores: Scores, index: int) -> dict[str, Any]:
    number = lambda value: None if np.isnan(value) else float(value)
    parts = {name: number(values[index]) for name, values in scores.parts.items()}
    return {"answer": sample.text, "reward": number(scores.total[index]), "parts": parts}


def _asked(sample: Sample, pictures: Sequence[np.ndarray]) -> str:
    """What a conversation ends with, as JSON; an image with the picture that the model saw."""
    content = sample.prompt[-1].get("content")
    if isinstance(content, list):
        images = [chunk for chunk in content if chunk["type"] == "image"]
        shown = iter(pictures[len(pictures) - len(images) :])
        content = [chunk | ({"png": thumbnail(next(shown))} if chunk["type"] == "image" else {}) for chunk in content]
    return json.dumps(content, ensure_ascii=False)


def _leave(path: Path, told: list[dict[str, Any]], prompts: int) -> None:
    """Write answers, each with the one to the same prompt at the first evaluation of the stage as `before`."""
    earlier: list[dict[str, Any]] = []
    with suppress(OSError, ValueError, KeyError):
        earlier = json.loads(path.read_text(encoding="utf-8"))["answers"]
    for answer, old in zip(told, earlier, strict=False):
        if answer["prompt"] == old.get("prompt"):
            answer["before"] = old.get("before") or {key: old[key] for key in ("answer", "reward", "parts")}
    write_json(path, {"prompts": prompts, "answers": told})

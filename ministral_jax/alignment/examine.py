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
from ministral_jax.alignment.passing import PASS_AT, pass_at_k
from ministral_jax.alignment.rewards import RewardsConfig
from ministral_jax.alignment.rollout import Answers, Params, Sampler, seeds
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
    completions: int = Field(default=8, ge=0)
    """Drawn of each prompt at `temperature` beside the greedy answer: of 8 or more there is pass@8. 0: none."""
    max_completion_length: int = Field(default=256, ge=1)
    answers_at_once: int | None = Field(default=None, ge=1)
    """Completions that are drawn together, one such batch after the other; None: all."""
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Of the completions that are drawn."""
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
        self._sampler, self._rows = sampler, prompts.evaluation(config.prompts)
        self._config, self._directory = config, directory
        self._scorer = Scorer(config.rewards, workers, seconds, "stop")

    def __enter__(self) -> Examiner:
        return self

    def __exit__(self, *_: object) -> None:
        self._scorer.__exit__()

    def examine(self, params: Params) -> tuple[dict[str, float], np.ndarray]:
        """Figures, and the rewards of the answers that were drawn, of the greedy ones where none are. A few of the
        greedy answers are left in the directory, as `answers.json`, beside what was said to the same prompts at the
        first evaluation.

        The figures are `figures_of` the greedy answers; of those that were drawn `sampled_reward` and
        `sampled_loop_rate`; where a reward says right or wrong, in all and as `<figure>_<source>` of each source,
        `accuracy` of the greedy answers and `pass@<k>` by those that were drawn; and `prompts_by_source`.
        """
        sources = [row.source for row in self._rows]
        answers, scores = self._answers(params, 0.0, 1)
        samples, passed, rewards = answers.samples, self._scorer.passed(scores), scores.total
        solved = {} if passed is None else {"accuracy": passed}
        sampled = {}
        if count := self._config.completions:
            drawn, of_drawn = self._answers(params, self._config.temperature, count)
            passed, rewards = self._scorer.passed(of_drawn), of_drawn.total
            if passed is not None:
                solved |= {f"pass@{k}": pass_at_k(passed.reshape(-1, count), k) for k in PASS_AT if k <= count}
            sampled = {
                "sampled_reward": float(np.nanmean(rewards)),
                "sampled_loop_rate": conduct(drawn.samples)["loop_rate"],
            }
        if is_first():
            told = [
                {"prompt": _asked(samples[i], answers.rows[i].rendered.pictures), **_said(samples[i], scores, i)}
                for i in _shown(sources)
            ]
            _leave(self._directory / "answers.json", told, len(sources))
        shares = {name: float(values.mean()) for name, values in solved.items()}
        for name, values in solved.items():
            shares |= {f"{name}_{source}": mean for source, mean in _by_source(values, sources).items()}
        return {**shares, **figures_of(samples, scores, sources), **sampled, **prompts_by_source(sources)}, rewards

    def _answers(self, params: Params, temperature: float, each: int) -> tuple[Answers, Scores]:
        """To all prompts, always with the same random numbers, and what they are worth."""
        sampler = replace(self._sampler, temperature=temperature, at_once=self._config.answers_at_once)
        numbers = seeds(0, 0, len(self._rows), _SALT)
        answers = sampler.answers(params, self._rows, numbers, each, self._config.max_completion_length)
        return answers, score_together(self._scorer, answers.samples)


def figures_of(samples: Sequence[Sample], scores: Scores, sources: Sequence[str]) -> dict[str, float]:
    """`reward` (mean), each of its parts as `reward_<part>`, in all and of each source as `reward_<part>_<source>`;
    `loop_rate`, `truncated` and the mean `completion_length` in tokens."""
    found = {"reward": float(np.nanmean(scores.total)), **conduct(samples)}
    for part, values in scores.parts.items():
        found[f"reward_{part}"] = float(np.nanmean(values))
        found |= {f"reward_{part}_{source}": mean for source, mean in _by_source(values, sources).items()}
    return found


def _by_source(values: np.ndarray, sources: Sequence[str]) -> dict[str, float]:
    """Means over the prompts of each source, where there are several."""
    names = np.array(sources)
    several = dict.fromkeys(sources) if len(set(sources)) > 1 else ()
    return {source: float(np.nanmean(values[names == source])) for source in several}


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


def score_together(scorer: Scorer, samples: Sequence[Sample], few: bool = False) -> Scores:
    """Scores of all samples on every process, each having judged its share. Raises `UserError`: a reward failed, on any
    of them, or too many did where they may, unless there are `few`, all of which may fail by chance."""
    announce("scoring")
    count, index = jax.process_count(), jax.process_index()
    if count == 1:
        return scorer.score_share(samples) if few else scorer.score(samples)
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
    if np.isnan(scores.total).any() and not few:
        check_enough(scores, first_problem(next(iter(own.problems), None)))
    return scores


def _shown(sources: Sequence[str]) -> list[int]:
    """Which answers are kept: those to the first prompts of every source, so that stages that ask the same sources
    keep the same prompts."""
    each = -(-SHOWN // max(len(set(sources)), 1))
    chosen = {name: [i for i, source in enumerate(sources) if source == name][:each] for name in dict.fromkeys(sources)}
    return sorted(i for first in chosen.values() for i in first)


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

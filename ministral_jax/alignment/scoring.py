"""Scores samples: cheap rewards here, the others in worker processes under a time limit. Free of JAX.

A reward that raises, takes too long or returns no finite number is a fault that is said, never a silent zero. What
comes out depends neither on the number of workers nor on the order of the samples.
"""

from __future__ import annotations

import importlib
import math
import multiprocessing
import numbers
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, TimeoutError
from contextlib import suppress
from multiprocessing import resource_tracker
from typing import Any, Literal, NamedTuple, Self

import numpy as np

from ministral_jax.alignment import code_reward, mathematics, reward_functions
from ministral_jax.alignment.answer import Sample
from ministral_jax.alignment.reward_functions import format_reward
from ministral_jax.alignment.rewards import CHECKABLE, AccuracyReward, AnyReward, RubricReward
from ministral_jax.distributed.lifetime import die_with
from ministral_jax.errors import UserError

Judged = tuple[float | None, str | None]
"""A reward and None, or None and what went wrong."""

_CHEAP = ("format", "constraints", "language", "length")
"""Kinds that need no worker."""
_STOPS = frozenset({signal.SIGTERM, signal.SIGINT})


class Scores(NamedTuple):
    """Of N samples.

    total [N] float64: sum of weight * reward, 0 behind a gate; NaN for a sample that could not be scored and is to be
        left out.
    parts: each reward [N] float64, unweighted; NaN where it failed, 0 where a gate kept it from being given.
    problems: a sentence for each failure.
    """

    total: np.ndarray
    parts: dict[str, np.ndarray]
    problems: list[str]


def together(parts: Sequence[Scores]) -> Scores:
    """Those of one sample after the other, by the same rewards."""
    named = {name: np.concatenate([part.parts[name] for part in parts]) for name in parts[0].parts}
    problems = [problem for part in parts for problem in part.problems]
    return Scores(np.concatenate([part.total for part in parts]), named, problems)


class Scorer:
    """Rewards with their worker processes, which start when they are first needed.

    Args:
        workers: processes that score at once.
        seconds: that a reward may take for one sample (code has limits of its own).
        on_error: stop at a failure, or drop the sample, and stop when more than half of the samples have one.

    Raises:
        UserError: a function or judge that cannot be imported or called.
    """

    def __init__(
        self,
        rewards: Mapping[str, AnyReward],
        workers: int,
        seconds: float = 10,
        on_error: Literal["stop", "drop"] = "stop",
    ) -> None:
        self._rewards = dict(rewards)
        self._workers = workers
        self._seconds = seconds
        self._on_error = on_error
        self._pool: Any = None
        for name, reward in self._rewards.items():
            for path in _paths(reward):
                resolve(path, f"rewards.{name}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Ends the worker processes at once."""
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()
            self._pool = None

    def check(self, columns: Mapping[str, Any], where: str) -> None:
        """Raises `UserError`: a row that a reward could not judge, or a reward that cannot be given on this machine."""
        for reward in self._rewards.values():
            if reward.kind in _CHECKS:
                _CHECKS[reward.kind](columns, reward, where)

    def score(self, samples: Sequence[Sample]) -> Scores:
        """Raises `UserError`: a reward failed, or with `on_error="drop"` more than half of the samples have one that
        did."""
        scores = self.score_share(samples)
        check_enough(scores, next(iter(scores.problems), None))
        return scores

    def score_share(self, samples: Sequence[Sample]) -> Scores:
        """`score` of some of the samples: whether enough of all of them could be scored is for `check_enough` to
        say. Raises `UserError`: a reward failed, unless `on_error="drop"`."""
        gates = [reward for reward in self._rewards.values() if reward.kind == "format" and reward.gate]
        graded = [all(format_reward(sample, gate) for gate in gates) for sample in samples]
        start = lambda reward: [
            self._start(reward, sample) if grade else (0.0, None) for sample, grade in zip(samples, graded, strict=True)
        ]
        jobs = {name: start(reward) for name, reward in self._rewards.items()}
        parts, problems = {}, []
        try:
            for name, reward in self._rewards.items():
                parts[name] = np.full(len(samples), np.nan)
                for n, (sample, job) in enumerate(zip(samples, jobs[name], strict=True)):
                    value, fault = _outcome(job, self._allowed(reward))
                    if fault is None:
                        parts[name][n] = value
                        continue
                    problems.append(f"the reward {name} of {sample.where} {fault}")
                    if self._on_error == "stop":
                        raise UserError(problems[-1])
        finally:
            for job in (job for of_reward in jobs.values() for job in of_reward if isinstance(job, Future)):
                job.cancel()
        total = sum((self._rewards[name].weight * part for name, part in parts.items()), np.zeros(len(samples)))
        return Scores(total, parts, problems)

    def passed(self, scores: Scores) -> np.ndarray | None:
        """bool `[N]`: which samples are right by every reward that says right or wrong (`rewards.CHECKABLE`); None
        where there is no such reward."""
        parts = [scores.parts[name] == 1 for name, reward in self._rewards.items() if reward.kind in CHECKABLE]
        return np.all(parts, axis=0) if parts else None

    def _allowed(self, reward: AnyReward) -> float:
        """Seconds for one sample; of code those of all its tests, and what it takes to start processes."""
        return code_reward.MAX_TESTS * reward.seconds + 30 if reward.kind == "code" else self._seconds

    def _start(self, reward: AnyReward, sample: Sample) -> Future | Judged:
        """A reward that is known already, or that a worker will know."""
        cheap = reward.kind in (*_CHEAP, "accuracy")
        if reward.kind == "accuracy":
            with suppress(UserError):  # `_evaluate` says it
                cheap = mathematics.quick_accuracy(sample, reward) is not None
        if cheap:
            return _evaluate(reward, sample)
        if self._pool is None:
            self._pool = _start_pool(self._workers, tuple(self._rewards.values()))
        # The first task starts the workers, which begin without taking a stop, until `_prepare_worker` has it ignored.
        resource_tracker.ensure_running()  # it would let stops through again
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
        try:
            return self._pool.schedule(_evaluate, args=(reward, sample), timeout=self._allowed(reward))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def check_enough(scores: Scores, problem: str | None) -> None:
    """Raises `UserError`: more than half of the samples could not be scored; it says the first `problem`."""
    failed, count = int(np.isnan(scores.total).sum()), len(scores.total)
    if 2 * failed > count:
        raise UserError(f"{failed} of {count} samples could not be scored; the first: {problem}")


def resolve(path: str, where: str) -> Callable[..., Any]:
    """The function that `package.module:function` names. Raises `UserError`: it cannot be imported, is not there, or
    cannot be called."""
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever a user's module raises when it is imported
        raise UserError(f"{where}: {path} cannot be imported ({type(error).__name__}: {error})") from None
    if not callable(function):
        raise UserError(f"{where}: {path} is a {type(function).__name__}, not a function")
    return function


def _paths(reward: AnyReward) -> tuple[str, ...]:
    if reward.kind == "user":
        return (reward.function,)
    return (reward.judge,) if reward.kind == "rubric" else ()


def _start_pool(workers: int, rewards: tuple[AnyReward, ...]) -> Any:
    import pebble

    pebble.CONSTS.term_timeout = 0.1  # workers ignore SIGTERM, see below, and are killed
    return pebble.ProcessPool(
        max_workers=workers,
        context=multiprocessing.get_context("spawn"),  # a fork of a process that runs JAX may deadlock
        initializer=_prepare_worker,
        initargs=(os.getpid(), rewards),
    )


def _prepare_worker(job: int, rewards: tuple[AnyReward, ...]) -> None:
    # A job that is to stop has SIGTERM, or a terminal's SIGINT, in all its processes, and still this batch to finish.
    for stop in _STOPS:
        signal.signal(stop, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
    die_with(job)
    # Imports and grammars now, since the time of a sample counts from when a worker takes it.
    if any(reward.kind == "accuracy" for reward in rewards):
        mathematics.check_gold({"answer": "x + 1"}, AccuracyReward(), "")
    for path in (path for reward in rewards for path in _paths(reward)):
        with suppress(Exception):  # said when it is called
            resolve(path, "rewards")


def _rubrics(columns: Mapping[str, Any], where: str) -> list[str]:
    rubrics = columns.get("rubrics")
    if not isinstance(rubrics, list) or not rubrics or not all(isinstance(r, str) and r.strip() for r in rubrics):
        raise UserError(f"{where}: column rubrics is {rubrics!r}; the reward rubric needs a list of texts there")
    return rubrics


def _rubric_reward(sample: Sample, settings: RubricReward) -> float:
    judge = resolve(settings.judge, "rewards")
    verdicts = []
    for rubric in _rubrics(sample.columns, sample.where):
        verdict = judge(sample, rubric)
        if not isinstance(verdict, bool | np.bool_ | numbers.Real) or not 0 <= float(verdict) <= 1:
            raise ValueError(f"the judge says {verdict!r} to {rubric!r}, which is neither true, false nor from 0 to 1")
        verdicts.append(float(verdict))
    return math.fsum(verdicts) / len(verdicts)


def _evaluate(reward: AnyReward, sample: Sample) -> Judged:
    """Never raises: not every exception can be sent."""
    try:
        value = _FUNCTIONS[reward.kind](sample, reward)
    except BaseException as error:  # a function may call exit()
        return None, _raised(error)
    if not isinstance(value, bool | np.bool_ | numbers.Real) or not math.isfinite(value):
        return None, f"is {value!r}, not a finite number"
    return float(value), None


_CHECKS: dict[str, Callable[[Mapping[str, Any], Any, str], object]] = {
    "accuracy": mathematics.check_gold,
    "constraints": lambda columns, _, where: reward_functions.check_constraints(columns.get("constraints"), where),
    "code": code_reward.check_code,
    "rubric": lambda columns, _, where: _rubrics(columns, where),
}
"""Of a row's columns, by settings, at a place: what cannot be judged is refused."""

_FUNCTIONS: dict[str, Callable[[Sample, Any], Any]] = {
    "accuracy": mathematics.accuracy,
    "format": reward_functions.format_reward,
    "constraints": reward_functions.constraints_reward,
    "language": reward_functions.language_reward,
    "length": reward_functions.length_reward,
    "code": code_reward.code_reward,
    "rubric": _rubric_reward,
    "user": lambda sample, reward: resolve(reward.function, "rewards")(sample, **reward.options),
}


def _raised(error: BaseException) -> str:
    return f"raised {type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"


def _outcome(job: Future | Judged, seconds: float) -> Judged:
    if not isinstance(job, Future):
        return job
    from pebble import ProcessExpired

    try:
        return job.result()
    except TimeoutError:
        return None, f"took longer than {seconds:g} s"
    except ProcessExpired as error:
        return None, f"ended its process (exit code {error.exitcode})"
    except Exception as error:  # what could not be sent to a worker or back
        return None, _raised(error)

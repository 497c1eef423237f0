"""What a model scores at tasks while it is trained, and when that says that it is trained for the wrong thing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ministral_jax.distributed.collectives import from_first
from ministral_jax.errors import UserError
from ministral_jax.training.state import State

LEVEL = 0.025
"""Chance, at most, that one evaluation finds a fall where there is none: shared out over the tasks and, as the best of
many scores is partly luck, over the evaluations of which it is the best."""
_AIMS = {"loss": -1, "kl": -1, "ce": -1, "reward": 1}
"""Held-out figures that say how well a stage does what it is trained for, the most telling first; -1: by falling."""


@dataclass(frozen=True)
class Tasks:
    """What the loop asks. `ask`: whether each question of each task is answered right, always the same questions, alike
    on all processes; patience: see `Scores.fallen`; where: the place of these settings."""

    ask: Callable[[State], dict[str, list[bool]]]
    patience: int | None
    where: str


class Overoptimised(UserError):
    """A task's score has fallen while the loss fell; the state is kept."""


@dataclass(frozen=True)
class Score:
    """Right answers to a task at a step, and how well the stage did then what it is trained for."""

    step: int
    right: str
    """A 1 for each right answer, a 0 for each wrong one."""
    aim: float

    @property
    def count(self) -> int:
        return self.right.count("1")


class Scores:
    """The scores so far, from what `note` has told."""

    def __init__(
        self,
        seen: int = 0,
        aim: str | None = None,
        best: Mapping[str, Mapping[str, Any]] | None = None,
        last: Mapping[str, Mapping[str, Any]] | None = None,
        low: Mapping[str, int] | None = None,
    ):
        self._seen, self._aim, self._low = seen, aim, dict(low or {})
        self._best, self._last = ({task: Score(**one) for task, one in (of or {}).items()} for of in (best, last))

    def note(self) -> dict[str, Any]:
        """Small JSON."""
        if not self._seen:
            return {}
        best, last = ({task: asdict(one) for task, one in of.items()} for of in (self._best, self._last))
        return {"seen": self._seen, "aim": self._aim, "best": best, "last": last, "low": self._low}

    def add(self, step: int, figures: Mapping[str, float], answers: Mapping[str, Sequence[bool]]) -> dict[str, float]:
        """Take in an evaluation; its figures, the share `task_<name>` of `count_<name>` questions.

        A score has fallen where the same questions say so: of those that are answered otherwise than at the best
        score, more were right then than chance would have it (sign test, exact and one-sided, at `LEVEL`; McNemar,
        Psychometrika 12, 1947), while the stage does better what it is trained for. All processes must call it.
        """
        aims = [name for name in _AIMS if name in figures]
        rights = {task: "".join("01"[one] for one in found) for task, found in answers.items()}
        # so that all decide alike, whatever they round
        name, aim, rights = from_first([aims[0] if aims else None, figures[aims[0]] if aims else 0.0, rights])
        again = any(score.step == step for score in self._last.values())
        for task, right in rights.items():
            self._last[task] = score = Score(step, right, aim)
            best = self._best.get(task)
            if best is not None and not again:
                fell = fallen(best.right, right) <= LEVEL / (self._seen * len(rights))
                better = name is not None and (aim - best.aim) * _AIMS[name] > 0
                self._low[task] = self._low.get(task, 0) + 1 if fell and better else 0
            if best is None or score.count >= best.count:
                self._best[task] = score
        self._seen, self._aim = self._seen + (not again), name
        shares = {f"task_{task}": right.count("1") / len(right) for task, right in rights.items()}
        return shares | {f"count_{task}": float(len(right)) for task, right in rights.items()}

    def fallen(self, tasks: Tasks) -> str | None:
        """What has fallen in as many evaluations in a row as the patience of `tasks`, in words."""
        patience = tasks.patience
        task = next((task for task, times in self._low.items() if patience is not None and times >= patience), None)
        if task is None:
            return None
        best, last = self._best[task], self._last[task]
        went = "rose" if last.aim > best.aim else "fell"
        return (
            f"at step {last.step} {last.count} of {len(last.right)} questions of {task} are answered right, at step "
            f"{best.step} it was {best.count}, while the held-out {self._aim} {went} from {best.aim:.4g} to "
            f"{last.aim:.4g}; {tasks.where}.patience = {patience} stops there, null goes on"
        )


def fallen(before: str, now: str) -> float:
    """How likely it is, if a model is as good as before at the same questions, that at least as many of those whose
    answers differ were right before. Answers are strings of 0 and 1."""
    lost = sum(pair == ("1", "0") for pair in zip(before, now, strict=True))
    changed = sum(one != other for one, other in zip(before, now, strict=True))
    return sum(math.comb(changed, k) for k in range(lost, changed + 1)) / 2**changed

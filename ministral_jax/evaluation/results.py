"""Tasks one after the other, the result of each written once it is there, so that what was killed goes on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ministral_jax.console import say
from ministral_jax.distributed.collectives import barrier, from_first, is_first
from ministral_jax.errors import UserError
from ministral_jax.evaluation.examinee import Examinee
from ministral_jax.evaluation.suites import COMMAND, Asked, Setting
from ministral_jax.evaluation.tasks import TASKS, Asking, ask
from ministral_jax.files import write_json


@dataclass(frozen=True)
class Kept:
    """Where results stand, one JSON file for each task, and what they are of: a JSON value in which the model and all
    settings are that a score depends on."""

    directory: Path
    identity: dict[str, Any]

    def path(self, task: Asked) -> Path:
        return self.directory / f"{task}.json"

    def read(self, task: Asked) -> dict[str, Any] | None:
        """A result that is there. Raises `UserError`: it is of something else."""
        path = self.path(task)
        if not path.is_file():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            theirs, result = found["of"], found["result"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} is not a result of this program; delete it or choose another directory") from None
        if theirs != (ours := json.loads(json.dumps(self.identity))):
            key = next(key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key))
            raise UserError(
                f"{path} was found with {key} = {theirs.get(key)!r}, not {ours.get(key)!r}; choose another directory "
                "or delete it"
            )
        return result


def evaluate(
    tasks: Sequence[Asked], examinee: Examinee, asking: Asking, kept: Kept | None = None, setting: Setting = COMMAND
) -> dict[str, dict[str, Any]]:
    """The result of every task, in their order: see `tasks.ask` and `harness.run_harness`. What `kept` has is not found
    again.

    Raises:
        UserError: a task that is not there or cannot be asked, or results of something else.
    """
    check_installed(tasks, setting)
    known = [kept.read(task) if kept is not None else None for task in tasks]
    barrier("results read")  # before one of them is written
    found: dict[str, dict[str, Any]] = {}
    # all processes have the same to do, also where only the first sees the directory
    for task, result in zip(tasks, from_first(known), strict=True):
        is_new = result is None
        if result is not None:
            say(f"{task}: is there already")
        elif task.task in TASKS:
            result = ask(task.task, examinee, asking)
        else:
            from ministral_jax.evaluation.harness import run_harness

            result = run_harness(task, examinee, asking, setting)
        found[str(task)] = result
        if kept is not None and is_new and is_first():
            kept.directory.mkdir(parents=True, exist_ok=True)
            write_json(kept.path(task), {"of": kept.identity, "result": result})
    return found


def check_installed(tasks: Sequence[Asked], setting: Setting = COMMAND) -> None:
    """Raises `UserError`: one of them is not made here, and lm-evaluation-harness is not installed."""
    other = next((task for task in tasks if task.task not in TASKS), None)
    if other is not None and find_spec("lm_eval") is None:
        raise UserError(
            f"{setting.names} {other}: is none of {', '.join(TASKS)}, and tasks of lm-evaluation-harness need the "
            "extra eval; in the checkout, pip install -e '.[eval]'"
        )

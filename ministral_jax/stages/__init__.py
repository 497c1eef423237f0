"""The verbs. Each is a function from a job to a result: it reads finished stage directories and writes one."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from ministral_jax.config import Stage
from ministral_jax.stages.job import Job, Result


def verb(stage: Stage) -> Callable[[Job], Result]:
    """The function that carries out a stage of this kind."""
    module = {"import": "import_hf"}.get(stage.do, stage.do)  # type: ignore[attr-defined]
    return importlib.import_module(f"ministral_jax.stages.{module}").run


__all__ = ["Job", "Result", "verb"]

"""The verbs. Each is a function from a job to a result: it reads finished stage directories and writes one."""

from __future__ import annotations

from collections.abc import Callable

from ministral_jax.config import Stage
from ministral_jax.stages.job import Job, Result


def verb(stage: Stage) -> Callable[[Job], Result]:
    """The function that carries out a stage of this kind."""
    from ministral_jax.stages import distill, export, import_hf, prune, train

    verbs = {
        "train": train.run,
        "import": import_hf.run,
        "prune": prune.run,
        "distill": distill.run,
        "export": export.run,
    }
    return verbs[stage.do]  # type: ignore[attr-defined]


__all__ = ["Job", "Result", "verb"]

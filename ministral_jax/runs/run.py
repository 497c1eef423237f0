"""A whole run: its directory owned, its log opened, its programs kept, its stages brought to their end."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import jax

from ministral_jax.console import log_to
from ministral_jax.distributed.collectives import first_then_all, is_first
from ministral_jax.distributed.host_memory import trim_after_compiling
from ministral_jax.errors import UserError
from ministral_jax.recipe.types import Recipe
from ministral_jax.runs.cascade import run_cascade
from ministral_jax.runs.lock import owned


@contextmanager
def opened(run_dir: Path) -> Iterator[None]:
    """Own a run's directory, of a run or of a sweep, and log to `log.txt` in it; process 0 for all of them.

    Raises:
        UserError: somebody else owns it, or it cannot be written.
    """
    with ExitStack() as stack:

        def take() -> None:
            if is_first():
                stack.enter_context(owned(run_dir))
                log_to(run_dir / "log.txt")

        first_then_all(take)
        yield


def run_recipe(recipe: Recipe, run_dir: Path, stages: Iterable[str] = (), taken_from: Sequence[Path] = ()) -> list[str]:
    """Run the stages of a recipe in `run_dir`, with the programs that an earlier attempt has compiled; see
    `run_cascade`."""
    cache_compilations(run_dir / "xla")
    trim_after_compiling()
    return run_cascade(recipe, run_dir, stages, taken_from)


def cache_compilations(directory: Path) -> None:
    """Keep compiled programs in `directory`, so that going on does not compile again."""
    jax.config.update("jax_compilation_cache_dir", str(directory.absolute()))
    if jax.default_backend() == "cpu":  # else the key names the directory, and a copy of it serves nobody
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


def recipe_of(run_dir: Path) -> Recipe:
    """The recipe that a run was made by.

    Raises:
        UserError: not a run's directory.
    """
    path = run_dir / "recipe.json"
    if not path.is_file():
        raise UserError(f"{run_dir} is not a run: it has no recipe.json")
    try:
        return Recipe.model_validate(json.loads(path.read_bytes()))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path} is not a recipe: {' '.join(str(error).split())}") from None

"""From a recipe and a scheduler's name to a job: printed, written, or submitted with the scheduler's own client."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ministral_jax.errors import UserError
from ministral_jax.files import is_remote
from ministral_jax.launching import gke, local, slurm, tpu_vm
from ministral_jax.launching.fit import refuse_misfit, unfinished
from ministral_jax.recipe.launch import Launch
from ministral_jax.recipe.layers import sort_words
from ministral_jax.recipe.load import load_recipe, order
from ministral_jax.recipe.types import Recipe
from ministral_jax.runs.survey import made_specs


class _Scheduler(NamedTuple):
    render: Callable[[Any, str, tuple[str, ...]], str]
    """From what the recipe says, the job's name and the words of a `ministral-jax` command to the job."""
    suffix: str
    submit: tuple[str, ...]
    """The client's command, which reads the job from its standard input; a script that stays is run instead."""


SCHEDULERS = {
    "slurm": _Scheduler(slurm.render, ".sbatch", ("sbatch",)),
    "gke": _Scheduler(gke.render, ".yaml", ("kubectl", "create", "-f", "-")),
    "tpu-vm": _Scheduler(tpu_vm.render, ".sh", ()),
}


def launch(
    scheduler: str,
    recipe: str,
    rest: Sequence[str] = (),
    run_dir: Path | None = None,
    output: Path | None = None,
    submit: bool = False,
) -> int:
    """Render the job that runs `recipe` under `scheduler`, then print it, write it to `output` or submit it.

    Args:
        scheduler: a key of `SCHEDULERS`, or `local`, which runs at once.
        rest: stages, overlays and `key=value`, as of `run`; values under `launch.` shape the job and go no further.

    Returns:
        the exit code of the client, or of the job under `local` and under `tpu-vm` with `submit`; else 0.

    Raises:
        UserError: the recipe, its `launch:` block or a word of `rest` is at fault; a stage does not fit the machine
            that the job asks for; the client is not installed.
    """
    words, stages = sort_words(rest)
    settings = load_recipe(recipe, words)
    names = order(settings, stages)
    command = ("run", recipe, *(word for word in rest if not word.startswith("launch.")))
    command += ("--run-dir", str(run_dir)) if run_dir is not None else ()
    _check_text(command)
    if scheduler == "local":
        if output is not None or submit:
            raise UserError(
                "launch local runs at once: it has nothing to write or to submit, so leave out --output and --submit"
            )
        return local.run(settings.launch.local, command)
    job, kind = block(settings, scheduler, recipe, f"launch {scheduler}"), SCHEDULERS[scheduler]
    name = job.name or settings.name
    text = kind.render(job, name, command)
    there = run_dir or Path("runs") / settings.name
    if is_remote(there):  # who may read it there need not be who writes the job
        refuse_misfit(settings, names, job, {}, shared=True)
    else:
        refuse_misfit(settings, unfinished(names, there), job, made_specs(there))
    if output is not None:
        _write(text, output / f"{name}{kind.suffix}" if output.is_dir() else output, executable=not kind.submit)
    elif not submit:
        sys.stdout.write(text)
    return _submit(kind.submit, text) if submit else 0


def block(settings: Recipe, scheduler: str, recipe: str, asked: str) -> Launch:
    """What the recipe (read from the path `recipe`) says to a scheduler.

    Raises:
        UserError: nothing, though `asked` needs it.
    """
    key = scheduler.replace("-", "_")
    if (found := getattr(settings.launch, key)) is None:
        raise UserError(f"recipe {recipe} has no launch.{key}, which {asked} needs (see docs/launch.md)")
    return found


def _check_text(command: Sequence[str]) -> None:
    for word in command:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise UserError(f"{word!r} is not UTF-8 text, which a job's command must be") from None


def _write(text: str, path: Path, executable: bool) -> None:
    try:
        path.write_text(text, encoding="utf-8")
        if executable:
            path.chmod(0o755)
    except OSError as error:
        raise UserError(f"--output {path}: {error.strerror}") from None
    print(path, file=sys.stderr)


def _submit(client: tuple[str, ...], text: str) -> int:
    if not client:  # in place of this process, which would stand between the script and the signals it answers to
        sys.stdout.flush()
        os.execvp("bash", ["bash", "-c", text])
    try:
        return subprocess.run(client, input=text.encode(), check=False).returncode
    except FileNotFoundError:
        raise UserError(f"--submit needs {client[0]!r}, which is not installed here") from None

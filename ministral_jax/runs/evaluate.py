"""`ministral-jax evaluate`: a checkpoint's scores at tasks."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from rich.table import Table

from ministral_jax.console import say
from ministral_jax.distributed.collectives import from_first
from ministral_jax.distributed.processes import poll_slow
from ministral_jax.errors import UserError
from ministral_jax.evaluation.examinee import Examinee
from ministral_jax.evaluation.results import Kept, check_installed, evaluate
from ministral_jax.evaluation.suites import asked_for
from ministral_jax.evaluation.tasks import Asking
from ministral_jax.explain import validate
from ministral_jax.files import digest_of, file_digest
from ministral_jax.interop.checkpoint import CONFIGS
from ministral_jax.interop.hub import located
from ministral_jax.runs.generate import open_checkpoint, placed_checkpoint
from ministral_jax.stages.figures import Share, wilson
from ministral_jax.stages.manifest import digest, read_manifest


def run_evaluate(args: Namespace) -> Table:
    """The command, with the arguments that `commands` declares; the table of what was found.

    Raises:
        UserError: arguments, a checkpoint or a task that cannot be used.
    """
    settings = {name: getattr(args, name) for name in Asking.model_fields}
    asking = validate(Asking, settings, "ministral-jax evaluate", "--")
    if args.batch < 1:
        raise UserError(f"--batch {args.batch}; it must be at least 1")
    tasks, lacking = asked_for(args.tasks)
    check_installed(tasks)
    checkpoint = located(args.checkpoint)
    spec, tokenizer = open_checkpoint(checkpoint)
    held_out = _held_out(checkpoint)
    model, params, placement = placed_checkpoint(checkpoint, spec, args.dtype)
    kept = None
    if args.output is not None:
        # weights may lie on a disk of each process, with times of their own
        of = {"checkpoint": from_first(_identity(checkpoint)), "tokenizer": tokenizer.digest, "held_out": held_out}
        of |= {"dtype": model.compute.dtype}
        of |= asking.model_dump(mode="json")
        kept = Kept(args.output, of)
    if lacking:
        say(f"not in lm-evaluation-harness and not measured: {', '.join(lacking)}")
    examinee = Examinee(model, params, placement, tokenizer, held_out, args.batch, poll_slow)
    return score_table(checkpoint.name, evaluate(tasks, examinee, asking, kept))


def score_table(title: str, results: dict[str, dict[str, Any]]) -> Table:
    """A line for each score of each task, those of the parts of one below it."""
    table = Table("task", "score", "of", title=title)
    for task, result in results.items():
        cut = [f"{result[key]} {key}" for key in ("truncated", "unfinished", "left_out") if result.get(key)]
        if "accuracy" in result:
            for name, part in {task: result, **result.get("by", {})}.items():
                share, count = part["accuracy"], part["count"]
                shown = str(Share(share, count, *wilson(share, count))).partition(", n =")[0] + ")"
                told = [str(count), *(cut if part is result else [])]
                table.add_row(name if part is result else f"  {name}", shown, ", ".join(told))
            continue
        for name, scores in result["results"].items():
            for key, value in scores.items():
                if isinstance(value, float) and "_stderr" not in key:
                    error = scores.get(key.replace(",", "_stderr,"))
                    spread = f" ± {error:.4f}" if isinstance(error, float) else ""
                    table.add_row(f"{name}: {key.removesuffix(',none')}", f"{value:.4f}{spread}", ", ".join(cut))
    return table


def _held_out(checkpoint: Path) -> float:
    """The share of documents that a finished stage's data held out; 0 where that is not known."""
    manifest = read_manifest(checkpoint)
    return manifest.config.get("data", {}).get("held_out", 0.0) if manifest is not None else 0.0


def _identity(checkpoint: Path) -> str:
    """Of a finished stage its manifest's; of another directory that of its sizes and of its weights' names, sizes and
    times."""
    if (checkpoint / "manifest.json").is_file():
        return digest(checkpoint)
    weights = [(path.name, path.stat()) for path in sorted(checkpoint.glob("*.safetensors"))]
    files = [(name, found.st_size, found.st_mtime_ns) for name, found in weights]
    configs = [file_digest(checkpoint / name) for name in CONFIGS if (checkpoint / name).is_file()]
    return digest_of([*configs, files])

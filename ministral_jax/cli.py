"""`ministral-jax`: argument parsing and nothing else."""

from __future__ import annotations

import argparse
import shlex
import sys
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ministral_jax import __version__
from ministral_jax.arguments import add_processes, any_place, local_directory, run_directory
from ministral_jax.certify.command import add_certify
from ministral_jax.console import log, say
from ministral_jax.doctor.command import add_doctor
from ministral_jax.errors import UserError
from ministral_jax.interop.hub import model_place
from ministral_jax.runs.evaluate_command import add_evaluate

if TYPE_CHECKING:
    from rich.table import Table

    from ministral_jax.planning.plan import Plan
    from ministral_jax.recipe.types import Recipe


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 2 the user's input is at fault (said in one sentence on stderr),
    75 stopped or lost a peer and to be run again, 130 interrupted, 1 a fault (with its traceback)."""
    args = _parse(argv)
    try:
        return _carry_out(args)
    except KeyboardInterrupt:  # while JAX is loaded
        _say("interrupted")
        return 130


def _carry_out(args: argparse.Namespace) -> int:
    if args.command in (_run, _sweep):  # loading JAX takes a while
        say(f"ministral-jax {__version__}")
    from ministral_jax.distributed.processes import (  # loads JAX, which --help need not
        RETRY,
        Preempted,
        leave,
        lost_peer,
    )

    try:
        code = args.command(args) or 0
    except UserError as error:
        _say(str(error))
        return leave(2, together=True)
    except Preempted as stop:
        _say(f"{stop.said}, before {stop}; {stop.then}")
        return leave(stop.code, together=True)
    except KeyboardInterrupt:  # while nothing is computed that could be saved
        _say("interrupted")
        return leave(130, together=False)
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:  # a file or directory is at fault
            log(traceback.format_exc())
            _say(f"{error.filename}: {error.strerror}")
            return leave(2, together=False)
        say(traceback.format_exc())
        if lost_peer(error):
            _say("another process of this job is gone; the same command goes on from the last saved state")
            return leave(RETRY, together=False)
        return leave(1, together=False)
    return leave(code, together=True)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Options may stand between stages and overrides, which argparse alone would not have."""
    parser = _parser()
    args, more = parser.parse_known_args(argv)
    if any(word.startswith("-") for word in more) or (more and not hasattr(args, "rest")):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if more:
        args.rest = [*args.rest, *more]
    args.words = sys.argv[1:] if argv is None else argv
    return args


def _say(text: str) -> None:
    say(f"ministral-jax: {text}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ministral-jax", description="Turn one vision-language model into a family of small ones."
    )
    parser.add_argument("--version", action="version", version=f"ministral-jax {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run a recipe's stages; finished ones are skipped, interrupted ones resumed")
    run.add_argument("recipe", help="YAML file, e.g. configs/tiny.yaml")
    settings = "stages to run (default: all), and what is laid over the recipe: files, then values"
    run.add_argument("rest", nargs="*", metavar="STAGE | FILE.yaml | key=value", help=settings)
    run.add_argument("--run-dir", type=run_directory, help="where stages are written (default: runs/<recipe's name>)")
    run.add_argument("--dry-run", action="store_true", help="say what would be made, taken and skipped")
    run.add_argument("--all", action="store_true", help="the recipe's optional stages too")
    add_processes(run)
    run.set_defaults(command=_run)

    sweep = commands.add_parser("sweep", help="run a recipe at several settings; stages that they share are run once")
    sweep.add_argument("recipe", help="YAML file: a recipe, or a sweep, e.g. configs/sweeps/tiny_layer_score.yaml")
    sweep.add_argument(
        "rest", nargs="*", metavar="STAGE | FILE.yaml | key=v1,v2", help="stages, overlays, values to vary"
    )
    sweep.add_argument("--zip", action="store_true", help="keys vary together instead of in every combination")
    sweep.add_argument("--name", help="of the directory below runs/ (default: the file's name and what varies)")
    sweep.add_argument("--run-dir", type=local_directory, help="where points are written (default: runs/<name>)")
    sweep.add_argument(
        "--jobs", choices=("local", "slurm", "gke"), default="local", help="here, or print a scheduler's jobs"
    )
    sweep.set_defaults(command=_sweep)

    for command in (run, sweep):
        text = "a run or sweep from which stages are taken that were made in the same way; may be given several times"
        options: Any = dict(
            dest="taken_from", action="append", default=[], type=run_directory, metavar="RUN", help=text
        )
        command.add_argument("--from", **options)

    launch = commands.add_parser("launch", help="a scheduler's job that runs a recipe: printed, written or submitted")
    launch.add_argument("scheduler", choices=("slurm", "gke", "tpu-vm", "local"), help="`local` runs it here, at once")
    launch.add_argument("recipe", help="YAML file; its `launch:` block describes the job")
    launch.add_argument(
        "rest", nargs="*", metavar="STAGE | FILE.yaml | key=value", help="as of run; launch.slurm.nodes=4 and the like"
    )
    launch.add_argument("--run-dir", type=run_directory, help="where stages are written, as the job sees it")
    launch.add_argument(
        "--output", type=local_directory, metavar="FILE|DIR", help="write the job instead of printing it"
    )
    launch.add_argument("--submit", action="store_true", help="submit it with sbatch, kubectl or gcloud")
    launch.set_defaults(command=_launch)

    _add_plan(commands)

    status = commands.add_parser("status", help="how far a run is, or all of runs/")
    status.add_argument("run_dir", type=run_directory, nargs="?", metavar="RUN")
    status.set_defaults(command=_status)

    compare = commands.add_parser("compare", help="settings in which two runs differ, and their figures")
    compare.add_argument("run_dirs", type=run_directory, nargs=2, metavar="RUN")
    compare.set_defaults(command=_compare)

    clean = commands.add_parser("clean", help="what a run or a sweep keeps that no finished result needs")
    clean.add_argument("run_dir", type=run_directory, metavar="RUN")
    clean.add_argument("--delete", action="store_true", help="remove it instead of listing it")
    clean.set_defaults(command=_clean)

    report = commands.add_parser("report", help="write the report and the figures of a run or of a sweep")
    report.add_argument("run_dir", type=run_directory, metavar="RUN")
    report.set_defaults(command=_report)

    export = commands.add_parser("export", help="write a finished stage for other programs")
    export.add_argument("checkpoint", type=any_place, help="directory of a finished stage")
    export.add_argument("destination", type=any_place, metavar="DIR")
    export.add_argument(
        "--format", choices=("hf", "native", "fp8", "gguf"), default="hf", help="the files and their names (hf)"
    )
    dtypes = ("float32", "bfloat16", "float16", "q8_0", "q4_0")
    export.add_argument("--dtype", choices=dtypes, default="bfloat16", help="the last three in gguf (bfloat16)")
    export.add_argument("--license", metavar="ID", help="of the parent, for the model card, e.g. apache-2.0")
    export.add_argument("--base-model", metavar="OWNER/NAME", help="the parent on a hub, for the model card")
    export.add_argument("--language", dest="languages", action="append", default=[], metavar="CODE", help="of the data")
    export.set_defaults(command=_export)

    generate = commands.add_parser("generate", help="let a checkpoint go on from a text, a chat or images")
    generate.add_argument(
        "checkpoint", type=model_place, help="directory of a finished stage or of a model, or its name on the hub"
    )
    generate.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    generate.add_argument(
        "--image", action="append", default=[], type=any_place, metavar="FILE", help="before every prompt"
    )
    generate.add_argument("--chat", action="store_true", help="prompts are a user's messages, not texts to go on with")
    generate.add_argument("--think", action="store_true", help="the answer begins with reasoning")
    generate.add_argument("--max-tokens", type=int, default=256, metavar="N")
    generate.add_argument("--temperature", type=float, default=1.0, metavar="T", help="0: always the most probable")
    generate.add_argument("--top-p", type=float, default=1.0, metavar="P")
    generate.add_argument("--top-k", type=int, default=0, metavar="K")
    generate.add_argument("--seed", type=int, default=0, metavar="S")
    generate.add_argument("--jsonl", type=any_place, metavar="IN", help='rows of {"prompt", "images"} or {"messages"}')
    generate.add_argument("--on-bad-row", choices=("stop", "skip"), default="stop", help="rows that cannot be used")
    generate.add_argument("--output", type=Path, metavar="OUT", help="the rows with their completions")
    generate.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of parameters (default: bfloat16, on a CPU float32)"
    )
    generate.add_argument("--cpu-devices", type=int, metavar="N", help="run on N virtual CPU devices")
    generate.set_defaults(command=_generate)
    add_doctor(commands)
    add_certify(commands)
    add_evaluate(commands)
    return parser


def _add_plan(commands: Any) -> None:
    text = "whether a recipe fits a machine, how long it takes there and what must change; nothing is run"
    plan = commands.add_parser("plan", help=text)
    plan.add_argument("recipe", help="YAML file")
    plan.add_argument("rest", nargs="*", metavar="STAGE | FILE.yaml | key=value", help="as of run")
    plan.add_argument("--on", required=True, metavar="CHIP:SHAPE", help="v5p:4x4x8, v6e:16x16, h100:32, .. or here")
    plan.add_argument("--slices", type=int, metavar="N", help="TPU slices joined by a network")
    plan.add_argument("--price", type=float, metavar="P", help="of a chip for an hour, in any currency")
    plan.add_argument("--all", action="store_true", help="the recipe's optional stages too")
    pairs: Any = dict(action="append", default=[])
    plan.add_argument("--sizes", **pairs, metavar="STAGE=PRESET", help="sizes of an import that is not here")
    plan.add_argument("--assume", **pairs, metavar="NAME=VALUE", help="another figure of the model, see docs/plan.md")
    plan.add_argument("--search", action="store_true", help="find meshes, microbatches and remat that are faster")
    plan.add_argument("--compile", action="store_true", help="ask XLA's compiler, of the stages named; minutes each")
    plan.add_argument("--run-dir", type=local_directory, help="with --on here, where the run would be written")
    plan.add_argument("--output", type=Path, metavar="FILE.json|FILE.html", help="all figures, or a page with pictures")
    plan.set_defaults(command=_plan)


def _plan(args: argparse.Namespace) -> int:
    from ministral_jax.planning.command import run_plan

    def page(plan: Plan) -> str:
        from ministral_jax.report.plan import plan_page  # loads Matplotlib

        return plan_page(plan, shlex.join(["ministral-jax", *args.words]))

    return run_plan(args, page)


def _run(args: argparse.Namespace) -> None:
    from ministral_jax.distributed.collectives import barrier, is_first
    from ministral_jax.distributed.processes import join, use_cpu
    from ministral_jax.recipe.layers import sort_words
    from ministral_jax.recipe.load import load_recipe, order, resolve_specs
    from ministral_jax.runs.run import opened, run_recipe
    from ministral_jax.runs.survey import made_specs, shelves

    settings, stages = sort_words(args.rest)
    load = partial(load_recipe, args.recipe, settings, lambda name: made_specs(args.run_dir or Path("runs") / name))
    recipe = load()
    run_dir = args.run_dir or Path("runs") / recipe.name
    made = made_specs(run_dir)
    fetched = [stage.fetch() for name, stage in recipe.stages.items() if name not in made]
    recipe = load() if any(fetched) else recipe  # what has been downloaded has sizes, and so companions
    if args.all and stages:
        raise UserError(f"--all runs every stage, {', '.join(stages)} too; give the names or --all")
    stages = list(recipe.stages) if args.all else stages
    resolve_specs(recipe, order(recipe, stages), made)  # before the directory is made
    shelves(args.taken_from)
    if args.dry_run:
        return _dry_run(recipe, run_dir, stages, args.taken_from)
    if args.cpu_devices is not None:
        use_cpu(args.cpu_devices)
    join(recipe.limits, args.distributed, args.coordinator, args.process_count, args.process_index)
    with opened(run_dir):
        ran = run_recipe(recipe, run_dir, stages, args.taken_from)
        if is_first():
            _finish_run(recipe, run_dir, ran)
        barrier("reported")


def _dry_run(recipe: Recipe, run_dir: Path, stages: list[str], taken_from: list[Path]) -> None:
    from tempfile import TemporaryDirectory

    from ministral_jax.runs.survey import shelves, survey
    from ministral_jax.runs.tables import plan_table

    with TemporaryDirectory() as scratch:
        plans = survey(recipe, run_dir, stages, shelves(taken_from), Path(scratch))
    _print_table(plan_table(recipe, plans))


def _finish_run(recipe: Recipe, run_dir: Path, names: Sequence[str] = ()) -> None:
    """The summary, the tables and the page of what a run has made."""
    from ministral_jax.report import build_report
    from ministral_jax.runs.reading import read_run
    from ministral_jax.runs.summary import write_summary
    from ministral_jax.runs.tables import family_table, stage_table

    summary = write_summary(recipe, run_dir)
    page = build_report(run_dir)
    run = read_run(run_dir)
    _print_table(stage_table(run, names))
    if summary.children:
        _print_table(family_table(run))
    for note in run.notes:
        say(note)
    say(f"report: {page}")


def _status(args: argparse.Namespace) -> None:
    from ministral_jax.runs.reading import read_run
    from ministral_jax.runs.tables import stage_table, status_lines, status_table

    if args.run_dir is None:
        run_dirs = sorted(path.parent for path in Path("runs").glob("*/recipe.json"))
        return _print_table(status_table(run_dirs)) if run_dirs else say("there is no run in runs/")
    if (args.run_dir / "sweep.json").is_file():
        return _print_table(status_table(sorted(path.parent for path in args.run_dir.glob("*/recipe.json"))))
    run = read_run(args.run_dir)
    _print_table(stage_table(run))
    print("\n".join(status_lines(args.run_dir, run)))


def _compare(args: argparse.Namespace) -> None:
    from ministral_jax.runs.tables import comparison_tables

    for table in comparison_tables(args.run_dirs):
        _print_table(table)


def _clean(args: argparse.Namespace) -> None:
    from ministral_jax.runs.clean import leftovers, remove, size
    from ministral_jax.runs.lock import owned

    leftovers(args.run_dir)  # before anything is written in what is no run
    with owned(args.run_dir):
        for what, paths in leftovers(args.run_dir).items():
            print(f"{sum(map(size, paths)) / 1e6:12,.1f} MB  {what}: {', '.join(str(p) for p in paths)}")
            for path in paths if args.delete else ():
                remove(path)
    if not args.delete:
        print("nothing was removed; add --delete")


def _print_table(table: Table) -> None:
    from rich.console import Console

    width = None if sys.stdout.isatty() else 120  # in a log, rich would cut the columns at 80
    Console(width=width).print(table)


def _sweep(args: argparse.Namespace) -> int:
    from ministral_jax.distributed.processes import Limits, join
    from ministral_jax.runs.sweep import read_sweep
    from ministral_jax.runs.sweep_run import run_sweep

    join(Limits())  # one process: for its answer to SIGTERM
    sweep = read_sweep(args.recipe, args.rest, args.zip, args.name)
    run_dir = args.run_dir or Path("runs") / sweep.name
    if args.jobs == "local":
        return run_sweep(sweep, run_dir, args.taken_from, lambda: _finish_sweep(run_dir))
    if args.taken_from:
        raise UserError("--from needs --jobs local: jobs of a scheduler make what they need")
    from ministral_jax.launching.sweep_jobs import prepare_jobs

    sys.stdout.write(prepare_jobs(sweep, run_dir, args.jobs))
    return 0


def _finish_sweep(sweep_dir: Path) -> None:
    """The record, the table and the page of what a sweep has made."""
    from ministral_jax.report.sweep import build_sweep_report
    from ministral_jax.runs.sweep_run import read_record, refresh
    from ministral_jax.runs.sweep_table import sweep_table

    _print_table(sweep_table(refresh(read_record(sweep_dir), sweep_dir)))
    print(f"report: {build_sweep_report(sweep_dir)}", file=sys.stderr)


def _launch(args: argparse.Namespace) -> int:
    from ministral_jax.launching.launch import launch

    return launch(args.scheduler, args.recipe, args.rest, args.run_dir, args.output, args.submit)


def _report(args: argparse.Namespace) -> None:
    if (args.run_dir / "sweep.json").is_file():
        return _finish_sweep(args.run_dir)
    from ministral_jax.runs.run import recipe_of

    _finish_run(recipe_of(args.run_dir), args.run_dir)


def _export(args: argparse.Namespace) -> None:
    from ministral_jax.distributed.placement import MeshConfig, Placement, Rules, make_mesh
    from ministral_jax.stages.card import read_card
    from ministral_jax.stages.export import export_stage

    placement = Placement(make_mesh(MeshConfig()), Rules())
    card = read_card({key: getattr(args, key) for key in ("license", "base_model", "languages")})
    export_stage(args.checkpoint, args.destination, args.dtype, placement, args.format, card)
    say(f"{args.destination}: written in {args.dtype}")


def _generate(args: argparse.Namespace) -> None:
    from ministral_jax.distributed.processes import Limits, join, use_cpu

    if args.cpu_devices is not None:
        use_cpu(args.cpu_devices)
    join(Limits())
    from ministral_jax.runs.generate import run_generate

    run_generate(args)


if __name__ == "__main__":
    sys.exit(main())

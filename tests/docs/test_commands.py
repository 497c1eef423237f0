"""Every command that README, docs and the recipes' comments print is run here as it stands, in one directory that looks
like a checkout after `make cascade`; those that need hours, a cluster or a network are checked as far as they go."""

from __future__ import annotations

import argparse
import contextlib
import re
import runpy
import sys
import tomllib

import pytest
from docs_blocks import commands, words
from paths import ROOT

from ministral_jax import cli
from ministral_jax.recipe.layers import sort_words
from ministral_jax.recipe.load import load_recipe
from ministral_jax.runs.sweep import expand, read_sweep

CHECKED = {
    "ministral-jax run configs/": "makes a family: ten minutes and more, or days on a cluster",
    "ministral-jax run own.yaml": "test_own_model.py runs it",
    "ministral-jax generate runs/rehearsal": "test_own_model.py runs it",
    "ministral-jax export runs/rehearsal/half gs://": "needs a bucket",
    "ministral-jax export runs/rehearsal/half half-": "test_own_model.py runs it",
    "ministral-jax export runs/tiny/parent parent": "test_own_model.py exports a parent",
    "ministral-jax certify": "tests/certify does, and tests/parity with transformers",
    "ministral-jax evaluate runs/tiny/14b-instruct --tasks paper": "downloads data sets",
    "ministral-jax sweep": "makes a family several times",
    "ministral-jax launch local": "two processes that make a family",
    "ministral-jax plan configs/ministral3_base.yaml configs/machines/v5p-128.yaml 14b-short": "compiles for minutes",
    "python -m ministral_jax run": "runs recipes of the tests at two commits",
    "python benchmarks/": "measures for minutes",
    "pip install": "needs a network",
    "pytest ": "tests, which are run as such",
    "make ": "CI runs them, each at its place",
    "git ": "of a release, or of a checkout",
    "cd ": "moves between two checkouts",
    "export ": "of a shell",
    "sh job.sh": "needs gcloud and a TPU",
    "source ": "of a shell",
    "tensorboard ": "another program, which is not installed with this one",
}
"""What is not run, by how it begins, and why; everything else is."""
ALL = commands()


def reason_not_to_run(command: str) -> str | None:
    found = [why for start, why in CHECKED.items() if command.startswith(start)]
    return found[0] if found else "submits a job" if "--submit" in words(command) else None


@pytest.mark.parametrize("command", [command for command in ALL if reason_not_to_run(command) is None])
def test_a_command_works_as_it_is_printed(command, checkout, monkeypatch, capsys):
    monkeypatch.chdir(checkout)
    program, *rest = words(command)
    assert program == "ministral-jax", f"say in CHECKED why `{command}` of {ALL[command]} is not run"
    written = [checkout / rest[i + 1] for i, word in enumerate(rest) if word == "--output"]
    for path in written:  # of another page's command
        path.unlink(missing_ok=True)
    with contextlib.suppress(SystemExit) if rest == ["--version"] else contextlib.nullcontext():
        assert cli.main(rest) == 0, capsys.readouterr().err
    said = capsys.readouterr()
    assert all(path.exists() for path in written)
    assert written or said.out.strip(), "it says nothing and writes nothing"


def test_nothing_is_excused_that_is_not_there():
    assert [start for start in CHECKED if not any(command.startswith(start) for command in ALL)] == []
    assert len(ALL) > 40


OURS = ("ministral-jax ", "python -m ministral_jax ")


@pytest.mark.parametrize("command", [c for c in ALL if reason_not_to_run(c) and c.startswith(OURS)])
def test_what_is_not_run_is_understood(command, monkeypatch, checkout):
    """Options, stages, overrides and recipe, through what the command itself calls."""
    monkeypatch.chdir(checkout)
    args = cli._parse(words(command)[1 if command.startswith(OURS[0]) else 3 :])
    rest = getattr(args, "rest", [])
    if command.startswith("ministral-jax sweep"):
        assert expand(read_sweep(args.recipe, rest, args.zip))
    elif hasattr(args, "submit"):  # rendered, which finds every fault of the recipe and of its launch block
        without = [word for word in words(command)[1:] if word != "--submit"]
        if args.scheduler != "local":
            assert cli.main(without) == 0
    elif args.command is cli.run and args.recipe == "configs/tiny.yaml":  # what would be made
        assert cli.main([*words(command)[1:], "--dry-run"]) == 0
    if "sweep" not in command and hasattr(args, "recipe") and args.recipe.startswith(("configs/", "tests/")):
        settings, stages = sort_words(rest)
        assert set(stages) <= load_recipe(ROOT / args.recipe, settings).stages.keys()


@pytest.mark.parametrize("command", [c for c in ALL if c.startswith("python benchmarks/")])
def test_arguments_of_a_benchmark_are_understood(command, monkeypatch):
    class Parsed(Exception):
        pass

    parse = argparse.ArgumentParser.parse_args

    def stop(self, *given, **named):
        parse(self, *given, **named)
        raise Parsed

    _, script, *rest = words(command)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [script, *rest])
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    with pytest.raises(Parsed):
        runpy.run_path(str(ROOT / script), run_name="__main__")


def test_what_is_installed_has_a_name():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for command in ALL:
        if command.startswith("pip install"):
            named = [name for found in re.findall(r"(?:\.|jax)\[([\w,]+)\]", command) for name in found.split(",")]
            assert set(named) <= {*extras, "opencv"}, command


def test_tests_that_are_named_are_there():
    markers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["markers"]
    for command in ALL:
        if command.startswith("pytest "):
            found = words(command)[1:]
            assert all((ROOT / word).exists() for word in found if word.startswith("tests/")), command
            if "-m" in found:
                assert found[found.index("-m") + 1] in {marker.split(":")[0] for marker in markers}


def test_what_make_runs_is_checked_or_run_elsewhere():
    """Of the targets that docs name, CI runs all but conveniences and long ones; the cascade is the recipe."""
    made = {word for command in ALL if command.startswith("make ") for word in words(command.split("&&")[0])[1:]}
    ci = {word for line in re.findall(r"^make (.*)", (ROOT / ".ci/run").read_text(), re.M) for word in line.split()}
    assert made - ci <= {"chaos", "format", "fuzz", "llama", "plan"}
    assert "ministral-jax run configs/tiny.yaml" in (ROOT / "Makefile").read_text()

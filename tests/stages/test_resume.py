"""Killed while it trains, distils or exports, a run goes on and ends in the same bits.

tests/chaos kills jobs of two processes in every phase.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from harness import COMPILING, Job
from paths import TESTS

import ministral_jax
from ministral_jax.stages.base import load_stage
from ministral_jax.stages.manifest import read_manifest

MICRO = TESTS.joinpath("micro.yaml")
TOKEN = "hf_" + 3 * "nobody-may-read"
STAGES = ("parent", "14b-pruned", "14b-short", "14b-hf")


CASCADE = (str(MICRO), "14b-hf", "stages.14b-hf.from=14b-short")


def job(run_dir: Path, recipe: tuple[str, ...]) -> Job:
    return Job(run_dir, 1, 1, *recipe[1:], recipe=Path(recipe[0]))


def finish(run_dir: Path, recipe: tuple[str, ...] = CASCADE) -> str:
    with job(run_dir, recipe) as begun:
        begun.finish()
        return begun.log()


def kill_when(run_dir: Path, ready, recipe: tuple[str, ...] = CASCADE) -> None:
    with job(run_dir, recipe) as begun:
        assert begun.until(ready), begun.tails()
        begun.kill([0])


def same(ours, theirs) -> bool:
    return jax.tree.all(jax.tree.map(np.array_equal, ours, theirs))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    """As a user starts it."""
    run_dir = tmp_path_factory.mktemp("unbroken")
    command = [sys.executable, "-m", "ministral_jax", "run", *CASCADE, "--run-dir", str(run_dir), "--cpu-devices", "1"]
    secrets = {"HF_TOKEN": TOKEN, "WANDB_API_KEY": TOKEN}
    done = subprocess.run(command, env={**os.environ, **COMPILING, **secrets}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (run_dir / "log").write_text(done.stdout + done.stderr)
    return run_dir


def test_a_token_of_the_environment_is_nowhere_in_the_run(unbroken):
    files = [path for path in unbroken.rglob("*") if path.is_file()]
    assert len(files) > 50
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]


def lines(run_dir: Path, stage: str) -> int:
    path = run_dir / stage / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.is_file() else 0


def moments(run_dir: Path) -> dict:
    """When to kill."""
    return {
        "train, after a save": lambda: (run_dir / "parent" / "state" / "2").is_dir() and lines(run_dir, "parent") >= 6,
        "prune": lambda: (run_dir / "14b-pruned" / "stage.json").is_file(),
        "distill, parameters written": lambda: (run_dir / "14b-short" / "params").is_dir(),
        "export": lambda: (run_dir / "14b-hf" / "stage.json").is_file(),
    }


def test_killed_it_ends_in_the_same_bits(unbroken, tmp_path):
    run_dir = tmp_path / "broken"
    run_dir.mkdir()
    (run_dir / "xla").symlink_to(unbroken / "xla")  # the same programs, compiled
    finished: dict[str, str] = {}
    for name, ready in moments(run_dir).items():
        kill_when(run_dir, ready)
        for stage in STAGES:
            if (path := run_dir / stage / "manifest.json").is_file():
                text = path.read_text()
                assert finished.setdefault(stage, text) == text, f"{stage} was run again ({name})"
    output = finish(run_dir)
    assert set(finished) >= {"parent", "14b-pruned", "14b-short"}
    assert all(f"{stage}: finished already" in output for stage in finished)
    for stage in ("parent", "14b-pruned", "14b-short"):
        _, ours = load_stage(run_dir / stage)
        _, theirs = load_stage(unbroken / stage)
        assert same(ours, theirs), stage
        assert _figures(run_dir, stage) == _figures(unbroken, stage), stage
    for path in (unbroken / "14b-hf" / "hf").glob("*.safetensors"):
        assert path.read_bytes() == (run_dir / "14b-hf" / "hf" / path.name).read_bytes()


def _figures(run_dir: Path, stage: str) -> list:
    """Every figure of every step but those that measure time: no step is missing, none is there twice."""
    path = run_dir / stage / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    records = [r for r in records if r["kind"] != "time"]
    return [{k: v for k, v in r.items() if not k.startswith("tokens_per_second")} for r in records]


def test_a_killed_import_is_done_again(unbroken, tmp_path):
    stages = {"model": {"do": "import", "path": str(unbroken / "14b-hf" / "hf")}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"stages": stages}))
    recipe, run_dir = (str(tmp_path / "r.yaml"),), tmp_path / "run"
    kill_when(run_dir, lambda: (run_dir / "model" / "stage.json").is_file(), recipe)
    assert read_manifest(run_dir / "model") is None
    finish(run_dir, recipe)
    assert same(load_stage(run_dir / "model")[1], load_stage(unbroken / "14b-short")[1])


def test_a_finished_run_does_nothing(unbroken):
    before = {path: path.stat().st_mtime_ns for path in unbroken.rglob("manifest.json")}
    output = finish(unbroken)
    assert output.count("finished already") == len(STAGES)
    assert before == {path: path.stat().st_mtime_ns for path in unbroken.rglob("manifest.json")}


def test_a_manifest_names_what_it_was_made_from(unbroken):
    manifest = read_manifest(unbroken / "14b-short")
    assert manifest.inputs["parent"].stage == "14b-pruned" and manifest.inputs["teacher"].stage == "parent"
    assert manifest.versions["jax"] == jax.__version__
    assert (manifest.tokens, manifest.steps) == (6 * 4 * 64, 6)


def test_the_vision_tower_is_the_parents(unbroken):
    _, parent = load_stage(unbroken / "parent")
    _, child = load_stage(unbroken / "14b-short")
    assert same(child["vision"], parent["vision"])
    assert not same(child["projector"], parent["projector"])


def test_a_stage_and_its_export_load_as_the_same_model(unbroken):
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12) + 100
    logits = []
    for path in (unbroken / "14b-short", unbroken / "14b-hf" / "hf"):
        model, params = ministral_jax.load(path)
        logits.append(np.asarray(model.apply({"params": params}, tokens)))
    assert logits[0].shape == (2, 12, 512)
    np.testing.assert_array_equal(*logits)


def test_summary_and_report_of_an_unfinished_family(unbroken):
    summary = json.loads((unbroken / "summary.json").read_text())
    assert (
        summary["parent"]["parameters"] > 0 and summary["children"] == {}
    )  # its last stage, 14b-base, was not asked for
    assert (unbroken / "report.html").is_file()

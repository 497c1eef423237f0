"""A sweep's jobs: no stage is ever run by two, each waits for what it needs, its command is the point's own."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import yaml
from paths import TESTS
from test_launch_jobs import shellcheck

from ministral_jax.cli import main
from ministral_jax.launching.sweep_jobs import plan
from ministral_jax.recipe.load import load_recipe
from ministral_jax.runs.sweep import SweepRecord, expand, read_sweep

MICRO = str(TESTS.joinpath("micro.yaml"))
SCORE = "stages.14b-pruned.options.mlp_score"
TEXT = "data.sources.code={kind: text, path: a b, weight: 0.6}"
WORDS = (MICRO, "14b-short", "stages.14b-short.seed=1,10", f"{SCORE}=activation,random", TEXT)


def test_jobs_never_run_a_stage_at_once():
    sweep = read_sweep(MICRO, WORDS[1:])
    points = expand(sweep)
    jobs = plan(sweep, points)
    assert [(job.name, job.point.name, job.stages, job.after) for job in jobs[:3]] == [
        ("shared-1", "seed=1_mlp-score=activation", ("parent", "14b-pruned"), None),
        ("shared-2", "seed=1_mlp-score=random", ("14b-pruned",), "shared-1"),
        ("point-1", "seed=1_mlp-score=activation", ("14b-short",), "shared-2"),
    ]
    assert len(jobs) == 6 and all(job.after == "shared-2" for job in jobs[2:])
    done = {points[0].stages[stage] for stage in ("parent", "14b-pruned", "14b-short")}
    assert [job.name for job in plan(sweep, points, done)] == ["shared-1", "point-2", "point-3", "point-4"]
    assert plan(sweep, points, {where for p in points for where in p.stages.values()}) == []


def test_jobs_for_slurm(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("it's").mkdir()
    argv = ["sweep", *WORDS, "launch.slurm.nodes=2", "--run-dir", "it's/s", "--jobs", "slurm"]
    assert main(argv) == 0
    script = capsys.readouterr().out
    shellcheck(script, "sh")
    assert Path("it's/s/seed=10_mlp-score=random/parent").resolve().parent == tmp_path / "it's" / "s" / "shared"
    (tmp_path / "sbatch").write_text("""#!/bin/sh
echo x >> count; n=$(wc -l < count | tr -d ' '); cat > job-$n; echo "$@" > arguments-$n; echo "$((100 + n));cluster"
""")
    (tmp_path / "sbatch").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["sh"], input=script, text=True, check=True, env=environment)
    arguments = [Path(f"arguments-{n}").read_text().strip() for n in range(1, 7)]
    after = "--parsable --kill-on-invalid-dep=yes --dependency=afterok:"
    assert arguments == ["--parsable", f"{after}101", *[f"{after}102"] * 4]
    job = Path("job-2").read_text()
    assert job.startswith("#!/bin/bash\n") and "#SBATCH --nodes=2\n" in job and "launch.slurm" not in job
    (line,) = [line for line in job.splitlines() if "ministral-jax run" in line]
    words = shlex.split(line)
    assert words[:4] == ["ministral-jax", "run", MICRO, "14b-pruned"] and words[-1] == "--distributed"
    assert f"{SCORE}=random" in words and TEXT.partition("=")[0] in line
    assert words[words.index("--run-dir") + 1] == "it's/s/seed=1_mlp-score=random"
    overrides = [word for word in words if "=" in word and not word.startswith("it's")]
    assert load_recipe(MICRO, overrides).stages == expand(read_sweep(MICRO, WORDS[1:]))[1].recipe.stages
    record = SweepRecord.model_validate_json(Path("it's/s/sweep.json").read_bytes())
    assert [point.state for point in record.points] == ["unfinished"] * 4


def test_jobs_for_gke(tmp_path, capsys):
    argv = ["sweep", *WORDS, "--run-dir", str(tmp_path / "s"), "--jobs", "gke"]
    assert main(argv) == 2 and "has no launch.gke, which --jobs gke needs" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()
    gke = ["launch.gke={image: registry.example/m:1, volume: {bucket: b}, tpu: {type: v5e, topology: 4x4}}"]
    assert main(argv[:-4] + gke + argv[-4:]) == 2
    said = capsys.readouterr()
    assert "topology = 4x4: stages.parent.batch.sequences = 4 must be a multiple of 16" in said.err and not said.out
    assert not (tmp_path / "s").exists()
    gke += ["mesh.tensor=4"]
    assert main(argv[:-4] + gke + argv[-4:]) == 0
    manifests = [m for m in yaml.safe_load_all(capsys.readouterr().out) if m]
    names = [m["metadata"].get("name") or m["metadata"]["generateName"] for m in manifests]
    assert names == [
        f"micro-seed-mlp-score-{end}" for end in ("shared-1", "shared-2", *(f"point-{n}" for n in range(1, 5)))
    ]

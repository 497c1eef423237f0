"""A teacher on a mesh of its own, on the student's devices and on others of every process: one process and two learn
the same, and a job goes on with another number of processes."""

import signal
from pathlib import Path

import pytest
import yaml
from harness import RECIPE, RETRY, Job, assert_same_figures, copied

pytestmark = pytest.mark.multiprocess
STUDENTS = ("reshaped", "others")
# As in `test_counts.py`.
RELATIVE = 2e-6


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    raw = yaml.safe_load(RECIPE.read_text())
    parent = raw["stages"]["parent"] | {"steps": 1}
    student = {"do": "distill", "from": None, "model": parent["model"] | {"mlp_width": 16}, "steps": 4}
    raw["stages"] = {
        "parent": parent,
        "reshaped": student | {"teacher_mesh": {"fsdp": 2, "tensor": 2}},
        "others": student | {"teacher_mesh": {"devices": 2, "fsdp": 1, "tensor": 2}},
    }
    path = tmp_path_factory.mktemp("recipe") / "apart.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def runs(recipe, tmp_path_factory) -> dict[int, Path]:
    """Finished run directory by number of processes, of four devices in all."""
    folder = tmp_path_factory.mktemp("apart")
    for count in (1, 2):
        with Job(folder / f"{count}", count, 4 // count, recipe=recipe) as job:
            job.finish()
    return {count: folder / f"{count}" for count in (1, 2)}


def test_two_processes_learn_what_one_does(runs):
    assert_same_figures(runs[2], runs[1], STUDENTS, RELATIVE)


def test_it_goes_on_with_one_process_less(runs, recipe, tmp_path):
    run_dir = copied(tmp_path / "run", runs[2], "others")
    with Job(run_dir, 2, 2, "others", recipe=recipe, pace=0.3) as job:
        assert job.until(lambda: job.has("others/3/")), job.tails()
        job.send(signal.SIGTERM, 0)
        assert job.wait() == [RETRY] * 2, job.tails()
    with Job(run_dir, 1, 4, "others", recipe=recipe) as job:
        job.finish()
    assert_same_figures(run_dir, runs[1], ("others",), RELATIVE)

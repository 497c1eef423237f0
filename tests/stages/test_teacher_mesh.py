"""A teacher on a mesh of its own teaches what one in the student's step does, and bad sizes are refused."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from paths import TESTS

from ministral_jax.cli import main
from ministral_jax.errors import UserError
from ministral_jax.stages.base import load_stage
from ministral_jax.stages.looped import RowLearner

MESHES = {
    "within": {"mesh": {"fsdp": 2, "data": 2, "tensor": 2}},
    "reshaped": {"mesh": {"fsdp": 2, "data": 2, "tensor": 2}, "teacher_mesh": {"fsdp": 2, "tensor": 2, "context": 2}},
    "others": {"mesh": {"fsdp": 2, "context": 2}, "teacher_mesh": {"devices": 4, "data": 2, "fsdp": 2}},
}
# float32 sums over devices in another order: as in tests/multiprocess/test_counts.py, of three steps
RELATIVE = 2e-6


def recipe(path: Path) -> str:
    """Three students, pictures and all, of one parent, two microbatches a step."""
    raw = yaml.safe_load(TESTS.joinpath("micro.yaml").read_text())
    rows = {"sequences": 8, "length": 64}
    raw["defaults"]["train"] |= {"steps": 1, "batch": rows}
    raw["defaults"]["distill"] |= {"steps": 3, "batch": rows | {"microbatches": 2}, "baseline": False}
    parent = raw["stages"]["parent"]
    parent["model"] |= {"layers": 1}
    student = {"do": "distill", "from": None, "model": parent["model"] | {"mlp_width": 32}}
    raw["stages"] = {"parent": parent, **{name: student | meshes for name, meshes in MESHES.items()}}
    del raw["family"]
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return str(path)


def figures(run_dir: Path, stage: str) -> list[dict[str, float]]:
    records = [json.loads(line) for line in (run_dir / stage / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "loss", "kl", "ce", "gradient_norm", "bits_per_byte")
    return [{k: r[k] for k in kept if k in r} for r in records if r["kind"] in ("train", "eval")]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("meshes")
    assert main(["run", recipe(folder / "meshes.yaml"), "--run-dir", str(folder / "run")]) == 0
    return folder / "run"


@pytest.mark.parametrize("stage", ["reshaped", "others"])
def test_loss_and_held_out_figures_are_those_of_one_mesh(run_dir, stage):
    found, expected = figures(run_dir, stage), figures(run_dir, "within")
    assert len(found) == len(expected) > 5 and expected[1]["loss"] > 0.01
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=RELATIVE)


def test_it_goes_on_to_the_same_bits(run_dir, tmp_path, monkeypatch):
    """Ended after a save, when the teacher was a batch ahead, it begins with the batch that the student needs next."""
    again = Path(shutil.copytree(run_dir, tmp_path / "again", ignore=shutil.ignore_patterns("others")))
    words = ["run", str(run_dir.parent / "meshes.yaml"), "others", "--run-dir", str(again)]
    step, done = RowLearner.step, []

    def ended(self, state, batch):
        done.append(1)
        if len(done) == 3:
            raise UserError("ended")
        return step(self, state, batch)

    with monkeypatch.context() as patch:
        patch.setattr(RowLearner, "step", ended)
        assert main(words) == 2
    assert (again / "others" / "state" / "2").is_dir()
    assert main(words) == 0
    ours, theirs = (load_stage(each / "others")[1] for each in (again, run_dir))
    assert jax.tree.all(jax.tree.map(np.array_equal, ours, theirs))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("teacher_mesh={devices: 8}", "stages.within.teacher_mesh.devices = 8 leaves none of 8 devices to the student"),
        ("teacher_mesh={fsdp: 3}", "stages.within.teacher_mesh {fsdp: 3} does not fit 8 devices, but 3"),
        ("teacher_mesh={devices: 4}", "stages.within.mesh {data: 2, fsdp: 2, tensor: 2} does not fit 4 devices, but 8"),
        (
            "teacher_mesh={fsdp: 8}",
            "stages.within.batch.sequences = 8 must be a multiple of 16, over which the teacher_mesh splits it",
        ),
    ],
)
def test_sizes_that_do_not_fit(refused, tmp_path, words, sentence):
    path = recipe(tmp_path / "meshes.yaml")
    assert sentence in refused(path, tmp_path / "run", "within", f"stages.within.{words}")

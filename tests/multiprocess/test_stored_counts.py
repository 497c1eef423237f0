"""A logit store recorded by four processes: students of one, two and four read the same rows from it, and a job that
records goes on with another number of processes."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
from harness import RETRY, Job, assert_same_figures, copied, digests

from ministral_jax.teachers.store import Store, verify

pytestmark = pytest.mark.multiprocess
RECIPE = Path(__file__).parent.parent / "micro_stored.yaml"
# As in `test_counts.py`.
RELATIVE = 2e-6


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    """A run directory whose store four processes have written, one device each, and then learned from."""
    run_dir = tmp_path_factory.mktemp("stored") / "four"
    with Job(run_dir, 4, 1, "short", recipe=RECIPE) as job:
        job.finish()
    assert not verify(str(run_dir / "logits" / "store"))
    return run_dir


def read(run_dir: Path) -> dict[str, np.ndarray]:
    """All rows of the training split, in the store's order."""
    arrays = Store(str(run_dir / "logits" / "store"))._arrays
    return {name.removeprefix("train/"): one.read().result() for name, one in arrays.items() if "train/" in name}


def test_students_of_any_number_of_processes_learn_the_same(recorded, tmp_path):
    one, two = (copied(tmp_path / f"{count}", recorded, "short") for count in (1, 2))
    for count, run_dir in ((1, one), (2, two)):
        with Job(run_dir, count, 4 // count, "short", recipe=RECIPE) as job:
            job.finish()
    for run_dir in (two, recorded):
        assert_same_figures(run_dir, one, ("short",), RELATIVE)


def test_a_store_goes_on_with_another_number_of_processes(recorded, tmp_path):
    """What is stored is the same to a code of the quantiser: another mesh adds float32 numbers in another order."""
    run_dir = copied(tmp_path / "run", recorded, "logits", "short")
    with Job(run_dir, 4, 1, "logits", recipe=RECIPE, pace=0.5) as job:
        assert job.until(lambda: job.has(".*train batch 4$")), job.tails()
        job.send(signal.SIGTERM, 0)
        assert job.wait() == [RETRY] * 4, job.tails()
    with Job(run_dir, 2, 2, "logits", recipe=RECIPE) as job:
        job.finish()
    ours, theirs = read(run_dir), read(recorded)
    assert not verify(str(run_dir / "logits" / "store"))
    same = np.mean([np.array_equal(a, b) for a, b in zip(ours["ids"], theirs["ids"], strict=True)])
    assert same > 0.9
    for name in ("logprobs", "forced", "tail", "tail_entropy"):
        rows = [i for i in range(36) if np.array_equal(ours["ids"][i], theirs["ids"][i])]
        difference = np.abs(ours[name][rows].astype(int) - theirs[name][rows].astype(int))
        assert difference.max() <= 1 + (name.startswith("tail")) * 8, (name, difference.max())
    manifests = [json.loads((run / "logits" / "manifest.json").read_text()) for run in (run_dir, recorded)]
    np.testing.assert_allclose(*[m["metrics"]["tail_mass"] for m in manifests], rtol=1e-4)


def test_four_processes_write_each_file_alone(recorded, tmp_path):
    """Recorded once more, its files are the same bytes."""
    run_dir = copied(tmp_path / "again", recorded, "logits", "short")
    with Job(run_dir, 4, 1, "logits", recipe=RECIPE) as job:
        job.finish()
    assert digests(run_dir / "logits" / "store") == digests(recorded / "logits" / "store")

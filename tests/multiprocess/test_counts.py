"""The same four devices in one, two and four processes: the same curves, figures and export; and a job goes on with
another number of processes. That each host decodes only the rows of its devices is in `test_mesh.py`."""

import json
import signal

import numpy as np
import pytest
from harness import RETRY, Job, assert_same_figures, export
from safetensors.numpy import load

pytestmark = pytest.mark.multiprocess

# The mesh and so the program are the same; what differs is in which order a collective adds four float32 numbers,
# inside a process or between them: 3 * 2**-24 = 1.8e-7 of the sum of magnitudes, per collective. Six steps of Adam,
# whose first divide a gradient by its own size, carry it to the loss about tenfold.
RELATIVE = 2e-6


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict:
    """Finished run directory by number of processes."""
    folder = tmp_path_factory.mktemp("counts")
    finished = {}
    for count in (1, 2, 4):
        with Job(folder / f"{count}", count, 4 // count) as job:
            job.finish()
            devices = [line for line in job.log().splitlines() if line.startswith("process 0 of")]
            assert count == 1 or devices == [f"process 0 of {count}: {4 // count} of 4 devices (cpu)"]
        finished[count] = folder / f"{count}"
    return finished


def assert_same(ours, theirs) -> None:
    worst = assert_same_figures(ours, theirs, ("parent", "short"), RELATIVE)
    figures = [json.loads((run / "pruned" / "manifest.json").read_text())["metrics"] for run in (ours, theirs)]
    np.testing.assert_allclose(figures[0]["kl_to_source"], figures[1]["kl_to_source"], rtol=1e-5)
    a, b = export(ours), export(theirs)
    assert a.keys() == b.keys()
    for name in a:
        if not name.endswith(".safetensors"):
            assert a[name] == b[name], name
            continue
        x, y = load(a[name]), load(b[name])
        assert x.keys() == y.keys()
        for key in x:
            # an element whose gradient is rounding alone moves by the learning rate either way
            np.testing.assert_allclose(x[key], y[key], rtol=1e-4, atol=1e-5, err_msg=key)
    print(f"{ours.name} against {theirs.name}: figures differ by at most {worst:.1e}")


@pytest.mark.parametrize("count", [2, 4])
def test_the_number_of_processes_changes_nothing(runs, count):
    assert_same(runs[count], runs[1])


def test_a_job_goes_on_with_another_number_of_processes(runs, tmp_path):
    run_dir, by_clock = tmp_path / "run", "defaults.train.checkpoint={every: 100, minutes: 0.001}"
    for count, moment in ((4, "parent/3/"), (2, "short/3/")):
        with Job(run_dir, count, 4 // count, by_clock, pace=0.3) as job:
            assert job.until(lambda job=job, moment=moment: job.has(moment)), job.tails()
            job.send(signal.SIGTERM, 0)
            assert job.wait() == [RETRY] * count, job.tails()
        if moment.startswith("parent"):  # those of steps before the one at which it stopped
            assert len([*(run_dir / "parent" / "state" / "checksums").iterdir()]) == 2
    with Job(run_dir, 1, 4) as job:
        job.finish()
    assert_same(run_dir, runs[1])

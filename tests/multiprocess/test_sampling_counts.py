"""Four devices in two processes draw and score the same as in one, and every process has all of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from harm_cases import free_port
from harness import COMPILED, COMPILING

pytestmark = pytest.mark.multiprocess
WORKER = Path(__file__).with_name("sampling_worker.py")


def sampled(folder: Path, count: int) -> list[dict]:
    """What each process has drawn."""
    outputs = [folder / f"{count}.{index}.json" for index in range(count)]
    coordinator = f"127.0.0.1:{free_port()}"
    environment = {**os.environ, **COMPILING, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(COMPILED)}
    started = [
        subprocess.Popen(
            [sys.executable, str(WORKER), coordinator, str(count), str(index), str(4 // count), str(output)],
            env=environment,
        )
        for index, output in enumerate(outputs)
    ]
    try:
        assert [process.wait(300) for process in started] == [0] * count
    finally:
        for process in started:
            process.kill()
    return [json.loads(output.read_text()) for output in outputs]


def test_two_processes_draw_the_same_as_one(tmp_path):
    (one,), (first, second) = sampled(tmp_path, 1), sampled(tmp_path, 2)
    assert first == second
    for mesh, of_one in one["sampled"].items():
        assert len(of_one) == 8
        for ours, theirs in zip(first["sampled"][mesh], of_one, strict=True):
            assert (ours["tokens"], ours["stopped"]) == (theirs["tokens"], theirs["stopped"])
            for name in ("logprobs", "processed_logprobs"):
                np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-5)
    (alone, said), (shared, said_together) = one["examined"], first["examined"]
    assert said_together == said and [row[1:] for row in shared] == [row[1:] for row in alone]
    np.testing.assert_allclose([row[0] for row in shared], [row[0] for row in alone], rtol=0, atol=5e-5)

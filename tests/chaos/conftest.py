"""The run that nothing happens to, and the order of its moments."""

from pathlib import Path

import pytest
from harness import Job


@pytest.fixture(scope="session")
def reference(tmp_path_factory) -> tuple[Path, list[tuple[float, str]]]:
    """Directory of an unbroken run of two processes, and what process 0 did when: with a warm cache, as later runs."""
    folder = tmp_path_factory.mktemp("chaos")
    with Job(folder / "unbroken") as job:
        job.finish()
        return folder / "unbroken", job.moments()

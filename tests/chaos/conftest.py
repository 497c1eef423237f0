"""The run that nothing happens to, the order of its moments, and how often the others are killed."""

from pathlib import Path

import pytest
from harness import Job


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=20, help="of a job at random moments; 9 are one in each phase")


@pytest.fixture(scope="session")
def kills(pytestconfig) -> int:
    return pytestconfig.getoption("--kills")


@pytest.fixture(scope="session")
def reference(tmp_path_factory) -> tuple[Path, list[tuple[float, str]]]:
    """Directory of an unbroken run of two processes, and what process 0 did when: with a warm cache, as later runs."""
    folder = tmp_path_factory.mktemp("chaos")
    with Job(folder / "unbroken") as job:
        job.finish()
        return folder / "unbroken", job.moments()

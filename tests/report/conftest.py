"""A finished run, a copy of it to be changed, and its page."""

import shutil
from pathlib import Path

import pytest
from pages import page_of
from report_run import POST, STORE, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "tiny", more={**POST, "logits": STORE})


@pytest.fixture
def copy(run, tmp_path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


@pytest.fixture(scope="module")
def page(run) -> str:
    return page_of(run)

"""`make lint` holds the order of the rooms: an import that points up makes it fail."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT


def lint_imports(where: Path) -> subprocess.CompletedProcess[str]:
    """The contracts of pyproject.toml, on the package in `where`."""
    command = [
        str(Path(sys.executable).with_name("lint-imports")),
        "--no-cache",
        "--config",
        str(ROOT / "pyproject.toml"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(where), "COLUMNS": "200"}
    return subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture
def package(tmp_path):
    """A copy of the package to do harm to."""
    ignore = shutil.ignore_patterns("__pycache__", "configs", "launch_templates")
    return shutil.copytree(ROOT / "ministral_jax", tmp_path / "ministral_jax", ignore=ignore)


@pytest.mark.parametrize(
    ("room", "upper", "contract"),
    [
        ("models", "training", "Imports point down"),
        ("stages", "recipe", "Imports point down"),
        ("runs", "report", "The core stands without what is around it"),
        ("training", "launching", "The core stands without what is around it"),
    ],
)
def test_an_import_that_points_up_is_refused(package, room, upper, contract):
    (package / room / "wrong.py").write_text(f"import ministral_jax.{upper}\n", encoding="utf-8")
    run = lint_imports(package.parent)
    assert run.returncode == 1, run.stdout + run.stderr
    assert f"{contract} BROKEN" in run.stdout
    assert f"ministral_jax.{room}.wrong -> ministral_jax.{upper}" in run.stdout


def test_a_room_without_a_place_is_refused(package):
    (package / "attic").mkdir()
    (package / "attic" / "__init__.py").touch()
    run = lint_imports(package.parent)
    assert run.returncode == 1 and "ministral_jax.attic" in run.stdout, run.stdout + run.stderr

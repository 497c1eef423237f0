"""Where commands and snippets of the docs are run."""

import re

import jax
import pytest
from docs_blocks import TEXTS, blocks
from docs_run import finished_run
from paths import ROOT

from ministral_jax.distributed import processes


@pytest.fixture(scope="session")
def checkout(tmp_path_factory):
    """A directory like a checkout after `make cascade`, with the rows of docs/generate.md and a recipe of one's own."""
    root = tmp_path_factory.mktemp("checkout")
    (root / "examples").symlink_to(ROOT / "examples")
    (launch,) = (block.text for block in blocks("yaml") if block.page == "docs/launch.md")
    mesh = "mesh: {fsdp: 1, tensor: -1}"  # rows that any number of devices can share
    (root / "my.yaml").write_text(f"{(ROOT / 'tests/micro.yaml').read_text()}\n{mesh}\n{launch}")
    (rows,) = (block.text for block in blocks("json") if block.page == "docs/generate.md")
    (root / "rows.jsonl").write_text(rows)
    named = re.findall(r"runs/tiny/([\w-]+)", "".join(TEXTS.values()))
    finished_run(root / "runs" / "tiny", "configs/tiny.yaml", named)
    (root / "runs" / "lr").symlink_to("tiny")
    return root


@pytest.fixture(scope="module", autouse=True)
def quick(quickly):
    """Commands compile many programs."""


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """As on a laptop; and nothing of a command's process stays."""
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *backend: devices)
    monkeypatch.setattr(processes, "_job", processes._Job())
    monkeypatch.setattr(processes.signal, "signal", lambda *_: None)

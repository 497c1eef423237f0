"""docs/own_model.md, worked through: in a directory of its own, from a small parent that is made here."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import jax
import pytest
from compiling import quickly_compiled
from docs_blocks import blocks, words
from model_cases import random_params
from paths import ROOT

from ministral_jax import cli
from ministral_jax.data.config import TokenizerConfig
from ministral_jax.data.tokenizer import export_tokenizer, load_tokenizer
from ministral_jax.distributed import processes
from ministral_jax.interop.hf import export_hf
from ministral_jax.models.spec import PRESETS

PAGE = "docs/own_model.md"
WIDTHS = {"width": 16, "heads": 2, "kv_heads": 1, "head_width": 8}


def small_parent(directory: Path) -> None:
    """What `export runs/tiny/parent` writes, narrower and of random weights, so that it is quickly gone through."""
    spec = PRESETS["tiny-24b"].model_copy(update=WIDTHS)
    tokenizer = load_tokenizer(TokenizerConfig(vocab=spec.vocab, special=64), directory.parent / "tokenizer")
    directory.mkdir()
    file = export_tokenizer(tokenizer, directory.parent / "tokenizer", spec.vision)
    directory.rmdir()
    export_hf(random_params(spec), spec, directory, "float32", [file])


def work_through(place: Path, run_python: Callable[[str], bool]) -> list[str]:
    """Every block of the page, in order, as it stands: files are written, commands and python run; what these print.
    The parent is made here instead of by `make cascade`, and the real run is left out."""
    printed = []
    devices = jax.devices()[:1]
    with quickly_compiled(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *backend: devices)
        patch.setattr(processes, "_job", processes._Job())
        patch.setattr(processes.signal, "signal", lambda *_: None)
        patch.chdir(place)
        small_parent(place / "parent")
        for block in (block for block in blocks() if block.page == PAGE):
            with redirect_stdout(io.StringIO()) as out:
                if block.language == "yaml":
                    Path("own.yaml").write_text(block.text)
                elif block.language == "python" and run_python(block.text):
                    exec(compile(block.text, f"{ROOT / PAGE}:{block.line}", "exec"), {"__name__": "snippet"})
                elif block.language == "bash":
                    for line in block.text.splitlines():
                        if line not in ("ministral-jax export runs/tiny/parent parent", "ministral-jax run own.yaml"):
                            assert cli.main(words(line)[1:]) == 0, line
            printed.append(out.getvalue())
    return printed

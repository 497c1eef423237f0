"""Checkpoints of FP8 are to `transformers` what they are here, to the last bit of a weight."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import oracle  # noqa: E402
from interop_cases import SPEC, to_fp8  # noqa: E402
from model_cases import CASES, by_hf_name, random_params  # noqa: E402

from ministral_jax.interop.checkpoint import import_checkpoint  # noqa: E402
from ministral_jax.interop.hf import export_hf  # noqa: E402

pytestmark = pytest.mark.parity


@pytest.mark.parametrize(
    ("block", "scheme"), [(None, "static"), (None, "dynamic"), ((4, 4), "dynamic")], ids=["static", "dynamic", "blocks"]
)
def test_weights_are_those_that_transformers_makes_of_them(tmp_path, block, scheme):
    assert CASES["images"].spec == SPEC
    export_hf(random_params(SPEC), SPEC, tmp_path / "hf")
    assert to_fp8(tmp_path / "hf", block, scheme)
    ours = by_hf_name(import_checkpoint(tmp_path / "hf")[1], SPEC)
    theirs = {
        oracle.short(name): p.detach().numpy() for name, p in oracle.load(tmp_path / "hf", SPEC).named_parameters()
    }
    assert ours.keys() == theirs.keys()
    assert all(theirs[name].dtype == np.float32 and np.array_equal(ours[name], theirs[name]) for name in ours)

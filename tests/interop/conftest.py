"""A small model, exported."""

import pytest
from interop_cases import SPEC
from model_cases import random_params

from ministral_jax.interop.hf import export_hf


@pytest.fixture(scope="module")
def params():
    return random_params(SPEC)


@pytest.fixture
def exported(tmp_path, params):
    export_hf(params, SPEC, tmp_path / "hf")
    return tmp_path / "hf"

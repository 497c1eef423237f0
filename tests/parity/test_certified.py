"""transformers reads an export as we do, and every control as something else."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import jax
from model_cases import TEXT, YARN, random_params, vlm

from ministral_jax.certify.certificate import certify
from ministral_jax.interop.hf import export_hf

pytestmark = pytest.mark.parity


@pytest.mark.parametrize(
    "spec", [vlm(rope=YARN), TEXT.model_copy(update={"rope": YARN, "tied": True})], ids=["images", "text"]
)
def test_transformers_certifies(spec, tmp_path, monkeypatch):
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *backend: devices)
    params = random_params(spec)
    for name, dtype in (("trained", "float32"), ("hf", "bfloat16")):
        export_hf(params, spec, tmp_path / name, dtype)
    found = certify(tmp_path / "hf", tmp_path / "trained")
    theirs = [reading for reading in found.readings if reading.reader.startswith("transformers")]
    assert found.holds and len(theirs) == 2 + (spec.vision is not None), found
    assert all(0 < reading.to_ours < 2e-5 for reading in theirs)
    failed = [failure for failure in found.controls if failure.reader.startswith("transformers")]
    assert len(failed) == 4 - spec.tied and all(f.refused or f.difference > 100 * found.limit for f in failed), failed

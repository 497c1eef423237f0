"""transformers reads an export as we do, and every control as something else."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import jax
import numpy as np
from model_cases import TEXT, YARN, random_params, vlm

from ministral_jax.certify.certificate import certify
from ministral_jax.interop.export import Export, export
from ministral_jax.interop.formats import FORMATS

pytestmark = pytest.mark.parity


IMAGES, TIED = vlm(rope=YARN), TEXT.model_copy(update={"rope": YARN, "tied": True})


@pytest.mark.parametrize(
    "spec, format", [(IMAGES, "hf"), (TIED, "hf"), (IMAGES, "fp8")], ids=["images", "text", "dequantised"]
)
def test_transformers_certifies(spec, format, tmp_path, monkeypatch):
    if format == "fp8":
        pytest.importorskip("accelerate")
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *backend: devices)
    params = random_params(spec)
    scales = {"attention": {"input": 1.0, "mixed": 1.0}, "mlp": {"input": 1.0, "hidden": 1.0}}
    layers = jax.tree.map(lambda scale: np.full(spec.layers, scale, np.float32), scales)
    export(Export(params, spec, "float32"), FORMATS["hf"], tmp_path / "trained")
    model = Export(params, spec, "bfloat16", scales={"decoder": {"layers": layers}} if format == "fp8" else None)
    export(model, FORMATS[format], tmp_path / format)
    found = certify(tmp_path / format, tmp_path / "trained")
    theirs = [reading for reading in found.readings if reading.reader.startswith("transformers")]
    assert found.holds and len(theirs) == 2 + (spec.vision is not None), found
    assert all(0 < reading.to_ours < 2e-5 for reading in theirs)
    failed = [failure for failure in found.controls if failure.reader.startswith("transformers")]
    assert len(failed) == 4 - spec.tied and all(f.refused or f.difference > 100 * found.limit for f in failed), failed

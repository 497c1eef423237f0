"""llama.cpp certifies a GGUF export, and tells every control from it."""

import pytest

pytest.importorskip("llama_cpp")

import jax
from model_cases import random_params
from test_llama_cpp import UNTIED

from ministral_jax.certify.certificate import certify
from ministral_jax.certify.in_card import section_of
from ministral_jax.data.config import TokenizerConfig
from ministral_jax.data.tokenizer import load_tokenizer
from ministral_jax.interop.export import Export, export
from ministral_jax.interop.formats import FORMATS

pytestmark = pytest.mark.llama


@pytest.mark.parametrize("dtype", ["float16", "q8_0"])
def test_llama_certifies(dtype, tmp_path, monkeypatch):
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *backend: devices)
    params, files = random_params(UNTIED), [load_tokenizer(TokenizerConfig(vocab=2000, special=64), tmp_path).path]
    export(Export(params, UNTIED, "float32", files), FORMATS["hf"], tmp_path / "trained")
    export(Export(params, UNTIED, dtype, files), FORMATS["gguf"], tmp_path / "gguf")
    found = certify(tmp_path / "gguf", tmp_path / "trained")
    assert found.holds, found
    theirs = [reading for reading in found.readings if reading.reader.startswith("llama.cpp")]
    assert [reading.prompt for reading in theirs] == ["text", "image", "long"]
    assert sum(failure.reader.startswith("llama.cpp") for failure in found.controls) == 4
    assert found.serving and found.serving.prompt_per_second and found.serving.generated_per_second
    assert "new ones in a second" in section_of(found)

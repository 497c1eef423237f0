"""Parity with torch `transformers` from recorded files, so that it is checked where torch is not installed.

`tests/parity/make_golden.py` wrote the files; `tests/parity/test_transformers.py` is the same comparison, live.
"""

from __future__ import annotations

import numpy as np
import pytest
from model_cases import CASES, by_hf_name, loss_and_grads, pack, relative
from paths import TESTS

from ministral_jax.interop import safetensors
from ministral_jax.interop.checkpoint import import_checkpoint
from ministral_jax.models.vlm import Compute

GOLDEN = TESTS / "golden"

# Float32 round-off through a few layers, with room for another order of summation.
LOGITS, GRADS = 2e-5, 1e-4

COMPUTES = {
    "text": Compute(),
    "text_tied_long": Compute(attention="blockwise", attention_block=16, unroll=0),
    "text_yarn_alone": Compute(remat="dots"),
    "text_temperature_alone": Compute(remat="full", unroll=2),
    "images": Compute(attention="blockwise", attention_block=16),
    "images_tied": Compute(),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_are_those_of_transformers(name, tmp_path):
    case, path = CASES[name], GOLDEN / f"{name}.safetensors"
    golden = {key: tensor.read() for key, tensor in safetensors.read(path).items()}
    part = lambda prefix: {k.removeprefix(prefix): v for k, v in golden.items() if k.startswith(prefix)}
    (tmp_path / "config.json").write_text(safetensors.metadata(path)["config"])
    weights = part("weights/")
    safetensors.write(
        tmp_path / "model.safetensors",
        [safetensors.Pending(k, v.dtype, v.shape, lambda v=v: v) for k, v in weights.items()],
    )

    spec, params = import_checkpoint(tmp_path)
    assert spec == case.spec
    batch = pack(case)
    (_, logits), grads = loss_and_grads(params, spec, batch, COMPUTES[name])
    logits, segments = np.asarray(logits), batch["segments"]
    assert np.isfinite(logits).all()
    ours = [logits[b][segments[b] == s] for b in range(len(segments)) for s in range(1, segments[b].max() + 1)]
    theirs = [golden[f"logits/{i}"] for i in range(len(ours))]
    assert relative(np.concatenate(ours), np.concatenate(theirs)) < LOGITS

    named, expected = by_hf_name(grads, spec), part("grads/")
    assert named.keys() == expected.keys()
    worst = {key: relative(named[key], expected[key]) for key in expected}
    assert max(worst.values()) < GRADS, max(worst.items(), key=lambda item: item[1])

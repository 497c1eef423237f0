"""FP8 exports in `transformers`: loaded as they stand, and multiplied as their scales say."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import oracle  # noqa: E402
from model_cases import CASES, inputs, pack, random_params, relative  # noqa: E402
from test_transformers import LOGITS, document_places  # noqa: E402

from ministral_jax.interop import safetensors  # noqa: E402
from ministral_jax.interop.checkpoint import import_checkpoint  # noqa: E402
from ministral_jax.interop.export import Export, export  # noqa: E402
from ministral_jax.interop.fp8_export import FP8, calibrate  # noqa: E402
from ministral_jax.models.block import Exported  # noqa: E402
from ministral_jax.models.vlm import VLM, Compute  # noqa: E402

pytestmark = pytest.mark.parity


def rounding(scale: float):
    """What FP8 kernels make of what goes into a linear layer with a static scale."""
    return lambda module, args: ((args[0] / scale).clamp(-448, 448).to(torch.float8_e4m3fn).to(args[0].dtype) * scale,)


def round_inputs(model: torch.nn.Module, path) -> int:
    """Register `rounding` at every linear layer that has a scale in the file; returns how many there are."""
    layers = {name: module for name, module in model.named_modules() if "vision" not in name}
    scales = {n: t.read() for n, t in safetensors.read(path).items() if n.endswith(".activation_scale")}
    for name, scale in scales.items():
        place = name.removesuffix(".activation_scale").split("layers.")[1]
        (module,) = (module for name, module in layers.items() if name.endswith(f"layers.{place}"))
        module.register_forward_pre_hook(rounding(float(scale.astype(np.float32))))
    return len(scales)


@pytest.mark.parametrize("name", ["images", "text_tied_long"])
def test_an_fp8_export_is_the_same_model_in_transformers(name, tmp_path):
    """On a CPU transformers multiplies what the weights stand for, and has no kernel that rounds what goes in: that is
    done here, in torch, by the scales of the file."""
    case, batch = CASES[name], pack(CASES[name])
    params = random_params(case.spec)
    scales = calibrate(VLM(case.spec), params, [batch])
    export(Export(params, case.spec, "float32", scales=scales), FP8, tmp_path / "fp8")
    model = oracle.load(tmp_path / "fp8", case.spec)

    def ours(compute: Compute, **variables) -> np.ndarray:
        logits = np.asarray(VLM(case.spec, compute).apply(variables, **inputs(batch)))
        return np.concatenate([logits[b, s] for b, s in document_places(batch)])

    theirs = lambda: np.concatenate([oracle.forward(model, d).detach().numpy() for d in case.documents])
    read, unrounded = import_checkpoint(tmp_path / "fp8")[1], theirs()
    assert relative(ours(Compute(), params=read), unrounded) < LOGITS

    assert round_inputs(model, tmp_path / "fp8/model.safetensors") == 7 * case.spec.layers
    rounded = theirs()
    error = np.abs(ours(Exported(), params=params, scales=scales) - rounded) / np.abs(rounded).max()
    # A sum in another order may move a number over the edge between two of eight bits, and with it what comes after.
    assert np.median(error) < LOGITS and error.max() < 0.02
    assert relative(unrounded, rounded) > 0.05

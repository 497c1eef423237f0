"""What the parent and its children cost where they are served: llama.cpp at their real widths.

    python benchmarks/serving.py [--dtype q8_0] [--models PRESET ...] [--json FILE]

For every model GGUF files of its widths are written, with one decoder layer and with three, and llama.cpp reads them on
this machine's CPU, medians of three rounds. Seconds and bytes of a layer are half of the difference, and those of the
whole model are projected from it: embedding and head once, a layer as often as there are layers. The parameters are one
random row, repeated: what llama.cpp does depends on no value. Needs the extras `gguf` and `llama`.

One sequence: a prompt of 128 tokens, then 64 more, one by one, without a vision tower.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

from hardware import processor
from ministral_jax.certify.serving import serving
from ministral_jax.interop.export import Export, export
from ministral_jax.interop.formats import FORMATS
from ministral_jax.models.spec import PRESETS
from ministral_jax.models.vlm import abstract_params

LAYERS = 1, 3
FAMILY = "mistral-small-3.1-24b", "ministral-3-14b", "ministral-3-8b", "ministral-3-3b"


def measured(preset: str, layers: int, dtype: str, directory: Path) -> np.ndarray:
    """Bytes, and seconds for a token of a prompt and for a new one, of a model with so many layers."""
    spec = PRESETS[preset].model_copy(update={"layers": layers, "vision": None})
    row = np.random.default_rng(0).standard_normal(2**18, np.float32) / 100

    def values(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        return np.broadcast_to(row[: leaf.shape[-1]], leaf.shape)

    export(Export(jax.tree.map(values, abstract_params(spec)), spec, dtype), FORMATS["gguf"], directory)
    found = serving(directory)
    assert found.prompt_per_second is not None and found.generated_per_second is not None
    return np.array([found.bytes, 1 / found.prompt_per_second, 1 / found.generated_per_second])


def projected(preset: str, dtype: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        few, more = (measured(preset, layers, dtype, Path(scratch, "gguf")) for layers in LAYERS)
    layer = (more - few) / (LAYERS[1] - LAYERS[0])
    whole = few + layer * (PRESETS[preset].layers - LAYERS[0])
    return {"model": preset, "bytes": whole[0], "prompt": 1 / whole[1], "generated": 1 / whole[2]}


def main() -> None:
    first, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(description=first, epilog=rest, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--dtype", default="q8_0", choices=FORMATS["gguf"].dtypes)
    parser.add_argument("--models", nargs="+", default=FAMILY, choices=sorted(PRESETS), metavar="PRESET")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    parent, found = None, []
    print(f"{'':24s}{'GB':>8s}{'prompt, tokens/s':>24s}{'new tokens/s':>24s}")
    for preset in given.models:
        found.append(made := projected(preset, given.dtype))
        parent = parent or made
        times = [f"{made[key]:,.2f} ({made[key] / parent[key]:.2f}x)" for key in ("prompt", "generated")]
        print(f"{preset:24s}{made['bytes'] / 1e9:8.1f}{times[0]:>24s}{times[1]:>24s}", flush=True)
    versions = {name: importlib.metadata.version(name) for name in ("llama-cpp-python", "gguf")}
    print(f"{given.dtype}, two threads; {versions} {processor()}")
    if given.json is not None:
        given.json.write_text(json.dumps({"models": found, "versions": versions, "hardware": processor()}, indent=1))


if __name__ == "__main__":
    main()

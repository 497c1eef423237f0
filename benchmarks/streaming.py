"""Memory and time of import, pruning and export at the real family's widths, with few layers.

    python benchmarks/streaming.py [--layers 1 2] [--fp8 tensor|blocks] [--json FILE] [--directory DIR]

A Hugging Face checkpoint of Mistral Small 3.1's widths (24B: width 5120, feed-forward 32,768, vocabulary 131,072; the
vision tower's too, two of its layers) with as many decoder layers, of random bfloat16, is imported, cut to the widths
of the 14B, from there to those of the 8B, and exported. Every stage is the command `ministral-jax run RECIPE STAGE` in
a process of its own on one CPU device.

Memory is anonymous memory (RssAnon, looked at every few milliseconds) beyond that of the same process before the
command, when JAX has been imported and its device found: arrays of the device, which on a CPU lie there, arrays of the
host, and what compilers take. Pages of mapped files, which the kernel drops when it likes, are not in it; the peak with
them (VmHWM) is beside it. `held` is what the stage cannot do without: import and export the parameters, pruning the
source and the matrices that a cut makes of its own, which go then. `result` is the
parameters that the stage makes, or has exported. The bar is result + 3 of the largest tensor of the file, the
embedding.

With `--fp8` the matrices of the decoder's layers are FP8, with a scale each and one of their activations, as Mistral
releases them, or with a scale of every 128 x 128 of their numbers; what is imported is bfloat16 as before.

A CPU has no products of bfloat16: XLA makes float32 of their factors, and by default before the loop over layers, of
all of them. Two of its passes are therefore off here; accelerators do not need that.

Seconds are of the wall clock, and of all cores together. Those of a layer are the difference of the two numbers of
layers in the latter, which other work on the machine changes less, and 40 layers are projected from it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import ml_dtypes
import numpy as np
from PIL import Image

from hardware import processor
from ministral_jax import cli
from ministral_jax.files import write_json
from ministral_jax.interop import hf, safetensors
from ministral_jax.interop.fp8_weights import E4M3
from ministral_jax.interop.hf_config import to_config
from ministral_jax.interop.slots import Slot
from ministral_jax.models.spec import PRESETS, ModelSpec, VisionSpec

LAYERS, TENSORS, SHARD = 40, 3, 2_000_000_000
STAGES = ("parent", "14b-pruned", "8b-pruned", "14b-hf", "8b-hf")
PASSES = "while-loop-invariant-code-motion", "while-loop-expensive-invariant-code-motion"
FLAGS = {"XLA_FLAGS": f"--xla_disable_hlo_passes={','.join(PASSES)}"}
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT32 = np.dtype(np.float32)
BLOCK = 128


def shallow(preset: str, layers: int) -> ModelSpec:
    """A model of the family with as many layers, whose context is short."""
    changes = {"layers": layers, "vision": VisionSpec(layers=2)}
    return PRESETS[preset].model_copy(update=changes)


def write_checkpoint(directory: Path, spec: ModelSpec, fp8: str | None) -> None:
    """Random parameters, of which one block is drawn and repeated; one tensor in memory at a time."""
    block = np.random.default_rng(0).standard_normal(2**25, np.float32)

    def value(slot: Slot, dtype: np.dtype) -> np.ndarray:
        if len(slot.shape) == 1:
            return np.ones(slot.shape, dtype)
        fan_in = int(np.prod(slot.shape[1:]))
        return np.resize((block if dtype == E4M3 else block / np.sqrt(fan_in)).astype(dtype), slot.shape)

    directory.mkdir(parents=True)
    config = to_config(spec, "bfloat16")
    if fp8:
        size = None if fp8 == "tensor" else [BLOCK, BLOCK]
        config["quantization_config"] = {
            "quant_method": "fp8",
            "activation_scheme": "static",
            "weight_block_size": size,
        }
    write_json(directory / "config.json", config)
    shards: list[list[safetensors.Pending]] = [[]]
    for slot in hf.slots(spec):
        name = f"{'' if slot.path.split('/')[0] in ('vision', 'projector') else 'language_model.model.'}{slot.name}"
        name = name.replace("model.lm_head", "lm_head")
        if sum(tensor.bytes for tensor in shards[-1]) > SHARD:
            shards.append([])
        dtype = E4M3 if fp8 and slot.path.startswith("decoder/layers/") and len(slot.shape) == 2 else BFLOAT16
        shards[-1].append(safetensors.Pending(name, dtype, slot.shape, partial(value, slot, dtype)))
        if dtype == E4M3:
            grid = () if fp8 == "tensor" else tuple(-(-n // BLOCK) for n in slot.shape)
            for scale, shape in (("weight_scale_inv", grid), ("activation_scale", ())):
                ones = partial(np.full, shape, slot.shape[1] ** -0.5, np.float32)
                shards[-1].append(safetensors.Pending(name.removesuffix("weight") + scale, FLOAT32, shape, ones))
    names = [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    for name, tensors in zip(names, shards, strict=True):
        safetensors.write(directory / name, tensors, {"format": "pt"})
    weights = {tensor.name: name for name, tensors in zip(names, shards, strict=True) for tensor in tensors}
    write_json(directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": weights})


def write_rows(directory: Path) -> None:
    """Short texts, and questions about a picture of 2 x 2 of the decoder's tokens."""
    Image.new("RGB", (56, 56), (90, 120, 30)).save(directory / "picture.png")
    text = {"text": "A row of a few words, which is read and never learnt. " * 2}
    picture = {"image": "picture.png", "question": "Which colour?", "answer": "Green."}
    rows = [json.dumps({**row, "id": n}) for n in range(100) for row in (text, picture)]
    (directory / "rows.jsonl").write_text("\n".join(rows) + "\n")


def recipe(layers: int, directory: Path) -> dict[str, Any]:
    def sizes(name: str) -> dict[str, Any]:
        spec = shallow(name, layers)
        return {key: getattr(spec, key) for key in ("width", "mlp_width")}

    prune = {"compute": {"dtype": "bfloat16"}, "batch": {"sequences": 1, "length": 64}, "calibration": 1}
    return {
        "name": "streaming",
        "data": {
            "tokenizer": {"file": "bundled", "vocab": 2048, "special": 64},
            "sources": {"rows": {"kind": "jsonl", "path": str(directory / "rows.jsonl")}},
            "held_out": 0.1,
            "patches": 64,
        },
        "defaults": {"prune": prune | {"evaluate": {"rows": 1}}},
        "stages": {
            "parent": {"do": "import", "path": str(directory / "hf"), "dtype": "bfloat16"},
            "14b-pruned": {"do": "prune", "from": "parent", "model": sizes("ministral-3-14b")},
            "8b-pruned": {"do": "prune", "from": "14b-pruned", "model": sizes("ministral-3-8b")},
            "14b-hf": {"do": "export", "from": "14b-pruned", "dtype": "bfloat16"},
            "8b-hf": {"do": "export", "from": "8b-pruned", "dtype": "bfloat16"},
        },
    }


# ---- in a process of its own ----------------------------------------------------------------------------------------


def memory(name: str) -> int:
    """Bytes, by the name that /proc/self/status has."""
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(f"{name}:"))


class Peak(threading.Thread):
    """Of anonymous memory, until it is stopped."""

    def __init__(self):
        super().__init__(daemon=True)
        self.bytes, self._over = 0, threading.Event()

    def run(self) -> None:
        while not self._over.wait(0.003):
            self.bytes = max(self.bytes, memory("RssAnon"))

    def stop(self) -> int:
        self._over.set()
        self.join()
        return self.bytes


def one_stage(name: str, directory: Path) -> None:
    """Run it, and print what it took as JSON."""
    jax.devices()
    jax.block_until_ready(jax.numpy.zeros(1) + 1)
    base, peak, began, used = memory("RssAnon"), Peak(), time.perf_counter(), time.process_time()
    peak.start()
    code = cli.main(["run", str(directory / "recipe.yaml"), name, "--run-dir", str(directory / "run")])
    took = {"seconds": time.perf_counter() - began, "cpu": time.process_time() - used}
    if code:
        raise SystemExit(code)
    print(json.dumps(took | {"peak": peak.stop() - base, "base": base, "with_files": memory("VmHWM")}))


# ---- the table ------------------------------------------------------------------------------------------------------


def measure(layers: int, directory: Path, stages: list[str], fp8: str | None) -> dict[str, dict[str, Any]]:
    """What each stage took."""
    write_checkpoint(directory / "hf", shallow("mistral-small-3.1-24b", layers), fp8)
    (directory / "recipe.yaml").write_text(json.dumps(recipe(layers, directory)))
    write_rows(directory)
    found = {}
    for name in stages:
        print(f"{layers} layers: {name}", file=sys.stderr, flush=True)
        command = [sys.executable, __file__, "--stage", name, "--directory", str(directory)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | FLAGS)
        found[name] = json.loads(done.stdout.splitlines()[-1]) | sizes_of(name, layers)
        print(json.dumps(found[name]), file=sys.stderr, flush=True)
    return found


def sizes_of(stage: str, layers: int) -> dict[str, int]:
    """Bytes, in bfloat16, of what a stage makes, of what it holds and of the largest tensor in it."""
    specs = [shallow(name, layers) for name in ("mistral-small-3.1-24b", "ministral-3-14b", "ministral-3-8b")]
    source, child = {"parent": (0, 0), "14b": (0, 1), "8b": (1, 2)}[stage.split("-")[0]]
    a, b = specs[source], specs[child]
    held = 2 * b.parameters
    if stage.endswith("pruned"):
        cut = b.parameters if a.width != b.width else 3 * layers * b.width * b.mlp_width
        held = 2 * (a.parameters + cut)
    tensor = 2 * (a if stage.endswith("pruned") else b).components["embedding"]
    return {"result": 2 * b.parameters, "held": held, "tensor": tensor}


def table(found: dict[int, dict[str, dict[str, Any]]]) -> str:
    few, many = min(found), max(found)
    head = ["result", "held", "peak", "bar", "with mapped files", "seconds", "of cores", "a layer", f"{LAYERS} layers"]
    lines = [f"| {many} layers | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    for name, row in found[many].items():
        bar = row["result"] + TENSORS * row["tensor"]
        sizes = [f"{size / 1e9:.2f} GB" for size in (row["result"], row["held"], row["peak"], bar, row["with_files"])]
        times = [row["seconds"], row["cpu"]]
        if many > few:
            layer = (row["cpu"] - found[few][name]["cpu"]) / (many - few)
            times += [layer, row["cpu"] + layer * (LAYERS - many)]
        cells = [name, *sizes, *(f"{seconds:.0f} s" for seconds in times)]
        lines.append(f"| {' | '.join([*cells, *[''] * (len(head) + 1 - len(cells))])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--fp8", choices=("tensor", "blocks"), help="the checkpoint's layers are FP8")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--directory", type=Path, help="for some 30 GB (default: a temporary one)")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        return one_stage(args.stage, args.directory)
    found = {}
    for layers in args.layers:
        directory = Path(tempfile.mkdtemp(dir=args.directory))
        try:
            found[layers] = measure(layers, directory, args.stages, args.fp8)
        finally:
            shutil.rmtree(directory, ignore_errors=True)
    versions = {name: importlib.metadata.version(name) for name in ("jax", "orbax-checkpoint", "tensorstore", "numpy")}
    where = {"python": platform.python_version(), **versions, "processor": processor()}
    if args.json:
        write_json(args.json, {"where": where, "layers": found})
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    print(table(found))


if __name__ == "__main__":
    main()

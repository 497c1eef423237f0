"""How the cost of a distillation step grows with the number of devices: what it sends and holds, how long it takes.

    python benchmarks/scaling.py [--json FILE] [--tpu v5p:4x4x4 --tpu v5p:8x8x4,data=4 ..]

The step is the one that a `distill` stage runs (text only, AdamW), lowered from shapes that say where they lie.

- On 1, 2, 4 and 8 virtual CPU devices: bytes that a device sends per step, read from the compiled program (see
  `planning/traffic.py`), and seconds per step of a tiny model. Virtual devices share the cores of one machine: seconds
  show what the program costs beside its arithmetic, not a speed-up. Weak scaling keeps the tokens of a device, strong
  scaling those of the batch.
- With `--tpu` (libtpu must be importable, no TPU is needed): the real family's 14B student and 24B teacher compiled
  ahead of time for the topology, fsdp over what the named axes leave; nothing is run. `--rows` and `--length` are the
  global batch, as many rows as chips if not said.

FLOPs are the specs' own count, which has no recomputation: XLA's analysis counts a loop's body once.
"""

from __future__ import annotations

import os

# Before JAX is imported. No host is asked for its chips: the topology is named.
os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}

import argparse
import importlib.metadata
import json
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from hardware import processor
from ministral_jax.distributed.placement import AXES, MeshConfig, Placement, Rules, make_mesh
from ministral_jax.models.spec import PRESETS, ModelSpec
from ministral_jax.models.vlm import Compute
from ministral_jax.planning.compiler.traffic import Collective, by_kind, collectives
from ministral_jax.stages.base import Graph, Job, fresh_params
from ministral_jax.stages.distill import Distill
from ministral_jax.stages.import_ import Import
from ministral_jax.training.optimizer import OptimizerConfig, make_optimizer
from ministral_jax.training.state import init_state

DEVICES = (1, 2, 4, 8)
MESHES = {
    "data": {1: {}, 2: dict(data=2), 4: dict(data=4), 8: dict(data=8)},
    "fsdp": {1: {}, 2: dict(fsdp=2), 4: dict(fsdp=4), 8: dict(fsdp=8)},
    "fsdp_tensor": {1: {}, 2: dict(tensor=2), 4: dict(fsdp=2, tensor=2), 8: dict(fsdp=4, tensor=2)},
    "data_fsdp_context": {1: {}, 2: dict(context=2), 4: dict(fsdp=2, context=2), 8: dict(data=2, fsdp=2, context=2)},
}
ROUNDS = 5
STEPS = 1000
OPTIMIZER = OptimizerConfig(lr=1e-4)


@dataclass(frozen=True)
class Setting:
    """What is distilled into what, how, in batches of which length."""

    student: ModelSpec
    teacher: ModelSpec
    compute: Compute
    chunk: int
    length: int

    def flops(self, tokens: int) -> int:
        """Of one step, as the training loop counts them for MFU."""
        return (3 * self.student.flops_per_token(self.length) + self.teacher.flops_per_token(self.length)) * tokens


def preset(name: str) -> ModelSpec:
    return PRESETS[name].model_copy(update={"vision": None})


TINY = Setting(preset("tiny-14b"), preset("tiny-24b"), Compute(), chunk=64, length=128)


def real(length: int) -> Setting:
    compute = Compute(dtype="bfloat16", remat="full")
    return Setting(preset("ministral-3-14b"), preset("mistral-small-3.1-24b"), compute, chunk=4096, length=length)


def distil(setting: Setting, place: Placement, rows: int) -> tuple[Distill, Graph]:
    """The stage, and what it knows of its teacher."""
    stage = Distill.model_validate(
        {
            "do": "distill",
            "from": "student",
            "teacher": "teacher",
            "steps": STEPS,
            "data": {"sources": {"text": {"kind": "python-library"}}},
            "batch": {"sequences": rows, "length": setting.length},
            "compute": setting.compute,
            "loss": {"chunk": setting.chunk},
            "optimizer": OPTIMIZER,
            "sharding": place.rules,
        }
    )
    return stage, Graph({"teacher": Import(do="import", path="none")}, {"teacher": setting.teacher})


def compile_step(setting: Setting, place: Placement, rows: int, **options: Any) -> Any:
    """The compiled step `(state, frozen, batch) -> (state, metrics)` of a distil stage; nothing is allocated. Call it
    with `place.mesh` set."""
    stage, graph = distil(setting, place, rows)
    job = Job("benchmark", stage, setting.student, graph, Path("none"), place.mesh)
    stage.check_mesh(job)
    return stage.programs(job)["step"].lower().compile(options)


def batch_of(setting: Setting, rows: int) -> dict[str, np.ndarray]:
    shape = rows, setting.length
    tokens = np.random.default_rng(0).integers(0, setting.student.vocab, shape, np.int32)
    positions = np.broadcast_to(np.arange(setting.length, dtype=np.int32), shape)
    return {
        "tokens": tokens,
        "positions": positions,
        "segments": np.ones(shape, np.int32),
        "labels": np.roll(tokens, -1, 1),
        "loss_mask": np.ones(shape, np.float32),
        "answer_mask": np.zeros(shape, np.float32),
        "text_bytes": np.ones(shape, np.float32),
    }


def figures_of(memory: Any, text: str, setting: Setting, rows: int, devices: int) -> tuple[dict, list[Collective]]:
    """What a device sends, computes and holds in a step."""
    found = collectives(text)
    sent = by_kind(found)
    flops = setting.flops(rows * setting.length) / devices
    figures = {
        "rows": rows,
        "tokens_per_device": rows * setting.length / devices,
        "sent_bytes": {op.replace("-", "_"): count for op, count in sent.items()} | {"total": sum(sent.values())},
        "flops": flops,
        "sent_bytes_per_flop": sum(sent.values()) / flops,
        "memory_bytes": {
            "arguments": memory.argument_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            # The state is donated: the new one takes its place.
            "arguments_and_temporaries": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        },
    }
    return figures, found


# ---- virtual devices ------------------------------------------------------------------------------------------------


def seconds_of(compiled: Any, setting: Setting, place: Placement, rows: int) -> list[float]:
    """Wall-clock seconds of each of `ROUNDS` steps after a first."""
    state = init_state(fresh_params(setting.student, 0, place), make_optimizer(OPTIMIZER, STEPS))
    frozen = {"teacher": fresh_params(setting.teacher, 1, place)}
    batch, spent = place.place(batch_of(setting, rows), rows), []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        state, metrics = compiled(state, frozen, batch)
        jax.block_until_ready((state, metrics))
        spent.append(time.perf_counter() - start)
    return spent[1:]


def virtual_devices() -> dict[str, Any]:
    """By mesh kind, scaling and number of devices."""
    done: dict[tuple, dict[str, Any]] = {}

    def one(count: int, mesh: dict[str, int], rows: int) -> dict[str, Any]:
        key = (tuple(mesh.items()), rows)
        if key not in done:
            place = Placement(make_mesh(MeshConfig(**{"fsdp": 1, **mesh}), jax.devices()[:count]), Rules())
            with jax.set_mesh(place.mesh):
                compiled = compile_step(TINY, place, rows)
                figures, _ = figures_of(compiled.memory_analysis(), compiled.as_text(), TINY, rows, count)
                seconds = statistics.median(seconds_of(compiled, TINY, place, rows))
            done[key] = {"mesh": mesh, "seconds": seconds, **figures}
        return done[key]

    most = max(DEVICES)
    result: dict[str, Any] = {}
    for kind, meshes in MESHES.items():
        print(f"compiling and running on meshes of kind {kind}", file=sys.stderr, flush=True)
        weak = {str(n): one(n, mesh, n) for n, mesh in meshes.items()}
        strong = {str(n): one(n, mesh, most) for n, mesh in meshes.items()}
        result[kind] = {"weak": weak, "strong": strong}
    return result


# ---- TPU topologies -------------------------------------------------------------------------------------------------


def tpu(request: str, rows: int | None, length: int) -> dict[str, Any]:
    """Figures of the real family's step on `TOPOLOGY[,axis=size ..]`."""
    name, *sizes = request.split(",")
    devices = list(topologies.get_topology_desc(name, platform="tpu").devices)
    config = MeshConfig.model_validate({axis: int(size) for axis, _, size in (s.partition("=") for s in sizes)})
    place, setting = Placement(make_mesh(config, devices), Rules()), real(length)
    rows = rows or len(devices)
    print(f"compiling for {request}, some minutes", file=sys.stderr, flush=True)
    start = time.perf_counter()
    # JAX cannot read these programs back from libtpu 0.0.52 (asynchronous fusions); the compiler's own dump is text.
    with tempfile.TemporaryDirectory() as dump, jax.set_mesh(place.mesh):
        compiled = compile_step(setting, place, rows, xla_dump_to=dump, xla_dump_hlo_as_text=True)
        (program,) = Path(dump).glob("*jit_step*.after_optimizations.txt")
        text = program.read_text()
    seconds = time.perf_counter() - start
    figures, found = figures_of(compiled.memory_analysis(), text, setting, rows, len(devices))
    return {
        "topology": name,
        "device_kind": devices[0].device_kind,
        "chips": len(devices),
        "mesh": {axis: size for axis, size in place.mesh.shape.items() if size > 1},
        "compile_seconds": seconds,
        **figures,
        "loss_head": loss_head(found),
        "largest": [_record(c) for c in sorted(found, key=lambda c: -c.sent)[:12]],
    }


def _record(c: Collective) -> dict[str, Any]:
    return {key: value for key, value in c._asdict().items() if key != "members"} | {"sent": c.sent}


def loss_head(found: list[Collective]) -> dict[str, dict[str, int]]:
    """Of the loss head's collectives, those that move a head or its gradient: how often a step runs them, bytes sent.

    They are known by their size: the loop over chunks only reduces numbers per token.
    """
    mine = [c for c in found if "shard_map" in c.source and "decoder" not in c.source and c.operand >= 2**20]
    ops = dict.fromkeys(c.op for c in mine)
    return {op: {key: sum(getattr(c, key) for c in mine if c.op == op) for key in ("times", "sent")} for op in ops}


# ---- output ---------------------------------------------------------------------------------------------------------

COLUMNS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "collective_permute", "total")


def mesh_text(mesh: dict[str, int]) -> str:
    return " x ".join(f"{axis} {mesh[axis]}" for axis in AXES if mesh.get(axis, 1) > 1) or "one device"


def virtual_table(figures: dict[str, Any]) -> str:
    head = f"{'':10}{'mesh':>29}{'rows':>6}{'ms':>8}" + "".join(f"{c.replace('_', '-')[:14]:>16}" for c in COLUMNS)
    lines = [head + f"{'B/kFLOP':>10}"]
    for kinds in figures.values():
        for scaling, by_count in kinds.items():
            for row in by_count.values():
                sent = "".join(f"{row['sent_bytes'][c] / 1024:16,.0f}" for c in COLUMNS)
                label = f"{scaling:10}{mesh_text(row['mesh']):>29}{row['rows']:6}{1e3 * row['seconds']:8.0f}"
                lines.append(label + sent + f"{1e3 * row['sent_bytes_per_flop']:10.2f}")
        lines.append("")
    return "\n".join(lines)


def tpu_table(figures: dict[str, Any]) -> str:
    head = f"{'topology':12}{'mesh':>22}{'rows':>6}{'held GiB':>10}{'arg. GiB':>10}"
    head += "".join(f"{c.replace('_', '-')[:14]:>16}" for c in COLUMNS) + f"{'TFLOP':>9}{'B/kFLOP':>9}"
    lines = [head]
    for row in figures.values():
        memory, sent = row["memory_bytes"], row["sent_bytes"]
        label = f"{row['topology']:12}{mesh_text(row['mesh']):>22}{row['rows']:6}"
        label += f"{memory['arguments_and_temporaries'] / 2**30:10.1f}{memory['arguments'] / 2**30:10.1f}"
        label += "".join(f"{sent[c] / 1e9:16,.2f}" for c in COLUMNS)
        lines.append(label + f"{row['flops'] / 1e12:9,.0f}{1e3 * row['sent_bytes_per_flop']:9.3f}")
    for name, row in figures.items():
        lines.append(f"\n{name}, compiled in {row['compile_seconds']:.0f} s; most is sent by")
        for c in row["largest"][:6]:
            arrays = c["shape"] if len(c["shape"]) < 40 else f"{c['shape'].split()[0]} and others"
            text = f"{c['sent'] / 1e9:9.2f} GB  {c['times']:3} x {c['op']} of {arrays} in groups of {c['group']}"
            lines.append(f"{text}: {'/'.join(c['source'].split('/')[-4:])}")
        for op, head in row["loss_head"].items():
            lines.append(f"{head['sent'] / 1e9:9.2f} GB  {head['times']:3} x {op} of a head or its gradient")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure to this file")
    parser.add_argument("--tpu", action="append", default=[], metavar="TOPOLOGY[,axis=size ..]")
    parser.add_argument("--rows", type=int, help="of the global batch on --tpu")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a row on --tpu")
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", max(DEVICES))
    names = ("jax", "jaxlib", "flax", "libtpu") if args.tpu else ("jax", "jaxlib", "flax")
    versions = {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}
    hardware = processor()
    print(f"{hardware}; " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    figures = {"versions": versions, "hardware": hardware, "tpu": {}}
    figures["tpu"] = {r.replace(":", "_"): tpu(r, args.rows, args.length) for r in args.tpu}
    figures["cpu"] = virtual_devices()
    print(virtual_table(figures["cpu"]))
    if args.tpu:
        print(tpu_table(figures["tpu"]))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()

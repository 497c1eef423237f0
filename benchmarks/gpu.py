"""What one H100, H200 or B200 does with a training step, in eight minutes at most.

    python benchmarks/gpu.py [--json FILE] [--minutes 8] [--rehearse]

- attention: kernels against each other, forward and backward, rows of 4K, 16K and 32K tokens with documents of 2K.
  TFLOP/s count the products within documents, three and a half times the forward pass's, whatever a kernel computes.
- train, distil: a step of the project's own, bfloat16, at the widths of 3B, 8B and 14B with as many layers as fit, by
  arithmetic: `bytes_of`. The teacher has the next larger widths and the share of layers that it has in the family. MFU
  is of the FLOPs that `ModelSpec.flops_per_token` counts (three passes, and one of the teacher's), nothing recomputed.
- loss head: forward KL of 8,192 tokens over the whole vocabulary, value and gradient.
- profile: where the time of a train step at 8B widths went, by named scope.

Each part is a process of its own with a deadline, in order of what one would miss most; what fails or is late is a row
that says so. `--rehearse` does all of it at sizes that a CPU can, in a minute: its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hardware import processor

NEXT = {"3b": "8b", "8b": "14b", "14b": "24b"}
SECONDS = {  # of each part, in the order in which they run
    "train 8b": 60, "attention": 120, "distil 8b": 55, "train 14b": 45, "distil 14b": 55, "train 3b": 40,
    "distil 3b": 45, "loss head": 30,
}  # fmt: skip
LONG_ENOUGH = 4.0
"""Seconds of runs that one figure is the mean of."""
USABLE = 0.85
"""Of the memory that JAX takes: the rest is for what the arithmetic leaves out, and fragments."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    presets: dict[str, str]
    tokens: int
    document: int
    lengths: tuple[int, ...]
    """Of rows for attention, of which there are as many as fill the longest one."""
    heads: tuple[int, int, int]
    layers: int | None = None
    """None: as many as fit."""


REAL = Sizes(
    {"3b": "ministral-3-3b", "8b": "ministral-3-8b", "14b": "ministral-3-14b", "24b": "mistral-small-3.1-24b"},
    tokens=8192,
    document=2048,
    lengths=(4096, 16384, 32768),
    heads=(32, 8, 128),
)
REHEARSAL = Sizes({name: f"tiny-{name}" for name in ("3b", "8b", "14b", "24b")}, 256, 64, (128, 256), (4, 2, 32), 2)


# ---- parts ----------------------------------------------------------------------------------------------------------


def attention(sizes: Sizes) -> Iterator[Row]:
    import jax
    import jax.numpy as jnp

    from ministral_jax.models.attention import AttentionSpec, attend

    heads, kv_heads, width = sizes.heads
    for length in sizes.lengths:
        rows = max(sizes.lengths) // length
        shapes = [(rows, length, n, width) for n in (heads, kv_heads, kv_heads)]
        arrays = [jax.random.normal(jax.random.key(i), s, jnp.bfloat16) for i, s in enumerate(shapes)]
        segments = packed(rows, length, sizes.document)[0]
        flops = 3.5 * 4 * heads * width * rows * length * sizes.document / 2
        for name in ("cudnn", "mosaic", "triton", "blockwise"):
            spec = AttentionSpec(implementation=name, block=min(512, sizes.document))

            def total(q, k, v, spec=spec, segments=segments):
                return attend(q, k, v, segments, spec).astype(jnp.float32).sum()

            def measured(total=total, arrays=arrays, flops=flops) -> Row:
                return timed(partial(jax.jit(jax.grad(total, (0, 1, 2))), *arrays), flops)

            yield {"name": f"{name}, {rows} x {length:,}", **attempt(measured)}


def train(size: str, sizes: Sizes, profile: bool) -> Iterator[Row]:
    yield from _steps(size, None, sizes, profile)


def distil(size: str, sizes: Sizes) -> Iterator[Row]:
    yield from _steps(size, NEXT[size], sizes, False)


def _steps(size: str, teacher: str | None, sizes: Sizes, profile: bool) -> Iterator[Row]:
    import jax
    import jax.numpy as jnp

    from ministral_jax.distributed.placement import MeshConfig, Placement, Rules, make_mesh
    from ministral_jax.losses.chunked import LossOptions
    from ministral_jax.losses.head import LossHead
    from ministral_jax.models.spec import PRESETS
    from ministral_jax.models.vlm import VLM, Compute, init_params
    from ministral_jax.stages.teaching import distillation
    from ministral_jax.stages.train import next_token_loss
    from ministral_jax.teachers.teacher import online_targets
    from ministral_jax.training.optimizer import OptimizerConfig, learning_rate, make_optimizer
    from ministral_jax.training.state import init_state, make_step

    student = PRESETS[sizes.presets[size]].model_copy(update={"vision": None})
    taught_by = None if teacher is None else PRESETS[sizes.presets[teacher]].model_copy(update={"vision": None})
    layers = sizes.layers or most_layers(student, taught_by, sizes.tokens)
    if layers < 1:
        yield {"name": f"{size} widths", "error": "not one layer fits"}
        return
    share = layers / student.layers
    student = student.model_copy(update={"layers": layers})
    place, compute = Placement(make_mesh(MeshConfig()), Rules()), Compute(dtype="bfloat16")
    frozen: dict[str, Any] = {}
    flops = 3 * student.flops_per_token(sizes.document)
    name = f"{size} widths, {layers} layers"
    fresh = jax.jit(init_params, static_argnums=(0, 2))
    if taught_by is None:
        loss = next_token_loss(student, compute, LossHead(place))
    else:
        taught_by = taught_by.model_copy(update={"layers": max(round(share * taught_by.layers), 1)})
        frozen = {"teacher": fresh(taught_by, jax.random.key(1), jnp.bfloat16)}
        flops += taught_by.flops_per_token(sizes.document)
        name += f", teacher {teacher} with {taught_by.layers}"
        targets = online_targets(taught_by, compute, place.rules)
        loss = distillation(VLM(student, compute), LossOptions(), LossHead(place), targets)
    config = OptimizerConfig(warmup=0, schedule="constant")
    optimizer = make_optimizer(config, 1000)
    step = make_step(loss, optimizer, learning_rate(config, 1000))
    state = init_state(fresh(student, jax.random.key(0), jnp.float32), optimizer)
    batch = rows_of(sizes, student.vocab)

    def run() -> Any:
        nonlocal state
        state, metrics = step(state, frozen, batch)
        return metrics

    def measured() -> Row:
        found = timed(run, flops * sizes.tokens)
        peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
        return found | {"tokens_per_second": 1e3 * sizes.tokens / found["ms"], "peak_gb": peak / 1e9}

    yield {"name": name, **(result := attempt(measured))}
    if profile and "error" not in result:
        yield {"name": f"profile of {name}", **attempt(partial(profiled, run))}


def profiled(run: Callable[[], Any], steps: int = 2) -> Row:
    import jax

    from ministral_jax.training.profiling import write_table

    with tempfile.TemporaryDirectory() as directory:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        with jax.profiler.trace(directory, profiler_options=options):
            for _ in range(steps):
                done = run()
            jax.block_until_ready(done)
        table = write_table(Path(directory), steps)
    return {"error": "the trace holds no operation"} if table is None else {"lines": table.lines()}


def loss_head(sizes: Sizes) -> Iterator[Row]:
    import jax
    import jax.numpy as jnp

    from ministral_jax.losses.chunked import Hidden, LossOptions, distillation_loss
    from ministral_jax.models.spec import PRESETS

    spec = PRESETS[sizes.presets["14b"]]
    draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)
    hidden, head = draw(0, 1, sizes.tokens, spec.width), draw(1, spec.width, spec.vocab) * spec.width**-0.5
    teacher = Hidden(draw(2, 1, sizes.tokens, spec.width), draw(3, spec.width, spec.vocab) * spec.width**-0.5)
    labels, mask = jnp.zeros((1, sizes.tokens), jnp.int32), jnp.ones((1, sizes.tokens))
    value = lambda hidden, head: distillation_loss(hidden, head, teacher, labels, mask, LossOptions())[0]
    flops = 4 * 2 * sizes.tokens * spec.width * spec.vocab  # two products for logits, two for gradients
    run = partial(jax.jit(jax.value_and_grad(value, (0, 1))), hidden, head)
    yield {"name": f"{sizes.tokens:,} x {spec.width:,} x {spec.vocab:,}", **attempt(lambda: timed(run, flops))}


PARTS: dict[str, Callable[[Sizes], Iterator[Row]]] = {
    "attention": attention,
    "loss head": loss_head,
    **{f"train {size}": partial(train, size, profile=size == "8b") for size in NEXT},
    **{f"distil {size}": partial(distil, size) for size in NEXT},
}


# ---- what they share ------------------------------------------------------------------------------------------------


def attempt(measured: Callable[[], Row]) -> Row:
    """What was measured, or why not: whatever one kernel or size raises, the others are to be measured."""
    try:
        return measured()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}


def timed(run: Callable[[], Any], flops: float, least: int = 3) -> Row:
    """Milliseconds of a run, the mean of those after the first two, and what they are of the device's peak."""
    import jax

    from ministral_jax.training.hooks import peak_flops

    begun = time.perf_counter()
    for _ in range(2):
        jax.block_until_ready(run())
    ready, count = time.perf_counter(), 0
    while count < least or time.perf_counter() - ready < LONG_ENOUGH:
        done = run()
        count += 1
        if count % least == 0:
            jax.block_until_ready(done)
    jax.block_until_ready(done)
    each = (time.perf_counter() - ready) / count
    found: Row = {"ms": 1e3 * each, "tflops": flops / each / 1e12, "to_begin_s": ready - begun, "runs": count}
    return found if (peak := peak_flops()) is None else found | {"mfu": flops / each / peak}


def packed(rows: int, length: int, document: int) -> tuple[Any, Any]:
    """Segments and positions [rows, length] of documents of one length."""
    import numpy as np

    index = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    return index // document + 1, index % document


def rows_of(sizes: Sizes, vocab: int) -> dict[str, Any]:
    """One row of random tokens, on the device."""
    import jax
    import numpy as np

    segments, positions = packed(1, sizes.tokens, sizes.document)
    tokens = np.random.default_rng(0).integers(0, vocab, segments.shape).astype(np.int32)
    mask = np.ones(segments.shape, np.float32)
    batch = dict(tokens=tokens, labels=np.roll(tokens, -1, 1), segments=segments, positions=positions, loss_mask=mask)
    return jax.device_put(batch)


def bytes_of(student: Any, teacher: Any, tokens: int, layers: int) -> float:
    """Of a step with `layers` of the student's layers.

    A parameter is 18 bytes: itself, two moments and a gradient in float32, its bfloat16 copy; a teacher's is 2. A layer
    keeps for the backward pass the results of its products and of attention, and its input, in bfloat16; one layer has
    as much again in hand, and so has the teacher's. The loss head has four float32 arrays of a chunk's logits and its
    gradient once more.
    """
    from ministral_jax.losses.targets import DEFAULT_CHUNK

    def layer(spec: Any) -> tuple[int, int]:
        at_heads = (2 * spec.heads + 2 * spec.kv_heads) * spec.head_width
        return spec.width * (at_heads + 3 * spec.mlp_width), tokens * 2 * (
            3 * spec.width + at_heads + 3 * spec.mlp_width
        )

    weights, kept = layer(student)
    tables = student.vocab * student.width
    total = layers * (18 * weights + kept) + 2 * kept + (1 if student.tied else 2) * 18 * tables + 4 * tables
    if teacher is not None:
        theirs, in_hand = layer(teacher)
        above = round(layers / student.layers * teacher.layers)
        total += 2 * (above * theirs + 2 * teacher.vocab * teacher.width) + 2 * in_hand
    return total + 4 * 4 * DEFAULT_CHUNK * student.vocab


def most_layers(student: Any, teacher: Any, tokens: int) -> int:
    """Up to all that the student has, 0 where not one fits."""
    import jax

    has = USABLE * jax.devices()[0].memory_stats()["bytes_limit"]
    return max((n for n in range(1, student.layers + 1) if bytes_of(student, teacher, tokens, n) <= has), default=0)


# ---- processes and what they say ------------------------------------------------------------------------------------


def child(part: str, rehearse: bool, path: Path) -> None:
    """One part; every row is in the file as soon as it is known."""
    with path.open("a") as file:
        for row in PARTS[part](REHEARSAL if rehearse else REAL):
            file.write(json.dumps(row) + "\n")
            file.flush()


def measure(part: str, seconds: float, rehearse: bool) -> list[Row]:
    """The rows that a process of its own made in so many seconds."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "rows"
        path.touch()
        # Most of the memory, in one piece: the arithmetic counts on it.
        environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"} | os.environ
        command = [sys.executable, __file__, "--part", part, "--rows", str(path), *["--rehearse"] * rehearse]
        begun, why = time.monotonic(), ""
        try:
            done = subprocess.run(command, env=environment, timeout=seconds, stderr=subprocess.PIPE, text=True)
            if done.returncode:
                why = f"ended with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}"
        except subprocess.TimeoutExpired:
            why = f"stopped after its {seconds:.0f} s"
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        rows += [{"name": "the rest", "error": why}] if why else []
        return [{"part": part, "wall_s": time.monotonic() - begun, **row} for row in rows]


def line_of(row: Row) -> str:
    if "error" in row:
        return f"{row['part']:10} {row['name']:44} {row['error']}"
    if "lines" in row:
        return "\n".join([row["name"], *(f"    {line}" for line in row["lines"])])
    share = f"{row['mfu']:7.1%} of peak" if "mfu" in row else ""
    more = f"  {row['tokens_per_second']:,.0f} tokens/s  {row['peak_gb']:.0f} GB" if "peak_gb" in row else ""
    return f"{row['part']:10} {row['name']:44} {row['ms']:9.2f} ms {row['tflops']:7.1f} TFLOP/s {share}{more}"


def hardware() -> Row:
    """Asked in a process of its own: this one must hold no memory of the device."""
    ask = "import jax; d = jax.devices()[0]; print(d.device_kind, '|', (d.memory_stats() or {}).get('bytes_limit', 0))"
    told = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, timeout=120, check=True)
    kind, limit = told.stdout.strip().splitlines()[-1].split(" | ")
    known = {}
    for name in ("jax", "jaxlib", "tokamax", "jax-cuda13-plugin", "nvidia-cudnn-cu13", "ministral-jax"):
        try:
            known[name] = version(name)
        except ImportError:
            known[name] = "not installed"
    return {"device": kind, "bytes_limit": int(limit), "host": processor(), "versions": known}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        return child(args.part, args.rehearse, args.rows)
    ends = time.monotonic() + 60 * args.minutes - 10
    result: Row = {**hardware(), "rehearsal": args.rehearse, "rows": []}
    print(result["device"], result["versions"], flush=True)
    waiting = dict(SECONDS)
    for part, share in SECONDS.items():
        del waiting[part]
        left = ends - time.monotonic()
        # What the parts before did not use is for this one, as long as the others keep theirs.
        rows = measure(part, max(min(share, left), left - sum(waiting.values()), 1), args.rehearse)
        result["rows"] += rows
        print(*map(line_of, rows), sep="\n", flush=True)
        if args.json:
            args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Attention over packed documents on CPU, this checkout against an earlier commit, interleaved in one run.

    python benchmarks/attention_cpu.py [--against REVISION] [--lengths 2048 8192 32768] [--json FILE]

One row of each length, of documents of 500 tokens, the last one cut. `attention` is the value and gradients of
`models.attention.attend` alone, `decoder` those of a decoder of two layers; float32, 8 heads of 32, 2 key-value heads.
Each side is a process of its own that sleeps while the other is measured; rounds alternate, figures are medians. Ratios
are taken of CPU seconds (all threads of the process), which other work on the machine disturbs less than wall time;
wall time stands beside them. Memory is what XLA allots beside arguments and results.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hardware import processor

HERE = Path(__file__).resolve().parent.parent
DOCUMENT, HEADS, KV_HEADS, HEAD_WIDTH, WIDTH, MLP, LAYERS = 500, 8, 2, 32, 256, 1024, 2
CASES = ("attention", "decoder")
SIDES = ("before", "now")


def segments(length: int) -> Any:
    import numpy as np

    return (1 + np.arange(length, dtype=np.int32) // DOCUMENT)[None]


def attention(length: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Value and gradients of attention, and its arguments."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from ministral_jax.models.attention import attend

    random = np.random.default_rng(0)
    draw = lambda heads: random.standard_normal((1, length, heads, HEAD_WIDTH), np.float32)
    q, k, v, weight = (draw(heads) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS))
    total = lambda q, k, v, weight, documents: jnp.sum(attend(q, k, v, documents) * weight)
    return jax.value_and_grad(total, (0, 1, 2)), (q, k, v, weight, segments(length))


def decoder(length: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Value and gradients of a small decoder's hidden states, and its arguments."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from ministral_jax.models.spec import ModelSpec
    from ministral_jax.models.vlm import VLM, Compute
    from ministral_jax.stages.base import fresh_params

    spec = ModelSpec(
        layers=LAYERS,
        width=WIDTH,
        heads=HEADS,
        kv_heads=KV_HEADS,
        head_width=HEAD_WIDTH,
        mlp_width=MLP,
        vocab=256,
        context=length,
        vision=None,
    )
    tokens = np.random.default_rng(0).integers(0, spec.vocab, (1, length)).astype(np.int32)
    positions = (np.arange(length, dtype=np.int32) % DOCUMENT)[None]

    def total(params: Any, tokens: Any, positions: Any, documents: Any) -> Any:
        hidden = VLM(spec, Compute()).apply({"params": params}, tokens, positions, documents, method="hidden")
        return jnp.sum(jnp.sin(hidden))

    return jax.value_and_grad(total), (fresh_params(spec, 0), tokens, positions, segments(length))


def worker() -> None:
    """Answer each line `case length` on stdin with the CPU and wall seconds of one call and its temporary bytes."""
    import jax

    compiled: dict[str, tuple[Any, tuple[Any, ...]]] = {}
    for line in sys.stdin:
        if line not in compiled:
            case, length = line.split()
            function, arguments = globals()[case](int(length))
            program = jax.jit(function).lower(*arguments).compile()
            compiled[line] = program, jax.device_put(arguments)
            jax.block_until_ready(program(*compiled[line][1]))
        program, arguments = compiled[line]
        wall, cpu = time.perf_counter(), time.process_time()
        jax.block_until_ready(program(*arguments))
        spent = time.process_time() - cpu, time.perf_counter() - wall
        print(json.dumps([*spent, program.memory_analysis().temp_size_in_bytes]), flush=True)


def start(source: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(source)}
    command = [sys.executable, __file__, "--worker"]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def measure(process: subprocess.Popen[str], case: str, length: int) -> list[float]:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{case} {length}\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def compare(revision: str, lengths: list[int], rounds: int) -> dict[str, Any]:
    show = ["git", "-C", str(HERE), "archive", revision, "ministral_jax"]
    results: dict[str, Any] = {case: {} for case in CASES}
    with tempfile.TemporaryDirectory() as before:
        with tarfile.open(fileobj=io.BytesIO(subprocess.run(show, check=True, capture_output=True).stdout)) as files:
            files.extractall(before, filter="data")
        processes = {"before": start(Path(before)), "now": start(HERE)}
        for case in CASES:
            for length in lengths:
                found: dict[str, list[list[float]]] = {side: [] for side in SIDES}
                for n in range(rounds):
                    for side in SIDES if n % 2 == 0 else reversed(SIDES):
                        found[side].append(measure(processes[side], case, length))
                results[case][length] = {
                    side: [statistics.median(x) for x in zip(*found[side], strict=True)] for side in SIDES
                }
                show_row(case, length, results[case][length])
        for process in processes.values():
            process.communicate()
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
    return {"against": revision, "rounds": rounds, "versions": versions, "hardware": processor(), "results": results}


def show_row(case: str, length: int, sides: dict[str, list[float]]) -> None:
    (cpu, wall, temp), (cpu_now, wall_now, temp_now) = (sides[side] for side in SIDES)
    print(
        f"{case:>10}{length:8,}{cpu:11.3f}{cpu_now:9.3f}{cpu / cpu_now:7.2f} x{wall:11.3f}{wall_now:9.3f}"
        f"{wall / wall_now:7.2f} x{temp / 1e6:10.1f}{temp_now / 1e6:9.1f}{temp_now / length:10.0f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", default="314c308", metavar="REVISION", help="a commit of this repository")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker()
    print(f"{'':>10}{'tokens':>8}{'CPU s':>11}{'now':>9}{'':9}{'wall s':>11}{'now':>9}{'':9}", end="")
    print(f"{'temp MB':>10}{'now':>9}{'B/token':>10}")
    result = compare(args.against, args.lengths, args.rounds)
    print(f"against {args.against}, medians of {args.rounds} rounds,", result["versions"], result["hardware"])
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

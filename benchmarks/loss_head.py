"""Memory and time of the chunked loss head against the dense form of the same loss.

Both are `jax.value_and_grad` of the mean forward KL over the full vocabulary with respect to the student's hidden
states and head, from float32 hidden states of student and teacher. Dense is the plain program: two arrays of logits,
two log-softmaxes, one sum, differentiated by JAX. It computes no metrics; ours computes and returns three.

- memory_ratio = dense / ours, temporaries of the program that XLA compiles for 8,192 tokens and a vocabulary of 131,072
  (compiled, not run). Arguments and results are not temporaries: both programs return a head gradient of the same size,
  and the total with them is printed as well.
- time_ratio = ours / dense, median wall-clock seconds of interleaved runs at a size where dense fits.

    python benchmarks/loss_head.py [--json FILE]
"""

import argparse
import json
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from hardware import processor
from ministral_jax.losses.chunked import Hidden, LossOptions, distillation_loss

WIDTH, ROWS, ROUNDS = 256, 4, 9
MEMORY_SIZE = dict(tokens=8_192, vocab=131_072)
TIME_SIZE = dict(tokens=1_024, vocab=32_768)
MEMORY_BAR, TIME_BAR = 8.0, 1.15


def ours(hidden, head, teacher, labels, mask):
    def mean(hidden, head):
        loss, metrics = distillation_loss(hidden, head, teacher, labels, mask, LossOptions())
        return loss / metrics["kl"][1], metrics

    return jax.value_and_grad(mean, (0, 1), has_aux=True)(hidden, head)


def dense(hidden, head, teacher, labels, mask):
    def mean(hidden, head):
        log_q = jax.nn.log_softmax(hidden @ head)
        log_p = jax.nn.log_softmax(teacher.hidden @ teacher.head)
        return jnp.sum(mask * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)) / jnp.sum(mask)

    value, gradients = jax.value_and_grad(mean, (0, 1))(hidden, head)
    return (value, {}), gradients


PROGRAMS = {"dense": dense, "ours": ours}


def abstract(tokens: int, vocab: int):
    """Arguments of the programs, as shapes."""
    positions = (ROWS, tokens // ROWS)
    hidden = jax.ShapeDtypeStruct((*positions, WIDTH), jnp.float32)
    head = jax.ShapeDtypeStruct((WIDTH, vocab), jnp.float32)
    labels, mask = (jax.ShapeDtypeStruct(positions, dtype) for dtype in (jnp.int32, jnp.float32))
    return hidden, head, Hidden(hidden, head), labels, mask


def memory() -> dict:
    """Bytes of each program at MEMORY_SIZE."""
    found = {}
    for name, program in PROGRAMS.items():
        analysis = jax.jit(program).lower(*abstract(**MEMORY_SIZE)).compile().memory_analysis()
        temporary, output = analysis.temp_size_in_bytes, analysis.output_size_in_bytes
        everything = temporary + output + analysis.argument_size_in_bytes
        found[name] = dict(temporary=temporary, output=output, total=everything)
    return found


def run_times() -> tuple[dict[str, list[float]], float]:
    """Seconds of each run at TIME_SIZE, and the largest difference of the two results relative to the largest entry."""
    rng = np.random.default_rng(0)
    draw = lambda like, scale=1.0: jnp.asarray(scale * rng.normal(size=like.shape), like.dtype)
    hidden, head, teacher, labels, mask = abstract(**TIME_SIZE)
    scale = WIDTH**-0.5  # logits of size 1
    teacher = Hidden(draw(teacher.hidden), draw(teacher.head, scale))
    labels, mask = (jnp.ones(like.shape, like.dtype) for like in (labels, mask))
    arguments = draw(hidden), draw(head, scale), teacher, labels, mask
    steps = {name: jax.jit(program) for name, program in PROGRAMS.items()}
    results = {name: jax.block_until_ready(step(*arguments)) for name, step in steps.items()}
    both = ((value, gradients) for (value, _), gradients in results.values())
    apart = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max() / jnp.abs(a).max()), *both)
    del results, both
    seconds = {name: [] for name in steps}
    for turn in range(ROUNDS):
        for name in sorted(steps, reverse=turn % 2 == 1):
            start = time.perf_counter()
            jax.block_until_ready(steps[name](*arguments))
            seconds[name].append(time.perf_counter() - start)
    return seconds, max(jax.tree.leaves(apart))


def measure() -> dict:
    """All figures, ready for JSON."""
    bytes_of = memory()
    seconds, difference = run_times()
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return dict(
        memory_ratio=bytes_of["dense"]["temporary"] / bytes_of["ours"]["temporary"],
        memory_ratio_bar=MEMORY_BAR,
        total_memory_ratio=bytes_of["dense"]["total"] / bytes_of["ours"]["total"],
        time_ratio=median["ours"] / median["dense"],
        time_ratio_bar=TIME_BAR,
        memory_bytes=bytes_of,
        memory_size=MEMORY_SIZE,
        seconds=seconds,
        time_size=TIME_SIZE,
        largest_relative_difference=difference,
        width=WIDTH,
        chunk=LossOptions().chunk,
        versions={"python": platform.python_version(), "jax": version("jax"), "jaxlib": version("jaxlib")},
        hardware=f"{processor()}, JAX on {jax.devices()[0].device_kind}",
    )


def table(figures: dict) -> str:
    """The figures for people."""
    lines = [
        f"{figures['hardware']}; " + ", ".join(f"{name} {value}" for name, value in figures["versions"].items()),
        f"forward KL, value and gradient, float32, D = D' = {WIDTH}, chunk = {figures['chunk']} tokens",
        f"\nmemory in MiB, {MEMORY_SIZE['tokens']:,} tokens, V = {MEMORY_SIZE['vocab']:,}, compiled only",
        f"{'':8}{'temporaries':>12}{'results':>12}{'everything':>12}",
    ]
    for name, row in figures["memory_bytes"].items():
        lines.append(f"{name:8}" + "".join(f"{n / 2**20:12,.0f}" for n in row.values()))
    lines += [
        f"\ntime in s, {TIME_SIZE['tokens']:,} tokens, V = {TIME_SIZE['vocab']:,}, {ROUNDS} interleaved rounds",
        f"{'':8}{'median':>12}{'fastest':>12}{'slowest':>12}",
    ]
    for name, values in figures["seconds"].items():
        lines.append(f"{name:8}{statistics.median(values):12.3f}{min(values):12.3f}{max(values):12.3f}")
    everything = figures["total_memory_ratio"]
    return "\n".join(
        [
            *lines,
            f"\nlargest difference of the results, relative: {figures['largest_relative_difference']:.1e}",
            f"memory_ratio {figures['memory_ratio']:.1f} (bar >= {MEMORY_BAR}); of everything {everything:.1f}",
            f"time_ratio {figures['time_ratio']:.2f} (bar <= {TIME_BAR})",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    path = parser.parse_args().json
    figures = measure()
    print(table(figures))
    if path:
        path.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()

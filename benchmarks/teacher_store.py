"""What a logit store costs and saves: bytes and speed by codec, waiting for it, training from it against online.

    python benchmarks/teacher_store.py [--json FILE] [--sections store wait throughput] [--run-dir runs/tiny_stored]

- `store`: for each codec, bytes per token on disk, and tokens per second written (`pack` and write, 16 rows a call into
  files of at most 32), sealed (read back, counted, hashed) and read (join by hash, 16 rows a call, and `unpack`; in
  random order and in the order on disk; files in the page cache). Rows of 2,048 tokens, V = 131,072, D' = 5120, 40
  forced ids. The teacher is synthetic, `drawn_teacher.py` says how: no model of that size ran. A quarter of its ids
  come from anywhere in the vocabulary; in `topk_64_8bit_any_ids` all do, and no teacher's ids cost more. `dense` is
  computed, 4 V.
- `wait`: the share of the training loop's time that it waits in `next` for a batch, rows and targets, on the real
  pipeline: students tiny-14b and tiny-8b of configs/tiny_stored.yaml. Beside it the same with the teacher online, which
  waits for rows alone, and steps on stored batches that are in memory already, which show what reading takes from the
  cores that it shares with the step. `wait_share` is the larger one of the two students with a store. It
  includes bringing arrays to the device, and bounds what is lost: the device is then at the step before. With
  `--run-dir` a run of configs/tiny_stored.yaml is used, and made as far as needed; else a shortened one, thrown away.
- `throughput`: tokens per second of a 3B-shaped student with a 24B-shaped teacher online and with its 64 most probable
  ids stored, in turns, on the same batches. Both are the real sizes with half of the layers, a sixteenth of all widths
  and of the row of 4,096, and 1/32 of the vocabulary, which keeps every matrix's share of the FLOPs and with it their
  ratio. `stored_over_online` compares medians; FLOPs alone would give 1 + teacher / student.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import drawn_teacher
import jax
import jax.numpy as jnp
import numpy as np
import yaml
from students import make_side

from hardware import processor
from ministral_jax.models.spec import PRESETS, ModelSpec
from ministral_jax.recipe.load import load_recipe
from ministral_jax.recipe.types import Recipe
from ministral_jax.runs.cascade import run_cascade
from ministral_jax.teachers.codecs import (
    Codec,
    HiddenCodec,
    SampledCodec,
    TopKCodec,
    layout,
    pack,
    unpack,
)
from ministral_jax.teachers.statistics import statistics as statistics_of
from ministral_jax.teachers.statistics import summarise
from ministral_jax.teachers.store import Store, open_for_writing
from ministral_jax.teachers.store_format import Description, StoreInfo, TeacherIdentity, split_spec

SECTIONS = ("store", "wait", "throughput")
WAIT_BAR, THROUGHPUT_BAR = 0.02, 2.0
TINY_STORED = "configs/tiny_stored.yaml"

# ---- size and speed of a store --------------------------------------------------------------------------------------

TEACHER = drawn_teacher.Teacher(vocab=131_072, width=5120, length=2048, forced=40)
CODECS: dict[str, Codec] = {
    "topk_32_8bit": TopKCodec(entries=32),
    "topk_64_8bit": TopKCodec(entries=64),
    "topk_64_8bit_any_ids": TopKCodec(entries=64),
    "topk_64_16bit": TopKCodec(entries=64, bits=16),
    "topk_128_8bit": TopKCodec(entries=128),
    "sampled_50": SampledCodec(entries=50),
    "hidden_bfloat16": HiddenCodec(dtype="bfloat16"),
    "hidden_float8": HiddenCodec(dtype="float8"),
}
CALL, SHARD, PASSES = 16, 32, 3
ROWS, HIDDEN_ROWS = 64, 32


def stores(teacher: drawn_teacher.Teacher, rows: int, hidden_rows: int) -> dict[str, dict[str, Any]]:
    """Figures of each codec."""
    found = {}
    for name, codec in CODECS.items():
        print(f"store: {name}", file=sys.stderr, flush=True)
        drawn = replace(teacher, anywhere=1.0) if name.endswith("any_ids") else teacher
        count = hidden_rows if isinstance(codec, HiddenCodec) else rows
        with tempfile.TemporaryDirectory() as root:
            found[name] = one_store(codec, drawn, count, root)
    return found


def one_store(codec: Codec, teacher: drawn_teacher.Teacher, rows: int, root: str) -> dict[str, Any]:
    """Write, seal and read a store of as many rows at `root`."""
    forced = tuple(range(teacher.forced)) if isinstance(codec, TopKCodec) else ()
    arrays = layout(codec, teacher.length, teacher.width, teacher.vocab, forced)
    spec = split_spec(rows, SHARD, arrays)
    description = Description(info=info_of(codec, teacher, forced), splits={"train": spec})
    writer = open_for_writing(root, description, create=True)
    hashes = [hashlib.sha256(str(row).encode()).digest()[:16] for row in range(rows)]
    spent = {"write": 0.0, "seal": 0.0}
    for first in range(0, rows, CALL):
        numbers = np.arange(first, min(first + CALL, rows))
        encoded = teacher.rows(codec, len(numbers), seed=first)
        begun = time.perf_counter()
        writer.write("train", numbers, [hashes[i] for i in numbers], pack(codec, encoded))
        spent["write"] += time.perf_counter() - begun
    begun = time.perf_counter()
    records = [writer.seal_shard("train", shard, partial(statistics_of, codec)) for shard in range(spec.shards)]
    writer.finish({"train": records})
    spent["seal"] = time.perf_counter() - begun
    tokens = rows * teacher.length
    spent |= read_seconds(Store(root), hashes)
    summary = summarise(codec, records)
    size = {name: count / tokens for name, count in summary.bytes.items()}
    taught = summary.model_dump(mode="json", include={"teacher_entropy", "tail_mass", "unique_ids"}, exclude_none=True)
    return {
        "bytes_per_token": sum(size.values()),
        "by_array": size,
        "tokens": tokens,
        "tokens_per_second": {what: tokens / seconds for what, seconds in spent.items()},
        "teacher": taught,
    }


def info_of(codec: Codec, teacher: drawn_teacher.Teacher, forced: tuple[int, ...]) -> StoreInfo:
    return StoreInfo(
        codec=codec.model_dump(mode="json"),
        teacher=TeacherIdentity(stage="drawn", digest="0" * 64),
        tokenizer_digest="0" * 64,
        data_digest="0" * 64,
        length=teacher.length,
        vocab=teacher.vocab,
        width=teacher.width,
        forced=forced,
        seed=0,
        dtype="bfloat16",
    )


def read_seconds(store: Store, hashes: list[bytes]) -> dict[str, float]:
    """Of reading all rows once, the median of some times; the two orders in turns."""
    rng = np.random.default_rng(0)
    spent: dict[str, list[float]] = {"read_random": [], "read_in_order": []}
    for _ in range(PASSES):
        for order, seconds in spent.items():
            rows = rng.permutation(len(hashes)) if order == "read_random" else np.arange(len(hashes))
            begun = time.perf_counter()
            for first in range(0, len(rows), CALL):
                unpack(store.read("train", [hashes[i] for i in rows[first : first + CALL]]))
            seconds.append(time.perf_counter() - begun)
    return {order: statistics.median(seconds) for order, seconds in spent.items()}


# ---- waiting for the store ------------------------------------------------------------------------------------------

CHILDREN = {"tiny-14b": "14b-short", "tiny-8b": "8b-short"}
WARM_UP, STEPS, ROUNDS = 12, 60, 2
SHORTENED = ["stages.parent.steps=30", "stages.logits.rows=1280", "defaults.distill.steps=80"]


def waiting(run_dir: Path | None) -> dict[str, dict[str, dict[str, float]]]:
    """By student and by where its batches come from."""
    with tempfile.TemporaryDirectory() as scratch:
        recipe = load_recipe(TINY_STORED, [] if run_dir else SHORTENED)
        directory = run_dir or Path(scratch)
        run_cascade(recipe, directory, ["logits"])
        return {child: wait_of(recipe, stage, directory) for child, stage in CHILDREN.items()}


def wait_of(recipe: Recipe, student: str, run_dir: Path) -> dict[str, dict[str, float]]:
    print(f"wait: {student}", file=sys.stderr, flush=True)
    from_disk = make_side(recipe, student, None, run_dir)
    kept = list(islice(stream := from_disk.batches(), 16))
    stream.close()  # type: ignore[attr-defined]
    from_memory = replace(from_disk, batches=lambda: cycle(kept), state=jax.tree.map(jnp.copy, from_disk.state))
    sides = {"stored": from_disk, "online": make_side(recipe, student, "parent", run_dir), "in_memory": from_memory}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for turn in range(ROUNDS):
        for name in sorted(sides, reverse=turn % 2 == 1):
            one, stream = sides[name], sides[name].batches()
            one.drive(stream, WARM_UP)
            found[name].append(one.drive(stream, STEPS))
            getattr(stream, "close", lambda: None)()
    return {name: wait_figures(of_side, sides[name].tokens * STEPS) for name, of_side in found.items()}


def wait_figures(blocks: list[tuple[float, float]], tokens: int) -> dict[str, float]:
    return {
        "wait_share": sum(waited for _, waited in blocks) / sum(spent for spent, _ in blocks),
        "step_seconds": statistics.median(spent for spent, _ in blocks) / STEPS,
        "tokens_per_second": tokens / statistics.median(spent for spent, _ in blocks),
    }


# ---- stored against online ------------------------------------------------------------------------------------------

LAYERS_BY, WIDTHS_BY = 2, 16
REAL = {"teacher": "mistral-small-3.1-24b", "student": "ministral-3-3b"}
SEQUENCES, REAL_LENGTH, BLOCK, BLOCKS = 8, 4096, 3, 5


def scaled(name: str) -> ModelSpec:
    """A preset, text only, with fewer layers, narrower, and so many tokens that the head's share stays."""
    real = PRESETS[name]
    sizes: dict[str, Any] = {
        "layers": real.layers // LAYERS_BY,
        "width": real.width // WIDTHS_BY,
        "mlp_width": real.mlp_width // WIDTHS_BY,
        "heads": real.heads // 4,
        "kv_heads": real.kv_heads // 4,
        "head_width": real.head_width * 4 // WIDTHS_BY,
        "vocab": real.vocab // (LAYERS_BY * WIDTHS_BY),
        "context": REAL_LENGTH // WIDTHS_BY,
    }
    return ModelSpec(**sizes, tied=real.tied, vision=None)


def throughput_recipe() -> dict[str, Any]:
    teacher, student = (scaled(REAL[who]).model_dump(mode="json") for who in ("teacher", "student"))
    batch = {"sequences": SEQUENCES, "length": REAL_LENGTH // WIDTHS_BY}
    steps = 1 + BLOCK * BLOCKS
    once = {"steps": 1, "batch": batch, "evaluate": {"rows": SEQUENCES}}
    return {
        "name": "stored_against_online",
        "data": {
            "tokenizer": {"file": "bundled", "vocab": 2048, "special": 64},
            "sources": {"code": {"kind": "python-library", "limit": 150}},
            "held_out": 0.1,
            "patches": 0,
        },
        "stages": {
            "teacher": {"do": "train", "model": teacher, **once},
            "logits": {
                "do": "record",
                "from": "teacher",
                "rows": SEQUENCES * steps,
                "held_out_rows": SEQUENCES,
                "batch": batch,
            },
            "student": {"do": "distill", "model": student, "teacher": {"store": "logits"}, **once, "steps": steps},
        },
    }


def throughput() -> dict[str, Any]:
    """Tokens per second of both, and what FLOPs promise."""
    with tempfile.TemporaryDirectory() as scratch:
        path, run_dir = Path(scratch) / "recipe.yaml", Path(scratch) / "run"
        path.write_text(yaml.safe_dump(throughput_recipe()))
        recipe = load_recipe(path)
        run_cascade(recipe, run_dir, ["logits"])
        print("throughput", file=sys.stderr, flush=True)
        sides = {
            "stored": make_side(recipe, "student", None, run_dir),
            "online": make_side(recipe, "student", "teacher", run_dir),
        }
        streams = {name: one.batches() for name, one in sides.items()}
        for name, one in sides.items():
            one.drive(streams[name], 1)
        spent: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(BLOCKS):
            for name in sorted(sides, reverse=turn % 2 == 1):
                spent[name].append(sides[name].drive(streams[name], BLOCK)[0])
        for stream in streams.values():
            stream.close()  # type: ignore[attr-defined]
    return compared(spent)


def compared(spent: dict[str, list[float]]) -> dict[str, Any]:
    """Figures of seconds by block."""
    tokens = BLOCK * SEQUENCES * REAL_LENGTH // WIDTHS_BY
    speed = {name: tokens / statistics.median(seconds) for name, seconds in spent.items()}
    return {
        "stored_over_online": speed["stored"] / speed["online"],
        "by_block": [o / s for s, o in zip(spent["stored"], spent["online"], strict=True)],
        "expected_by_flops": 1 + teacher_over_student(scaled, REAL_LENGTH // WIDTHS_BY),
        "expected_by_flops_at_real_sizes": 1 + teacher_over_student(PRESETS.__getitem__, REAL_LENGTH),
        "tokens_per_second": speed,
        "sizes": {who: scaled(name).model_dump(mode="json") for who, name in REAL.items()},
    }


def teacher_over_student(sizes: Callable[[str], ModelSpec], length: int) -> float:
    """FLOPs of the teacher's forward pass over those of the student's training step."""
    return sizes(REAL["teacher"]).flops_per_token(length) / (3 * sizes(REAL["student"]).flops_per_token(length))


# ---- output ---------------------------------------------------------------------------------------------------------


def measure(sections: tuple[str, ...], run_dir: Path | None) -> dict[str, Any]:
    """All figures of the sections, ready for JSON."""
    names = ("jax", "jaxlib", "tensorstore", "grain", "numpy")
    figures: dict[str, Any] = {
        "versions": {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names},
        "hardware": f"{processor()}, JAX on {jax.devices()[0].device_kind}",
    }
    if "store" in sections:
        found = stores(TEACHER, ROWS, HIDDEN_ROWS)
        figures["bytes_per_token"] = {name: one["bytes_per_token"] for name, one in found.items()}
        figures["bytes_per_token"]["dense"] = 4 * TEACHER.vocab
        figures["store"] = found
    if "wait" in sections:
        figures["wait"] = waiting(run_dir)
        figures["wait_share"] = max(child["stored"]["wait_share"] for child in figures["wait"].values())
    if "throughput" in sections:
        figures["throughput"] = throughput()
        figures["stored_over_online"] = figures["throughput"]["stored_over_online"]
    return figures


def table(figures: dict[str, Any]) -> str:
    """The figures for people."""
    versions = ", ".join(f"{name} {version}" for name, version in figures["versions"].items())
    lines = [f"{figures['hardware']}; {versions}"]
    for section, render in (("store", store_lines), ("wait", wait_lines), ("throughput", throughput_lines)):
        if section in figures:
            lines += ["", *render(figures[section])]
    if "wait_share" in figures:
        lines += [f"\nwait_share {figures['wait_share']:.2%} (bar < {WAIT_BAR:.0%})"]
    if "stored_over_online" in figures:
        lines += [f"stored_over_online {figures['stored_over_online']:.2f} (bar >= {THROUGHPUT_BAR})"]
    return "\n".join(lines)


def store_lines(figures: dict[str, Any]) -> list[str]:
    speeds = ("write", "seal", "read_random", "read_in_order")
    dense, t = 4 * TEACHER.vocab, TEACHER
    lines = [
        f"store of a synthetic teacher: V = {t.vocab:,}, D' = {t.width}, rows of {t.length:,}, {t.forced} forced ids",
        f"{'':22}{'bytes/token':>12}{'of dense':>10}"
        + "".join(f"{s.replace('_', ' '):>14}" for s in speeds)
        + "   tokens/s",
    ]
    for name, one in figures.items():
        size, speed = one["bytes_per_token"], one["tokens_per_second"]
        lines.append(f"{name:22}{size:12,.1f}{size / dense:10.3%}" + "".join(f"{speed[s]:14,.0f}" for s in speeds))
    lines.append(f"{'dense (computed)':22}{dense:12,}{1:10.0%}")
    for name, one in figures.items():
        arrays = ", ".join(f"{array} {size:.2f}" for array, size in one["by_array"].items() if size >= 0.005)
        lines.append(f"{name:22}{arrays}")
    for name, one in figures.items():
        if one["teacher"]:
            means = {key: value["mean"] if isinstance(value, dict) else value for key, value in one["teacher"].items()}
            lines.append(f"{name:22}teacher drawn: " + ", ".join(f"mean {k} {v:.4g}" for k, v in means.items()))
    return lines


def wait_lines(figures: dict[str, Any]) -> list[str]:
    lines = [
        f"training loop of configs/tiny_stored.yaml, {ROUNDS} x {STEPS} steps after {WARM_UP}",
        f"{'':22}{'wait share':>12}{'ms/step':>10}{'tokens/s':>12}",
    ]
    for child, sides in figures.items():
        for name, one in sides.items():
            label = f"{child} {name.replace('_', ' ')}"
            speed = f"{1e3 * one['step_seconds']:10.1f}{one['tokens_per_second']:12,.0f}"
            lines.append(f"{label:22}{one['wait_share']:12.2%}{speed}")
    return lines


def throughput_lines(figures: dict[str, Any]) -> list[str]:
    real, here = figures["expected_by_flops_at_real_sizes"], figures["expected_by_flops"]
    sizes, blocks = figures["sizes"], figures["by_block"]
    shown = {who: f"{s['layers']} x {s['width']}/{s['mlp_width']}, V {s['vocab']}" for who, s in sizes.items()}
    return [
        f"{REAL['student']} and {REAL['teacher']}, scaled (student {shown['student']}; teacher {shown['teacher']})",
        *(f"{name:22}{speed:12,.0f} tokens/s" for name, speed in figures["tokens_per_second"].items()),
        f"{'stored / online':22}{figures['stored_over_online']:12.2f} (blocks {min(blocks):.2f} to {max(blocks):.2f}, "
        f"by FLOPs {here:.2f}, at real sizes {real:.2f})",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure to this file")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--run-dir", type=Path, help="a run of configs/tiny_stored.yaml, for `wait`")
    args = parser.parse_args()
    figures = measure(tuple(args.sections), args.run_dir)
    print(table(figures))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()

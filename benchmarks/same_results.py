"""Did a refactor change a result? Two runs of one recipe, compared to the bit.

    python benchmarks/same_results.py BEFORE AFTER

For each finished stage: the final parameters, the figures of its manifest and of its metrics.jsonl, its answers and
samples, and the files of its export or logit store; then the packed data and the run's own figures. Times, speeds,
versions and checksums of compressed files are no results. One line for each stage; exit code 1 when anything differs.

It reads the files alone and nothing of the package, so the two runs may come from different commits.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from grain.sources import ArrayRecordDataSource
from orbax.checkpoint import v1 as ocp

RESULTS = ("stage", "do", "spec", "tokens", "steps", "metrics", "data", "prune", "store")
"""Keys of a manifest that say what came out."""
FILES = ("samples.json", "answers.json", "hf", "store")
"""Of a stage, beside its parameters and figures."""
TIMES = ("seconds", "wall_seconds", "tokens_per_second", "tokens_per_second_per_device", "mfu")
LINEAGE = ("digest", "sha256", "recording.json")
"""In the JSON of a logit store: the digest of the teacher's manifest, which holds times, and what follows from it."""
BY_VALUE = {
    "summary.json": (),
    "samples.json": (),
    "answers.json": (),
    "store.json": LINEAGE,
    "recording.json": LINEAGE,
}
"""JSON files whose values are compared instead of their bytes, and the keys that are left out."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a run's directory")
    parser.add_argument("after", type=Path, help="another's, of the same recipe")
    args = parser.parse_args(argv)
    parts = compare(args.before, args.after)
    if not parts:
        parser.error(f"{args.before} has no finished stage")
    width, bad = max(map(len, parts)), 0
    for name, problems in parts.items():
        said = "same" if not problems else f"DIFFERENT  {problems[0]}"
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        print(f"{name:{width}}  {said}{more}", flush=True)
        bad += bool(problems)
    print(f"{len(parts) - bad} of {len(parts)} the same")
    return 1 if bad else 0


def compare(before: Path, after: Path) -> dict[str, list[str]]:
    """What differs, by stage and for "data" and "run"; nothing where there is no finished stage."""
    names = sorted({path.parent.name for run in (before, after) for path in run.glob("*/manifest.json")})
    parts = {name: compare_stage(before / name, after / name) for name in names}
    if parts:
        parts["(data)"] = list(compare_trees(before / "data", after / "data"))
        parts["(run)"] = [
            p for name in ("summary.json", "samples.json") for p in compare_trees(before / name, after / name)
        ]
    return parts


def compare_stage(before: Path, after: Path) -> list[str]:
    manifests = [read_json(path / "manifest.json") or {} for path in (before, after)]
    for path, manifest in zip((before, after), manifests, strict=True):
        if manifest.get("status") != "finished":
            return [f"{path} is not a finished stage"]
    results = [{key: manifest.get(key) for key in RESULTS} for manifest in manifests]
    problems = list(differences(*results, at="manifest"))
    problems += compare_params(before / "params", after / "params")
    records = [read_records(path / "metrics.jsonl") for path in (before, after)]
    problems += differences(*records, at="metrics.jsonl")
    for name in FILES:
        problems += compare_trees(before / name, after / name)
    return problems


def compare_params(before: Path, after: Path) -> list[str]:
    """Every array of two checkpoints, byte by byte."""
    if not before.exists() and not after.exists():
        return []
    leaves = [read_params(path) if path.exists() else {} for path in (before, after)]
    problems = []
    for name in sorted(leaves[0].keys() | leaves[1].keys()):
        one, other = (side.get(name) for side in leaves)
        if one is None or other is None:
            problems.append(f"params {name} is only in {before if other is None else after}")
        elif (one.shape, one.dtype) != (other.shape, other.dtype):
            problems.append(f"params {name} is {one.dtype}{one.shape} and {other.dtype}{other.shape}")
        elif one.tobytes() != other.tobytes():
            bits = [side.reshape(-1).view(f"u{side.itemsize}") for side in (one, other)]
            problems.append(f"params {name} differs in {(bits[0] != bits[1]).sum()} of {one.size} values")
    return problems


def read_params(path: Path) -> dict[str, np.ndarray]:
    """Arrays by path, in the dtypes they were saved in."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    stored: Any = ocp.metadata(str(path.absolute())).metadata
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), stored)
    loaded = ocp.load(str(path.absolute()), abstract)
    leaves = jax.tree_util.tree_leaves_with_path(loaded)
    return {jax.tree_util.keystr(where, simple=True, separator="/"): np.asarray(leaf) for where, leaf in leaves}


def compare_trees(before: Path, after: Path) -> Iterator[str]:
    """Files, or all files of directories: their bytes, but for packed rows and for JSON that holds times or lineage."""
    if before.is_dir() or after.is_dir():
        names = {path.relative_to(root) for root in (before, after) for path in root.rglob("*") if path.is_file()}
        for name in sorted(names):
            yield from compare_trees(before / name, after / name)
    elif before.exists() != after.exists():
        yield f"{before.name} is only in {(before if before.exists() else after).parent}"
    elif before.name in BY_VALUE:
        yield from differences(read_json(before), read_json(after), at=before.name)
    elif before.exists():
        read: Callable[[Path], Any] = read_rows if before.suffix == ".array_record" else Path.read_bytes
        if read(before) != read(after):
            yield f"{before} and {after} differ"


def differences(before: Any, after: Any, at: str) -> Iterator[str]:
    """Where two JSON values differ. A key that is null is as one that is not there: a default that was written out."""
    without = TIMES + BY_VALUE.get(at.partition(".")[0] + ".json", ())
    if isinstance(before, dict) and isinstance(after, dict):
        for key in before | after:
            if key not in without:
                yield from differences(before.get(key), after.get(key), f"{at}.{key}")
    elif isinstance(before, list) and isinstance(after, list):
        if len(before) != len(after):
            yield f"{at} has {len(before)} and {len(after)} entries"
        for number, (one, other) in enumerate(zip(before, after, strict=False)):
            yield from differences(one, other, f"{at}[{number}]")
    elif json.dumps(before) != json.dumps(after):  # as text: a NaN is equal to itself, 1 is not 1.0
        yield f"{at} is {shown(before)} and {shown(after)}"


def shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def read_records(path: Path) -> list[Any]:
    """Records of what was trained and evaluated, without those of where the time went."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [record for record in map(json.loads, lines) if record["kind"] != "time"]


def read_rows(path: Path) -> list[bytes]:
    source: Any = ArrayRecordDataSource([str(path)])
    return [source[index] for index in range(len(source))]


if __name__ == "__main__":
    sys.exit(main())

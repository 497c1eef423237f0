"""Does a run in a bucket end in the bits of a local one, however often it is killed?

    python benchmarks/buckets.py [--kills 10] [--recipe tests/chaos/chaos.yaml] [--keep DIR]

Buckets are emulated on the loopback, and all of it runs in a network that has nothing else (`unshare --net`):
what would leave the machine fails. First a run at gs://, killed by SIGKILL as soon as certain objects appear, against
one on a disk; then data, a logit store and an export at s3://. Exit code 1 when a result differs.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from pathlib import Path

from emulators import BUCKET, emulator

ROOT = Path(__file__).parents[1]
INSIDE = "MINISTRAL_JAX_ALONE"
PATIENCE = 1800
RECIPES = {
    "tests/chaos/chaos.yaml": (
        "data/documents/",
        "parent/stage.json",
        "parent/state/2/",
        "parent/state/checksums/2.json",
        "parent/state/checksums/4.json",
        "parent/params/",
        "pruned/params/",
        "short/state/2/",
        "short/state/checksums/4.json",
        "hf/hf/",
    ),
    "tests/micro.yaml": (
        "data/documents/",
        "parent/state/2/",
        "parent/state/checksums/4.json",
        "14b-pruned/params/",
        "14b-short/state/2/",
        "14b-base/state/checksums/2.json",
        "14b-base/params/",
        "3b-pruned/params/",
        "3b-short/state/checksums/4.json",
        "3b-hf/hf/",
    ),
}
"""Prefixes of objects at whose appearance a run is killed, in the order in which they come; the last one is of an
export."""
KILLS = 10
FAST = {
    "JAX_PLATFORMS": "cpu",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=KILLS, choices=range(1, KILLS + 1), metavar="N")
    parser.add_argument("--recipe", default=next(iter(RECIPES)), choices=RECIPES)
    parser.add_argument("--keep", type=Path, help="where what was made stays")
    args = parser.parse_args(argv)
    if INSIDE not in os.environ:
        words = [sys.executable, __file__, *(sys.argv[1:] if argv is None else argv)]
        return subprocess.run(
            ["unshare", "--net", "--map-root-user", *words], env=os.environ | {INSIDE: "1"}
        ).returncode
    _raise_loopback()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        return max(at_gs(args.recipe, args.kills, folder), at_s3(folder))


def _raise_loopback() -> None:
    """And be sure that there is nothing else."""
    names = [name for _, name in socket.if_nameindex()]
    assert names == ["lo"], f"a network of its own has the loopback alone, this one {names}"
    request = struct.pack("16sh14x", b"lo", 0x1 | 0x40)  # up, running
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, 0x8914, request)  # SIOCSIFFLAGS


def at_gs(recipe: str, kills: int, folder: Path) -> int:
    """A run at gs://, killed, against a local one."""
    moments, recipe = RECIPES[recipe], str(ROOT / recipe)
    chosen = [moments[i * KILLS // kills] for i in range(kills)]
    run(["run", recipe, "--run-dir", str(folder / "local")], environment({**os.environ}, folder))
    with emulator("gs", folder) as found:
        env = environment(found, folder)
        command = ["run", recipe, "--run-dir", f"gs://{BUCKET}/run"]
        for moment in chosen:
            kill_at(moment, command, env)
            shutil.rmtree(folder / "cache")  # as on another machine
        run(command, env)
        for verb in (["report"], ["status"], ["clean"]):
            run([*verb, f"gs://{BUCKET}/run"], env)
        for model in (moments[-2].split("/")[0], moments[-1]):
            run(["generate", f"gs://{BUCKET}/run/{model}", "--prompt", "a", "--max-tokens", "4"], env)
        taken = [*command[:-1], f"gs://{BUCKET}/other", "--from", f"gs://{BUCKET}/run"]
        said = run(taken, env)
        assert ": 0 of " in said, said
        _fetch(env, folder / "bucket")
    (folder / "local/data/digests.jsonl").unlink()  # of files by their times of change: only where a disk keeps it
    return same(folder / "local", folder / "bucket")


def at_s3(folder: Path) -> int:
    """Data, a logit store and an export at s3://, against local ones."""
    texts = folder / "texts"
    texts.mkdir()
    for path in sorted((ROOT / "docs").glob("*.md"))[:8]:
        shutil.copy(path, texts)
    recipe = str(ROOT / "tests/micro_stored.yaml")
    words = lambda place: [f"data.sources.code={{kind: text, weight: 0.6, path: '{place}/texts'}}"]
    run(["run", recipe, *words(folder), "--run-dir", str(folder / "disk")], environment({**os.environ}, folder))
    with emulator("s3", folder) as found:
        env, bucket = environment(found, folder), f"s3://{BUCKET}"
        python(f"places.put_files(Path({str(texts)!r}), places.place('{bucket}/texts', ''))", env)
        stored = f"stages.logits.store={bucket}/logits"
        run(["run", recipe, *words(bucket), stored, "--run-dir", str(folder / "stored")], env)
        assert not (folder / "stored/logits/store").exists()
        run(["export", str(folder / "stored/short"), f"{bucket}/hf"], env)
        run(["export", str(folder / "stored/short"), str(folder / "hf")], env)
        run(["generate", f"{bucket}/hf", "--prompt", "a", "--max-tokens", "4"], env)
        python(f"places.fetch_files(places.place('{bucket}/hf', ''), Path({str(folder / 'fetched')!r}))", env)
    files = {path.name: path.read_bytes() for path in (folder / "hf").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (folder / "fetched").iterdir()}, "exports differ"
    print(f"export at s3://: {len(files)} files, the same")
    shutil.rmtree(folder / "disk/logits/store")  # the other one is in the bucket
    for name in ("disk", "stored"):  # which says where documents came from; manifests have digests of the rows
        shutil.rmtree(folder / name / "data")
    return same(folder / "disk", folder / "stored")


def environment(found: dict[str, str], folder: Path) -> dict[str, str]:
    """With a cache of its own for what is copied from buckets."""
    (folder / "cache").mkdir(exist_ok=True)
    return found | FAST | {"XDG_CACHE_HOME": str(folder / "cache"), "PYTHONPATH": str(ROOT)}


def run(words: list[str], env: dict[str, str]) -> str:
    """A command to its end; what it said on stderr."""
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "ministral_jax", *words], env=env, capture_output=True, text=True)
    print(f"{words[0]} {words[-1]}: {done.returncode} in {time.monotonic() - begun:.0f} s", flush=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stderr


def python(line: str, env: dict[str, str]) -> None:
    subprocess.run(
        [sys.executable, "-c", f"from pathlib import Path; from ministral_jax import places; {line}"],
        env=env,
        check=True,
    )


def kill_at(moment: str, words: list[str], env: dict[str, str]) -> None:
    """Kill a run when an object with this prefix appears that was not there when it began."""
    before, end = set(names(env)), time.monotonic() + PATIENCE
    begun = time.monotonic()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "ministral_jax", *words], env=env, stdout=log, stderr=log, start_new_session=True
        )
        while not any(name.startswith(f"run/{moment}") for name in set(names(env)) - before):
            log.seek(0)
            assert process.poll() is None, f"ended before {moment}: {log.read()}"
            assert time.monotonic() < end, f"{moment} did not come"
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    print(f"killed at {moment} after {time.monotonic() - begun:.0f} s, {len(names(env))} objects", flush=True)


def names(env: dict[str, str]) -> list[str]:
    """Of the objects that are in the bucket, as the emulator says."""
    url = f"{env['STORAGE_EMULATOR_HOST']}/storage/v1/b/{BUCKET}/o?{urllib.parse.urlencode({'prefix': 'run/'})}"
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=60) as answer:
        return [item["name"] for item in json.load(answer).get("items", [])]


def _fetch(env: dict[str, str], folder: Path) -> None:
    python(f"places.fetch_files(places.place('gs://{BUCKET}/run', ''), Path({str(folder)!r}))", env)


def same(before: Path, after: Path) -> int:
    """What `same_results.py` finds."""
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/same_results.py"), str(before), str(after)]
    ).returncode


if __name__ == "__main__":
    sys.exit(main())

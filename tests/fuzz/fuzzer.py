"""Malformed files by the thousand, each read in a process whose memory and time are limited.

`python tests/fuzz/fuzzer.py --files 10000` spoils tiny valid files in ways that a seed gives and reads them. A file is
to be read, or refused by a `UserError` of one sentence: another exception, more memory than its bytes and the bound of
its kind, more than `SECONDS`, or the end of the process is a failure. `--first N --files 1` repeats one.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

SECONDS = 10
"""Of one file."""
READ, REFUSED = "read", "refused"
_LONGEST = 1000
"""Characters of a sentence."""


class _Hang(BaseException):
    """Passes through what catches exceptions."""


def outcomes(first: int, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Of files `first` to `first + count`, in order: `number`, `kind`, and how it ended as `end`, `READ`, `REFUSED` or
    what went wrong. They are read in a child process; where one ends or hangs, another goes on after that file."""
    done = 0
    while done < count:
        command = [sys.executable, __file__, "--child", "--first", str(first + done), "--files", str(count - done)]
        with (
            tempfile.TemporaryFile() as errors,
            subprocess.Popen(
                [*command, "--seed", str(seed)], bufsize=0, stdout=subprocess.PIPE, stderr=errors
            ) as child,
        ):
            assert child.stdout is not None
            kinds: list[str] = []
            while select.select([child.stdout], [], [], 3 * SECONDS if kinds else 120)[0]:
                if not (line := child.stdout.readline()):
                    break
                record = json.loads(line)
                if not kinds:
                    kinds = record
                    continue
                done += 1
                yield record
            child.kill()
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip()
        if count == 1:
            print(said, file=sys.stderr)
        if not kinds:
            raise RuntimeError(f"the process that is to read files did not start: {said[-2000:]}")
        if done < count:
            number = first + done
            done += 1
            yield {
                "number": number,
                "kind": kind_of(number, kinds),
                "end": f"the process ended or hung: {said[-2000:]}",
            }


def _child(first: int, count: int, seed: int, directory: Path) -> None:
    known = readers(directory)
    for name, reader in known.items():  # what is valid is read; and what is imported or compiled once is not counted
        _fill(directory / name, reader.valid)
        reader.read(directory / name)
    print(json.dumps([*known]), flush=True)
    signal.signal(signal.SIGALRM, _hang)
    for number in range(first, first + count):
        kind = kind_of(number, [*known])
        end = _attempt(known[kind], directory / kind, Random(f"{seed} {number}"), verbose=count == 1)
        print(json.dumps({"number": number, "kind": kind, "end": end}), flush=True)


def _fill(directory: Path, files: dict[str, bytes]) -> None:
    directory.mkdir(exist_ok=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)


def _hang(*_: Any) -> None:
    raise _Hang(f"it takes more than {SECONDS} s")


def _attempt(reader: Reader, directory: Path, random: Random, verbose: bool) -> str:
    victim = random.choice([*reader.spoil])
    content = reader.spoil[victim](reader.valid[victim], random)
    (directory / victim).write_bytes(content)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (held + len(content) + reader.bound, hard))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        reader.read(directory)
    except BaseException as error:  # a Rust extension's panic is no Exception
        found: BaseException | None = error
    else:
        found = None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    if verbose and found is not None:
        traceback.print_exception(found)
        print(f"{victim}: {content[:2000]!r}", file=sys.stderr)
    (directory / victim).write_bytes(reader.valid[victim])
    return READ if found is None else _verdict(found)


def _verdict(error: BaseException) -> str:
    """Whether it is one sentence that the user may read; what went wrong else."""
    causes, sentence = [error], str(error)
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    if any(isinstance(cause, MemoryError) for cause in causes):
        return f"allocates more than its bound: {sentence:.200}"
    if not isinstance(error, UserError):
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {sentence!r:.200} in {Path(place.filename).name}:{place.lineno}"
    if "\n" in sentence or len(sentence) > _LONGEST or not sentence.isprintable():
        return f"no sentence for a user: {sentence!r:.300} ({len(sentence)} characters)"
    return REFUSED


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        with tempfile.TemporaryDirectory() as directory:
            _child(args.first, args.files, args.seed, Path(directory))
        return 0
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for record in outcomes(args.first, args.files, args.seed):
        place = {READ: 0, REFUSED: 1}.get(record["end"], 2)
        counts[record["kind"]][place] += 1
        if place == 2:
            print(f"file {record['number']} ({record['kind']}): {record['end']}", flush=True)
    print(f"{'kind':24}{'read':>8}{'refused':>9}{'failed':>8}")
    for kind, numbers in [*sorted(counts.items()), ("all", [sum(n) for n in zip(*counts.values(), strict=True)])]:
        print(f"{kind:24}{numbers[0]:8}{numbers[1]:9}{numbers[2]:8}")
    return int(any(failed for _, _, failed in counts.values()))


if __name__ == "__main__" and "--child" in sys.argv:
    warnings.simplefilter("ignore")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

from readers import Reader, kind_of, readers  # noqa: E402

from ministral_jax.errors import UserError  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())

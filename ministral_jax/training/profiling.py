"""Where the time of traced steps went, by the named scopes of the code.

A trace of `jax.profiler` is an XSpace (xplane.proto of OpenXLA): planes of a device or of the host, with lines of
events. An event of a device is one run of an instruction of HLO; the scope that it was traced in is the instruction's
`op_name`, which TPUs write beside the event's name, and every backend in the HLO protos that go with a trace.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from ministral_jax.files import write_text

SCOPES = {
    "vision": "vision",
    "projector": "projector",
    "loss_head": "loss head",
    "label_logprobs": "loss head",
    "label_logprobs_gradient": "loss head",
    "optimizer": "optimizer",
    "gradient_sums": "gradient sums",
    "attend": "attend",
    "attention": "attention",
    "mlp": "mlp",
    "embed_tokens": "embedding",
}
"""What a row is called by the scope on the path; the first that is there counts: `attend` lies within `attention`."""
COLLECTIVES = re.compile(r"(all-|reduce-scatter|ragged-all|collective-|async-collective|send|recv|nccl)", re.IGNORECASE)
_CONTAINERS = re.compile(r"(while|conditional|call)\b")
_DEVICE = re.compile(r"/device:(TPU|GPU):\d+$")


class Op(NamedTuple):
    """One run of an instruction: its name in HLO, the path that it was traced at ("" where nobody knows), and when."""

    name: str
    path: str
    start: float
    end: float
    """Both in nanoseconds."""


class Row(NamedTuple):
    """What a scope took; `part` is forward, backward, recomputed, teacher or nothing, as far as the path tells."""

    scope: str
    part: str
    milliseconds: float
    """A step, mean over devices; where operations overlap they count each."""
    share: float
    """Of all rows."""


class TimeByScope(NamedTuple):
    """A table of where the time of traced steps went."""

    rows: tuple[Row, ...]
    """The longest first."""
    devices: int
    """1 for the host, whose threads count as one device."""
    steps: int
    milliseconds: float
    """A step, from the first operation's begin to the last one's end."""
    busy: float
    """The share of that in which a device did something, mean over devices."""

    def lines(self) -> list[str]:
        """For people."""
        head = f"{self.steps} steps of {self.milliseconds:,.1f} ms, devices busy {self.busy:.0%} of it"
        names = [f"{row.scope} {row.part}".strip() for row in self.rows]
        width = max(map(len, names), default=0)
        pairs = zip(names, self.rows, strict=True)
        return [head, *(f"{name:<{width}} {row.milliseconds:10,.2f} ms {row.share:6.1%}" for name, row in pairs)]

    def json(self) -> str:
        return json.dumps({**self._asdict(), "rows": [row._asdict() for row in self.rows]}, indent=1) + "\n"


def time_by_scope(devices: Sequence[Sequence[Op]], steps: int) -> TimeByScope:
    """The table of what each device ran in `steps` steps."""
    sums: dict[tuple[str, str], float] = defaultdict(float)
    per_step = 1e-6 / max(len(devices) * steps, 1)
    window = busy = 0.0
    for ops in devices:
        for op in ops:
            sums[_scope(op), _part(op.path)] += (op.end - op.start) * per_step
        spans = sorted((op.start, op.end) for op in ops)
        window += (max(end for _, end in spans) - spans[0][0]) * per_step
        busy += _covered(spans) * per_step
    total = sum(sums.values())
    rows = (Row(*key, value, value / total if total else 0.0) for key, value in sums.items())
    ordered = tuple(sorted(rows, key=lambda row: -row.milliseconds))
    return TimeByScope(ordered, len(devices), steps, window, busy / window if window else 0.0)


def _scope(op: Op) -> str:
    if COLLECTIVES.match(op.name):
        return "collectives"
    on_path = set(re.findall(r"\w+", op.path))
    return next((name for scope, name in SCOPES.items() if scope in on_path), "rest")


def _part(path: str) -> str:
    """`transpose(jvp(` is JAX's name for what a backward pass adds to the path of what it is of."""
    if re.search(r"\bteacher\b", path):
        return "teacher"
    if "rematted_computation" in path:
        return "recomputed"
    if "transpose(jvp" in path:
        return "backward"
    return "forward" if "jvp(" in path else ""


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of the union of spans that are sorted by their begin."""
    covered = reached = 0.0
    for start, end in spans:
        covered += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return covered


def write_table(directory: Path, steps: int) -> TimeByScope | None:
    """The table of the newest trace below `directory`, also written there as `scopes.json`; None where no trace holds
    an operation."""
    traces = sorted(directory.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    if not traces or not (devices := read_trace(traces[-1].read_bytes())):
        return None
    table = time_by_scope(devices, steps)
    write_text(directory / "scopes.json", table.json())
    return table


# ---- reading a trace ------------------------------------------------------------------------------------------------


def read_trace(space: bytes) -> list[list[Op]]:
    """What each TPU or GPU ran, or, where there is none, the threads of the host together."""
    paths = _Paths(space)
    host: list[Op] = []
    devices: list[list[Op]] = []
    for plane in jax.profiler.ProfileData.from_serialized_xspace(space).planes:
        if _DEVICE.match(plane.name):
            lines = list(plane.lines)
            # A TPU's other lines say the same by module, by step or by source; a GPU has a line for each stream.
            chosen = [x for x in lines if x.name == "XLA Ops"] or [x for x in lines if x.name.startswith("Stream")]
            devices.append([op for line in chosen for op in _ops(line, paths)])
        elif plane.name == "/host:CPU":
            host += [op for line in plane.lines for op in _ops(line, paths, of_host=True)]
    return [ops for ops in devices if ops] or [ops for ops in [host] if ops]


def _ops(line: Any, paths: _Paths, of_host: bool = False) -> Iterator[Op]:
    for event in line.events:
        stats = dict(event.stats)
        if of_host and "hlo_op" not in stats:
            continue
        # A GPU's event is called after its kernel, a TPU's after the whole text of its instruction.
        name = str(stats.get("hlo_op", event.name)).lstrip("%").split(" ", 1)[0]
        if not _CONTAINERS.match(name):  # a loop's event spans those of its body
            yield Op(name, paths.of(event.name, str(stats.get("hlo_module")), name), event.start_ns, event.end_ns)


class _Paths:
    """The paths of instructions. `ProfileData` shows neither what is said of all events of a name nor the HLO protos,
    so these are read from the bytes; the events themselves, nearly all of a trace, are passed over."""

    def __init__(self, space: bytes):
        self._by_event: dict[str, str] = {}
        self._by_op: dict[tuple[str, str], str] = {}
        for plane in _all(memoryview(space), 1):
            names = {_number(entry, 1): _text(_one(entry, 2), 2) for entry in _all(plane, 5)}
            for entry in _all(plane, 4):
                self._add(_one(entry, 2), names)

    def _add(self, event: memoryview, names: dict[int, str]) -> None:
        for stat in _all(event, 5):
            match names.get(_number(stat, 1)):
                case "tf_op":
                    self._by_event[_text(event, 2)] = _text(stat, 5) or names.get(_number(stat, 7), "")
                case "Hlo Proto" | "hlo_proto":
                    self._add_module(_one(_one(stat, 6), 1))
                case _:
                    pass

    def _add_module(self, module: memoryview) -> None:
        name = _text(module, 1)
        for computation in _all(module, 3):
            for instruction in _all(computation, 2):
                self._by_op[name, _text(instruction, 1)] = _text(_one(instruction, 7), 2)

    def of(self, event: str, module: str, op: str) -> str:
        return self._by_event.get(event) or self._by_op.get((module, op), "")


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Numbers and values of a message's fields in protobuf's wire format; fixed-width ones are passed over."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            yield number, varint()
        elif kind == 2:
            size = varint()
            yield number, message[at : at + size]
            at += size
        else:
            at += 8 if kind == 1 else 4


def _all(message: memoryview, number: int) -> Iterator[memoryview]:
    return (value for found, value in _fields(message) if found == number and isinstance(value, memoryview))


def _one(message: memoryview, number: int) -> memoryview:
    return next(_all(message, number), memoryview(b""))


def _text(message: memoryview, number: int) -> str:
    return bytes(_one(message, number)).decode(errors="replace")


def _number(message: memoryview, number: int) -> int:
    return next((value for found, value in _fields(message) if found == number and isinstance(value, int)), 0)

"""What a compiled program does, read from its HLO text: how often each computation runs, its FLOPs and, in
`traffic`, what it sends.

XLA's own cost analysis counts the body of a loop once. Here it counts as often as it runs, which XLA notes on the loop
or can be seen from its condition.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

_WIDTHS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$", re.M)
_CALLS = re.compile(r"(?:to_apply|calls|branch_computations|called_computations|true_computation|false_computation)=")


class Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str

    @property
    def source(self) -> str:
        """The name of the JAX operation that it was made for; empty where XLA does not say."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found.group(1).replace("\\'", "'") if found else ""


@dataclass(frozen=True)
class Module:
    """Instructions of every computation, and how often a run of the program runs each: None where a loop's trip count
    is unknown. Of a conditional's branches each counts as taken."""

    computations: dict[str, list[Instruction]]
    times: dict[str, float | None]
    devices: int
    arguments: int
    """Bytes of its arguments on a device."""

    @staticmethod
    def read(text: str, unknown: float | None = None) -> Module:
        """Of `jit(f).lower(..).compile().as_text()` or a dump of the compiler's. `unknown`: how often, on average, a
        loop goes round that does not say it."""
        computations, entry = _computations(text)
        count = re.search(r"num_partitions=(\d+)", text)
        times, devices = _times(computations, entry, unknown), int(count.group(1)) if count else 1
        arguments = sum(size(i.shape) for i in computations.get(entry, ()) if i.opcode == "parameter")
        return Module(computations, times, devices, arguments)

    def flops(self) -> float:
        """Of a device's matrix products and convolutions, 2 for a multiplication and its sum. Raises `ValueError`: one
        is in a loop whose trip count is unknown."""
        total = 0.0
        for name, instructions in self.computations.items():
            shapes = {i.name: i.shape for i in instructions}
            each = sum(_product_flops(i, shapes) for i in instructions if i.opcode in ("dot", "convolution"))
            total += each * self.runs(name) if each else 0
        return total

    def runs(self, computation: str) -> float:
        """How often it runs. Raises `ValueError`: in a loop whose trip count is unknown."""
        if (times := self.times[computation]) is None:
            raise ValueError(f"{computation} runs in a loop whose trip count the program does not say")
        return times


def dimensions(shape: str) -> tuple[int, ...]:
    """Of an array, `f32[8,4]{1,0}`; of a tuple, those of its first."""
    found = _ARRAY.search(shape)
    return tuple(int(d) for d in found.group(2).split(",") if d) if found else ()


def size(shape: str) -> int:
    """Bytes of an array or of a tuple of arrays, `f32[8,4]{1,0}`, without the padding of tiles."""
    bits = 0
    for dtype, dims in _ARRAY.findall(shape):
        width = _WIDTHS.get(dtype) or int(re.sub(r"^[a-z]+(\d+).*$", r"\1", dtype)) if dtype != "token" else 0
        bits += width * math.prod(int(d) for d in dims.split(",") if d)
    return bits // 8


def _product_flops(i: Instruction, shapes: dict[str, str]) -> int:
    left, right = (dimensions(shapes.get(o, "")) for o in i.operands[:2])
    outputs = math.prod(dimensions(i.shape))
    if i.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.rest)
        axes = [int(d) for d in contracted.group(1).split(",") if d] if contracted else []
        return 2 * outputs * math.prod(left[a] for a in axes)
    return _convolution_flops(i, left, right)


def _convolution_flops(i: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> int:
    """TPU programs write every matrix product as a convolution: its batch dimensions and some of the others as windows
    that mostly lie in the padding, which cost nothing."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.rest)
    assert labels is not None, i.rest[:200]
    ins, kernel, outs = labels.groups()
    out = dimensions(i.shape)
    flops = 2 * left[ins.index("b")] * right[kernel.index("i")] * right[kernel.index("o")]
    window = re.search(r"window=\{([^}]*)\}", i.rest)
    fields = dict(part.split("=") for part in window.group(1).split()) if window else {}

    def field(name: str, d: int, default: str) -> str:
        return fields[name].split("x")[d] if name in fields else default

    for d in range(len(kernel) - 2):
        label = str(d)
        stride, dilation, spread = (int(field(n, d, "1")) for n in ("stride", "lhs_dilate", "rhs_dilate"))
        low = int(field("pad", d, "0_0").split("_")[0])
        reach, taps = (left[ins.index(label)] - 1) * dilation, range(right[kernel.index(label)])
        places = (o * stride + k * spread - low for o in range(out[outs.index(label)]) for k in taps)
        flops *= sum(0 <= at <= reach and at % dilation == 0 for at in places)
    return flops


def _computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Instructions of every computation, and the name of the entry."""
    text, computations, entry = re.sub(r"/\*.*?\*/", "", text), {}, ""
    for block in re.split(r"\n(?=%|ENTRY)", text):
        head = re.match(r"(ENTRY )?%?([\w.\-]+) ", block)
        if head and "{" in block:
            computations[head.group(2)] = [_instruction(*m.groups()) for m in _INSTRUCTION.finditer(block)]
            entry = head.group(2) if head.group(1) else entry
    return computations, entry


def _instruction(name: str, text: str) -> Instruction:
    end = _closed(text, 0) if text.startswith("(") else text.index(" ")
    opcode, _, _ = text[end:].strip().partition("(")
    start = text.index("(", end)
    close = _closed(text, start)
    # Where operands are written with their shapes, the names are what begins with %.
    inside = text[start + 1 : close - 1]
    operands = re.findall(r"%([\w.\-]+)", inside) or re.findall(r"[\w.\-]+", inside)
    return Instruction(name, text[:end], opcode.strip(), tuple(operands), text[close:])


def _closed(text: str, start: int) -> int:
    """The index after the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match.group() == "(" else -1
        if not depth:
            return match.end()
    return len(text)


def _times(computations: dict[str, list[Instruction]], entry: str, unknown: float | None) -> dict[str, float | None]:
    edges: dict[str, list[tuple[str, float | None]]] = defaultdict(list)
    for name, instructions in computations.items():
        beside = {i.name: i for i in instructions}
        for i in instructions:
            edges[name] += _called(i, beside, computations)
    times: dict[str, float | None] = dict.fromkeys(computations, 0)
    times[entry] = 1
    for name in _callers_first(edges, entry):
        for called, trips in edges[name]:
            if called in times:
                a, b, trips = times[name], times[called], unknown if trips is None else trips
                times[called] = None if a is None or b is None or trips is None else b + a * trips
    return times


def _called(
    i: Instruction, beside: dict[str, Instruction], computations: dict[str, list[Instruction]]
) -> Iterator[tuple[str, float | None]]:
    if i.opcode == "while":
        condition, body = (re.findall(rf"\b{k}=%?([\w.\-]+)", i.rest)[0] for k in ("condition", "body"))
        yield from (
            (name, _trips(i, beside, computations[condition], computations[body])) for name in (body, condition)
        )
    elif not i.opcode.endswith(("-done", "-update")):
        for match in _CALLS.finditer(i.rest):
            names = re.match(r"\{([^}]*)\}|%?([\w.\-]+)", i.rest[match.end() :])
            for name in re.findall(r"[\w.\-]+", names.group(1) or names.group(2)) if names else ():
                yield name, 1


def _trips(
    loop: Instruction, beside: dict[str, Instruction], condition: list[Instruction], body: list[Instruction]
) -> int | None:
    """Trip count of a loop: as noted on it (CPU, GPU); else, of a counter, from the constant that it is compared with,
    the one that it begins with and the one that is added to it (TPU, which takes two rounds at once of some loops)."""
    if known := re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.rest):
        return int(known.group(1))
    named = {i.name: i for i in condition}
    test = condition[-1]
    counter, limit = (named.get(name) for name in (*test.operands, "", "")[:2])
    if test.opcode != "compare" or "direction=LT" not in test.rest or counter is None or limit is None:
        return None
    index = re.search(r"index=(\d+)", counter.rest)
    if limit.opcode != "constant" or index is None or loop.operands[0] not in beside:
        return None
    start = beside.get(beside[loop.operands[0]].operands[int(index.group(1))])
    while start is not None and start.opcode == "copy":
        start = beside.get(start.operands[0])
    first = int(start.operands[0]) if start and start.opcode == "constant" else 0
    step = _step(body, int(index.group(1)))
    return None if step is None else -((first - int(limit.operands[0])) // step)


def _step(body: list[Instruction], index: int) -> int | None:
    """What a loop adds to its counter."""
    named, root = {i.name: i for i in body}, body[-1]
    new = named.get(root.operands[index]) if root.opcode == "tuple" else None
    while new is not None and new.opcode == "copy":
        new = named.get(new.operands[0])
    added = [named[o] for o in new.operands if o in named] if new is not None and new.opcode == "add" else []
    return next((int(i.operands[0]) for i in added if i.opcode == "constant"), None)


def _callers_first(edges: dict[str, list[tuple[str, float | None]]], entry: str) -> list[str]:
    order: list[str] = []
    seen: set[str] = set()

    def visit(name: str) -> None:
        if name not in seen:
            seen.add(name)
            for called, _ in edges.get(name, ()):
                visit(called)
            order.append(name)

    visit(entry)
    return order[::-1]


class Buffer(NamedTuple):
    """An array that a program holds when it holds most; `source` is the JAX operation or argument it belongs to."""

    bytes: int
    shape: str
    source: str


def live_at_peak(report: str, module: Module) -> list[Buffer]:
    """From the compiler's `*-live-range.txt`, largest first; arrays that share their place are listed once."""
    found, shapes = [], {i.name: i for instructions in module.computations.values() for i in instructions}
    peak = report.partition("(peak):")[2]
    for name, index, count in re.findall(r"^\s+([\w.\-]+)\{([\d,]*)\}: (\d+) bytes \(cumulative", peak, re.M):
        instruction = shapes.get(name)
        arrays = _ARRAY.findall(instruction.shape) if instruction else []
        shape = ""
        if len(arrays) == 1 or (index.isdigit() and int(index) < len(arrays)):
            dtype, dims = arrays[int(index) if len(arrays) > 1 else 0]
            shape = f"{dtype}[{dims}]"
        found.append(Buffer(int(count), shape, (instruction.source if instruction else "") or name))
    return sorted(found, reverse=True)

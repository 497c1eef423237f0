"""Bytes that one device sends in one run of a compiled program, read from its HLO text.

Every collective is counted as often as it runs: those in a loop's body times the loop's trip count, which XLA notes on
the loop. Bytes are those of ring algorithms in a group of n devices, from the size S of the operand on the device:
(n-1) S for an all-gather, (n-1)/n S for a reduce-scatter or all-to-all, 2 (n-1)/n S for an all-reduce, S for a
collective-permute. These are the least that any algorithm sends for the first three and what a ring sends for the rest;
they say nothing of how much of it is hidden behind arithmetic.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

import numpy as np

OPS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_WIDTHS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$", re.M)
_CALLS = re.compile(r"(?:to_apply|calls|branch_computations|called_computations|true_computation|false_computation)=")


class Collective(NamedTuple):
    """One operation: `operand` bytes on each device of groups of `group`, run `times` per step."""

    op: str
    operand: int
    group: int
    times: int
    shape: str
    source: str
    """The name of the JAX operation that it was made for."""

    @property
    def sent(self) -> int:
        """Bytes that a device sends in a step."""
        n = self.group
        per = {"all-gather": n - 1, "all-reduce": Fraction(2 * (n - 1), n), "collective-permute": int(n > 1)}
        return round(self.times * self.operand * per.get(self.op, Fraction(n - 1, n)))


class _Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str


def collectives(text: str) -> list[Collective]:
    """All collectives of `jit(f).lower(..).compile().as_text()` that move something.

    Raises:
        ValueError: a collective runs in a loop without a known trip count, or its groups cannot be read.
    """
    computations, entry = _computations(text)
    count = re.search(r"num_partitions=(\d+)", text)
    devices, times, found = int(count.group(1)) if count else 1, _times(computations, entry), []
    for name, instructions in computations.items():
        shapes = {i.name: i.shape for i in instructions}
        scatter = next((i for i in instructions if i.opcode == "dynamic-slice"), None) if "scatter" in name else None
        for i in instructions:
            op = i.opcode.removesuffix("-start")
            if op not in OPS or times[name] == 0:
                continue
            if times[name] is None:
                raise ValueError(f"{i.name} runs in a loop whose trip count the program does not say")
            if op == "all-reduce" and scatter:
                op = "reduce-scatter"  # how TPU programs write it
            shape = " ".join(shapes[o].split("{")[0] if o in shapes else "" for o in i.operands)
            operand = sum(size(shapes[o]) for o in i.operands)
            group = _group(i, devices)
            if group > 1:
                source = re.search(r'op_name="([^"]*)"', i.rest)
                found.append(Collective(op, operand, group, times[name], shape, source.group(1) if source else ""))
    return found


def by_kind(found: list[Collective]) -> dict[str, int]:
    """Bytes that a device sends in a step, for each of `OPS`."""
    return {op: sum(c.sent for c in found if c.op == op) for op in OPS}


def size(shape: str) -> int:
    """Bytes of an array or of a tuple of arrays, `f32[8,4]{1,0}`."""
    bits = 0
    for dtype, dims in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", shape):
        width = _WIDTHS.get(dtype) or int(re.sub(r"^[a-z]+(\d+).*$", r"\1", dtype)) if dtype != "token" else 0
        bits += width * int(np.prod([int(d) for d in dims.split(",") if d], dtype=object))
    return bits // 8


def _computations(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """Instructions of every computation, and the name of the entry."""
    text, computations, entry = re.sub(r"/\*.*?\*/", "", text), {}, ""
    for block in re.split(r"\n(?=%|ENTRY)", text):
        head = re.match(r"(ENTRY )?%?([\w.\-]+) ", block)
        if head and "{" in block:
            computations[head.group(2)] = [_instruction(*m.groups()) for m in _INSTRUCTION.finditer(block)]
            entry = head.group(2) if head.group(1) else entry
    return computations, entry


def _instruction(name: str, text: str) -> _Instruction:
    end = _closed(text, 0) if text.startswith("(") else text.index(" ")
    opcode, _, _ = text[end:].strip().partition("(")
    start = text.index("(", end)
    close = _closed(text, start)
    # Where operands are written with their shapes, the names are what begins with %.
    inside = text[start + 1 : close - 1]
    operands = re.findall(r"%([\w.\-]+)", inside) or re.findall(r"[\w.\-]+", inside)
    return _Instruction(name, text[:end], opcode.strip(), tuple(operands), text[close:])


def _closed(text: str, start: int) -> int:
    """The index after the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match.group() == "(" else -1
        if not depth:
            return match.end()
    return len(text)


def _times(computations: dict[str, list[_Instruction]], entry: str) -> dict[str, int | None]:
    """How often a step runs each computation; None where a loop's trip count is unknown. Of a conditional's branches
    each counts as taken."""
    edges: dict[str, list[tuple[str, int | None]]] = defaultdict(list)
    for name, instructions in computations.items():
        beside = {i.name: i for i in instructions}
        for i in instructions:
            edges[name] += _called(i, beside, computations)
    times: dict[str, int | None] = dict.fromkeys(computations, 0)
    times[entry] = 1
    for name in _callers_first(edges, entry):
        for called, trips in edges[name]:
            if called in times:
                a, b = times[name], times[called]
                times[called] = None if None in (a, b, trips) else b + a * trips  # type: ignore[operator]
    return times


def _called(i: _Instruction, beside: dict[str, _Instruction], computations: dict) -> Iterator[tuple[str, int | None]]:
    if i.opcode == "while":
        condition, body = (re.search(rf"\b{k}=%?([\w.\-]+)", i.rest).group(1) for k in ("condition", "body"))  # type: ignore[union-attr]
        yield from ((name, _trips(i, beside, computations[condition])) for name in (body, condition))
    elif not i.opcode.endswith(("-done", "-update")):
        for match in _CALLS.finditer(i.rest):
            names = re.match(r"\{([^}]*)\}|%?([\w.\-]+)", i.rest[match.end() :])
            for name in re.findall(r"[\w.\-]+", names.group(1) or names.group(2)) if names else ():
                yield name, 1


def _trips(loop: _Instruction, beside: dict[str, _Instruction], condition: list[_Instruction]) -> int | None:
    """Trip count of a loop: as noted on it (CPU, GPU); else, of a counter that goes up by 1, the constant that it is
    compared with less the one that it begins with (TPU)."""
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
    return int(limit.operands[0]) - (int(start.operands[0]) if start and start.opcode == "constant" else 0)


def _callers_first(edges: dict[str, list[tuple[str, int | None]]], entry: str) -> list[str]:
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


def _group(i: _Instruction, devices: int) -> int:
    """Devices of a group; of a permutation, those that send."""
    if i.opcode.startswith("collective-permute"):
        pairs = re.findall(r"\{(\d+),(\d+)\}", i.rest.partition("source_target_pairs=")[2].partition("}}")[0] + "}")
        return sum(a != b for a, b in pairs)
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]<=", i.rest):
        return int(match.group(1))
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", i.rest):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", match.group(1)))
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", match.group(2))
        return int(np.prod([int(part or sizes[axis]) for axis, part in axes]))
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", i.rest):
        return match.group(1).count(",") + 1
    if "replica_groups={}" in i.rest or "replica_groups" not in i.rest:
        return devices
    raise ValueError(f"cannot read the groups of {i.name}: {i.rest[:200]}")

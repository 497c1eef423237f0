"""Bytes that one device sends in one run of a compiled program, read from its HLO text.

Every collective is counted as often as it runs: those in a loop's body times the loop's trip count. Bytes are those of
ring algorithms in a group of n devices, from the size S of the operand on the device: (n-1) S for an all-gather,
(n-1)/n S for a reduce-scatter or all-to-all, 2 (n-1)/n S for an all-reduce, S for a collective-permute. These are the
least that any algorithm sends for the first three and what a ring sends for the rest; they say nothing of how much of
it is hidden behind arithmetic.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from ministral_jax.planning.compiler.hlo import Instruction, Module, size

_BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
"""How programs of several TPU slices write a collective between them: it leaves through the host."""
OPS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


class Collective(NamedTuple):
    """One operation: `operand` bytes on each device of groups of `group`, run `times` per step."""

    op: str
    operand: int
    group: int
    times: int
    shape: str
    source: str
    """The name of the JAX operation that it was made for."""
    members: tuple[tuple[int, ...], ...]
    """Devices that exchange, by their place in the mesh: one of the groups; of a permutation, who sends to whom."""

    @property
    def sent(self) -> int:
        """Bytes that a device sends in a step."""
        n = self.group
        per = {"all-gather": n - 1, "all-reduce": Fraction(2 * (n - 1), n), "collective-permute": int(n > 1)}
        return round(self.times * self.operand * per.get(self.op, Fraction(n - 1, n)))

    def axes(self, mesh: Mapping[str, int]) -> tuple[str, ...]:
        """Axes of the mesh (name -> size, slowest first) along which its groups lie."""
        varying: set[str] = set()
        for group in self.members:
            places = np.array(np.unravel_index(group, tuple(mesh.values())))
            varying |= {axis for axis, at in zip(mesh, places, strict=True) if np.ptp(at) > 0}
        return tuple(axis for axis in mesh if axis in varying)


def collectives(program: str | Module) -> list[Collective]:
    """All collectives of `jit(f).lower(..).compile().as_text()` that move something.

    Raises:
        ValueError: a collective runs in a loop without a known trip count, or its groups cannot be read.
    """
    module, found = Module.read(program) if isinstance(program, str) else program, []
    for name, instructions in module.computations.items():
        shapes = {i.name: i.shape for i in instructions}
        # how TPU programs write a reduce-scatter
        scatter = "scatter" in name and any(i.opcode == "dynamic-slice" for i in instructions)
        for i in instructions:
            between = _BETWEEN_SLICES.search(i.rest) if i.opcode == "send" else None
            op = between.group(1).lower().replace("_", "-") if between else i.opcode.removesuffix("-start")
            if op not in OPS or module.times[name] == 0:
                continue
            times, (members, group) = round(module.runs(name)), _groups(i, module.devices)
            if op == "all-reduce" and scatter:
                op = "reduce-scatter"
            if group > 1:
                shape = " ".join(shapes[o].split("{")[0] if o in shapes else "" for o in i.operands)
                operand = sum(size(shapes[o]) for o in i.operands[: 1 if between else None])
                found.append(Collective(op, operand, group, times, shape, i.source, members))
    return found


def by_kind(found: list[Collective]) -> dict[str, int]:
    """Bytes that a device sends in a step, for each of `OPS`."""
    return {op: sum(c.sent for c in found if c.op == op) for op in OPS}


def _groups(i: Instruction, devices: int) -> tuple[tuple[tuple[int, ...], ...], int]:
    """One of the groups, and its size; of a permutation the pairs, and how many devices send to another."""
    if i.opcode == "send":  # the same device of every slice; slices come one after the other
        slices = _slices(i)
        return (tuple(range(0, devices, devices // slices)),), slices
    if i.opcode.startswith("collective-permute"):
        text = i.rest.partition("source_target_pairs=")[2].partition("}}")[0] + "}"
        pairs = tuple((int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", text))
        return pairs, sum(a != b for a, b in pairs)
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", i.rest):
        group = _in_order(match.group(2), match.group(3)).reshape(-1, int(match.group(1)))[0]
    elif match := re.search(r"replica_groups=mesh\[([^\]]*)\]([^{]*)\{([^}]*)\}", i.rest):
        group = _named(*match.groups())
    elif match := re.search(r"replica_groups=\{\{([\d,]+)\}", i.rest):
        group = np.array([int(d) for d in match.group(1).split(",")])
    elif "replica_groups={}" in i.rest or "replica_groups" not in i.rest:
        group = np.arange(devices)
    else:
        raise ValueError(f"cannot read the groups of {i.name}: {i.rest[:200]}")
    return (tuple(group.tolist()),), len(group)


def _slices(i: Instruction) -> int:
    """How many exchange: `{1,2}x{0:3}` names slices, as a list or as first and last, and devices of each."""
    named = re.search(r'_xla_megascale_target="\{([\d,:]+)\}x', i.rest)
    if named is None:
        raise ValueError(f"cannot read the slices of {i.name}: {i.rest[:200]}")
    parts = (part.partition(":") for part in named.group(1).split(","))
    return sum(int(last or first) - int(first) + 1 for first, _, last in parts)


def _in_order(dims: str, axes: str | None) -> np.ndarray:
    """Devices in the order of XLA's `[dims]T(axes)`."""
    shape = [int(d) for d in dims.split(",")]
    ids = np.arange(math.prod(shape)).reshape(shape)
    return (ids.transpose([int(a) for a in axes.split(",")]) if axes else ids).reshape(-1)


def _named(sizes: str, between: str, axes: str) -> np.ndarray:
    """The first group along axes of XLA's own mesh, `'a'=16,'b'=4` and `'a','b':(1)2`: of an axis the part of that size
    above one of `(pre-)size`."""
    mesh = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", sizes)}
    order = re.search(r"device_ids=\(?\[([\d,]+)\](?:T\(([\d,]+)\))?", between)
    ids = (_in_order(*order.groups()) if order else np.arange(math.prod(mesh.values()))).reshape(tuple(mesh.values()))
    chosen: dict[str, list[int]] = {name: [0] for name in mesh}
    for name, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes):
        count = int(part or mesh[name])
        stride = mesh[name] // (int(before or 1) * count)
        chosen[name] = [at + stride * k for at in chosen[name] for k in range(count)]
    return ids[np.ix_(*chosen.values())].reshape(-1)

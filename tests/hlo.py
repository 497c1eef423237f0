"""Which collectives a compiled program runs, on arrays of which size, inside loops or outside."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

_OPS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
_OP = re.compile(rf"= (\([^=]*?\)|\S+) ({_OPS})(?:-start)?\(")
_NAME = re.compile(r"(?:ENTRY )?%?([\w.\-]+)")
_CALLED = re.compile(r"(?:body|condition|to_apply|calls|\w+_computations?)=\{?([^\s}]+(?:, [^\s}]+)*)")


class Collective(NamedTuple):
    """One operation of a device's program; `shapes` are those of its results on the device."""

    op: str
    shapes: tuple[tuple[int, ...], ...]
    in_loop: bool

    @property
    def size(self) -> int:
        return max(math.prod(shape) for shape in self.shapes)


def collectives(text: str) -> list[Collective]:
    """All collectives of `jit(f).lower(..).compile().as_text()`; those of a loop's body are listed once."""
    computations, text = {}, re.sub(r"/\*.*?\*/", "", text)
    for block in re.split(r"\n(?=%|ENTRY)", text):
        if (name := _NAME.match(block)) and "{" in block:
            computations[name.group(1)] = block
    looped = set()
    waiting = [n for block in computations.values() for n in re.findall(r"(?:body|condition)=%?([\w.\-]+)", block)]
    while waiting:
        name = waiting.pop()
        if name not in looped and name in computations:
            looped.add(name)
            for called in _CALLED.findall(computations[name]):
                waiting += re.findall(r"%?([\w.\-]+)", called)
    found = []
    for name, block in computations.items():
        for result, op in _OP.findall(block):
            shapes = re.findall(r"[a-z]\w*\[([\d,]*)\]", result)
            sizes = tuple(tuple(int(d) for d in s.split(",") if d) for s in shapes)
            found.append(Collective(op, sizes, name in looped))
    return found

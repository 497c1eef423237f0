"""What accelerators can do, one JAX device each: arithmetic, memory, and the links to their neighbours.

Sources, all by the vendors: Google Cloud's pages of TPU v4, v5e, v5p, v6e and TPU7x (read November 2026; a
"bidirectional interconnect bandwidth" of a chip counts both directions of all its links), and the data sheets of A100,
H100, H200, B200 and of the DGX machines that hold them (dense bf16, no sparsity). Rates are peaks: nothing reaches them
all the time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

GB, GIB = 10**9, 2**30


@dataclass(frozen=True)
class Chip:
    """One device as JAX counts them; a TPU7x chip is two.

    kinds: how its `device_kind` begins.
    flops: dense bf16 FLOP/s.
    hbm: bytes of memory; hbm_bandwidth: bytes/s.
    sides: dimensions of the torus that its links form; 0 for GPUs, which all reach each other within a node.
    link: bytes/s one way over one link of the torus, or of a GPU to all others of its node.
    network: bytes/s one way to other slices or nodes (data centre network, InfiniBand), its share of the host's.
    per_host: devices of one host; host_memory: bytes of that host.
    cores: devices of one chip.
    """

    name: str
    kinds: tuple[str, ...]
    flops: float
    hbm: int
    hbm_bandwidth: float
    sides: int
    link: float
    network: float
    per_host: int
    host_memory: int
    cores: int = 1

    @property
    def platform(self) -> str:
        return "tpu" if self.sides else "cpu" if "cpu" in self.kinds else "gpu"


class _Sheet(NamedTuple):
    """What a data sheet says of a chip: TFLOP/s, memory in GiB (of GPUs GB) and GB/s, all its links together in both
    directions in GB/s, its share of the network in Gbit/s; and of a host, how many chips and memory."""

    name: str
    kinds: tuple[str, ...]
    flops: float
    hbm: float
    bandwidth: float
    links: float
    network: float
    sides: int = 0
    per_host: int = 8
    host: float = 2000
    cores: int = 1

    @property
    def chip(self) -> Chip:
        """Of one device. A torus has two links for each of its sides."""
        unit = GIB if self.sides else GB
        each = 1 / self.cores
        return Chip(
            self.name,
            self.kinds,
            flops=self.flops * 1e12 * each,
            hbm=int(self.hbm * unit) // self.cores,
            hbm_bandwidth=self.bandwidth * GB * each,
            sides=self.sides,
            link=self.links * GB / 2 / max(1, 2 * self.sides) * each,
            network=self.network * GB / 8 * each,
            per_host=self.per_host * self.cores,
            host_memory=int(self.host * unit),
            cores=self.cores,
        )


CHIPS = {
    sheet.name: sheet.chip
    for sheet in (
        _Sheet("v4", ("TPU v4",), 275, 32, 1200, 600, 50, sides=3, per_host=4, host=400),
        _Sheet("v5e", ("TPU v5 lite", "TPU v5e"), 197, 16, 819, 400, 25, sides=2, per_host=4, host=188),
        _Sheet("v5p", ("TPU v5",), 459, 95, 2765, 1200, 50, sides=3, per_host=4, host=448),
        _Sheet("v6e", ("TPU v6",), 918, 32, 1638, 800, 100, sides=2, per_host=4, host=720),
        _Sheet("tpu7x", ("TPU7x", "TPU v7"), 2307, 192, 7380, 1200, 100, sides=3, per_host=4, host=960, cores=2),
        _Sheet("a100", ("NVIDIA A100",), 312, 80, 2039, 600, 200),
        _Sheet("h100", ("NVIDIA H100",), 989, 80, 3350, 900, 400),
        _Sheet("h200", ("NVIDIA H200",), 989, 141, 4800, 900, 400),
        _Sheet("b200", ("NVIDIA B200",), 2250, 180, 8000, 1800, 400),
    )
}
"""By the names that `plan --on` takes."""


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a device, None where it is none of `CHIPS` (a CPU)."""
    found = [(len(kind), chip) for chip in CHIPS.values() for kind in chip.kinds if device_kind.startswith(kind)]
    return max(found, key=lambda pair: pair[0])[1] if found else None

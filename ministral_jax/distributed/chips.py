"""What accelerators can do, one JAX device each: arithmetic, memory, and the links to their neighbours.

Sources, all by the vendors: Google Cloud's pages of TPU v4, v5e, v5p, v6e and TPU7x (read November 2026; a
"bidirectional interconnect bandwidth" of a chip counts both directions of all its links), and the data sheets of A100,
H100, H200, B200 and of the DGX machines that hold them (dense bf16, no sparsity). Rates are peaks: nothing reaches them
all the time.
"""

from __future__ import annotations

from dataclasses import dataclass

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


def _tpu(
    name: str,
    kinds: tuple[str, ...],
    flops: float,
    hbm: float,
    bandwidth: float,
    sides: int,
    links: float,
    network: float,
    per_host: int,
    host: float,
    cores: int = 1,
) -> Chip:
    """Of a chip's figures in TFLOP/s, GiB, GB/s (`links`: of all, both directions), Gbit/s and GiB, a device's."""
    link = links * GB / (2 * 2 * sides)
    each = (int(hbm * GIB) // cores, bandwidth * GB / cores)
    shares = (link / cores, network * GB / 8 / cores)
    return Chip(name, kinds, flops * 1e12 / cores, *each, sides, *shares, per_host * cores, int(host * GIB), cores)


def _gpu(name: str, kind: str, flops: float, hbm: float, bandwidth: float, nvlink: float, network: float) -> Chip:
    """Of TFLOP/s, GB, GB/s (`nvlink`: both directions) and Gbit/s, in nodes of eight with 2 TB of memory."""
    rates = (nvlink * GB / 2, network * GB / 8)
    return Chip(name, (kind,), flops * 1e12, int(hbm * GB), bandwidth * GB, 0, *rates, 8, 2000 * GB)


CHIPS = {
    chip.name: chip
    for chip in (
        _tpu("v4", ("TPU v4",), 275, 32, 1200, 3, 600, 50, 4, 400),
        _tpu("v5e", ("TPU v5 lite", "TPU v5e"), 197, 16, 819, 2, 400, 25, 4, 188),
        _tpu("v5p", ("TPU v5",), 459, 95, 2765, 3, 1200, 50, 4, 448),
        _tpu("v6e", ("TPU v6",), 918, 32, 1638, 2, 800, 100, 4, 720),
        _tpu("tpu7x", ("TPU7x", "TPU v7"), 2307, 192, 7380, 3, 1200, 100, 4, 960, cores=2),
        _gpu("a100", "NVIDIA A100", 312, 80, 2039, 600, 200),
        _gpu("h100", "NVIDIA H100", 989, 80, 3350, 900, 400),
        _gpu("h200", "NVIDIA H200", 989, 141, 4800, 900, 400),
        _gpu("b200", "NVIDIA B200", 2250, 180, 8000, 1800, 400),
    )
}
"""By the names that `plan --on` takes."""


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a device, None where it is none of `CHIPS` (a CPU)."""
    found = [(len(kind), chip) for chip in CHIPS.values() for kind in chip.kinds if device_kind.startswith(kind)]
    return max(found, key=lambda pair: pair[0])[1] if found else None

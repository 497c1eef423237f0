"""What a prediction of time takes for granted, each figure with its source or its reason."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Assumptions:
    """Shares are of the peaks that `chips.CHIPS` lists; times are in seconds. `docs/plan.md` has them as a table.

    matmul: share of peak FLOP/s that a large matrix product reaches; with 0.8 published training comes out
        neither too fast nor too slow.
    attention: the same of the two products of attention, whose tiles are small; fused kernels reach about half.
    memory: share of the memory's bandwidth that streaming reaches; 0.8 is what STREAM-like programs do.
    trip: one trip of a loop that the compiler does not unroll, beside its arithmetic: a dozen operations in turn, each
        0.5 to 1 microseconds of launch and pipeline. 5 to 20 microseconds on TPUs; nothing was measured here.
    gpu_trip: the same on a GPU, where each operation is a kernel of some 3 microseconds.
    cpu_trip: the same where an operation is a call.
    idle_step: one step of a TPU kernel's grid in which nothing is read or computed; nothing was measured here.
    hop: seconds from one chip of a torus to its neighbour (How to Scale Your Model, chapter on rooflines).
    launch: one collective within a slice or a node, beside its bytes and hops.
    network_launch: one collective over a network.
    link: share of the links' bandwidth that a large collective reaches.
    overlap: share of the time of collectives that nothing waits for at once (gathers of the next layer's weights,
        sums of gradients) that hides behind arithmetic; XLA's scheduler starts them early, by default.
    activations: the same of those whose result the next operation needs (tensor parallelism, keys and values).
    near: bytes of an intermediate result that stay next to the arithmetic (a TPU's vector memory is 64 to 128 MiB, a
        GPU's second cache 40 to 126 MB, of which programs leave a part); larger ones go to memory and back.
    score_passes, score_passes_back: how often a tile of scores is read or written, in float32, without fusion.
    logit_passes, logit_passes_back: the same of a chunk of logits in the loss head.
    norm_passes: how often a norm, a residual sum or a gate reads or writes what it works on, after XLA's fusion, as a
        share of what its formula says.
    highest: matrix products of `Precision.HIGHEST` (float32 moments of calibration) in those of bfloat16.
    disk: bytes/s of one host from or to storage.
    """

    matmul: float = 0.8
    attention: float = 0.5
    memory: float = 0.8
    trip: float = 10e-6
    gpu_trip: float = 30e-6
    cpu_trip: float = 10e-6
    idle_step: float = 0.5e-6
    hop: float = 1e-6
    launch: float = 5e-6
    network_launch: float = 100e-6
    link: float = 0.9
    overlap: float = 0.8
    activations: float = 0.0
    near: float = 16 * 2**20
    score_passes: float = 6
    score_passes_back: float = 10
    logit_passes: float = 6
    logit_passes_back: float = 4
    norm_passes: float = 1.0
    highest: float = 6
    disk: float = 1e9


def meanings() -> dict[tuple[str, ...], str]:
    """What the docstring says of figures, by their names; some are explained together."""
    text = inspect.cleandoc(Assumptions.__doc__ or "").partition("\n\n")[2]
    entries = (entry.split(": ", 1) for entry in re.split(r"\n(?! )", text))
    return {tuple(names.split(", ")): " ".join(said.split()) for names, said in entries}

"""Google Kubernetes Engine: a JobSet manifest, of TPU slices or of GPU nodes."""

from __future__ import annotations

import math
import re

from ministral_jax.errors import UserError
from ministral_jax.launching.templates import fill, yaml
from ministral_jax.recipe.launch import GkeLaunch, TpuSlices

NODE_LABEL = {"v5e": "tpu-v5-lite-podslice", "v5p": "tpu-v5p-slice", "v6e": "tpu-v6e-slice"}
"""Value of `cloud.google.com/gke-tpu-accelerator`."""

CHIPS_PER_HOST = 4
"""Of every slice with more than one host, of all three generations."""

FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
"""Topologies of v5e and v6e; 1x1 has one chip, 2x4 exists as one host of 8 chips and as two of 4."""

PORT = 8476
"""Of JAX's coordinator on GPU nodes."""


def render(job: GkeLaunch, name: str, command: tuple[str, ...]) -> str:
    """The JobSet that runs `command` once on every host.

    Raises:
        UserError: see `hosts`; also a name that no JobSet may have.
    """
    name = _jobset_name(name)
    words, place = [_verbatim(word) for word in ("ministral-jax", *command)], {}
    if job.tpu is not None:
        pods = hosts(job.tpu)
        place = {"chips": _chips(job.tpu) // pods, "label": NODE_LABEL[job.tpu.type]}
        words += ["--distributed"] if pods * job.tpu.slices > 1 else []
    else:
        assert job.gpu is not None
        pods = job.gpu.nodes
        if pods > 1:
            words += ["--coordinator", f"{name}-worker-0-0.{name}:{PORT}", "--process-count", str(pods)]
            words += ["--process-index", "$(JOB_COMPLETION_INDEX)"]
    environment = {key: _verbatim(value) for key, value in job.variables.items()}
    return fill(
        "jobset.yaml", yaml, job=job, name=name, pods=pods, port=PORT, command=words, environment=environment, **place
    )


def hosts(tpu: TpuSlices) -> int:
    """Hosts of one slice.

    Raises:
        UserError: the generation has no such topology, or another number of hosts.
    """
    sides, chips = [int(side) for side in tpu.topology.split("x")], _chips(tpu)
    if tpu.type == "v5p":
        even = len(sides) == 3 and sides == sorted(sides) and all(side and side % 2 == 0 for side in sides)
        known, accepted = even or sides == [2, 2, 1], "2x2x1, or three even sides in rising order such as 2x2x4"
    else:
        known, accepted = tpu.topology in FLAT, ", ".join(FLAT)
    if not known:
        raise UserError(f"launch.gke.tpu.topology: {tpu.type} has no topology {tpu.topology!r} (accepted: {accepted})")
    possible = [1, 2] if tpu.topology == "2x4" else [max(1, chips // CHIPS_PER_HOST)]
    if tpu.hosts not in (None, *possible):
        raise UserError(
            f"launch.gke.tpu.hosts = {tpu.hosts}, but a slice of {tpu.type} with topology {tpu.topology} has "
            f"{' or '.join(map(str, possible))} ({chips} chips)"
        )
    return tpu.hosts or possible[0]


def _chips(tpu: TpuSlices) -> int:
    return math.prod(int(side) for side in tpu.topology.split("x"))


def _verbatim(text: str) -> str:
    """Kubernetes expands `$(NAME)`, and `$$` to `$`."""
    return text.replace("$", "$$")


def _jobset_name(name: str) -> str:
    """Names of pods and of their service are made from it: a DNS label, with room for what is appended."""
    label = name.lower().replace("_", "-")
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", label):
        raise UserError(
            f"a JobSet cannot be called {name!r}; give launch.gke.name: at most 40 letters, digits and '-', first a "
            "letter, last not '-'"
        )
    return label

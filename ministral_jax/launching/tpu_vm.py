"""Cloud TPU VMs: a script that keeps a queued resource, and the job on it, going."""

from __future__ import annotations

from itertools import pairwise

from ministral_jax.launching.templates import fill, shell
from ministral_jax.recipe.launch import TpuVmLaunch


def render(job: TpuVmLaunch, name: str, command: tuple[str, ...]) -> str:
    """The script that runs `command` on every host of the slice. It goes on where JAX finds the slice by itself.
    Hosts whose run is at gs:// need no bucket mounted, and get a directory of their own to work in."""
    create = [f"--accelerator-type={job.accelerator_type}", f"--runtime-version={job.runtime_version}"]
    create += ["--reserved"] if job.reserved else ["--spot"] if job.spot else []
    alone = job.bucket is None and dict(pairwise(command)).get("--run-dir", "").startswith("gs://")
    words = ("ministral-jax", *command, "--distributed")
    return fill("tpu-vm.sh", shell, job=job, name=name, create=create, command=words, alone=alone)

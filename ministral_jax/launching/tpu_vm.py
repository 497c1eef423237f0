"""Cloud TPU VMs: a script that keeps a queued resource, and the job on it, going."""

from __future__ import annotations

from ministral_jax.launching.job import TpuVmJob
from ministral_jax.launching.templates import fill, shell


def render(job: TpuVmJob, name: str, command: tuple[str, ...]) -> str:
    """The script that runs `command` on every host of every slice. It goes on where JAX finds the slices by itself."""
    place = [f"--zone={job.zone}", *([f"--project={job.project}"] if job.project else [])]
    create = [
        f"--accelerator-type={job.accelerator_type}",
        f"--runtime-version={job.runtime_version}",
        *([f"--node-count={job.slices}", f"--node-prefix={name}"] if job.slices > 1 else [f"--node-id={name}"]),
        *(["--spot"] if job.spot else []),
        *([f"--service-account={job.service_account}"] if job.service_account else []),
    ]
    words = ("ministral-jax", *command, "--distributed")
    worker = fill("tpu-vm-worker.sh", shell, job=job, name=name, command=words)
    return fill("tpu-vm.sh", shell, job=job, name=name, place=place, create=create, worker=worker)

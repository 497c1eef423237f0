"""What a scheduler is told about a job: the `launch:` block of a recipe. Secrets are named here, never written."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from ministral_jax.settings import Frozen

Plain = Annotated[str, Field(pattern=r"^[A-Za-z0-9_@%+=:,./-]+$")]
"""Letters, digits and `_@%+=:,./-`: the same in a `#SBATCH` line, in a shell and in YAML."""


def _bare(bucket: str) -> str:
    if "://" in bucket:
        raise ValueError(f"{bucket} is a URL, and must be the bucket's name alone, such as my-runs")
    return bucket


Bucket = Annotated[Plain, AfterValidator(_bare)]
"""A bucket's name, without gs://."""
Directory = Annotated[str, Field(pattern=r"^/[^\x00-\x1f]*$")]
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Count = Annotated[int, Field(ge=1)]

_SECRET = re.compile(r"TOKEN(?!IZER)|KEY|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)

XLA_FLAGS = "XLA_FLAGS"
FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"
ON_GPUS = {
    # JAX takes three quarters of a GPU by default; what is left is for NCCL, cuDNN and the driver
    FRACTION: "0.92",
    XLA_FLAGS: " ".join(
        (
            # collectives begin early and end late, behind the products of the same layer
            "--xla_gpu_enable_latency_hiding_scheduler=true",
            # .. and behind those of the layer before, from which a loop would otherwise keep them
            "--xla_gpu_enable_pipelined_all_gather=true",
            "--xla_gpu_enable_pipelined_reduce_scatter=true",
            # without which a gather that is one trip ahead is copied into its place
            "--xla_gpu_enable_while_loop_double_buffering=true",
            # a layer's matrices travel in a few messages of 128 MiB: larger ones wait for all of a layer
            "--xla_gpu_all_gather_combine_threshold_bytes=134217728",
            "--xla_gpu_reduce_scatter_combine_threshold_bytes=134217728",
            "--xla_gpu_all_reduce_combine_threshold_bytes=134217728",
        )
    ),
}
"""What processes on GPUs find in their environment; jaxlib ends a process at a flag that it does not know. On TPUs
libtpu has all of it by default."""


class Launch(Frozen):
    """What every kind of job has."""

    secrets_go: ClassVar[str]
    """How a secret is referred to, for the error that refuses its value."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")] | None = None
    """The job's name; the recipe's when none is given."""
    environment: dict[Variable, str] = Field(default_factory=dict)
    """Variables and their values, which stand in the job for all to read. On GPUs they come after those of `ON_GPUS`:
    flags in XLA_FLAGS are added, of which the later counts, and other values take the place of its own."""
    restarts: int = Field(default=20, ge=0)
    """How often the job is started again after exit code 75 or the death of a process."""

    @field_validator("environment")
    @classmethod
    def _holds_no_secret(cls, environment: dict[str, str]) -> dict[str, str]:
        for name, value in environment.items():
            if _SECRET.search(name):
                why = f"{name} looks like a secret, whose value a job must not hold; {cls.secrets_go}"
                raise PydanticCustomError("secret", "{why}", {"why": why})
            if "\0" in value:
                raise PydanticCustomError("secret", "{why}", {"why": f"{name} holds a NUL character, which none can"})
        return environment

    @property
    def on_gpus(self) -> bool:
        return False

    @property
    def variables(self) -> dict[str, str]:
        """All that a process finds in its environment."""
        if not self.on_gpus:
            return self.environment
        flags = " ".join((ON_GPUS[XLA_FLAGS], self.environment.get(XLA_FLAGS, ""))).strip()
        return ON_GPUS | self.environment | {XLA_FLAGS: flags}


class SlurmLaunch(Launch):
    """One `sbatch` job, one task for each process."""

    secrets_go = "write it into a file on the cluster and name that with launch.slurm.env_file"

    nodes: Count = 1
    gpus_per_node: int = Field(default=0, ge=0)
    gpu: Literal["a100", "h100", "h200", "b200"] | None = None
    """Kind of the GPUs, without which memory and times are not checked before a job is made."""
    tasks_per_node: Count | None = None
    """Processes of a node: one for each GPU when none is given, one where there are no GPUs."""
    cpus_per_task: Count | None = None
    time: Annotated[str, Field(pattern=r"^(\d+-)?\d+(:\d\d){0,2}$")] | None = None
    """Limit of one start, e.g. `24:00:00`; a job that is not done by then is queued again."""
    partition: Plain | None = None
    options: dict[Annotated[str, Field(pattern=r"^[a-z][a-z-]*$")], Plain] = Field(default_factory=dict)
    """Further options of `sbatch` by their long names: `{account: lm, mem: 200G}`."""
    activate: Directory | None = None
    """A virtual environment."""
    env_file: Directory | None = None
    """A shell file of assignments, sourced by the job: the place of secrets."""
    grace: Count = 120
    """Seconds between SIGTERM and the time limit."""

    @model_validator(mode="after")
    def _said_once(self) -> Self:
        if "cpus-per-task" in self.options:
            raise ValueError("options: cpus-per-task is a setting of its own, cpus_per_task: srun must be told too")
        return self

    @model_validator(mode="after")
    def _one_device_for_a_task(self) -> Self:
        if self.gpus_per_node and self.tasks_per_node not in (None, self.gpus_per_node):
            raise ValueError(
                f"tasks_per_node = {self.tasks_per_node} must equal gpus_per_node = {self.gpus_per_node}, because "
                "under SLURM a JAX process takes one GPU"
            )
        return self

    @property
    def on_gpus(self) -> bool:
        return self.gpus_per_node > 0

    @property
    def tasks(self) -> int:
        """Processes of a node."""
        return self.tasks_per_node or self.gpus_per_node or 1


class SecretKey(Frozen):
    """One key of a Kubernetes secret."""

    secret: Plain
    key: Plain


class Volume(Frozen):
    """What holds the run directory for all pods: a claim that many nodes may write to, or a bucket (by gcsfuse)."""

    claim: Plain | None = None
    bucket: Bucket | None = None

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if (self.claim is None) == (self.bucket is None):
            raise ValueError("exactly one of claim and bucket must be given")
        return self


class TpuSlices(Frozen):
    """`slices` TPU slices of one topology; `hosts` is worked out unless a topology exists in two forms."""

    type: Literal["v5e", "v5p", "v6e"]
    topology: Annotated[str, Field(pattern=r"^\d+(x\d+){1,2}$")]
    slices: Count = 1
    hosts: Count | None = None


class GpuNodes(Frozen):
    """`nodes` nodes with `per_node` GPUs, one process for each node."""

    type: Plain
    """The node label `cloud.google.com/gke-accelerator`, e.g. `nvidia-h100-80gb`."""
    nodes: Count = 1
    per_node: Count = 8


class GkeLaunch(Launch):
    """A JobSet on Google Kubernetes Engine."""

    secrets_go = "put it into a Kubernetes secret and refer to it with launch.gke.secrets.NAME={secret: .., key: ..}"

    image: Plain
    volume: Volume
    mount: Directory = "/work"
    """Where the volume is mounted, and the command's working directory."""
    tpu: TpuSlices | None = None
    gpu: GpuNodes | None = None
    spot: bool = False
    service_account: Plain | None = None
    queue: Plain | None = None
    """A Kueue queue."""
    secrets: dict[Variable, SecretKey] = Field(default_factory=dict)
    grace: Count = 120
    """Seconds between SIGTERM and SIGKILL; spot machines get 30 at the most whatever is asked for."""

    @model_validator(mode="after")
    def _has_accelerators(self) -> Self:
        if (self.tpu is None) == (self.gpu is None):
            raise ValueError("exactly one of tpu and gpu must be given")
        return self

    @property
    def on_gpus(self) -> bool:
        return self.gpu is not None


class TpuVmLaunch(Launch):
    """One slice of Cloud TPU VMs by a queued resource, kept going by a script."""

    secrets_go = "write it into a file on the VMs and source that in launch.tpu_vm.setup"

    zone: Plain
    accelerator_type: Annotated[str, Field(pattern=r"^(v4|v5litepod|v5p|v6e)-\d+$")]
    """E.g. `v5litepod-16`, `v6e-32` (chips), `v5p-64` (cores, two for each chip)."""
    runtime_version: Plain
    spot: bool = True
    reserved: bool = False
    """From a reservation of the project; then it is no spot machine."""
    bucket: Bucket | None = None
    """Mounted with gcsfuse on every host: the shared file system, which a run at gs:// does without."""
    mount: Directory = "/mnt/work"
    """Where the bucket is mounted, and the command's working directory, made for a run at gs:// without a bucket."""
    setup: str | None = None
    """Shell, run on every host before each start, whose variables the command sees; must bear being run twice."""

    @model_validator(mode="after")
    def _is_of_one_tier(self) -> Self:
        if self.reserved and self.spot and "spot" in self.model_fields_set:
            raise ValueError("reserved and spot exclude each other: a machine is of a reservation or a spot machine")
        return self


class LocalLaunch(Launch):
    """Processes on this machine."""

    secrets_go = "leave it in your shell's environment, which the processes inherit"

    restarts: int = Field(default=0, ge=0)
    processes: Count = 2
    cpu_devices: Count | None = None
    """Virtual CPU devices of each process."""


class LaunchConfig(Frozen):
    """How each scheduler is to run this recipe. It changes nothing about what a stage makes."""

    slurm: SlurmLaunch = SlurmLaunch()
    gke: GkeLaunch | None = None
    tpu_vm: TpuVmLaunch | None = None
    local: LocalLaunch = LocalLaunch()

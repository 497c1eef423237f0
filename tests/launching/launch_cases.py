"""Jobs that the launch tests look at."""

from __future__ import annotations

import io
import os
from contextlib import redirect_stdout
from unittest import mock

from paths import ROOT

from ministral_jax.launching.launch import launch
from ministral_jax.places import run_place

RECIPE = str(ROOT / "configs" / "tiny.yaml")
GKE = ("launch.gke.image=registry.example/ministral-jax:0.1", "launch.gke.volume={bucket: my-runs}")
TPU_VM = (
    *("launch.tpu_vm.zone=us-east5-b", "launch.tpu_vm.accelerator_type=v6e-4"),
    "launch.tpu_vm.runtime_version=v2-alpha-tpuv6e",
)
SLURM_GPU = (
    *("slurm", "14b-short", "mesh.tensor=2"),
    "launch.slurm={nodes: 2, gpus_per_node: 8, cpus_per_task: 12, time: 24:00:00, partition: gpu, grace: 300,"
    " restarts: 40, options: {mem: 900G, account: lm, chdir: /scratch/lm}, activate: /opt/my envs/mj,"
    " env_file: /home/me/.secrets.env, environment: {XLA_FLAGS: '--a=1 --b=2', NOTE: it's}}",
)
GKE_TPU = (
    *("gke", *GKE, "launch.gke.tpu={type: v5e, topology: 4x4, slices: 2}", "mesh={slice: 2, tensor: 8}"),
    "launch.gke.secrets={HF_TOKEN: {secret: hub, key: token}}",
    "launch.gke.environment={LIBTPU_INIT_ARGS: '--x=$(Y) --z=$5'}",
    *("launch.gke.service_account=trainer", "launch.gke.queue=research", "launch.gke.spot=true"),
)
GKE_GPU = (
    *("gke", "launch.gke.name=Big_Run", "launch.gke.gpu={type: nvidia-h100-80gb, nodes: 2}", "mesh.tensor=4"),
    *("launch.gke.image=mj", "launch.gke.volume={claim: runs}", "launch.gke.grace=60"),
)
TPU_VM_ALL = (
    *("tpu-vm", *TPU_VM, "launch.tpu_vm.bucket=my-runs", "launch.tpu_vm.environment={A: b c}"),
    "launch.tpu_vm.setup=pip install --quiet 'ministral-jax[tpu]'",
)
SCRIPTS = (("slurm",), SLURM_GPU, ("tpu-vm", *TPU_VM), TPU_VM_ALL)
NASTY = (
    "x-note.text=a  'b' \"c\" $(touch pwned) `touch pwned` $HOME $$ $(HOME) %j {{ 7 * 7 }} {% raw %}"
    "\nsecond \\ é 😀 line"
)


SECRETS = {"HF_TOKEN": "hf_abcdefghij", "WANDB_API_KEY": "0123456789abcdef"}


def render(scheduler: str, *rest: str, recipe: str = RECIPE, run_dir: str | None = None) -> str:
    """What `ministral-jax launch SCHEDULER configs/tiny.yaml ...` prints where there are secrets in the environment."""
    printed = io.StringIO()
    with redirect_stdout(printed), mock.patch.dict(os.environ, SECRETS):
        assert launch(scheduler, recipe, rest, None if run_dir is None else run_place(run_dir, "--run-dir")) == 0
    text = printed.getvalue().replace(RECIPE, "configs/tiny.yaml")
    assert not any(secret in text for secret in SECRETS.values())
    return text

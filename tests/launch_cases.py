"""Jobs that the launch tests look at. `python tests/launch_cases.py` writes their golden files anew."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stdout
from pathlib import Path

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden" / "launch"
RECIPE = str(ROOT / "configs" / "tiny.yaml")

GKE = ["launch.gke.image=registry.example/ministral-jax:0.1", "launch.gke.volume={bucket: my-runs}"]
TPU_VM = [
    "launch.tpu_vm.zone=us-east5-b",
    "launch.tpu_vm.accelerator_type=v6e-16",
    "launch.tpu_vm.runtime_version=v2-alpha-tpuv6e",
]

CASES = {
    "slurm-cpu.sbatch": ["slurm", "parent", "launch.slurm.nodes=4"],
    "slurm-one.sbatch": ["slurm"],
    "slurm-gpu.sbatch": [
        "slurm",
        "14b-short",
        "stages.parent.steps=10",
        "launch.slurm={nodes: 2, gpus_per_node: 8, cpus_per_task: 12, memory: 900G, time: '24:00:00', partition: gpu,"
        " account: lm, qos: high, workdir: /scratch/lm, activate: /opt/my envs/mj, env_file: /home/me/.secrets.env,"
        " grace: 300, restarts: 40, environment: {XLA_FLAGS: '--a=1 --b=2', NOTE: it's}}",
    ],
    "gke-tpu.yaml": [
        "gke",
        *GKE,
        "launch.gke.tpu={type: v5e, topology: 4x4, slices: 2}",
        "launch.gke.secrets={HF_TOKEN: {secret: hub, key: token}, WANDB_API_KEY: {secret: wandb, key: api}}",
        "launch.gke.environment={LIBTPU_INIT_ARGS: '--x=$(Y) --z=$5'}",
        "launch.gke.service_account=trainer",
        "launch.gke.queue=research",
        "launch.gke.spot=true",
        "launch.gke.namespace=lm",
    ],
    "gke-tpu-host.yaml": ["gke", *GKE, "launch.gke.tpu={type: v6e, topology: 2x4}"],
    "gke-gpu.yaml": [
        "gke",
        "launch.gke={image: mj, volume: {claim: runs}, gpu: {type: nvidia-h100-80gb, nodes: 2}, grace: 60}",
        "launch.gke.name=Big_Run",
    ],
    "tpu-vm.sh": [
        "tpu-vm",
        *TPU_VM,
        "launch.tpu_vm.slices=2",
        "launch.tpu_vm.project=my-project",
        "launch.tpu_vm.bucket=my-runs",
        "launch.tpu_vm.setup=pip install --quiet 'ministral-jax[tpu]'",
        "launch.tpu_vm.service_account=trainer@my-project.iam.gserviceaccount.com",
    ],
    "tpu-vm-host.sh": [
        "tpu-vm",
        *TPU_VM,
        "launch.tpu_vm.spot=false",
        "launch.tpu_vm.env_file=/home/me/.env",
        "launch.tpu_vm.activate=/opt/mj",
        "launch.tpu_vm.environment={A: b c}",
    ],
}


def render(scheduler: str, *rest: str, recipe: str = RECIPE) -> str:
    """What `ministral-jax launch SCHEDULER configs/tiny.yaml ...` prints."""
    from ministral_jax.launching.launch import launch

    printed = io.StringIO()
    with redirect_stdout(printed):
        assert launch(scheduler, recipe, rest) == 0
    return printed.getvalue().replace(RECIPE, "configs/tiny.yaml")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for name, arguments in CASES.items():
        (GOLDEN / name).write_text(render(*arguments), encoding="utf-8")

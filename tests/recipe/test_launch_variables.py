"""What a job's processes find in their environment."""

import os
import subprocess
import sys

from ministral_jax.recipe.launch import FRACTION, ON_GPUS, XLA_FLAGS, GkeLaunch, SlurmLaunch, TpuVmLaunch

GKE = {"image": "mj", "volume": {"bucket": "runs"}}


def test_jobs_on_gpus_alone_have_flags_and_more_of_the_memory():
    assert SlurmLaunch(gpus_per_node=8).variables == ON_GPUS
    assert GkeLaunch(**GKE, gpu={"type": "nvidia-h100-80gb"}).variables == ON_GPUS
    assert SlurmLaunch(environment={"A": "b"}).variables == {"A": "b"}
    assert GkeLaunch(**GKE, tpu={"type": "v5e", "topology": "4x4"}).variables == {}
    assert TpuVmLaunch(zone="z", accelerator_type="v6e-4", runtime_version="v2").variables == {}


def test_what_the_recipe_says_comes_after():
    own = {FRACTION: "0.8", XLA_FLAGS: "--xla_gpu_enable_latency_hiding_scheduler=false", "A": "b"}
    found = SlurmLaunch(gpus_per_node=8, environment=own).variables
    assert found[FRACTION] == "0.8" and found["A"] == "b"
    assert found[XLA_FLAGS] == f"{ON_GPUS[XLA_FLAGS]} {own[XLA_FLAGS]}"


def test_jaxlib_knows_every_flag():
    """It ends the process at one that it does not know, on a machine without GPUs too."""
    begin = [sys.executable, "-c", "import jax; jax.devices()"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    run = lambda flags: subprocess.run(begin, env={**environment, XLA_FLAGS: flags}, capture_output=True, text=True)
    assert run(ON_GPUS[XLA_FLAGS]).returncode == 0
    assert "Unknown flag" in run("--xla_gpu_no_such_flag=true").stderr

"""Attention by the kernel of TPUs, interpreted, and which devices get it."""

import jax
import numpy as np
import pytest
from mesh_cases import placement

from ministral_jax.distributed.axes import platform
from ministral_jax.distributed.placement import MeshConfig
from ministral_jax.errors import UserError
from ministral_jax.models.attention import AttentionSpec, chosen_implementation
from ministral_jax.planning.machine import parse_machine


def test_the_platform_is_that_of_the_mesh_which_need_not_be_there():
    assert platform() == "cpu"
    for name, expected in (("v5p:2x2x1", "tpu"), ("h100:8", "gpu")):
        with jax.sharding.use_abstract_mesh(parse_machine(name).mesh(MeshConfig()).abstract_mesh):
            assert platform() == expected
            assert jax.jit(lambda x: x + len(platform())).eval_shape(np.float32(0)).shape == ()
    with jax.set_mesh(placement(devices=1).mesh), jax.default_device(jax.devices()[0]):
        assert platform() == "cpu"


@pytest.mark.parametrize(
    ("platform", "keys", "chunk", "spec", "expected"),
    [
        ("tpu", 16384, 16384, AttentionSpec(), "splash"),
        ("tpu", 16384, 512, AttentionSpec(), "splash"),
        ("tpu", 16384, 64, AttentionSpec(), "blockwise"),  # of a chunk no block is a multiple of 128
        ("tpu", 16384, 512, AttentionSpec(context="ring"), "blockwise"),
        ("tpu", 16384, 16384, AttentionSpec(context="ring"), "splash"),  # nothing is cut
        ("tpu", 16384, 16384, AttentionSpec(implementation="blockwise"), "blockwise"),
        ("tpu", 100, 100, AttentionSpec(), "xla"),
        ("cpu", 16384, 16384, AttentionSpec(), "blockwise"),
        ("gpu", 100, 100, AttentionSpec(), "xla"),
    ],
)
def test_what_auto_is_on_each_platform(platform, keys, chunk, spec, expected):
    assert chosen_implementation(spec, platform, keys, chunk, 128) == expected


@pytest.mark.parametrize(
    ("platform", "chunk", "context", "needs"),
    [
        ("cpu", 128, "all_gather", "tpu devices; here are cpu devices"),
        ("tpu", 100, "all_gather", "a multiple of 128 tokens; here are tpu devices, chunks of 100 tokens"),
        ("tpu", 128, "ring", "compute.context: all_gather; here"),
    ],
)
def test_a_kernel_that_cannot_serve_is_refused(platform, chunk, context, needs):
    spec = AttentionSpec(implementation="splash", context=context)
    with pytest.raises(UserError, match=f"compute.attention = splash needs .*{needs}"):
        chosen_implementation(spec, platform, 256, chunk, 128)

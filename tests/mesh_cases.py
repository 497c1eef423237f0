"""Meshes of this machine's virtual devices."""

import jax

from ministral_jax.distributed.placement import MeshConfig, Placement, Rules, make_mesh


def placement(devices: int = 8, **sizes: int) -> Placement:
    """On some of the devices; `fsdp` is 1 where it is not said."""
    return Placement(make_mesh(MeshConfig(**{"fsdp": 1} | sizes), jax.devices()[:devices]), Rules())

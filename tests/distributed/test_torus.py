"""Meshes on every topology of every TPU, and over GPU nodes: none fails, none splits a side without need."""

import itertools
import math

import pytest
from torus_cases import TOPOLOGIES, devices_of, gpus, tpu

from ministral_jax.distributed.placement import AXES, MeshConfig, make_mesh
from ministral_jax.distributed.torus import torus_sides
from ministral_jax.errors import UserError

MESHES = (
    MeshConfig(),
    MeshConfig(data=-1, fsdp=4),
    MeshConfig(data=-1, fsdp=16),
    MeshConfig(data=-1, fsdp=64),
    MeshConfig(data=-1, fsdp=16, tensor=4),
    MeshConfig(data=-1, fsdp=4, context=16),
    MeshConfig(data=-1, fsdp=2, tensor=2, context=8),
    MeshConfig(data=-1, fsdp=32, tensor=2),
    MeshConfig(fsdp=-1, tensor=8),
)
CASES = [
    (kind, topology, slices, config)
    for kind, topologies in TOPOLOGIES.items()
    for topology in topologies
    for slices in (1, 2)
    for config in MESHES
    if devices_of(kind, topology) % math.prod(size for axis in AXES if (size := getattr(config, axis)) > 0) == 0
]


def fits_whole(sides: list[int], shape: tuple[int, ...]) -> bool:
    """Whether every side of the torus can belong to one axis: tried for all."""
    for owners in itertools.product(range(len(shape)), repeat=len(sides)):
        if all(
            math.prod(s for s, o in zip(sides, owners, strict=True) if o == axis) == size
            for axis, size in enumerate(shape)
        ):
            return True
    return False


def test_every_mesh_is_built_and_splits_no_side_without_need():
    split = set()
    for kind, topology, slices, config in CASES:
        case = f"{slices} x {kind}:{topology} {config}"
        devices = tpu(kind, topology, slices)
        mesh = make_mesh(config.model_copy(update={"slice": slices}), devices)
        assert sorted(device.id for device in mesh.devices.flat) == list(range(len(devices))), case
        assert all(len({device.slice_index for device in part.flat}) == 1 for part in mesh.devices), case
        sides = torus_sides(mesh)
        sizes = [*map(int, topology.split("x")), *([2] if kind == "tpu7x" else [])]
        if devices_of(kind, topology) <= 32:  # JAX winds a ring through the smallest ones
            continue
        for axis in AXES[1:]:
            assert math.prod(side.extent for side in sides[axis]) == mesh.shape[axis], case
        is_split = any(side.is_split for axis in AXES for side in sides[axis])
        assert is_split != fits_whole(sizes, tuple(mesh.shape[axis] for axis in AXES[1:])), (case, sides)
        split.update([(kind, topology)] if is_split and slices == 1 else [])
    assert {("v5p", "4x4x8"), ("v5p", "8x8x8"), ("v5p", "4x4x28"), ("v6e", "16x16")} <= split


def along(kind: str, topology: str, slices: int = 1, **sizes: int) -> dict[str, dict[str, int]]:
    """By axis and side, how much of the side the axis has; negative where the side is split."""
    sides = torus_sides(make_mesh(MeshConfig(**{"slice": slices} | sizes), tpu(kind, topology, slices)))
    return {
        axis: {side.name: -side.extent if side.is_split else side.extent for side in found}
        for axis, found in sides.items()
        if found
    }


def test_where_axes_lie_on_the_torus():
    whole = {"fsdp": {"y": 4, "z": 4}, "tensor": {"x": 4}}
    assert along("v5p", "4x4x4", data=-1, fsdp=16, tensor=4) == whole
    assert along("tpu7x", "4x4x4", data=-1, fsdp=16, tensor=4) == {"data": {"core": 2}} | whole
    assert along("v5p", "4x4x4", slices=2, data=-1, fsdp=16, tensor=4) == whole
    # JAX alone would lay `context` over two sides of 4, and then split the third between the other axes.
    assert along("v5p", "4x4x16", data=-1, fsdp=4, context=16) == {
        "data": {"x": 4},
        "fsdp": {"y": 4},
        "context": {"z": 16},
    }
    split = {"data": {"y": -2}, "fsdp": {"y": -2, "z": 8}, "tensor": {"x": 4}}
    assert along("v5p", "4x4x8", data=-1, fsdp=16, tensor=4) == split
    assert along("v6e", "16x16", data=-1, fsdp=16, tensor=4) == {
        "data": {"x": -4},
        "fsdp": {"y": 16},
        "tensor": {"x": -4},
    }
    assert not any(torus_sides(make_mesh(MeshConfig(fsdp=8), gpus(1))).values())


def test_of_a_split_side_the_last_axis_has_neighbours():
    mesh = make_mesh(MeshConfig(data=-1, fsdp=16, tensor=4), tpu("v6e", "16x16"))
    assert [device.coords[0] for device in mesh.devices[0, 0, 0, :, 0]] == [0, 1, 2, 3]
    assert [device.coords[0] for device in mesh.devices[0, :, 0, 0, 0]] == [0, 4, 8, 12]


def nodes(mesh, *axes: str) -> int:
    """Over how many nodes a line along these axes goes."""
    place = tuple(slice(None) if axis in axes else 0 for axis in AXES)
    return len({device.slice_index for device in mesh.devices[place].flat})


def test_gpu_nodes_are_one_mesh_unless_the_recipe_makes_them_slices():
    mesh = make_mesh(MeshConfig(data=-1, fsdp=4, tensor=4), list(reversed(gpus(4))))
    assert (nodes(mesh, "tensor"), nodes(mesh, "fsdp"), nodes(mesh, "data")) == (1, 2, 2)
    assert [device.id for device in mesh.devices.flat] == list(range(32))
    assert nodes(make_mesh(MeshConfig(), gpus(4)), "fsdp") == 4
    for count, within in ((4, 1), (2, 2)):
        mesh = make_mesh(MeshConfig(slice=count), gpus(4))
        assert (nodes(mesh, "slice"), nodes(mesh, "fsdp")) == (count, within)
    assert make_mesh(MeshConfig(slice=2), gpus(1)).shape["fsdp"] == 4


def test_slices_that_do_not_fit_are_one_sentence():
    with pytest.raises(UserError, match=r"^stages.x.mesh.slice = 1 but the devices form 2 slices; they must be equal$"):
        make_mesh(MeshConfig(), tpu("v5e", "4x4", 2), "stages.x.mesh")
    with pytest.raises(UserError, match=r"^mesh.slice = 8 but there are 4 nodes, which it must divide"):
        make_mesh(MeshConfig(slice=8), gpus(4))
    with pytest.raises(UserError, match=r"^stages.x.mesh {fsdp: -1, tensor: 3} does not fit 16 .* a multiple of 3$"):
        make_mesh(MeshConfig(tensor=3), tpu("v5e", "4x4"), "stages.x.mesh")

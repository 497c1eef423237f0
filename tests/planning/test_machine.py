"""Machines: their names, devices and hosts, and what no machine is."""

import pytest

from ministral_jax.distributed.chips import CHIPS, chip_of
from ministral_jax.distributed.placement import MeshConfig
from ministral_jax.errors import UserError
from ministral_jax.planning.booking import booking
from ministral_jax.planning.machine import parse_machine
from ministral_jax.recipe.launch import TpuVmLaunch


@pytest.mark.parametrize(
    ("text", "slices", "devices", "hosts"),
    [
        ("v5p:4x4x8", 1, 128, 32),
        ("v6e:16x16", 2, 512, 128),
        ("tpu7x:4x4x4", 1, 128, 16),
        ("h100:32", 1, 32, 4),
        ("b200:4", 1, 4, 1),
    ],
)
def test_a_machine_has_its_devices_once_each_and_its_hosts(text, slices, devices, hosts):
    machine = parse_machine(text, slices)
    places = {
        (d.slice_index, *d.coords, d.core_on_chip, d.id if machine.chip.sides == 0 else 0) for d in machine.described
    }
    assert machine.devices == len(machine.described) == len(places) == devices
    assert machine.hosts == len({device.process_index for device in machine.described}) == hosts
    assert machine.name == text


@pytest.mark.parametrize(
    ("text", "slices", "hosts"),
    [
        ("v5p:4x4x4", 1, {0: (0, 0, 0), 1: (2, 0, 0), 2: (0, 2, 0), 3: (2, 2, 0), 4: (0, 0, 1), 15: (2, 2, 3)}),
        ("v6e:8x16", 1, {3: (6, 0, 0), 4: (0, 2, 0), 31: (6, 14, 0)}),
        ("tpu7x:4x4x4", 1, {1: (2, 0, 0)}),
        ("v5p:2x2x4", 2, {3: (0, 0, 3), 4: (0, 0, 0)}),
    ],
)
def test_a_tpus_host_has_a_square_of_chips(text, slices, hosts):
    """As libtpu numbers the processes of these topologies; `make aot` asks it."""
    machine = parse_machine(text, slices)
    for host, (x, y, z) in hosts.items():
        places = {d.coords for d in machine.described if d.process_index == host}
        assert places == {(x + i, y + j, z) for i in (0, 1) for j in (0, 1)}


def test_a_mesh_of_described_devices():
    mesh = parse_machine("v5p:4x4x4").mesh(MeshConfig(data=-1, fsdp=16, tensor=4))
    assert mesh.shape["data"] == 1 and mesh.size == 64


@pytest.mark.parametrize(
    ("text", "slices", "said"),
    [
        ("v5q:4x4x4", 1, "no chip 'v5q'"),
        ("v5p", 1, "comes the shape"),
        ("v5p:4x0x4", 1, "comes the shape"),
        ("v6e:4x4x4", 1, "torus of 2 sides, 4x4x4 has 3"),
        ("v5p:5x7x3", 1, "multiples of 4"),
        ("v5p:2x4x8", 1, "multiples of 4"),
        ("v6e:3x5", 1, "one of 1x1, 2x2, 2x4"),
        ("v6e:100x100", 1, "8x16, 16x16"),
        ("h100:12", 1, "12 GPUs do not fill nodes of 8"),
        ("h100:16", 2, "GPUs have no slices"),
        ("v5p:4x4x4", 0, "--slices 0"),
    ],
)
def test_what_is_no_machine_is_one_sentence(text, slices, said):
    with pytest.raises(UserError, match=said.replace("[", r"\[")):
        parse_machine(text, slices)


@pytest.mark.parametrize(
    ("accelerator_type", "name"),
    [
        *(("v5p-8", "v5p:2x2x1"), ("v5p-32", "v5p:2x2x4"), ("v5p-256", "v5p:4x4x8"), ("v5p-3072", "v5p:8x12x16")),
        *(("v6e-8", "v6e:2x4"), ("v6e-256", "v6e:16x16"), ("v5litepod-128", "v5e:8x16")),
    ],
)
def test_an_accelerator_type_is_the_most_even_torus(accelerator_type, name):
    asked = booking(TpuVmLaunch(zone="z", accelerator_type=accelerator_type, runtime_version="r"))
    assert asked.machine.name == name


def test_every_device_kind_is_its_own_chip():
    kinds = {
        "TPU v4": "v4",
        "TPU v5 lite": "v5e",
        "TPU v5": "v5p",
        "TPU v5p": "v5p",
        "TPU v6 lite": "v6e",
        "TPU7x": "tpu7x",
        "NVIDIA A100-SXM4-80GB": "a100",
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H200": "h200",
        "NVIDIA B200": "b200",
    }
    assert {kind: chip_of(kind).name for kind in kinds} == kinds and set(kinds.values()) == set(CHIPS)
    assert chip_of("cpu") is None

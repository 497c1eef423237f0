"""Arrays handed to other devices arrive as they were, whatever the two meshes cut; and which devices are the others."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ministral_jax.distributed.handing import handed, shared_out
from ministral_jax.distributed.placement import MeshConfig, make_mesh
from ministral_jax.errors import UserError

ROWS = np.arange(8 * 4 * 6, dtype=np.float32).reshape(8, 4, 6)


def mesh(devices, **sizes: int):
    return make_mesh(MeshConfig(**{"fsdp": 1} | sizes), list(devices))


@pytest.mark.parametrize("theirs", [{"fsdp": 4}, {"data": 2, "tensor": 2}, {"context": 4}])
@pytest.mark.parametrize("ours", [{"fsdp": 4}, {"data": 2, "context": 2}, {"fsdp": 2, "tensor": 2}])
def test_rows_and_their_tokens_arrive(ours, theirs):
    devices = jax.devices()
    cut = P(("data", "fsdp"), "context")
    source = NamedSharding(mesh(devices[4:], **theirs), cut)
    target = NamedSharding(mesh(devices[:4], **ours), cut)
    with jax.set_mesh(target.mesh):
        found = handed(jax.device_put(ROWS, source), target)
    assert found.sharding == target
    for shard in found.addressable_shards:
        np.testing.assert_array_equal(shard.data, ROWS[shard.index])


def test_between_different_numbers_of_devices_and_meshes_of_the_same():
    devices = jax.devices()
    for ours, theirs in ((devices[:6], devices[6:]), (devices[:4], devices[4:6]), (devices, devices[::-1])):
        source = NamedSharding(mesh(theirs, fsdp=2, tensor=len(theirs) // 2), P("fsdp", "tensor"))
        target = NamedSharding(mesh(ours, data=2, context=len(ours) // 2), P("data", None, None))
        np.testing.assert_array_equal(handed(jax.device_put(ROWS, source), target), ROWS)


def test_every_process_has_some_of_both():
    class Device:
        def __init__(self, number: int):
            self.number, self.process_index = number, number // 4

    devices = [Device(number) for number in range(8)]
    first, last = shared_out(devices, 2, "mine")
    assert [d.number for d in first] == [0, 1, 2, 4, 5, 6] and [d.number for d in last] == [3, 7]
    with pytest.raises(UserError, match="mine = 3 must be a multiple of 2: every process has equally many"):
        shared_out(devices, 3, "mine")
    with pytest.raises(UserError, match="mine = 8 leaves none of 8 devices to the student"):
        shared_out(devices, 8, "mine")

"""One of two processes that write, check and lose checkpoints together; started by test_checkpoint.py."""

import json
import os
import resource
import sys
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np

from ministral_jax.distributed.collectives import barrier, is_first
from ministral_jax.distributed.placement import MeshConfig, make_mesh
from ministral_jax.errors import UserError
from ministral_jax.files import file_digest
from ministral_jax.training import checksums
from ministral_jax.training.checkpoint import ResumeStore, load_params, save_params

index, port, directory = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)


mesh = make_mesh(MeshConfig(fsdp=4))
cut, whole = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in (("fsdp",), ()))


def tree(step):
    make = lambda key: {"w": jax.random.normal(jax.random.key(key), (64, 1024)), "count": key}
    return jax.jit(make, out_shardings={"w": cut, "count": whole})(step)


def same(ours, theirs):
    shards = zip(ours["w"].addressable_shards, theirs["w"].addressable_shards, strict=True)
    return all(np.array_equal(a.data, b.data) for a, b in shards) and int(ours["count"]) == int(theirs["count"])


def sentence(function):
    try:
        function()
    except UserError as error:
        return str(error)
    return None


@contextmanager
def no_large_files(process):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if index == process:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def alone(path):
    """The checksums as one process computes them."""
    files = sorted(p for p in path.rglob("*") if p.is_file())
    return {p.relative_to(path).as_posix(): [p.stat().st_size, file_digest(p)] for p in files}


def damage(path):
    barrier(f"whole {path}")  # the other may be reading it
    if is_first():
        file = max((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
        file.write_bytes(file.read_bytes()[:-1])
    barrier(f"damaged {path}")


def reading(path):
    read.append(path.relative_to(directory).as_posix())
    return file_digest(path)


read: list[str] = []
checksums.file_digest = reading
abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree(0))
said = {}
said["files"] = save_params(directory / "params", tree(0))
said[f"process {index} has read"] = sorted(read)
said["alone"] = alone(directory / "params")
said["loads"] = same(load_params(directory / "params", abstract, said["files"]), tree(0))

store = ResumeStore(directory / "state", keep=3)
for step in (1, 2, 3):
    store.save(step, tree(step), {"step": step})
store.wait()
said["latest"] = store.latest
record = json.loads((directory / "state" / "checksums" / "3.json").read_text())
said["recorded"] = list(record.items()) == list(alone(directory / "state" / "3").items())
store.close()
damage(directory / "state" / "3")
store = ResumeStore(directory / "state", keep=3)
said["after damage"] = store.latest
state, note = store.restore(abstract)
said["restored"] = same(state, tree(2)) and note == {"step": 2}

for process in (1, 0):
    with no_large_files(process):
        store.save(4, tree(4), {"step": 4})
        said[f"process {process} fails"] = sentence(store.wait)
    said[f"left by process {process}"] = sorted(p.name for p in (directory / "state").iterdir())
store.save(4, tree(4), {"step": 4})
store.wait()
said["goes on"] = store.latest
store.close()

damage(directory / "params")
said["params"] = sentence(lambda: load_params(directory / "params", abstract, said["files"]))
print(json.dumps(said), flush=True)
barrier("end")
os._exit(0)  # as the command does: what waits inside the failed saves is not waited for

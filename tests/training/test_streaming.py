"""Parameters that are read and written hold no second copy of themselves."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np

from ministral_jax.distributed.placement import MeshConfig, make_mesh
from ministral_jax.training import streaming
from ministral_jax.training.checkpoint import load_params, save_params

LEAVES, SIDE = 12, 512


def test_one_leaf_is_read_at_a_time_where_more_do_not_fit(tmp_path, monkeypatch):
    """Read in another dtype, whose copies are what is on its way."""
    params = {f"w{n}": np.full((SIDE, SIDE), n, np.float32) for n in range(LEAVES)}
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), params)
    save_params(tmp_path / "params", params)
    monkeypatch.setattr(streaming, "IN_FLIGHT", 1)
    tracemalloc.start()
    loaded = load_params(tmp_path / "params", abstract)
    stays, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b) and a.dtype == jnp.bfloat16, loaded, params))
    assert most - stays < 3 * SIDE * SIDE * 4


def test_the_limit_is_raised_for_a_leaf_that_is_larger(monkeypatch):
    monkeypatch.setattr(streaming, "IN_FLIGHT", 1000)
    small, large = np.zeros(10, np.float32), np.zeros(1000, np.float32)
    for tree, limit in (({"a": small}, 1001), ({"a": small, "b": large}, 4001)):
        with streaming.streaming(tree) as context:
            assert context.memory.write_concurrent_bytes == limit


def test_what_is_saved_in_parts_is_read_on_another_mesh(tmp_path, monkeypatch):
    """A device's part may lie in more of the file's chunks than it is large: the limit is what has to be read."""
    monkeypatch.setattr(streaming, "IN_FLIGHT", 1)
    monkeypatch.setattr(streaming, "CHUNK", 3000)
    w = np.arange(6 * 40 * 32, dtype=np.float32).reshape(6, 40, 32)
    rows, columns = (
        jax.NamedSharding(make_mesh(MeshConfig(fsdp=n), jax.devices()[:n]), jax.P(*spec))
        for n, spec in ((2, ("fsdp",)), (8, (None, None, "fsdp")))
    )
    save_params(tmp_path / "params", {"w": jax.device_put(w, rows), "one": np.ones(1, np.float32)})
    shapes = {"w": jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=columns), "one": jax.ShapeDtypeStruct((1,), w.dtype)}
    loaded = load_params(tmp_path / "params", shapes)
    assert np.array_equal(loaded["w"], w) and loaded["one"] == 1

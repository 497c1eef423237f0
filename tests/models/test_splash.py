"""Attention by the kernel of TPUs, interpreted, and which devices get it."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mesh_cases import placement
from model_cases import relative
from test_model import naive_attention

from ministral_jax.distributed.axes import platform
from ministral_jax.distributed.placement import MeshConfig, zigzag
from ministral_jax.errors import UserError
from ministral_jax.models import attention
from ministral_jax.models.attention import AttentionSpec, Part, attend, chosen_implementation
from ministral_jax.models.kernels import Asked, splash
from ministral_jax.models.rope import apply_rope, rope_angles
from ministral_jax.models.sharded_attention import attend_on_mesh
from ministral_jax.models.spec import PRESETS
from ministral_jax.planning.machine import parse_machine

H, K = 4, 2
FLOAT32 = 3e-6  # sums of at most 1,024 products in float32, against float64
BFLOAT16 = 2e-2  # a rounding to 8 bits of probabilities, outputs and cotangents


@pytest.fixture
def interpreted(monkeypatch):
    """The kernel serves this machine, in small blocks."""
    monkeypatch.setattr(splash, "LARGEST", 128)
    module = SimpleNamespace(unserved=splash.unserved, attend=partial(splash.attend, interpret=True))
    monkeypatch.setitem(attention.KERNELS, "splash", ("cpu", module))


def case(segments, width):
    """Queries and keys, turned to positions beyond 131,072, values, the output's cotangent and segments."""
    random, (B, T) = np.random.default_rng(0), segments.shape
    q, k, v, weight = (random.standard_normal((B, T, n, width)) for n in (H, K, K, H))
    far = rope_angles(jnp.arange(200_000, 200_000 + T)[None], PRESETS["ministral-3-3b"].rope, width, jnp.float32)
    return [np.asarray(apply_rope(jnp.asarray(x), far), np.float64) for x in (q, k)] + [v, weight, segments]


def value_and_gradients(function, arrays, dtype):
    q, k, v, weight = (jnp.asarray(x, dtype) for x in arrays[:4])

    def total(q, k, v):
        out = function(q, k, v, arrays[4])
        return jnp.sum((out * weight).astype(jnp.promote_types(dtype, jnp.float32))), out

    (_, out), gradients = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(q, k, v)
    return [np.asarray(x, np.float64) for x in (out, *gradients)]


def exact(arrays, causal):
    """By all scores at once, in float64."""
    with jax.enable_x64(True):
        return value_and_gradients(partial(attend, spec=AttentionSpec(causal, "xla")), arrays, jnp.float64)


def packed(*lengths, padding=0):
    return np.array([n + 1 for n, length in enumerate(lengths) for _ in range(length)] + [0] * padding, np.int32)


ROWS = np.stack([packed(100, 28, 200, 56, padding=128), packed(40, 340, 132)])


@pytest.mark.parametrize(("causal", "width"), [(True, 32), (False, 64)])
def test_packed_documents_and_images_have_the_values_and_gradients_of_all_scores_at_once(interpreted, causal, width):
    arrays = case(ROWS, width)
    want = exact(arrays, causal)
    first = [x[:1, :128] for x in arrays]
    assert max(map(relative, [x[:1, :128] for x in want], naive_attention(*first, causal))) < 1e-12
    kernel = partial(attend, spec=AttentionSpec(causal))
    assert max(map(relative, value_and_gradients(kernel, arrays, jnp.float32), want)) < FLOAT32
    if causal:
        narrow = value_and_gradients(kernel, [x[1:] for x in arrays], jnp.bfloat16)
        assert max(map(relative, narrow, [x[1:] for x in want])) < BFLOAT16


@pytest.mark.parametrize(
    ("mesh", "length"),
    [
        (dict(devices=4, context=2, tensor=2), 512),
        (dict(devices=4, context=4), 1024),
        (dict(devices=4, tensor=4), 256),  # a device has the key-value heads of its query heads
        (dict(devices=2, data=2), 256),  # one row: nothing is cut
    ],
    ids=str,
)
def test_a_row_over_a_mesh_has_the_values_and_gradients_of_one_device(interpreted, mesh, length):
    arrays, place = case(packed(100, 28, length - 192, padding=64)[None], 16), placement(**mesh)
    order = zigzag(length, place.mesh.shape["context"])
    with jax.set_mesh(place.mesh), place.rules.active():
        found = value_and_gradients(attend_on_mesh, [x[:, order] for x in arrays], jnp.float32)
        # nothing divides a compiled kernel by itself, also where every device has all of it
        assert "shard_map" in str(jax.make_jaxpr(attend_on_mesh)(*arrays[:3], arrays[4]))
    for got, want in zip(found, exact(arrays, True), strict=True):
        assert relative(got, want[:, order]) < FLOAT32


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shards", [1, 2])
def test_blocks_that_no_document_crosses_are_not_visited(causal, shards):
    row, block = packed(5, 3, 30, 2, 6, padding=18), 4
    row = np.asarray(Part(row[None], np.zeros(1, np.int32)).apart)[0]
    order = zigzag(len(row), shards)[: len(row) // shards]
    sees = row[order, None] == row
    if causal:
        sees &= order[:, None] >= np.arange(len(row))
    crossed = sees.reshape(len(order) // block, block, -1, block).any((1, 3))
    found = splash.visited(jnp.asarray(row[order]), jnp.asarray(row), jnp.asarray(order) if causal else None, block)
    np.testing.assert_array_equal(found, crossed)

    for axis, table in ((0, crossed), (1, crossed.T)):
        fetched = np.asarray(splash._fetched(found[None], axis + 1))[0]
        for line, has in zip(table.T if axis == 0 else crossed, fetched.T if axis == 0 else fetched, strict=True):
            mine = np.flatnonzero(line)
            for step, block_had in enumerate(has):
                following = mine[mine >= step]
                assert block_had == (following[0] if len(following) else mine[-1] if len(mine) else 0)


def test_blocks_fill_the_vector_memory_and_divide_the_chunk():
    assert [splash.block_of(128 * n) for n in (1, 5, 8, 12, 128, 9)] == [128, 640, 1024, 768, 1024, 384]


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
        ("tpu", 2**18, 2**18, AttentionSpec(), "splash"),
        ("tpu", 2**18 + 128, 2**18 + 128, AttentionSpec(), "blockwise"),  # blocks are small, their table is large
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
    assert chosen_implementation(spec, platform, Asked(chunk, keys, 128, "bfloat16")) == expected


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
        chosen_implementation(spec, platform, Asked(chunk, 256, 128, "bfloat16"))

"""Attention and the whole model on meshes of eight devices against one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo import collectives
from mesh_cases import placement
from model_cases import CASES, inputs, pack, random_params, relative, targets

from ministral_jax.distributed.placement import zigzag
from ministral_jax.models import sharded_attention
from ministral_jax.models.attention import AttentionSpec, attend
from ministral_jax.models.sharded_attention import attend_on_mesh
from ministral_jax.models.vlm import VLM, Compute, param_shardings

B, T, H, K, WIDTH = 2, 48, 8, 2, 4
EXACT = 1e-12  # fp64: sums of at most T + H numbers of size 1 in another order
MESHES = {
    "context 8": dict(context=8),
    "context 4, tensor 2": dict(context=4, tensor=2),
    "data 2, context 2, tensor 2": dict(data=2, context=2, tensor=2),
    "tensor 8 of 2 key-value heads": dict(tensor=8),
}


def case(heads=H, kv_heads=K):
    random = np.random.default_rng(0)
    segments = np.array([[1] * 7 + [2] * 29 + [3] * 5 + [0] * 7, [1] * 40 + [0] * 8], np.int32)
    return [random.standard_normal((B, T, n, WIDTH)) for n in (heads, kv_heads, kv_heads, heads)] + [segments]


def value_and_gradients(function, arrays):
    q, k, v, weight, segments = arrays

    def total(q, k, v):
        out = function(q, k, v, segments)
        return jnp.sum(out * weight), out

    (_, out), gradients = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(q, k, v)
    return jax.device_get([out, *gradients])


@functools.cache
def alone(causal):
    with jax.enable_x64(True):
        return value_and_gradients(functools.partial(attend, spec=AttentionSpec(causal, "xla")), case())


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("causal", [True, False])
def test_value_and_gradients_equal_those_of_one_device(mesh, causal):
    place = placement(**MESHES[mesh])
    order = zigzag(T, place.mesh.shape["context"]) if causal else np.arange(T)
    ways = [("all_gather", "blockwise", 5), ("ring", "blockwise", 2), ("all_gather", "xla", 128)]
    with jax.enable_x64(True), jax.set_mesh(place.mesh), place.rules.active():
        for context, implementation, block in ways if "context" in MESHES[mesh] else ways[:1]:
            spec = AttentionSpec(causal, implementation, block, context)
            got = value_and_gradients(functools.partial(attend_on_mesh, spec=spec), [x[:, order] for x in case()])
            for found, want in zip(got, alone(causal), strict=True):
                assert relative(found, want[:, order]) < EXACT, spec


@pytest.mark.parametrize("context", ["all_gather", "ring"])
def test_without_segments_a_row_is_one_document(context):
    place, arrays = placement(context=4, devices=4), case()[:3]
    spec = AttentionSpec(False, block=8, context=context)
    with jax.enable_x64(True):
        want = attend(*arrays, jnp.ones((B, T), jnp.int32), spec)
        with jax.set_mesh(place.mesh), place.rules.active():
            assert relative(jax.jit(functools.partial(attend_on_mesh, spec=spec))(*arrays), want) < EXACT


def test_query_heads_pick_their_key_value_heads_wherever_the_cut_falls():
    """12 query heads of 4 groups over 8 devices are not cut; 12 of 3 over 2 are, in the middle of a group."""
    for heads, kv_heads, sizes in ((12, 4, dict(tensor=8)), (12, 3, dict(fsdp=4, tensor=2))):
        place, arrays = placement(**sizes), case(heads, kv_heads)
        with jax.enable_x64(True):
            want = value_and_gradients(attend, arrays)
            with jax.set_mesh(place.mesh), place.rules.active():
                got = value_and_gradients(attend_on_mesh, arrays)
        assert max(map(relative, got, want)) < EXACT


def test_without_a_mesh_or_rules_or_on_one_device_it_is_attend():
    q, k, v, _, segments = case()
    text = lambda f: str(jax.make_jaxpr(functools.partial(f, spec=AttentionSpec(block=8)))(q, k, v, segments))
    assert text(attend_on_mesh) == text(attend)
    one = placement(devices=1)
    with jax.set_mesh(one.mesh), one.rules.active():
        assert "shard_map" not in text(attend_on_mesh)
    with jax.set_mesh(placement(context=8).mesh):
        assert "shard_map" not in text(attend_on_mesh)
        with one.rules.active():
            assert "shard_map" in text(attend_on_mesh)


def test_shards_of_a_causal_row_visit_the_same_number_of_tiles_and_together_those_of_one_device():
    shards, block, length = 4, 3, 96
    chunk = length // (2 * shards)
    tiles = lambda starts: [int(s) + t for s in starts for t in range(0, chunk, block)]
    visits = [
        sum(start // block + 1 for start in tiles(sharded_attention._starts(jnp.int32(i), shards, 2 * chunk, True)))
        for i in range(shards)
    ]
    assert len(set(visits)) == 1 and sum(visits) == sum(range(1, length // block + 1))


@pytest.mark.parametrize("context", ["all_gather", "ring"])
def test_keys_and_values_travel_and_nothing_else(context):
    place = placement(context=8)
    q, k, v, weight, segments = case()
    spec = AttentionSpec(block=2, context=context)
    total = lambda q, k, v: jnp.sum(attend_on_mesh(q, k, v, segments, spec) * weight)
    with jax.set_mesh(place.mesh), place.rules.active():
        rows = jax.NamedSharding(place.mesh, jax.P(None, "context"))
        arrays = [jax.device_put(np.float32(x), rows) for x in (q, k, v)]
        text = jax.jit(jax.grad(total, (0, 1, 2))).lower(*arrays).compile().as_text()
    shard = B * T // 8 * K * WIDTH
    found = sorted((c.op, c.size, c.in_loop) for c in collectives(text) if len(c.shapes[0]) > 3)  # all but segments
    if context == "ring":  # k and v forward; k, v, d_k and d_v backward; every chunk of 3 tokens fills two tiles of 2
        assert found == [("collective-permute", shard * 4 // 3, True)] * 6
    else:
        assert found == [("all-gather", 8 * shard, False)] * 2 + [("reduce-scatter", shard, False)] * 2


@pytest.mark.parametrize(("context", "remat"), [("all_gather", "none"), ("ring", "full")])
def test_a_model_with_packed_text_and_images_equals_itself_on_one_device(context, remat):
    place, spec = placement(fsdp=2, tensor=2, context=2), CASES["images"].spec
    batch = pack(CASES["images"])
    batch = {name: pad(name, array) for name, array in batch.items()}
    labels, weights = targets(batch, spec.vocab)
    # what the hidden states are weighted with must travel as the tokens do
    batch |= {"labels": labels.astype(np.int32), "loss_mask": weights}
    model = VLM(spec, Compute(attention="blockwise", attention_block=8, context=context, remat=remat))

    def total(params, batch):
        hidden = model.apply({"params": params}, **inputs(batch), method="hidden")
        mixture = jnp.cos(batch["labels"][..., None] + jnp.arange(spec.width))
        return jnp.sum(hidden * mixture * batch["loss_mask"][..., None]), hidden

    step = jax.value_and_grad(total, has_aux=True)
    with jax.enable_x64(True):
        params = random_params(spec, dtype=np.float64)
        (_, want), wanted = jax.jit(step)(params, batch)
        with jax.set_mesh(place.mesh):
            placed = jax.tree.map(jax.device_put, params, param_shardings(spec, place))
            (_, got), gradients = jax.jit(place.rules.scoped(step))(placed, place.place(batch, 2))
    real = batch["segments"] > 0
    order = np.argsort(zigzag(batch["tokens"].shape[1], 2))
    # a few hundred roundings in sequence, each 1e-16 of numbers of the result's size
    assert relative(np.asarray(got)[:, order][real], np.asarray(want)[real]) < 1e-11
    del wanted["decoder"]["head"]  # hidden states do not depend on it
    for path, leaf in jax.tree_util.tree_leaves_with_path(wanted):
        found = functools.reduce(lambda tree, key: tree[key.key], path, gradients)
        assert relative(found, leaf) < 1e-10, path


def pad(name: str, array: np.ndarray) -> np.ndarray:
    """Rows to a length that two shards cut: 4 chunks of tokens, whole blocks of patches."""
    axis = 2 if name.startswith("patch") else 1
    padded = np.pad(array, [(0, -size % 8 if n == axis else 0) for n, size in enumerate(array.shape)])
    if name == "image_slot":
        padded[:, array.shape[1] :] = -1
    return padded

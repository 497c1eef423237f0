"""The counter of communicated bytes on programs whose traffic is known by hand."""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from paths import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
from traffic import by_kind, collectives, size

LAYERS, WIDTH = 5, 64


def compiled(function, mesh: jax.sharding.Mesh, specs, *shapes: tuple[int, ...]) -> str:
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, specs, strict=True)
    ]
    return jax.jit(function).lower(*arguments).compile().as_text()


def test_a_gather_in_a_scan_and_a_sum_after_it():
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"))
    specs = (P("data"), P(None, "fsdp"))

    @partial(jax.shard_map, mesh=mesh, in_specs=specs, out_specs=P())
    def program(x, kernels):
        def layer(x, kernel):
            return jnp.tanh(x @ jax.lax.all_gather(kernel, "fsdp", tiled=True)), None

        x = jax.lax.pcast(x, "fsdp", to="varying")
        x, _ = jax.lax.scan(layer, x, kernels)
        return jax.lax.psum(x, ("data", "fsdp"))

    found = collectives(compiled(program, mesh, specs, (16, WIDTH), (LAYERS, WIDTH, WIDTH)))
    gather, total = sorted(found)
    assert (gather.op, gather.group, gather.times, gather.operand) == ("all-gather", 4, LAYERS, 4 * WIDTH * WIDTH // 4)
    assert gather.sent == LAYERS * 3 * gather.operand
    assert (total.op, total.group, total.times, total.operand) == ("all-reduce", 8, 1, 4 * 8 * WIDTH)
    assert total.sent == 2 * 7 * total.operand // 8
    assert by_kind(found) == {
        "all-gather": gather.sent,
        "all-reduce": total.sent,
        "reduce-scatter": 0,
        "all-to-all": 0,
        "collective-permute": 0,
    }


def test_loops_within_loops_multiply_and_groups_of_one_send_nothing():
    mesh = jax.make_mesh((8, 1), ("ring", "alone"))

    @partial(jax.shard_map, mesh=mesh, in_specs=P("ring"), out_specs=P("ring"))
    def program(x):
        def hop(_, x):
            return jax.lax.ppermute(jnp.sin(x), "ring", [(i, (i + 1) % 8) for i in range(8)])

        x = jax.lax.fori_loop(0, 3, lambda _, x: jax.lax.fori_loop(0, 7, hop, x) + 1, x)
        scattered = jax.lax.psum_scatter(jnp.tile(x, 8), "ring", tiled=True)
        return jax.lax.psum(scattered, "alone")

    found = {c.op: c for c in collectives(compiled(program, mesh, [P("ring")], (8 * WIDTH,)))}
    assert found.keys() == {"collective-permute", "reduce-scatter"}
    assert (found["collective-permute"].times, found["collective-permute"].sent) == (21, 21 * 4 * WIDTH)
    assert found["reduce-scatter"].sent == 7 * 4 * WIDTH


def test_what_cannot_be_counted_is_refused():
    mesh = jax.make_mesh((8,), ("ring",))

    @partial(jax.shard_map, mesh=mesh, in_specs=P("ring"), out_specs=P(), check_vma=False)
    def program(x):
        return jax.lax.while_loop(lambda x: jnp.all(x < 1), lambda x: jax.lax.psum(x, "ring"), x)

    with pytest.raises(ValueError, match="trip count"):
        collectives(compiled(program, mesh, [P("ring")], (8,)))


def test_sizes_of_shapes():
    assert size("bf16[64,5120]{1,0:T(8,128)(2,1)S(1)}") == 2 * 64 * 5120
    assert size("(f32[8,4]{1,0}, (s8[3], pred[5]), f8e4m3fn[16], u32[])") == 128 + 3 + 5 + 16 + 4

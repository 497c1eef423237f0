"""The counter of communicated bytes and FLOPs on programs whose traffic and arithmetic are known by hand."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ministral_jax.planning.compiler.hlo import Module, live_at_peak, size
from ministral_jax.planning.compiler.traffic import by_kind, collectives

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
    assert gather.axes(mesh.shape) == ("fsdp",) and total.axes(mesh.shape) == ("data", "fsdp")
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
    assert {c.axes(mesh.shape) for c in found.values()} == {("ring",)}


def test_what_cannot_be_counted_is_refused():
    mesh = jax.make_mesh((8,), ("ring",))

    @partial(jax.shard_map, mesh=mesh, in_specs=P("ring"), out_specs=P(), check_vma=False)
    def program(x):
        return jax.lax.while_loop(lambda x: jnp.all(x < 1), lambda x: jax.lax.psum(x, "ring"), x)

    with pytest.raises(ValueError, match="trip count"):
        collectives(compiled(program, mesh, [P("ring")], (8,)))


GROUPS = {
    "replica_groups=[4,4]<=[2,2,4]T(2,1,0)": ("data", "fsdp"),
    "replica_groups={{0,1,2,3},{4,5,6,7},{8,9,10,11},{12,13,14,15}}": ("tensor",),
    "replica_groups=mesh['axis_0'=4,'axis_1'=4] {'axis_1'}": ("tensor",),
    "replica_groups=mesh['axis_0'=16] {'axis_0':(2)2}": ("fsdp",),
    "replica_groups=mesh['a'=4,'b'=4], device_ids=([4,4]T(1,0)) {'a'}": ("tensor",),
    "source_target_pairs={{0,4},{4,0},{8,12},{12,8}}": ("fsdp",),
}


@pytest.mark.parametrize("groups", GROUPS)
def test_the_axes_of_groups_however_they_are_written(groups):
    op = "collective-permute" if "pairs" in groups else "all-gather"
    text = f"""HloModule jit_f, num_partitions=16

ENTRY %main (x: f32[8]) -> f32[8] {{
  %x = f32[8]{{0}} parameter(0)
  ROOT %y = f32[8]{{0}} {op}(%x), channel_id=1, {groups}, metadata={{op_name="f"}}
}}
"""
    (found,) = collectives(text)
    assert found.axes({"data": 2, "fsdp": 2, "tensor": 4}) == GROUPS[groups]


@pytest.mark.parametrize(("target", "slices"), [("{1,2}x{0:3}", 2), ("{1:4}x{0:3}", 4)])
def test_what_slices_send_each_other(target, slices):
    text = f"""HloModule jit_f, num_partitions={4 * slices}

ENTRY %main (x: f32[64]) -> token[] {{
  %x = f32[64] parameter(0)
  %after = token[] after-all()
  %send = (f32[64], u32[], token[]) send(%x, %after), frontend_attributes={{_xla_megascale_target="{target}",_xla_megascale_transfer_type="ALL_REDUCE"}}
  ROOT %done = token[] send-done(%send)
}}
"""  # noqa: E501
    (found,) = collectives(text)
    assert (found.op, found.group, found.sent) == ("all-reduce", slices, 2 * (slices - 1) * 256 // slices)
    assert found.axes({"slice": slices, "fsdp": 4}) == ("slice",)


def test_products_count_as_often_as_they_run():
    def program(x, kernels):
        return jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)[0]

    shapes = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((16, WIDTH), (LAYERS, WIDTH, WIDTH)))
    text = jax.jit(program).lower(*shapes).compile().as_text()
    assert Module.read(text).flops() == LAYERS * 2 * 16 * WIDTH**2


def test_a_loop_that_does_not_say_how_often_it_goes_round():
    def program(x, n):
        return jax.lax.fori_loop(0, n, lambda _, x: x @ x, x)

    shapes = jax.ShapeDtypeStruct((8, 8), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
    text = jax.jit(program).lower(*shapes).compile().as_text()
    assert Module.read(text, unknown=2.5).flops() == 2.5 * 2 * 8**3
    with pytest.raises(ValueError, match="trip count"):
        Module.read(text).flops()


LOOP = """HloModule jit_f

%body (carry: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %carry = (s32[], f32[8,8]) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %x = f32[8,8] get-tuple-element(%carry), index=1
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %y = f32[8,8] dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %out = (s32[], f32[8,8]) tuple(%next, %y)
}

%condition (carry.1: (s32[], f32[8,8])) -> pred[] {
  %carry.1 = (s32[], f32[8,8]) parameter(0)
  %i.1 = s32[] get-tuple-element(%carry.1), index=0
  %limit = s32[] constant(9)
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (x.1: f32[8,8]) -> (s32[], f32[8,8]) {
  %x.1 = f32[8,8] parameter(0)
  %one = s32[] constant(1)
  %begin = (s32[], f32[8,8]) tuple(%one, %x.1)
  ROOT %loop = (s32[], f32[8,8]) while(%begin), condition=%condition, body=%body
}
"""


def test_a_counter_that_goes_up_by_two_as_in_programs_for_tpus():
    assert Module.read(LOOP).flops() == 4 * 2 * 8**3
    assert Module.read(LOOP.replace("constant(9)", "constant(8)")).flops() == 4 * 2 * 8**3
    assert Module.read(LOOP.replace("constant(2)", "constant(1)")).flops() == 8 * 2 * 8**3
    with pytest.raises(ValueError, match="trip count"):
        Module.read(LOOP.replace("add(%i, %two)", "multiply(%i, %two)")).flops()


PRODUCTS = {  # as TPU programs write them: of matrices, with batch dimensions, and with a result of several
    ("[1,32,8]", "[8,16,1]", "[1,32,16]"): ("window={size=1}, dim_labels=0bf_io0->0bf", 32 * 8 * 16),
    ("[4,3,32,8]", "[4,3,16,8]", "[4,3,32,16]"): (
        "window={size=4x3 stride=3x2 lhs_dilate=4x3}, dim_labels=01bf_01oi->01bf",
        4 * 3 * 32 * 8 * 16,
    ),
    ("[4,32,2,8,1]", "[5,16,2,8,1]", "[4,32,5,16,1]"): (
        "window={size=1x5x2 pad=0_0x4_4x0_0 rhs_reversal=0x1x0}, dim_labels=0b2f1_1o2i0->0b1f2",
        4 * 32 * 5 * 16 * (2 * 8),
    ),
}


@pytest.mark.parametrize("shapes", PRODUCTS)
def test_products_that_are_written_as_convolutions(shapes):
    left, right, out = shapes
    attributes, products = PRODUCTS[shapes]
    text = f"""HloModule jit_f

ENTRY %main (x: f32{left}, y: f32{right}) -> f32{out} {{
  %x = f32{left} parameter(0)
  %y = f32{right} parameter(1)
  ROOT %z = f32{out} convolution(%x, %y), {attributes}
}}
"""
    assert Module.read(text).flops() == 2 * products


REPORT = """HloLiveRange (max 12):
  Live ranges at 3 (peak):
    copy{}: 16 bytes (cumulative: 16 bytes)
    loop{1}: 32 bytes (cumulative: 48 bytes)
"""


def test_what_is_live_at_the_peak():
    text = """HloModule jit_f

ENTRY %main (x: f32[4]) -> f32[8] {
  %x = f32[4] parameter(0), metadata={op_name="batch[\\'x\\']"}
  %copy = f32[4] copy(%x)
  ROOT %loop = (s32[], bf16[16]) tuple(%x), metadata={op_name="jit(f)/loop"}
}
"""
    assert live_at_peak(REPORT, Module.read(text)) == [(32, "bf16[16]", "jit(f)/loop"), (16, "f32[4]", "copy")]


def test_sizes_of_shapes():
    assert size("bf16[64,5120]{1,0:T(8,128)(2,1)S(1)}") == 2 * 64 * 5120
    assert size("(f32[8,4]{1,0}, (s8[3], pred[5]), f8e4m3fn[16], u32[])") == 128 + 3 + 5 + 16 + 4

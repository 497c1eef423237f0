"""The roofline: what it says of one product by hand, and of a step against the compiler's own counts."""

from dataclasses import replace

import jax
import pytest

from ministral_jax.distributed.placement import MeshConfig, Rules
from ministral_jax.models.block import Compute
from ministral_jax.models.spec import PRESETS, ModelSpec
from ministral_jax.models.vlm import abstract_params
from ministral_jax.planning.machine import parse_machine
from ministral_jax.planning.records import Draw, Held, Phase, Read, StageWork
from ministral_jax.planning.timing.assumptions import Assumptions
from ministral_jax.planning.timing.blocks import Layout
from ministral_jax.planning.timing.costs import costs
from ministral_jax.planning.timing.links import Links, Transfer
from ministral_jax.planning.timing.roofline import stage_time

SPEC = ModelSpec(
    layers=4, width=512, mlp_width=2048, heads=8, kv_heads=4, head_width=64, vocab=8192, context=4096, vision=None
)
BF16 = Compute(dtype="bfloat16", remat="full")


def step(read: Read, machine: str = "v5p:4x4x4", assume: Assumptions = Assumptions(), **mesh: int):  # noqa: B008
    machine = parse_machine(machine)
    work = StageWork((read.model,), (Phase("step", (read,), 10),))
    return stage_time(work, machine.mesh(MeshConfig(**mesh)), machine, assume)


def reading(**changes) -> Read:
    student = Held("student", SPEC, "float32", Rules(), learns=True)
    return Read(**{**dict(model=student, rows=64, length=1024, compute=BF16, head="ce", learns=True), **changes})


def test_parts_add_up_to_the_step_and_steps_to_the_stage():
    time = step(reading(), fsdp=16, tensor=4)
    (phase,) = time.phases
    assert phase.seconds == pytest.approx(sum(part.seconds for part in phase.parts)) == time.step_seconds
    assert time.seconds == pytest.approx(10 * time.step_seconds)
    assert time.tokens == 64 * 1024
    assert phase.flops == 3 * SPEC.flops_per_token(1024) * time.tokens
    assert time.mfu(1e18) == pytest.approx(phase.flops / phase.seconds / 1e18)


def test_what_comes_beside_steps_is_in_the_stage_but_in_no_step():
    machine, read = parse_machine("v5p:4x4x4"), reading()
    seen = Phase("judge", (replace(read, learns=False),), 5, beside=True)
    work = StageWork((read.model,), (Phase("step", (read,), 10), seen))
    time = stage_time(work, machine.mesh(MeshConfig()), machine)
    first, second = time.phases
    assert time.step_seconds == first.seconds and time.seconds == 10 * first.seconds + 5 * second.seconds
    assert time.mfu(1e18) == pytest.approx(first.flops / first.seconds / 1e18)


def test_trips_of_tiles_are_those_below_the_diagonal():
    """16,384 tokens in tiles of 128: 8,256 trips of a layer and pass, three passes. Layers themselves take two trips:
    what is computed again is in that of the backward pass."""
    one = reading(length=16384, compute=replace(BF16, attention="blockwise"))
    (phase,) = step(one, fsdp=64).phases
    trips = {part.name: part.seconds / Assumptions().trip for part in phase.parts}
    assert trips["loop of attention"] == pytest.approx(8256 * SPEC.layers * 3)
    assert trips["loop of layers"] == pytest.approx(SPEC.layers * 2)


def test_a_kernel_multiplies_whole_blocks_and_its_grid_goes_through_the_others():
    """16,384 tokens in blocks of 1,024: 136 of 256 are visited; of d_q three products, of d_k and d_v four."""
    layout = Layout(parse_machine("v5p:4x4x4").mesh(MeshConfig(fsdp=64)), Rules())
    for remat, forward in (("full", 2), ("none", 1)):
        read = reading(length=16384, compute=replace(BF16, remat=remat))
        (cost,) = (c for c in costs(read, layout, 16, Assumptions()) if c.name == "attention")
        pairs = SPEC.layers * SPEC.heads * 136 * 1024**2
        assert cost.flops == pytest.approx(2 * pairs * SPEC.head_width * (2 * forward + 7))
        assert cost.idle == pytest.approx(SPEC.layers * SPEC.heads * 120 * (forward + 2) * Assumptions().idle_step)
        assert cost.trips == 0


@pytest.mark.parametrize(
    ("machine", "mesh", "axes", "links", "sides"),
    [
        ("v5p:4x4x4", dict(fsdp=16, tensor=4), ("fsdp",), 4, 2),
        ("v5p:4x4x4", dict(fsdp=16, tensor=4), ("tensor",), 2, 1),
        ("v5p:4x4x4", dict(fsdp=64), ("fsdp",), 6, 3),
        ("v6e:16x16", dict(fsdp=16, tensor=16), ("fsdp",), 2, 1),
        ("v6e:4x4", dict(fsdp=4, tensor=4), ("fsdp",), 1, 1),  # a line: only sides of 16 are rings
        ("v5p:2x4x4", dict(fsdp=4, tensor=8), ("fsdp",), 1, 1),  # no whole cubes, no rings
    ],
)
def test_an_axis_has_the_links_of_the_sides_that_it_spans(machine, mesh, axes, links, sides):
    machine = parse_machine(machine)
    wire = Links(machine.mesh(MeshConfig(**mesh)), machine, Assumptions()).wire(axes)
    assert (wire.speed, wire.sides, wire.network) == (pytest.approx(links * machine.chip.link), sides, False)


def test_slices_meet_over_the_network():
    pods = parse_machine("v5p:4x4x4", slices=2)
    wire = Links(pods.mesh(MeshConfig(slice=2)), pods, Assumptions()).wire(("slice",))
    assert wire.network and wire.speed == pods.chip.network


@pytest.mark.parametrize(
    ("machine", "mesh", "speed", "network"),
    [
        ("h100:8", dict(fsdp=8), 450e9, False),
        ("h100:32", dict(fsdp=32), 400e9, True),  # eight network cards of a node
        ("h100:32", dict(fsdp=4, tensor=8), 50e9, True),  # one device of each node
    ],
)
def test_nodes_meet_over_the_network_cards_of_the_devices_that_do(machine, mesh, speed, network):
    machine = parse_machine(machine)
    wire = Links(machine.mesh(MeshConfig(**mesh)), machine, Assumptions()).wire(("fsdp",))
    assert (wire.speed, wire.network) == (speed, network)


def test_around_a_ring_keys_go_over_one_link_and_gathers_over_all():
    machine = parse_machine("v5p:4x4x4")
    links = Links(machine.mesh(MeshConfig(context=16, fsdp=1, data=-1)), machine, Assumptions(launch=0, hop=0))
    passed, gathered = (links.seconds(Transfer(op, ("context",), 16e9)) for op in ("pass", "gather"))
    assert passed == pytest.approx(16e9 / (machine.chip.link * 0.9))
    assert gathered == pytest.approx(15e9 / (4 * machine.chip.link * 0.9))


def test_over_three_sides_a_gather_sends_twice_as_much():
    machine = parse_machine("v5p:4x4x4")
    meshes = {size: machine.mesh(MeshConfig(fsdp=size, data=-1)) for size in (16, 64)}
    links = {size: Links(mesh, machine, Assumptions()) for size, mesh in meshes.items()}
    assert {n: x.sent(Transfer("gather", ("fsdp",), 6400)) for n, x in links.items()} == {16: 6000, 64: 2 * 6300}
    assert links[64].sent(Transfer("exchange", ("fsdp",), 6400)) == 6300


@pytest.mark.parametrize("frozen", [("vision",), ()])
def test_the_optimiser_goes_over_all_that_learns(frozen):
    """Projector and norms too, and the vision tower unless it is frozen; once whole on every device."""
    spec, machine = PRESETS["tiny-14b"], parse_machine("v5p:4x4x4")
    read = reading(model=Held("student", spec, "float32", Rules(), True, frozen))
    layout = Layout(machine.mesh(MeshConfig(data=64, fsdp=1)), Rules())
    (optimiser,) = (cost for cost in costs(read, layout, 16, Assumptions()) if cost.name == "optimiser")
    learns = {name: tree for name, tree in abstract_params(spec).items() if name not in frozen}
    assert optimiser.hbm == 32 * sum(leaf.size for leaf in jax.tree.leaves(learns))


def test_room_for_answers_doubles_up_to_the_longest():
    model = Held("policy", SPEC, "float32", Rules())
    rooms = {tokens: list(Draw(model, 1, 1, 32, tokens, BF16).rooms) for tokens in (1000, 100)}
    assert rooms == {1000: [(256, 256), (512, 256), (1000, 488)], 100: [(100, 100)]}

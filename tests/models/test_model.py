"""The model against algebra in float64; against torch it is `test_golden.py`."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from model_cases import CASES, TEXT, YARN, Case, inputs, loss_and_grads, pack, random_params, relative

from ministral_jax.errors import UserError
from ministral_jax.models import attention
from ministral_jax.models.attention import AttentionSpec, Part, attend
from ministral_jax.models.block import linear, rms_norm
from ministral_jax.models.rope import apply_rope, axial_angles, position_scale, rope_angles, yarn_frequencies
from ministral_jax.models.spec import PRESETS, RopeSpec
from ministral_jax.models.vlm import (
    VLM,
    Compute,
    abstract_params,
    check_params,
    head_matrix,
    init_params,
    logical_axes,
)

# A few thousand float64 roundings.
EXACT = 1e-12


# ---- positions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "theta, expected",
    [
        (1e6, [1, 0.8058422, 0.03162278, 0.01333521, 3.282066e-3, 6.907023e-4, 4.961135e-5, 1.111425e-5, 1.283453e-6,
               7.755861e-8]),
        (1e9, [1, 0.7233942, 4.305426e-3, 6.977792e-4, 1.906580e-5, 3.776852e-6, 5.412277e-7, 1.482109e-7,
               5.816076e-9, 8.639826e-11]),
    ],
)  # fmt: skip
def test_yarn_frequencies_of_the_released_sizes(theta, expected):
    rope = RopeSpec(theta=theta, yarn_factor=16, original_context=16_384)
    got = yarn_frequencies(128, rope)[[0, 1, 16, 20, 25, 30, 36, 40, 50, 63]]
    np.testing.assert_allclose(got, expected, rtol=5e-7)


def test_position_temperature_of_the_released_sizes(x64):
    rope = PRESETS["ministral-3-3b"].rope
    positions = jnp.array([0, 16_383, 16_384, 32_768, 131_071, 262_143])
    expected = [1, 1, 1.069315, 1.109861, 1.207944, 1.277259]
    np.testing.assert_allclose(position_scale(positions, rope, jnp.float64), expected, rtol=5e-7)
    assert position_scale(positions, RopeSpec(), jnp.float64) is None


def test_rotation_is_multiplication_of_complex_pairs(x64):
    random = np.random.default_rng(0)
    x, positions = random.standard_normal((2, 5, 3, 8)), random.integers(0, 99, (2, 5))
    rope = YARN.model_copy(update={"attention_factor": 1.25})
    rotated = np.asarray(apply_rope(jnp.asarray(x), rope_angles(jnp.asarray(positions), rope, 8, jnp.float64)))
    pairs = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * positions[..., None, None] * yarn_frequencies(8, rope)) * 1.25
    np.testing.assert_allclose(rotated, np.concatenate([pairs.real, pairs.imag], -1), atol=1e-13)


def test_even_frequencies_turn_with_the_row_and_odd_ones_with_the_column(x64):
    rows, columns = jnp.array([[0, 3]]), jnp.array([[5, 0]])
    cos, _ = axial_angles(rows, columns, 1e4, 16, jnp.float64)
    f = 1e4 ** (-np.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(cos[0, 0], np.cos(np.concatenate([0 * f[0::2], 5 * f[1::2]])))
    np.testing.assert_allclose(cos[0, 1], np.cos(np.concatenate([3 * f[0::2], 0 * f[1::2]])))


# ---- attention ------------------------------------------------------------------------------------------------------


def naive_attention(q, k, v, weight, segments, causal):
    """The mixture, and the gradients in q, k and v of its product with `weight`, token by token."""
    out, d_q, d_k, d_v = (np.zeros_like(x) for x in (q, q, k, v))
    B, T, H, h = q.shape
    for b, t, n in np.ndindex(B, T, H):
        g = n // (H // k.shape[2])
        seen = [s for s in range(T) if segments[b, s] == segments[b, t] and (s <= t or not causal)]
        seen = seen if segments[b, t] else [t]
        w = np.exp(k[b, seen, g] @ q[b, t, n] * h**-0.5)
        p, d_out = w / w.sum(), weight[b, t, n]
        out[b, t, n] = p @ v[b, seen, g]
        d_s = p * ((v[b, seen, g] - out[b, t, n]) @ d_out) * h**-0.5
        d_q[b, t, n] = d_s @ k[b, seen, g]
        d_k[b, seen, g] += np.outer(d_s, q[b, t, n])
        d_v[b, seen, g] += np.outer(p, d_out)
    return [out, d_q, d_k, d_v]


@pytest.mark.parametrize("causal", [True, False])
def test_attention_agrees_with_loops_in_every_implementation_and_its_gradients_too(x64, causal):
    random = np.random.default_rng(0)
    q, k, v, weight = (random.standard_normal((3, 21, n, 4)) for n in (6, 2, 2, 6))
    segments = np.array([[1] * 4 + [2] * 6 + [3] * 3 + [0] * 8, [1] * 21, [1] + [2] * 13 + [3] * 7])

    def run(implementation, block):
        def f(q, k, v):
            out = attend(q, k, v, segments, AttentionSpec(causal, implementation, block))
            return jnp.sum(out * weight), out

        (_, out), grads = jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2), has_aux=True))(q, k, v)
        return [out, *grads]

    want = naive_attention(q, k, v, weight, segments, causal)
    for implementation, block in (("xla", 5), ("blockwise", 2), ("blockwise", 5), ("blockwise", 32)):
        assert max(map(relative, run(implementation, block), want)) < EXACT, (implementation, block)
    without = attend(q, k, v, None, AttentionSpec(causal, "blockwise", 5))
    assert relative(without[1], want[0][1]) < EXACT


def test_a_tile_of_queries_visits_the_tiles_of_its_documents_and_of_padding_only_its_own():
    segments = jnp.array([[1] * 8 + [2] * 8 + [0] * 8, [1] * 12 + [2] * 4 + [0] * 8])
    part = Part(segments, np.zeros(1, np.int32))
    nothing = jnp.zeros((2, 24, 1, 1))
    *_, tiles = attention.into_tiles(nothing, nothing, nothing, part, part, 4)

    def visits(causal):
        bounds = [attention._visited(attention.Tiles(*tile), tiles, causal) for tile in zip(*tiles, strict=True)]
        return [(int(begin), int(end)) for begin, end in bounds]

    assert visits(True) == [(0, 1), (0, 2), (0, 3), (2, 4), (4, 5), (5, 6)]
    assert visits(False) == [(0, 3), (0, 3), (0, 4), (2, 4), (4, 5), (5, 6)]


def test_auto_attention_takes_blocks_once_there_are_several():
    def primitives(length):
        q = jnp.zeros((1, length, 2, 4))
        return str(jax.make_jaxpr(lambda q: attend(q, q, q, spec=AttentionSpec(block=8)))(q))

    assert "while" in primitives(9) and "while" not in primitives(8)


def test_auto_takes_smaller_tiles_on_a_cpu_and_a_setting_is_kept():
    auto, told = AttentionSpec(block=256), AttentionSpec(implementation="blockwise", block=256)
    cases = [(auto, "cpu"), (auto, "tpu"), (told, "cpu"), (AttentionSpec(block=16), "cpu")]
    assert [attention.chosen_block(*case) for case in cases] == [attention.CPU_BLOCK, 256, 256, 16]


# ---- whole model ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed():
    """A packed batch with images, float64 parameters, and its logits and gradients from the plainest computation."""
    case = CASES["images"]
    with jax.enable_x64(True):
        params, batch = random_params(case.spec, dtype=np.float64), pack(case)
        batch["patches"] = batch["patches"].astype(np.float64)
        (_, logits), grads = loss_and_grads(params, case.spec, batch, Compute(attention="xla"))
        return case, params, batch, np.asarray(logits), jax.tree.map(np.asarray, grads)


def logits_of(params, spec, arguments, method="__call__"):
    return jax.jit(lambda p, a: VLM(spec).apply({"params": p}, **a, method=method))(params, arguments)


def test_documents_do_not_see_each_other(packed, x64):
    case, params, batch, logits, _ = packed
    assert np.isfinite(logits).all()
    for b, row in enumerate(case.rows):
        for number, document in enumerate(row, 1):
            alone = pack(Case(case.spec, ((document,),)), padding=0)
            arguments = {"tokens": alone["tokens"], "images": inputs(alone)["images"]}
            ours, theirs = logits[b][batch["segments"][b] == number], logits_of(params, case.spec, arguments)[0]
            assert relative(ours, theirs) < EXACT


def test_images_reach_only_their_own_document(packed, x64):
    case, params, batch, logits, _ = packed
    changed = batch["patches"].copy()
    changed[batch["patch_image"] == 3] += 1
    again = logits_of(params, case.spec, inputs({**batch, "patches": changed}))
    moved = np.abs(np.asarray(again - logits)).max(-1) > EXACT * np.abs(logits).max()
    image_3 = np.zeros_like(moved)
    image_3[0] = batch["segments"][0] == 3
    assert (moved & image_3).sum() > 5 and not (moved & ~image_3).any()


BLOCKWISE = Compute(attention="blockwise", attention_block=16)


@pytest.mark.parametrize(
    "compute", [Compute(unroll=0, remat="full", attention="xla"), replace(BLOCKWISE, remat="dots")]
)
def test_ways_of_computing_agree(packed, x64, compute):
    case, params, batch, logits, grads = packed
    (_, other), other_grads = loss_and_grads(params, case.spec, batch, compute)
    assert relative(other, logits) < EXACT
    assert max(jax.tree.leaves(jax.tree.map(relative, other_grads, grads))) < EXACT


def test_float64_is_never_narrowed_on_the_way(packed, x64):
    case, params, batch, *_ = packed
    for compute in (Compute(attention="xla"), BLOCKWISE):
        apply = lambda p, c=compute: VLM(case.spec, c).apply({"params": p}, **inputs(batch))
        program = str(jax.make_jaxpr(apply)(params))
        assert "f64[" in program and not [kind for kind in ("f32[", "bf16[") if kind in program]


def test_bfloat16_compute_keeps_parameters_and_returns_float32_logits(packed):
    case, params, batch, logits, _ = packed
    params = jax.tree.map(lambda p: p.astype(np.float32), params)
    batch = {**batch, "patches": batch["patches"].astype(np.float32)}
    model = VLM(case.spec, Compute(dtype="bfloat16"))
    apply = lambda p: model.apply({"params": p}, **inputs(batch))
    half, grads = jax.jit(apply)(params), jax.eval_shape(jax.grad(lambda p: jnp.sum(apply(p))), params)
    assert half.dtype == jnp.float32 and {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    real = batch["segments"] > 0
    rms = lambda x: np.sqrt(np.mean(np.square(np.asarray(x, np.float64)[real])))
    # bfloat16 rounds to 2^-9; some dozens of roundings add up like a random walk.
    assert 2**-12 < rms(np.asarray(half) - logits) / rms(logits) < 2**-9 * 10


def test_tied_model_is_the_untied_one_with_the_transposed_embedding_as_head(x64):
    tied = TEXT.model_copy(update={"tied": True})
    params = random_params(tied, dtype=np.float64)
    untied = {"decoder": {**params["decoder"], "head": head_matrix(params)}}
    arguments = {"tokens": CASES["text"].rows[0][0].tokens[None]}
    out = logits_of(params, tied, arguments)
    assert relative(logits_of(untied, TEXT, arguments), out) < EXACT
    hidden = logits_of(params, tied, arguments, method="hidden")
    assert relative(hidden @ head_matrix(untied), out) < EXACT


def test_observe_shows_every_layer(packed, x64):
    case, params, batch, *_ = packed
    weights = jnp.asarray(batch["segments"] > 0, jnp.float64)
    arguments = {**inputs(batch), "tap": lambda a, w: (a, jnp.sum(a["mlp_hidden"] * w[..., None])), "weights": weights}
    observe = jax.jit(lambda p: VLM(case.spec).apply({"params": p}, **arguments, method="observe"))
    hidden, (seen, total) = observe(params)
    layers, eps = params["decoder"]["layers"], case.spec.norm_eps
    assert relative(hidden, logits_of(params, case.spec, inputs(batch), method="hidden")) < EXACT
    assert relative(hidden, rms_norm(seen["out"][-1], params["decoder"]["norm"], eps)) < EXACT
    assert relative(seen["attention_norm_in"][1:], seen["out"][:-1]) < EXACT
    text = batch["image_slot"] < 0
    assert relative(seen["attention_norm_in"][0][text], params["decoder"]["embed"][batch["tokens"][text]]) < EXACT
    assert np.abs(seen["mlp_norm_in"] - seen["attention_norm_in"]).max() > 0.1
    for i in range(case.spec.layers):
        x = rms_norm(seen["mlp_norm_in"][i], layers["mlp_norm"][i], eps)
        product = jax.nn.silu(x @ layers["mlp"]["gate"][i]) * (x @ layers["mlp"]["up"][i])
        assert relative(seen["mlp_hidden"][i], product) < EXACT
        assert relative(seen["out"][i], seen["mlp_norm_in"][i] + product @ layers["mlp"]["down"][i]) < EXACT
        assert relative(total[i], jnp.sum(product * weights[..., None])) < EXACT


@pytest.mark.parametrize("shape", [(3, 7), (7, 3)])
def test_gradient_of_linear(x64, shape):
    random = np.random.default_rng(0)
    x, w = random.standard_normal((2, 5, shape[0])), random.standard_normal(shape)
    f = lambda product: jax.grad(lambda x, w: jnp.sum(jnp.sin(product(x, w))), argnums=(0, 1))(x, w)
    assert max(map(relative, f(linear), f(jnp.matmul))) < EXACT


def test_the_model_runs_on_a_mesh_under_logical_rules():
    case = CASES["images"]
    params, batch = random_params(case.spec), pack(case)
    alone = logits_of(params, case.spec, inputs(batch))
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rules = [("batch", "data"), ("mlp", "model"), ("heads", "model"), ("vocab", "model")]
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        specs = jax.tree.map(lambda axes: nn.logical_to_mesh_axes(axes), logical_axes(case.spec), is_leaf=is_axes)
        shard = lambda p, s: jax.device_put(p, jax.NamedSharding(mesh, s))
        spread = logits_of(jax.tree.map(shard, params, specs), case.spec, inputs(batch))
        assert "model" in str(spread.sharding)
    assert relative(spread, alone) < 1e-5


def is_axes(x) -> bool:
    return isinstance(x, tuple)


# ---- parameters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, decoder, total",
    [
        ("mistral-small-3.1-24b", 23.572e9, 24.01e9),
        ("ministral-3-14b", 13.506e9, 13.95e9),
        ("ministral-3-8b", 8.490e9, 8.92e9),
        ("ministral-3-3b", 3.429e9, 3.85e9),
    ],
)
def test_presets_have_the_published_number_of_parameters(name, decoder, total):
    spec = PRESETS[name]
    tree = abstract_params(spec)
    count = lambda t: sum(leaf.size for leaf in jax.tree.leaves(t))
    assert count(tree["decoder"]) == spec.decoder_parameters and count(tree) == spec.parameters
    assert abs(count(tree["decoder"]) - decoder) < 0.5e6 and abs(count(tree) - total) < 5e6


def test_fresh_parameters_have_the_declared_shapes_axes_and_scales():
    spec = PRESETS["tiny-8b"]
    params = jax.jit(lambda key: init_params(spec, key, jnp.bfloat16))(jax.random.key(0))
    check_params(params, spec, "here")
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    for leaf, axes in zip(jax.tree.leaves(params), jax.tree.leaves(logical_axes(spec), is_leaf=is_axes), strict=True):
        assert leaf.ndim == len(axes) == len(set(axes)) or axes.count("vision_heads") == 2
    mlp = params["decoder"]["layers"]["mlp"]
    assert np.std(mlp["gate"].astype(np.float32)) == pytest.approx(spec.width**-0.5, rel=0.05)
    assert np.std(mlp["down"].astype(np.float32)) == pytest.approx((2 * spec.layers * spec.mlp_width) ** -0.5, rel=0.05)
    assert np.unique(np.asarray(mlp["gate"], np.float32)[:, 0, 0]).size == spec.layers


# ---- errors ---------------------------------------------------------------------------------------------------------


def test_parameters_of_another_size_are_named():
    spec = PRESETS["tiny-3b"]
    shapes = abstract_params(spec)
    broken = {**shapes, "decoder": {**shapes["decoder"], "norm": jax.ShapeDtypeStruct((49,), jnp.float32)}}
    with pytest.raises(UserError, match=r"runs/x: parameter decoder/norm has shape \(49,\), expected \(48,\)"):
        check_params(broken, spec, "runs/x")
    with pytest.raises(UserError, match=r"decoder/head \(48, 2048\) is missing"):
        check_params(shapes, spec.model_copy(update={"tied": False}), "runs/x")
    with pytest.raises(UserError, match=r"projector/linear_1 \(32, 48\) is not part of this model"):
        check_params(shapes, spec.model_copy(update={"vision": None}), "runs/x")


@pytest.mark.parametrize(
    "spec, change, message",
    [
        (CASES["images"].spec, lambda b: b.pop("patch_row"), "images lack patch_row"),
        (CASES["images"].spec, lambda b: b.update(patches=b["patches"][:, :, :-2]), "P a multiple of 4"),
        (CASES["images"].spec, lambda b: b.update(patches=b["patches"][..., :-1]), r"expected \[S, G, P, 12\]"),
        (CASES["images"].spec, lambda b: b.update(image_slot=b["image_slot"][:1]), "2 groups, over which 1 rows"),
        (TEXT, lambda b: None, "no vision tower"),
    ],
)
def test_images_that_do_not_fit_are_refused(spec, change, message):
    images = inputs(pack(CASES["images"]))["images"]
    change(images)
    with pytest.raises(UserError, match=message):
        VLM(spec).apply({"params": random_params(spec)}, np.zeros((2, 4), np.int32), images=images)

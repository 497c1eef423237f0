"""Calibration sums against a float64 NumPy oracle that keeps every activation, and scores against their formulas."""

from __future__ import annotations

import math
from dataclasses import fields

import jax
import numpy as np
import pytest
from model_cases import inputs
from pruning_cases import SPEC, make_batch, params64

from ministral_jax.errors import UserError
from ministral_jax.models.vision import VisionTower
from ministral_jax.models.vlm import IMAGE_KEYS, VLM, Compute
from ministral_jax.pruning.score import PruneOptions, layer_scores, mlp_scores, top, width_basis
from ministral_jax.pruning.statistics import Statistics, collect, retained

MODEL = VLM(SPEC)


@pytest.fixture(scope="module")
def params():
    with jax.enable_x64(True):
        yield params64(SPEC)


def gather(params, *batches, **options) -> Statistics:
    with jax.enable_x64(True):
        return collect(MODEL, params, batches, **options)


def kinds(batch):
    """Where text and image tokens stand."""
    counted = batch["segments"] > 0
    image = counted & (batch["image_slot"] >= 0)
    return counted & ~image, image


def test_tokens_may_weigh_the_same_at_every_norm(params, batch, activations):
    found = gather(params, batch, token_weighted=True)
    for domain, mask in enumerate(kinds(batch)):
        x = np.stack([activations["attention_norm_in"], activations["mlp_norm_in"]])[:, :, mask]
        x = (x / np.sqrt((x**2).mean(-1, keepdims=True))).reshape(-1, SPEC.width)
        np.testing.assert_allclose(found.second_moment[domain], x.T @ x / (2 * SPEC.layers), rtol=1e-9, atol=1e-12)
        assert np.trace(found.second_moment[domain]) == pytest.approx(SPEC.width * mask.sum())


def test_what_is_retained_at_each_norm(params, batch, activations):
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((SPEC.width, 7)))[0]
    with jax.enable_x64(True):
        found = retained(MODEL, params, [batch, batch], basis, image_weight=3.0)
    text, image = kinds(batch)
    weight = text + 3.0 * image

    def share(x):  # [L, B, T, D]
        kept = ((x @ basis) ** 2).sum(-1) / (x**2).sum(-1)
        return (np.where(weight > 0, kept, 0) * weight).sum((1, 2)) / weight.sum()

    np.testing.assert_allclose(found.attention, share(activations["attention_norm_in"]), rtol=1e-6)
    np.testing.assert_allclose(found.mlp, share(activations["mlp_norm_in"]), rtol=1e-6)
    assert found.final == pytest.approx(share(activations["out"])[-1], rel=1e-6)
    assert np.ptp(found.attention) > 1e-3


def close(a: Statistics, b: Statistics, rtol: float = 1e-12) -> bool:
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in fields(a)]
    return all(np.allclose(x, y, rtol=0, atol=rtol * np.abs(y).max()) for x, y in pairs)


def rows(batch, *index):
    return {name: value[list(index)] for name, value in batch.items()}


@pytest.fixture(scope="module")
def batch():
    """Rows that differ in where their text, image and padding tokens stand."""
    batch = make_batch(5, rows=4)
    batch["segments"][1, 9:12] = 0
    batch["image_slot"][2, 2] = -1
    batch["image_slot"][3, 22] = 1  # an image token in padding
    return batch


@pytest.fixture(scope="module")
def activations(params, batch):
    """Every activation of every layer, kept."""
    with jax.enable_x64(True):
        _, taps = MODEL.apply({"params": params}, tap=lambda a, _: a, **inputs(batch), method="observe")
        patches = map(batch.get, IMAGE_KEYS[:4])
        features = VisionTower(SPEC.vision, Compute()).apply({"params": params["vision"]}, *patches)
    return jax.tree.map(np.asarray, {**taps, "features": features})


@pytest.fixture(scope="module")
def statistics(params, batch):
    return gather(params, batch)


def test_sums_equal_the_oracle(params, batch, activations, statistics):
    counted = batch["segments"] > 0
    image = counted & (batch["image_slot"] >= 0)
    before, middle, after, hidden = (activations[k] for k in ("attention_norm_in", "mlp_norm_in", "out", "mlp_hidden"))
    sizes = np.linalg.norm(before, axis=-1), np.linalg.norm(after, axis=-1)
    for domain, mask in enumerate((counted & ~image, image)):
        assert statistics.tokens[domain] == mask.sum() > 0
        expect = {
            "norm_ratio": (sizes[1] / sizes[0])[:, mask].sum(1),
            "cosine": ((before * after).sum(-1) / (sizes[0] * sizes[1]))[:, mask].sum(1),
            "mlp": np.abs(hidden)[:, mask].sum(1),
        }
        inputs = np.stack([before, middle])[:, :, mask].reshape(2 * SPEC.layers, -1, SPEC.width)
        expect["second_moment"] = np.mean([x.T @ x for x in inputs], axis=0)
        for name, value in expect.items():
            np.testing.assert_allclose(getattr(statistics, name)[domain], value, rtol=1e-12, atol=1e-12)

    projector = jax.tree.map(np.asarray, params["projector"])
    x = activations["features"]
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + SPEC.norm_eps) * projector["norm"]
    x = x.reshape(4, 4, 4, -1).swapaxes(2, 3).reshape(4, 4, -1) @ projector["merge"] @ projector["linear_1"]
    gelu = np.abs(x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2)
    at_tokens = gelu[np.arange(4)[:, None], np.maximum(batch["image_slot"], 0)][image]
    np.testing.assert_allclose(statistics.projector[1], at_tokens.sum(0), rtol=1e-12)
    assert not statistics.projector[0].any()


def test_sums_do_not_depend_on_batch_size_or_order(params, batch, statistics):
    pairs = gather(params, rows(batch, 3, 1), rows(batch, 0, 2))
    assert close(pairs, statistics)
    assert close(gather(params, rows(batch, 0, 2)) + gather(params, rows(batch, 1, 3)), statistics)
    lean = gather(params, batch, width=False)
    assert lean.second_moment is None and np.array_equal(lean.mlp, statistics.mlp)


def test_padding_never_counts(params, batch, statistics):
    noisy = {name: value.copy() for name, value in batch.items()}
    padding = noisy["segments"] == 0
    noisy["tokens"][padding] = 39
    noisy["patches"][:, :, 12:] = 7.0
    assert close(gather(params, noisy), statistics)
    noisy["tokens"][~padding] = 39
    assert not close(gather(params, noisy), statistics, 1e-3)


def test_text_and_image_batches_mix(params, batch, statistics):
    text = make_batch(6, images=False)
    alone = gather(params, text)
    assert alone.tokens[1] == 0 and not alone.mlp[1].any() and not alone.projector.any()
    assert close(gather(params, text, batch), alone + statistics)
    mean = statistics.mean(statistics.mlp, 0.5)
    counts, sums = statistics.tokens, statistics.mlp
    np.testing.assert_allclose(mean, (sums[0] + 0.5 * sums[1]) / (counts[0] + 0.5 * counts[1]), rtol=1e-14)


def test_a_mesh_counts_the_same(params, batch, statistics):
    """Float32 on eight devices: rows over `data`, parameters and the second moment over `model`."""
    from flax import linen as nn
    from jax.sharding import AxisType, PartitionSpec

    wide = rows(batch, 0, 1, 2, 3)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    single = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)
    with jax.set_mesh(mesh), nn.logical_axis_rules([("embed", "model"), ("batch", "data")]):
        sharded = jax.device_put(single, PartitionSpec())
        result = collect(MODEL, sharded, [jax.device_put(wide, PartitionSpec("data"))])
    assert result.mlp.dtype == np.float64
    assert close(result, statistics, 1e-5)


def test_useless_calibration_is_refused(params, batch):
    with pytest.raises(UserError, match="saw no token"):
        gather(params)
    with pytest.raises(UserError, match="saw no token"):
        gather(params, {**batch, "segments": 0 * batch["segments"]})
    with jax.enable_x64(True):
        broken = {**params, "decoder": {**params["decoder"], "embed": params["decoder"]["embed"] * np.nan}}
    with pytest.raises(UserError, match="norm_ratio is not finite"):
        gather(broken, batch)
    with pytest.raises(UserError, match="image_weight = 0"):
        text_free = gather(params, {**batch, "segments": np.where(batch["image_slot"] >= 0, batch["segments"], 0)})
        text_free.mean(text_free.mlp, 0.0)


def test_top_keeps_the_largest_in_order():
    scores = np.array([[3.0, 1.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    assert top(scores, 2).tolist() == [[0, 2], [0, 1]]
    assert top(scores[0], 3).tolist() == [0, 2, 3]


def test_scores_are_their_formulas(params, statistics, activations, batch):
    mask, layers = batch["segments"] > 0, jax.tree.map(np.asarray, params["decoder"]["layers"])
    before, after = activations["attention_norm_in"][:, mask], activations["out"][:, mask]
    ratio = (np.linalg.norm(after, axis=-1) / np.linalg.norm(before, axis=-1)).mean(1)
    unit = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (before, after)]
    gain = layers["mlp_norm"][:, :, None]
    sizes = [np.sqrt(((gain * layers["mlp"][k]) ** 2).sum(1)) for k in ("gate", "up")]
    rng = lambda: np.random.default_rng(7)
    for score, want in {
        "norm_ratio": ratio,
        "norm_ratio_inverse": 1 / ratio,
        "block_influence": 1 - (unit[0] * unit[1]).sum(-1).mean(1),
        "random": rng().random(SPEC.layers),
    }.items():
        found = layer_scores(statistics, PruneOptions(layer_score=score), rng())
        np.testing.assert_allclose(found, want, rtol=1e-12, atol=1e-14)
    for score, want in {
        "activation": np.abs(activations["mlp_hidden"])[:, mask].mean(1),
        "weight_norm": sizes[0] * sizes[1] * np.sqrt((layers["mlp"]["down"] ** 2).sum(2)),
        "random": rng().random((SPEC.layers, SPEC.mlp_width)),
    }.items():
        found = mlp_scores(params, statistics, PruneOptions(mlp_score=score), rng())
        np.testing.assert_allclose(found, want, rtol=1e-12)


def test_bases_are_orthonormal_and_sorted(statistics, activations, batch):
    mask = batch["segments"] > 0
    data = np.concatenate(
        [activations[k][:, mask].reshape(-1, SPEC.width) for k in ("attention_norm_in", "mlp_norm_in")]
    )
    _, singular, right = np.linalg.svd(data, full_matrices=False)
    total = (data**2).sum() / len(data)
    for kind in ("pca", "magnitude", "random"):
        basis = width_basis(statistics, PruneOptions(width_basis=kind), np.random.default_rng(7))
        np.testing.assert_allclose(basis.vectors.T @ basis.vectors, np.eye(SPEC.width), atol=1e-12)
        np.testing.assert_allclose(basis.energy, ((data @ basis.vectors) ** 2).mean(0), rtol=1e-9)
        assert basis.retained(SPEC.width) == pytest.approx(1, abs=1e-12)
        np.testing.assert_allclose(basis.energy.sum(), total, rtol=1e-12)
        if kind == "magnitude":
            assert set(np.unique(basis.vectors)) == {0.0, 1.0} and (np.diff(basis.energy) <= 0).all()
        if kind == "pca":
            np.testing.assert_allclose(basis.energy, singular**2 / len(data), rtol=1e-9)
            signs = np.sign((basis.vectors * right.T).sum(0))
            np.testing.assert_allclose(basis.vectors * signs, right.T, atol=1e-8)
            assert (basis.vectors[np.abs(basis.vectors).argmax(0), np.arange(SPEC.width)] > 0).all()

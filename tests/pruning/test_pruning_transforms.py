"""Surgery is algebra: what the transforms promise, to float64 round-off, through the whole vision-language model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import relative
from pruning_cases import SPEC, WRITERS, logits, make_batch, params64

from ministral_jax.models.vlm import check_params
from ministral_jax.pruning import transforms
from ministral_jax.pruning.transforms import (
    NORM_GAINS,
    RESIDUAL_AXIS,
    Gains,
    drop_layers,
    edit,
    fold_norm_gains,
    narrow_mlp,
    narrow_projector,
    rotate,
    slice_gain,
    slice_width,
    tie_embeddings,
    untie,
)

EXACT = 1e-12


pytestmark = pytest.mark.usefixtures("x64")


def orthogonal(width: int, seed: int = 1) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((width, width)))[0]


def test_full_width_rotation_leaves_the_logits_unchanged():
    params, batch = params64(SPEC), make_batch()
    source = logits(params, SPEC, batch)
    folded = fold_norm_gains(params)
    rotated = rotate(folded, orthogonal(SPEC.width))
    assert relative(logits(folded, SPEC, batch), source) < EXACT
    assert relative(logits(rotated, SPEC, batch), source) < EXACT
    # The gains are why folding comes first, and every table entry is needed.
    assert relative(logits(rotate(params, orthogonal(SPEC.width)), SPEC, batch), source) > 1e-2
    for path in RESIDUAL_AXIS:
        stale = edit(rotated, {path: lambda w, path=path: _leaf(folded, path)})
        assert relative(logits(stale, SPEC, batch), source) > 1e-6, path


def test_leaves_that_are_large_rotate_part_by_part(monkeypatch):
    params, basis = params64(SPEC), orthogonal(SPEC.width)[:, : SPEC.width // 2]
    whole = rotate(params, basis)
    monkeypatch.setattr(transforms, "WHOLE", SPEC.width * SPEC.mlp_width // 3)
    parts = rotate(params, basis)
    assert jax.tree.all(jax.tree.map(lambda a, b: a.shape == b.shape and relative(a, b) < EXACT, parts, whole))
    assert " scan[" in str(jax.make_jaxpr(rotate)(params, basis))


def test_a_tied_model_rotates_once_untied():
    spec = SPEC.model_copy(update={"tied": True})
    params, batch = params64(spec), make_batch()
    source = logits(params, spec, batch)
    half_folded = fold_norm_gains(params)
    assert "head" not in half_folded["decoder"] and half_folded["decoder"]["norm"] is params["decoder"]["norm"]
    assert relative(logits(half_folded, spec, batch), source) < EXACT
    with pytest.raises(ValueError, match="untied"):
        rotate(half_folded, orthogonal(spec.width))
    free = untie(params)
    check_params(free, SPEC, "untied")
    rotated = rotate(fold_norm_gains(free), orthogonal(spec.width))
    assert relative(logits(rotated, SPEC, batch), source) < EXACT


def test_keeping_everything_in_any_order_leaves_the_logits_unchanged():
    params, batch, rng = params64(SPEC), make_batch(), np.random.default_rng(2)
    source = logits(params, SPEC, batch)
    shuffled = np.stack([rng.permutation(SPEC.mlp_width) for _ in range(SPEC.layers)])
    every = narrow_projector(narrow_mlp(params, shuffled), rng.permutation(SPEC.width))
    assert np.array_equal(logits(drop_layers(params, np.arange(SPEC.layers)), SPEC, batch), source)
    assert relative(logits(every, SPEC, batch), source) < EXACT


def test_dropping_a_layer_that_writes_nothing_is_exact():
    silent = {f"decoder/layers/{name}": lambda w: w.at[1].set(0) for name in ("attention/o", "mlp/down")}
    params, batch = edit(params64(SPEC), silent), make_batch()
    smaller = drop_layers(params, np.array([0, 2]))
    spec = SPEC.model_copy(update={"layers": 2})
    assert relative(logits(smaller, spec, batch), logits(params, SPEC, batch)) < EXACT
    other = drop_layers(params, np.array([1, 2]))
    assert relative(logits(other, spec, batch), logits(params, SPEC, batch)) > 1e-3


def test_dropping_dead_neurons_is_exact():
    rng = np.random.default_rng(3)
    kept = np.stack([np.sort(rng.permutation(SPEC.mlp_width)[:17]) for _ in range(SPEC.layers)])
    alive = np.zeros((SPEC.layers, 1, SPEC.mlp_width))
    np.put_along_axis(alive, kept[:, None], 1.0, axis=2)
    params, batch = edit(params64(SPEC), {"decoder/layers/mlp/up": lambda w: w * alive}), make_batch()
    smaller, spec = narrow_mlp(params, kept), SPEC.model_copy(update={"mlp_width": 17})
    check_params(smaller, spec, "narrowed")
    assert relative(logits(smaller, spec, batch), logits(params, SPEC, batch)) < EXACT


@pytest.mark.parametrize("energy", [1.0, 0.8])
def test_sliced_norm_equals_the_norm_over_the_full_width(energy):
    width, kept, eps = 20, 13, 1e-2
    y = np.random.default_rng(4).standard_normal((50, kept))
    full = y / np.sqrt((y**2).sum(-1, keepdims=True) / energy / width + eps)

    def norm(gain: float, eps: float) -> np.ndarray:
        return gain * y / np.sqrt((y**2).mean(-1, keepdims=True) + eps)

    gain = slice_gain(width, kept, energy)
    assert relative(norm(gain, gain**2 * eps), full) < EXACT
    assert 1e-4 < relative(norm(gain, eps), full) < 2e-2
    assert relative(norm(1.0, eps), full) > abs(1 - 1 / gain) / 2


@pytest.mark.parametrize(("images", "eps"), [(False, 1e-2), (True, 1e-13)])  # the projector's norm shares the epsilon
def test_slicing_directions_without_energy_is_exact(images, eps):
    kept, basis = 14, orthogonal(SPEC.width)
    spec = SPEC.model_copy(update={"norm_eps": eps})
    params, batch = fold_norm_gains(params64(SPEC)), make_batch(images=images)
    inside = basis[:, :kept] @ basis[:, :kept].T
    params = edit(params, {path: lambda w: w @ inside for path in WRITERS})
    params = edit(params, {"projector/linear_1": lambda w: w.at[:, kept:].set(0)})
    source = logits(params, spec, batch)

    gain = slice_gain(spec.width, kept)
    gains = Gains.same(gain, spec.layers)
    rotated = rotate(params, basis)
    small = narrow_projector(slice_width(rotated, kept, gains), np.arange(kept))
    sliced = spec.model_copy(update={"width": kept, "norm_eps": eps * gain**2})
    check_params(small, sliced, "sliced")
    assert relative(logits(small, sliced, batch), source) < EXACT
    without = edit(small, dict.fromkeys(NORM_GAINS, jnp.ones_like))
    assert relative(logits(without, sliced, batch), source) > 1e-2
    at_once = slice_width(rotate(params, basis[:, :kept]), kept, gains)
    for one, other in zip(jax.tree.leaves(at_once), jax.tree.leaves(slice_width(rotated, kept, gains)), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-13)


@pytest.mark.parametrize("seed", ["embed", "head", "mean"])
def test_tying_fits_the_final_gain_by_least_squares(seed):
    params, tied = params64(SPEC), SPEC.model_copy(update={"tied": True})
    decoder = params["decoder"]
    embed, head = np.asarray(decoder["embed"]), np.asarray(decoder["head"]).T * np.asarray(decoder["norm"])
    result = tie_embeddings(params, seed)
    check_params(result, tied, "tied")
    matrix, gain = np.asarray(result["decoder"]["embed"]), np.asarray(result["decoder"]["norm"])
    matched = head * np.linalg.norm(embed, axis=0) / np.linalg.norm(head, axis=0)
    want = {"embed": embed, "head": matched, "mean": (embed + matched) / 2}[seed]
    np.testing.assert_allclose(matrix, want, rtol=1e-12)
    fitted = [np.linalg.lstsq(matrix[:, [i]], head[:, i], rcond=None)[0][0] for i in range(SPEC.width)]
    np.testing.assert_allclose(gain, fitted, rtol=1e-10)
    if seed == "head":
        np.testing.assert_allclose(matrix * gain, head, rtol=1e-12)


def test_tying_what_is_already_one_matrix_is_exact():
    spec = SPEC.model_copy(update={"tied": True})
    params, batch = params64(spec), make_batch()
    for seed in ("embed", "head", "mean"):
        again = tie_embeddings(untie(params), seed)
        assert relative(logits(again, spec, batch), logits(params, spec, batch)) < EXACT


def test_transforms_keep_dtypes_and_leave_their_argument_alone():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params64(SPEC))
    before = jax.tree.map(np.array, params)
    keep = np.tile(np.arange(9), (SPEC.layers, 1))
    result = slice_width(rotate(fold_norm_gains(params), orthogonal(SPEC.width)), 12, Gains.same(1.25, SPEC.layers))
    result = narrow_projector(narrow_mlp(drop_layers(result, np.array([0, 1, 2])), keep), np.arange(12))
    result = tie_embeddings(result, "mean")
    assert {leaf.dtype for leaf in jax.tree.leaves(result)} == {jnp.bfloat16.dtype}
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(before), strict=True))
    assert result["vision"]["patch_embed"] is params["vision"]["patch_embed"]


def _leaf(params, path):
    for name in path.split("/"):
        params = params[name]
    return params

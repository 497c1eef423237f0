"""Surgery from end to end: the family's four sizes on a tiny model, exact where it can be, refused where it must be."""

from __future__ import annotations

import json
import weakref
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import relative
from pruning_cases import SPEC, WRITERS, logits, make_batch, params32, params64

from ministral_jax.distributed.placement import MeshConfig, Placement, Rules, make_mesh
from ministral_jax.errors import UserError
from ministral_jax.models.spec import PRESETS, RopeSpec
from ministral_jax.models.vlm import abstract_params, check_params, init_params, param_shardings
from ministral_jax.pruning.surgery import PruneOptions, Surgery, check_target
from ministral_jax.pruning.transforms import edit

FAMILY = {
    "24b": SPEC.model_copy(update={"layers": 4, "width": 20, "mlp_width": 32}),
    "14b": SPEC.model_copy(update={"layers": 4, "width": 20, "mlp_width": 16}),
    "8b": SPEC.model_copy(update={"layers": 3, "width": 16, "mlp_width": 14, "rope": RopeSpec(theta=1e4)}),
    "3b": SPEC.model_copy(update={"layers": 2, "width": 12, "mlp_width": 9, "tied": True, "rope": RopeSpec(theta=1e4)}),
}
TEXT = SPEC.model_copy(update={"vision": None})


def calibration():
    return [make_batch(seed) for seed in (0, 1)]


def as_json(report):
    return json.loads(json.dumps(report.model_dump(mode="json"), allow_nan=False))


def test_what_a_cut_replaces_is_freed_where_nobody_else_holds_it():
    """So that a source and its child need not fit together: after the first cut the layers of before are gone."""
    given = [params32(FAMILY["24b"])]
    replaced = [weakref.ref(leaf) for leaf in jax.tree.leaves(given[0]["decoder"]["layers"])]

    def measure(params, spec):
        assert not any(leaf() is not None for leaf in replaced)
        return 0.0

    Surgery(FAMILY["8b"], calibration, measure=measure).run(given.pop(), FAMILY["24b"])


def test_the_cascade_of_the_family():
    spec, params = FAMILY["24b"], params32(FAMILY["24b"])
    lines: list[str] = []
    steps = {"14b": ["mlp"], "8b": ["layers", "width", "mlp", "rope"], "3b": ["layers", "width", "mlp", "tie"]}
    for name, expected in steps.items():
        target, seen = FAMILY[name], []

        def measure(params, spec, seen=seen):
            check_params(params, spec, "in between")
            seen.append(spec)
            return len(seen)

        before = jax.tree.map(np.array, params)
        options = PruneOptions(recollect=name != "3b")
        surgery = Surgery(target, calibration, options, measure=measure, progress=lines.append)
        small, small_spec, report = surgery.run(params, spec)
        assert small_spec == target
        check_params(small, target, name)
        assert all(leaf.dtype == jnp.float32 and np.isfinite(leaf).all() for leaf in jax.tree.leaves(small))
        assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(before), strict=True))

        report = as_json(report)
        assert [step["step"] for step in report["steps"]] == expected
        assert report["kl"] == dict(zip(expected, range(1, 9), strict=False))
        assert report["tokens"] == {"text": 2 * 3 * 17, "image": 2 * 3 * 3}
        if name != "14b":
            layers, width, mlp = report["steps"][:3]
            assert len(layers["scores"]) == spec.layers
            assert sorted(layers["kept"]) == layers["kept"] and len(layers["kept"]) == target.layers
            assert min(layers["scores"][i] for i in layers["kept"]) == sorted(layers["scores"])[-target.layers]
            assert width["gain"] == pytest.approx((spec.width / target.width) ** 0.5)
            cumulative = width["spectrum"]["cumulative"]
            assert width["retained_energy"] == pytest.approx(cumulative[target.width - 1])
            assert 0 < width["projector"]["kept_share"] < 1 and len(mlp["layers"]) == target.layers
            assert all(layer["kept"][0] >= layer["all"][0] for layer in mlp["layers"])
        params, spec = small, small_spec
    assert "mlp: calibration batch 2" in lines and "tie: done" in lines


def test_cutting_only_what_is_unused_keeps_the_logits():
    """One silent layer, a residual stream in 14 of 20 directions, dead neurons in decoder and projector."""
    target = SPEC.model_copy(update={"layers": 2, "width": 14, "mlp_width": 19})
    with jax.enable_x64(True):
        basis = np.linalg.qr(np.random.default_rng(1).standard_normal((SPEC.width, SPEC.width)))[0][:, : target.width]
        params = edit(params64(SPEC), {path: lambda w: w @ basis @ basis.T for path in WRITERS})
        silent = {f"decoder/layers/{name}": lambda w: w.at[1].set(0) for name in ("attention/o", "mlp/down")}
        dead = {"decoder/layers/mlp/up": lambda w: w.at[:, :, :9].set(0)}
        params = edit(params, silent | dead | {"projector/linear_1": lambda w: w.at[:, 3:9].set(0)})
        spec = SPEC.model_copy(update={"norm_eps": 1e-13})  # the projector's norm shares the scaled epsilon
        options = PruneOptions(layer_score="block_influence", norm_eps="exact")
        small, small_spec, report = Surgery(target, calibration, options).run(params, spec)
        batch = make_batch(3)
        assert report.steps[0].kept == (0, 2)
        assert report.steps[1].retained_energy == pytest.approx(1, abs=1e-12)
        assert small_spec.norm_eps == pytest.approx(1e-13 * SPEC.width / target.width)
        assert relative(logits(small, small_spec, batch), logits(params, spec, batch)) < 1e-11
        # With the whole energy retained, the energy-matched gain is the exact one.
        energy = PruneOptions(layer_score="block_influence", norm_eps="exact", norm_gain="energy", recollect=False)
        small, small_spec, _ = Surgery(target, calibration, energy).run(params, spec)
        assert relative(logits(small, small_spec, batch), logits(params, spec, batch)) < 1e-11


def test_each_norm_may_have_its_own_gain():
    target = TEXT.model_copy(update={"width": 12})
    batch, options = make_batch(0, images=False), PruneOptions(norm_gain="per_norm", width_weight="token")
    small, _, report = Surgery(target, lambda: [batch], options).run(params32(TEXT), TEXT)
    layers, (step, *_) = small["decoder"]["layers"], report.steps
    gains = [
        *np.asarray(layers["attention_norm"]),
        *np.asarray(layers["mlp_norm"]),
        np.asarray(small["decoder"]["norm"]),
    ]
    assert all(np.ptp(gain) == 0 for gain in gains)
    firsts = np.array([gain[0] for gain in gains])
    limit = (TEXT.width / target.width) ** 0.5
    assert np.ptp(firsts) > 1e-3 and (firsts < limit).all() and step.gain == pytest.approx(firsts.mean())
    # of a basis that holds everything, the gain of all
    whole = TEXT.model_copy(update={"width": TEXT.width - 1})
    params = edit(params32(TEXT), {path: lambda w: w.at[..., -1].set(0) for path in WRITERS})
    cut = [Surgery(whole, lambda: [batch], PruneOptions(norm_gain=g)).run(params, TEXT) for g in ("per_norm", "exact")]
    norms = [np.asarray(each.params["decoder"]["layers"]["mlp_norm"]) for each in cut]
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-4)


@pytest.mark.parametrize(
    "chosen",
    [
        {"layer_score": "norm_ratio_inverse", "width_basis": "magnitude", "norm_gain": "energy", "tie_seed": "embed"},
        {"layer_score": "block_influence", "width_basis": "random", "mlp_score": "weight_norm", "tie_seed": "head"},
        {"layer_score": "random", "mlp_score": "random", "norm_eps": "exact", "norm_gain": "energy"},
    ],
)
def test_every_option_runs_on_text_alone_with_one_pass(chosen):
    target = TEXT.model_copy(update={"layers": 2, "width": 15, "mlp_width": 20, "tied": True})
    params, passes = params32(TEXT), []

    def batches():
        passes.append(None)
        return [make_batch(0, images=False)]

    options = PruneOptions(**chosen, recollect=False)
    small, spec, report = Surgery(target, batches, options).run(params, TEXT)
    assert len(passes) == 1
    check_params(small, spec, "small")
    report = as_json(report)
    width = report["steps"][1]
    assert "projector" not in width
    rho = width["retained_energy"] if chosen.get("norm_gain") == "energy" else 1.0
    assert 0.5 < width["retained_energy"] < 1 and width["gain"] == pytest.approx((rho * TEXT.width / 15) ** 0.5)
    np.testing.assert_allclose(small["decoder"]["layers"]["attention_norm"], width["gain"], rtol=1e-6)
    exact = chosen.get("norm_eps") == "exact"
    assert spec.norm_eps == pytest.approx(TEXT.norm_eps * (width["gain"] ** 2 if exact else 1))
    other = as_json(Surgery(target, batches, options, seed=1).run(params, TEXT).report)
    assert (other["steps"][0]["scores"] != report["steps"][0]["scores"]) == (chosen["layer_score"] == "random")


def test_a_fresh_projector_is_drawn_last_and_needs_no_image_tokens():
    target = SPEC.model_copy(update={"width": 15})
    params = params32(SPEC, jnp.bfloat16)
    text = [make_batch(0, images=False)]
    small, _, report = Surgery(target, lambda: text, PruneOptions(projector="fresh"), seed=9).run(params, SPEC)
    assert [step.step for step in report.steps] == ["width", "projector"]
    check_params(small, target, "small")
    drawn = jax.jit(lambda key: init_params(target, key, jnp.bfloat16)["projector"])(jax.random.key(9))
    assert all(
        np.array_equal(drawn[name], leaf) and leaf.dtype == jnp.bfloat16 for name, leaf in small["projector"].items()
    )
    with pytest.raises(UserError, match=r"no image token.*projector: fresh"):
        Surgery(target, lambda: text).run(params, SPEC)


def test_a_tied_source_prunes_to_tied_and_untied_targets():
    tied = TEXT.model_copy(update={"tied": True})
    batches = lambda: [make_batch(0, images=False)]
    with jax.enable_x64(True):
        params, batch = params64(tied), make_batch(1, images=False)
        untied, spec, report = Surgery(TEXT, batches).run(params, tied)
        assert as_json(report) == {"tokens": None, "steps": [], "kl": {}} and not spec.tied
        assert relative(logits(untied, spec, batch), logits(params, tied, batch)) < 1e-12
        target = tied.model_copy(update={"width": 15})
        small, spec, report = Surgery(target, batches).run(params, tied)
        assert [step.step for step in report.steps] == ["width", "tie"] and "head" not in small["decoder"]
        check_params(small, target, "tied")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 4}, "here: layers = 4 is larger than the source's 3"),
        ({"width": 21}, "here: width = 21 is larger than the source's 20"),
        ({"mlp_width": 64}, "here: mlp_width = 64 is larger than the source's 28"),
        ({"heads": 2}, "here: heads = 2 differs from the source's 4"),
        ({"kv_heads": 1}, "here: kv_heads = 1 differs from the source's 2"),
        ({"head_width": 4}, "here: head_width = 4 differs from the source's 6"),
        ({"vocab": 39}, "here: vocab = 39 differs from the source's 40"),
        ({"vision": None}, "here: vision = None differs from the source's"),
    ],
)
def test_an_impossible_target_is_refused(change, message):
    target = SPEC.model_copy(update=change)
    with pytest.raises(UserError) as error:
        check_target(SPEC, target, "here")
    assert message in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="prune target"):
        Surgery(target, lambda: pytest.fail("must not calibrate")).run({}, SPEC)


def test_parameters_of_another_model_are_refused():
    with pytest.raises(UserError, match="prune source: parameter"):
        Surgery(FAMILY["8b"], lambda: pytest.fail("must not calibrate")).run(abstract_params(TEXT), SPEC)


@pytest.mark.parametrize("prefix", ["tiny", "ministral-3"])
def test_the_presets_form_a_cascade(prefix):
    parent = "tiny-24b" if prefix == "tiny" else "mistral-small-3.1-24b"
    names = [parent, *(f"{prefix}-{size}" for size in ("14b", "8b", "3b"))]
    for source, target in pairwise(names):
        check_target(PRESETS[source], PRESETS[target], target)


def test_a_cut_shares_what_it_leaves_as_it_is():
    """Source and child are both there: only what differs is there twice, in the dtype that it had."""
    place = Placement(make_mesh(MeshConfig(fsdp=2), jax.devices()[:2]), Rules())
    whole = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params32(FAMILY["24b"]))
    placed = jax.device_put(whole, param_shardings(FAMILY["24b"], place))
    small, *_ = Surgery(FAMILY["14b"], calibration, placement=place).run(placed, FAMILY["24b"])
    parts = lambda leaf: [shard.data.unsafe_buffer_pointer() for shard in leaf.addressable_shards]
    same = jax.tree.map(lambda a, b: parts(a) == parts(b), small, placed)
    changed = [jax.tree_util.keystr(path) for path, shared in jax.tree_util.tree_leaves_with_path(same) if not shared]
    assert changed == [f"['decoder']['layers']['mlp']['{name}']" for name in ("down", "gate", "up")]
    assert {leaf.dtype for leaf in jax.tree.leaves(small)} == {jnp.dtype(jnp.bfloat16)}
    alone, *_ = Surgery(FAMILY["14b"], calibration).run(whole, FAMILY["24b"])
    assert jax.tree.all(jax.tree.map(np.array_equal, small, alone))

"""Rows longer than the teacher's context: refused, masked, or learnt from the labels, and never held against it."""

import jax
import numpy as np
import pytest
from mesh_cases import placement
from model_cases import random_params, text
from paths import TESTS

from ministral_jax.errors import UserError
from ministral_jax.losses.chunked import LossOptions
from ministral_jax.losses.head import LossHead
from ministral_jax.losses.held_out import document_sums, held_out_figures
from ministral_jax.models.spec import ModelSpec
from ministral_jax.models.vlm import VLM, Compute
from ministral_jax.recipe.load import load_recipe, resolve_specs
from ministral_jax.stages.teaching import Beyond, distillation
from ministral_jax.stages.train import next_token_loss
from ministral_jax.teachers.teacher import online_targets

SPEC = ModelSpec(layers=1, width=16, mlp_width=24, heads=2, kv_heads=1, head_width=8, vocab=64, context=32, vision=None)
ROWS, T, KNOWN = 2, 32, 12


@pytest.fixture(scope="module")
def batch():
    tokens = np.stack([text(T, seed, SPEC).tokens for seed in range(ROWS)]).astype(np.int32)
    where = dict(positions=np.tile(np.arange(T, dtype=np.int32), (ROWS, 1)), segments=np.ones((ROWS, T), np.int32))
    mask = np.ones((ROWS, T), np.float32)
    mask[:, -1] = 0
    return dict(tokens=tokens, labels=np.roll(tokens, -1, 1), loss_mask=mask, **where)


def gradient(loss, batch):
    params, frozen = random_params(SPEC), {"teacher": random_params(SPEC, seed=1)}
    return jax.device_get(jax.jit(jax.value_and_grad(loss, has_aux=True))(params, frozen, batch))


@pytest.mark.parametrize("labels", [False, True])
def test_the_teacher_counts_within_its_context_and_the_labels_beyond(batch, labels):
    heads, compute = LossHead(placement(devices=1)), Compute()
    targets = online_targets(SPEC, compute, heads.placement.rules)
    taught = lambda beyond: distillation(VLM(SPEC, compute), LossOptions(), heads, targets, beyond)
    (total, metrics), ours = gradient(taught(Beyond(KNOWN, labels)), batch)
    within = batch["loss_mask"] * (batch["positions"] < KNOWN)
    (want, _), theirs = gradient(taught(None), {**batch, "loss_mask": within})
    count = within.sum()
    if labels:
        beyond = {**batch, "loss_mask": batch["loss_mask"] - within}
        (more, _), added = gradient(next_token_loss(SPEC, compute, heads), beyond)
        want, theirs, count = want + more, jax.tree.map(np.add, theirs, added), batch["loss_mask"].sum()
    np.testing.assert_allclose(total, want, rtol=1e-5)
    assert metrics["loss"][1] == count and metrics["kl"][1] == within.sum()
    assert ("ce_beyond_teacher" in metrics) == labels
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


def test_held_out_kl_is_of_positions_that_the_teacher_knows(batch):
    ones, zeros = np.ones((ROWS, T)), np.zeros((ROWS, T))
    read = dict(ce=ones, kl=np.where(batch["positions"] < KNOWN, 1.0, 50.0), confidence=ones / 2, prediction=zeros)
    read |= dict(answer_mask=zeros, text_bytes=zeros, document=batch["segments"])
    assert held_out_figures([document_sums(batch | read, KNOWN)]).figures["kl"] == 1
    assert held_out_figures([document_sums(batch | read)]).figures["kl"] > 20
    assert [octave.kl for octave in held_out_figures([document_sums(batch | read, KNOWN)]).positions] == [1]


def test_a_teacher_is_not_asked_beyond_its_context_unless_that_is_said():
    short = "stages.parent.model.context=64"
    with pytest.raises(
        UserError, match=r"stages\.14b-base\.batch\.length = 128 exceeds the context of 64 of its teacher 'parent'; set"
    ):
        resolve_specs(load_recipe(TESTS / "micro.yaml", [short]))
    resolve_specs(load_recipe(TESTS / "micro.yaml", [short, "stages.14b-base.beyond_teacher=labels"]))

"""Held-out figures: means over everything, intervals over documents, loss by position."""

import math

import numpy as np
import pytest

from ministral_jax.losses.held_out import document_sums, held_out_figures

ONES = np.ones((1, 4), np.float32)


def part(**changes):
    read = {
        "labels": np.array([[2, 3, 4, 0]]),
        "prediction": np.array([[2, 3, 4, 0]]),
        "confidence": 0.5 * ONES,
        "ce": 2 * ONES,
        "kl": ONES,
        "loss_mask": np.array([[1, 1, 0, 0]], np.float32),
        "text_bytes": np.array([[3, 0, 0, 0]], np.float32),
        "answer_mask": np.array([[0, 1, 0, 0]], np.float32),
        "positions": np.array([[0, 1, 2, 3]]),
        "document": np.array([[7, 7, 9, 9]]),
    }
    return document_sums(read | changes)


def test_figures_are_means_over_all_batches_not_means_of_means():
    wrong = dict(ce=4 * ONES, kl=4 * ONES, prediction=np.zeros((1, 4), int), confidence=0.9 * ONES)
    result = held_out_figures([part(), part(**wrong, loss_mask=ONES, answer_mask=np.array([[1, 1, 0, 0]]))]).figures
    assert result["kl"] == pytest.approx((2 * 1 + 4 * 4) / 6)
    # two right at 0.5 and, of four at 0.9, the last one
    assert result["ece"] == pytest.approx((abs(2 * 0.5 - 2) + abs(4 * 0.9 - 1)) / 6)
    assert result["ce"] == pytest.approx((2 * 2 + 4 * 4) / 6)
    assert result["bits_per_byte"] == pytest.approx((2 + 4) / math.log(2) / 6)
    assert result["digit_accuracy"] == pytest.approx(1 / 3)


def table(documents: int, tokens: int, seed: int):
    """Documents whose losses differ far more than the tokens within one do."""
    rng = np.random.default_rng(seed)
    shape = (documents, tokens)
    ce = np.repeat(rng.normal(3, 1, (documents, 1)), tokens, 1) + rng.normal(0, 0.1, shape)
    blank = dict(labels=np.zeros(shape, int), prediction=np.ones(shape, int), confidence=np.full(shape, 0.5))
    zero = np.zeros(shape, np.float32)
    where = dict(
        positions=np.tile(np.arange(tokens), (documents, 1)), document=np.tile(np.arange(documents)[:, None], tokens)
    )
    masks = dict(loss_mask=np.ones(shape, np.float32), text_bytes=zero, answer_mask=zero)
    return document_sums(blank | where | masks | {"ce": ce})


def test_intervals_hold_the_mean_as_often_as_they_say():
    """Over 200 draws of 60 documents: 95 %, to within 3 standard errors; an interval over tokens would nearly never."""
    found = [held_out_figures([table(60, 20, seed)]) for seed in range(200)]
    assert all(each.documents == 60 for each in found)
    held = np.mean([each.intervals["ce"][0] < 3 < each.intervals["ce"][1] for each in found])
    assert 0.89 <= held <= 1
    widths = np.array([high - low for low, high in (each.intervals["ce"] for each in found)])
    assert widths.mean() == pytest.approx(2 * 1.96 / math.sqrt(60), rel=0.1)


def test_a_document_that_spans_batches_is_one_and_padding_none():
    apart = [part(document=np.array([[5, 5, 5, 5]])), part(document=np.array([[5, 5, 6, 6]]))]
    found = held_out_figures(apart)
    assert found.documents == 1 and found.intervals == {}  # nothing of 6 counts
    assert held_out_figures([part(loss_mask=0 * ONES, text_bytes=0 * ONES, answer_mask=0 * ONES)]).documents == 0
    assert held_out_figures([]).figures == {}


def test_loss_by_position_is_in_octaves():
    (documents, sums), length = table(3, 300, 0), 300
    ce = sums["ce"].sum() / (3 * length)
    octaves = held_out_figures([(documents, sums)]).positions
    assert [(each.start, each.counted / 3) for each in octaves] == [(0, 32), (32, 32), (64, 64), (128, 128), (256, 44)]
    assert sum(each.ce * each.counted for each in octaves) / (3 * length) == pytest.approx(ce)


def test_answers_by_position_are_those_that_are_right():
    """Of three answers two in the first 32 positions, one of them right, and one, right, from 128 on."""
    where, answers = np.array([[5, 31, 130, 64]]), np.array([[1, 1, 1, 0]], np.float32)
    read = dict(positions=where, answer_mask=answers, prediction=np.array([[2, 0, 4, 9]]), loss_mask=ONES)
    first, words, last = held_out_figures([part(**read)]).positions
    assert [(each.start, each.answers, each.accuracy) for each in (first, words, last)] == [
        (0, 2, 0.5),
        (64, 0, None),
        (128, 1, 1),
    ]


def test_a_model_that_has_diverged_has_figures_that_say_so():
    nothing = np.full((1, 4), np.nan, np.float32)
    found = held_out_figures([part(), part(ce=nothing, kl=nothing, confidence=nothing)])
    assert all(math.isnan(found.figures[name]) for name in ("ce", "kl", "ece", "bits_per_byte"))

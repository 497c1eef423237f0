"""The benchmark of logit stores: its drawn teacher is a distribution, its scaled family has the real one's ratio."""

import json
import sys
from itertools import count

import numpy as np
import pytest
from paths import ROOT

from ministral_jax.teachers.codecs import TopKCodec, curve_sizes

sys.path.insert(0, str(ROOT / "benchmarks"))
import drawn_teacher
import students
import teacher_store

TOY = drawn_teacher.Teacher(vocab=4096, width=8, length=16, forced=5)


def test_drawn_top_k_is_a_distribution_over_distinct_ids():
    codec = TopKCodec(entries=64, bits=16)
    drawn = TOY.rows(codec, 3)
    steps = np.diff(drawn["ids"], axis=-1)
    assert drawn["ids"].shape == (3, 16, 64) and drawn["ids"].min() >= TOY.forced and drawn["ids"].max() < TOY.vocab
    assert (steps > 0).all()
    mass = np.exp(drawn["logprobs"][..., :64].astype(np.float64)).sum(axis=-1) + np.exp(
        drawn["tail"].astype(np.float64)
    )
    np.testing.assert_allclose(mass, 1, rtol=1e-5)  # 65 float32 numbers
    # its curve at S entries is the tail itself
    sizes = curve_sizes(codec, TOY.vocab)
    at_s = drawn["curve"][:, sizes.index(64)]
    np.testing.assert_allclose(at_s, np.exp(drawn["tail"]).sum(axis=1), rtol=1e-5)


def test_drawn_ids_are_as_frequent_as_a_zipf_law_says():
    zipf = drawn_teacher.Teacher(vocab=4096, width=8, length=4000, forced=5, anywhere=0.0)
    ids = zipf._ids((4000, 64), np.random.default_rng(0)) - 5
    # floor of a log-uniform number in [1, 4092): P(first) = ln 2 / ln 4092 = 0.0833; 256,000 draws, 8 standard errors
    assert abs((ids == 0).mean() - np.log(2) / np.log(4092)) < 0.005
    assert abs((ids < 63).mean() - 0.5) < 0.01  # 64 = sqrt(4096)


def test_the_scaled_family_has_the_ratio_of_the_real_one():
    scaled = teacher_store.teacher_over_student(
        teacher_store.scaled, teacher_store.REAL_LENGTH // teacher_store.WIDTHS_BY
    )
    real = teacher_store.teacher_over_student(teacher_store.PRESETS.__getitem__, teacher_store.REAL_LENGTH)
    assert scaled == pytest.approx(real, rel=1e-9)
    assert teacher_store.throughput_recipe()["stages"]["logits"]["rows"] % teacher_store.SEQUENCES == 0


def test_a_loop_takes_one_batch_a_step_and_waits_for_no_longer_than_it_runs():
    seen: list[int] = []

    def update(state, batch):
        seen.append(batch)
        return state + 1, {"loss": (np.float32(1), np.float32(1))}

    side = students.Side(update, lambda: iter(()), 0, 1)
    spent, waited = side.drive(count(3), 4)
    assert seen == [3, 4, 5, 6] and side.state == 4
    assert 0 <= waited <= spent


def test_figures_and_table(monkeypatch):
    monkeypatch.setattr(teacher_store, "TEACHER", TOY)
    monkeypatch.setattr(teacher_store, "ROWS", 5)
    monkeypatch.setattr(teacher_store, "HIDDEN_ROWS", 3)
    monkeypatch.setattr(teacher_store, "CALL", 2)
    monkeypatch.setattr(teacher_store, "SHARD", 4)
    waits = {"stored": [(2.0, 0.02), (2.0, 0.06)], "online": [(4.0, 0.0), (4.0, 0.04)]}
    wait = {name: teacher_store.wait_figures(blocks, 120) for name, blocks in waits.items()}
    monkeypatch.setattr(teacher_store, "waiting", lambda run_dir: {"tiny-14b": wait})
    monkeypatch.setattr(teacher_store, "throughput", lambda: teacher_store.compared({"stored": [2.0], "online": [5.0]}))
    figures = json.loads(json.dumps(teacher_store.measure(teacher_store.SECTIONS, None)))
    assert figures["bytes_per_token"].keys() == {*teacher_store.CODECS, "dense"}
    assert figures["bytes_per_token"]["dense"] == 4 * 4096
    for name, one in figures["store"].items():
        assert one["bytes_per_token"] == pytest.approx(sum(one["by_array"].values()))
        assert one["tokens"] == (3 if "hidden" in name else 5) * 16
        assert one["tokens_per_second"].keys() == {"write", "seal", "read_random", "read_in_order"}
    assert figures["wait_share"] == pytest.approx(0.02)
    assert figures["stored_over_online"] == pytest.approx(2.5)
    text = teacher_store.table(figures)
    assert "wait_share 2.00%" in text and "stored_over_online 2.50" in text and "dense (computed)" in text

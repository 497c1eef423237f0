"""How many tokens a head start saves, on curves whose answer is known, and on a made-up run of which all is charged."""

import json

import pytest
from head_start import Curve, ends, head_starts, multiples, picture, reached, read, told

from ministral_jax.runs.summary import tokens_read
from ministral_jax.stages.manifest import finished

BEFORE, OWN = 3000, 1000


def halving(stage: str, start: float, scratch: bool = False, last: int = 4) -> Curve:
    """A KL that halves every 1000 tokens."""
    tokens = [1000 * n for n in range(last + 1)]
    before, own = (0, 0) if scratch else (BEFORE, OWN)
    return Curve("8b", stage, scratch, before, own, tokens, [start * 0.5**n for n in range(last + 1)])


def test_a_kl_is_reached_between_evaluations_where_its_logarithm_falls_evenly():
    found = reached(halving("8b-short", 1.0), 0.5**1.25)
    assert (found.charged, found.own) == pytest.approx((BEFORE + 1250, OWN + 1250)) and not found.bound


def test_on_an_evaluation_it_is_reached_there():
    assert reached(halving("8b-short", 1.0), 0.25).charged == pytest.approx(BEFORE + 2000)


def test_what_is_there_at_once_costs_the_cut_and_is_a_bound():
    found = reached(halving("8b-short", 1.0), 3.0)
    assert (found.charged, found.own, found.bound) == (BEFORE, OWN, "first")


def test_what_is_never_there_costs_more_than_the_whole_run():
    found = reached(halving("8b-short", 1.0), 0.01)
    assert (found.charged, found.bound) == (BEFORE + 4000, "never")


def test_a_curve_that_rises_again_was_there_when_it_first_was():
    curve = Curve("8b", "8b-short", False, 0, 0, [0, 1000, 2000, 3000], [1.0, 0.25, 0.9, 0.2])
    assert reached(curve, 0.5).charged == pytest.approx(500)


def test_of_two_runs_of_a_student_the_one_counts_that_is_there_first():
    scratch = halving("8b-scratch", 4.0, scratch=True)  # ends at 0.25 with 4000 tokens
    slow = halving("8b-long", 2.0)  # 3000 tokens
    for students in ([slow, halving("8b-short", 1.0)], [slow, halving("8b-short", 1.0, last=1)]):
        found, bounds = multiples([[*students, scratch]], "8b-scratch")
        wanted = 2000 if len(students[1].kl) > 2 else 3000  # the short one ends at 0.5
        assert found == pytest.approx([4000 / (BEFORE + wanted)]) and bounds == [""]
    assert multiples([[slow, scratch]], "8b-scratch", own=True)[0] == pytest.approx([4000 / (OWN + 3000)])


def test_where_no_run_gets_there_the_longest_is_the_bound():
    scratch = halving("8b-scratch", 1.0, scratch=True)  # 0.0625
    found, bounds = multiples([[halving("8b-short", 4.0, last=2), halving("8b-long", 4.0), scratch]], "8b-scratch")
    assert found == [4000 / (BEFORE + 4000)] and bounds == ["never"]


def test_intervals_are_of_the_logarithm_and_bounds_are_said():
    assert told([2.0, 8.0], ["", ""]).startswith("4.00× (")
    low, high = map(float, told([3.9, 4.0, 4.1], [""] * 3).partition("(")[2].rstrip(")").split(" to "))
    assert low * high == pytest.approx(4.0**2, rel=0.01) and low < 4 < high
    assert told([2.0, 8.0], ["first", ""]).startswith("≥ 4.00×") and told([0.5, 0.5], ["never"] * 2) == "≤ 0.50×"
    assert told([2.0, 8.0], ["first", "never"]) == "not known"
    assert told([2.0], [""]) == "2.00×"


@pytest.fixture
def sweep(tmp_path):
    """Two seeds of a parent, two cuts and what follows them; manifests as a run writes them."""
    spec = dict(layers=1, width=2, mlp_width=2, heads=1, kv_heads=1, head_width=2, vocab=4, context=8, vision=None)
    cut = dict(batch=dict(sequences=2, length=8), calibration=3, options=dict(recollect=True, norm_gain="exact"))
    mlp = dict(step="mlp", score="s", kept=1, layers=[])
    width = dict(step="width", basis="b", retained_energy=1, gain=1, spectrum=dict(index=[], energy=[], cumulative=[]))
    stages = {
        "parent": dict(do="train", tokens=999, steps=1, config={}),
        "14b-pruned": dict(do="prune", config=cut, prune=dict(steps=[mlp]), source="parent"),
        "14b-short": dict(do="distill", tokens=400, steps=4, source="14b-pruned"),
        "8b-pruned": dict(
            do="prune", config=cut, prune=dict(steps=[width, mlp, dict(step="rope", to={})]), source="14b-short"
        ),
        "8b-short": dict(do="distill", tokens=400, steps=4, source="8b-pruned"),
        "8b-scratch": dict(do="distill", tokens=800, steps=8),
    }
    points = []
    for seed in (0, 1):
        point = tmp_path / f"seed-{seed}"
        for name, made in stages.items():
            made = {"config": {}, **made}
            source = made.pop("source", None)
            inputs = {"teacher": dict(stage="parent", digest="")} if made["do"] == "distill" else {}
            inputs |= {"parent": dict(stage=source, digest="")} if source else {}
            (point / name).mkdir(parents=True)
            manifest = dict(stage=name, status="finished", spec=spec, inputs=inputs, **made)
            (point / name / "manifest.json").write_text(json.dumps(manifest))
            last = made.get("steps", 0)
            rows = [dict(kind="eval", step=n, kl=(2 + seed) * 0.5**n, ce=1) for n in range(last + 1)]
            lines = [dict(kind="train", step=1, loss=1), *rows]
            (point / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        where = {name: f"{point.name}/{name}" for name in stages}
        points.append(
            dict(name=point.name, settings={"defaults.train.seed": seed}, stages=where, state="finished", figures={})
        )
    record = dict(name="s", recipe="r", keys={}, axes=[], overrides={}, wanted=[], measure=[], stages=6)
    record |= dict(stages_unshared=12, points=points)
    (tmp_path / "sweep.json").write_text(json.dumps(record))
    return tmp_path


CALIBRATION = 3 * 2 * 8


def test_every_pass_of_calibration_and_everything_on_the_way_is_charged(sweep):
    seeds = read(sweep)
    assert [(c.stage, c.scratch, c.before, c.own) for c in seeds[0]] == [
        ("14b-short", False, CALIBRATION, CALIBRATION),
        ("8b-short", False, CALIBRATION + 400 + 2 * CALIBRATION, 2 * CALIBRATION),
        ("8b-scratch", True, 0, 0),
    ]
    assert seeds[1][1].tokens == [0, 100, 200, 300, 400] and seeds[1][1].kl[0] == 3


def test_a_pass_more_for_a_gain_of_every_norm_and_one_for_all_cuts(sweep):
    cut = finished(sweep / "seed-0" / "8b-pruned")
    cut.config["options"]["norm_gain"] = "per_norm"
    assert tokens_read(cut) == 3 * CALIBRATION
    cut.config["options"]["recollect"] = False
    assert tokens_read(cut) == 2 * CALIBRATION


def test_tables_and_picture(sweep):
    seeds = read(sweep)
    table = head_starts(seeds).splitlines()
    # the student ends at a sixteenth of what it began with, scratch at a 256th
    assert (
        len(table) == 3
        and table[2].startswith("| 8b | 800 | ")
        and "| ≤ " in table[2]
        and table[2].endswith("| 0, 2 |")
    )
    assert f"≤ {800 / (544 + 400):.2f}×" in table[2]
    assert "| 8b-short | 544 | 400 | 2.500 ±" in ends(seeds)
    picture(seeds, sweep / "picture.svg")
    assert "thousand tokens" in (sweep / "picture.svg").read_text() or (sweep / "picture.svg").stat().st_size > 5000


def test_an_unfinished_sweep_has_no_table(sweep):
    record = json.loads((sweep / "sweep.json").read_text())
    record["points"][1]["state"] = "unfinished"
    (sweep / "sweep.json").write_text(json.dumps(record))
    with pytest.raises(SystemExit, match="seed-1 is unfinished"):
        read(sweep)

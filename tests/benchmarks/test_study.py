"""The table of a study, from a made-up sweep whose figures are known."""

import json

import numpy as np
import pytest
from scipy import stats
from study import mean_and_half, picture, read, read_stages, table

KL = {
    "exact": [0.50, 0.52, 0.47, 0.55, 0.51],
    "energy": [0.48, 0.51, 0.44, 0.53, 0.49],
    "per_norm": [0.6, 0.4, 0.5, 0.5, 0.55],
}


@pytest.fixture
def sweep(tmp_path):
    keys = {
        "stages.cut.options.norm_gain": "norm-gain",
        "stages.short.seed": "short.seed",
        "stages.parent.seed": "parent.seed",
    }
    points = [
        dict(
            name=f"{gain}_{seed}",
            settings=dict(zip(keys, (gain, seed, seed), strict=True)),
            stages={},
            state="finished",
            figures={"short": {"kl": KL[gain][seed], "ece": 0.1}},
        )
        for seed in (4, 0, 3, 1, 2)
        for gain in KL
    ]
    record = dict(
        name="s",
        recipe="r.yaml",
        keys=keys,
        axes=[],
        overrides={},
        wanted=[],
        stages=1,
        stages_unshared=1,
        points=points,
    )
    record["measure"] = [dict(stage="short", metrics=[], curve=[])]
    (tmp_path / "sweep.json").write_text(json.dumps(record))
    return tmp_path


def test_arms_are_compared_seed_by_seed(sweep):
    arms = read(sweep)
    assert [(arm.name, arm.figures["kl"]) for arm in arms] == [(f"norm-gain {gain}", KL[gain]) for gain in KL]
    first, energy, per_norm = (line.split(" | ") for line in table(arms, ["kl"]).splitlines()[2:])
    assert first[1] == "0.5100 ± 0.0362" and first[2] == " |"
    assert energy[2] == "**-0.0200 ± 0.0088** |"  # though the intervals of both arms overlap
    assert per_norm[2].startswith("+0.0000 ±")


def test_intervals_are_student_s():
    mean, half = mean_and_half(KL["exact"])
    low, high = stats.t.interval(0.95, 4, np.mean(KL["exact"]), stats.sem(KL["exact"]))
    assert (mean - half, mean + half) == pytest.approx((low, high))


def test_an_unfinished_study_has_no_table(sweep):
    record = json.loads((sweep / "sweep.json").read_text())
    record["points"][2]["state"] = "failed"
    (sweep / "sweep.json").write_text(json.dumps(record))
    with pytest.raises(SystemExit, match="is failed; run the sweep's command again"):
        read(sweep)


def test_the_picture_names_every_arm(sweep):
    picture(read(sweep), ["kl", "ece"], sweep / "kl.svg")
    told = (sweep / "kl.svg").read_text()
    assert all(f"<!-- norm-gain {gain} -->" in told for gain in KL)


def test_arms_are_called_by_what_is_asked_for(sweep):
    record = json.loads((sweep / "sweep.json").read_text())
    record["keys"]["stages.cut.options"] = "options"
    for point in record["points"]:
        point["settings"]["stages.cut.options"] = {"basis": "pca", "gain": point["name"].rpartition("_")[0]}
    (sweep / "sweep.json").write_text(json.dumps(record))
    names = [arm.name for arm in read(sweep, by=["cut.options"])]
    assert names == [f"basis pca, gain {gain}" for gain in KL]
    assert read(sweep)[0].name == "norm-gain exact, basis pca, gain exact"


def test_several_stages_are_arms(sweep):
    record = json.loads((sweep / "sweep.json").read_text())
    record["points"] = [p | {"figures": p["figures"] | {"long": {"kl": 1.0}}} for p in record["points"]]
    (sweep / "sweep.json").write_text(json.dumps(record))
    arms = read_stages(sweep, ["short", "long"])
    assert [arm.name for arm in arms] == [f"{stage}, norm-gain {gain}" for stage in ("short", "long") for gain in KL]
    assert arms[3].figures["kl"] == [1.0] * 5 and arms[:3] != read(sweep) == read_stages(sweep, ["short"])
    record["keys"].pop("stages.cut.options.norm_gain")
    for point in record["points"]:
        point["settings"].pop("stages.cut.options.norm_gain")
    (sweep / "sweep.json").write_text(json.dumps(record))
    assert [arm.name for arm in read_stages(sweep, ["short", "long"])] == ["short", "long"]

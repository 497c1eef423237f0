"""The table of the study of post-training."""

import json

import pytest
from post_training import evaluations

from ministral_jax.errors import UserError

SPEC = dict(layers=1, width=2, mlp_width=2, heads=1, kv_heads=1, head_width=2, vocab=4, context=8, vision=None)


@pytest.fixture
def sweep(tmp_path):
    """Two points, and a stage that an older recipe has made."""
    for name in ("14b-sft-a", "14b-sft-b", "14b-sft-old"):
        made = tmp_path / "shared" / name
        made.mkdir(parents=True)
        (made / "manifest.json").write_text(
            json.dumps(dict(stage=name, do="sft", status="finished", config={}, spec=SPEC))
        )
        rows = [dict(kind="train", step=1), dict(kind="eval", step=1, accuracy=ord(name[-1]))]
        (made / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    points = [
        dict(name=n, settings={}, stages={"14b-sft": f"shared/14b-sft-{n}"}, state="finished", figures={}) for n in "ab"
    ]
    record = dict(name="s", recipe="r", keys={}, axes=[], overrides={}, wanted=[], measure=[], stages=1)
    (tmp_path / "sweep.json").write_text(json.dumps(record | dict(stages_unshared=2, points=points)))
    return tmp_path


def test_it_is_of_the_points_of_the_sweep_and_of_nothing_else_that_lies_beside_them(sweep):
    assert [[r["accuracy"] for r in records] for records in evaluations(sweep, "14b-sft")] == [[ord("a")], [ord("b")]]


def test_an_unfinished_study_has_no_table(sweep):
    (sweep / "shared" / "14b-sft-b" / "manifest.json").unlink()
    with pytest.raises(UserError, match="14b-sft-b"):
        evaluations(sweep, "14b-sft")

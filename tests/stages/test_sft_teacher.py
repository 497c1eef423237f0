"""Fine-tuning with a teacher: beside the student or from a logit store, mixed with the cross-entropy by weight."""

import json
from pathlib import Path

import pytest
import yaml
from paths import TESTS

from ministral_jax.cli import main

MICRO = TESTS.joinpath("micro_post.yaml")


def recipe(path: Path) -> Path:
    raw = yaml.safe_load(MICRO.read_text())
    sft = {"do": "sft", "from": "parent", "steps": 4}
    raw["stages"] = {
        "parent": raw["stages"]["parent"],
        "logits": {
            "do": "record",
            "from": "parent",
            "batch": {"sequences": 4, "length": 64},
            "held_out_rows": 8,
            "codec": {"kind": "hidden", "dtype": "float32"},
        },
        "online": {**sft, "teacher": "parent", "loss": {"ce_weight": 0.25}},
        "stored": {**sft, "teacher": {"store": "logits"}, "loss": {"ce_weight": 0.25}},
        "alone": sft,
    }
    path.write_text(yaml.safe_dump(raw))
    return path


def test_online_and_stored_teachers_give_the_same_run(tmp_path, one_device):
    run_dir = tmp_path / "run"
    assert main(["run", str(recipe(tmp_path / "teacher.yaml")), "--run-dir", str(run_dir)]) == 0

    def figures(stage: str, kind: str) -> list[dict]:
        records = [json.loads(line) for line in (run_dir / stage / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in r.items() if "per_second" not in k} for r in records if r["kind"] == kind]

    for kind in ("train", "eval"):
        assert figures("online", kind) == figures("stored", kind)
    first = figures("online", "train")[0]
    assert first["kl"] == pytest.approx(0, abs=1e-6)  # the teacher is where the student begins
    assert first["loss"] == pytest.approx(0.25 * first["ce"], rel=1e-5)
    alone = figures("alone", "train")[0]
    assert "kl" not in alone and alone["loss"] == alone["ce"] == pytest.approx(first["ce"], rel=1e-5)

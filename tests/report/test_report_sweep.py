"""The page of a sweep: its table, its figures, and what changes whatever the seed."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import numpy as np
import pytest
from pages import anchors, check, parse, plain, rows, section, text_of
from report_run import write_json, write_sweep

from ministral_jax.report.sweep import build_sweep_report
from ministral_jax.report.units import decimal
from ministral_jax.runs.naming import setting
from ministral_jax.runs.seeds import Change
from ministral_jax.stages import figures

LR, SCORE, SEED = "stages.14b-short.optimizer.lr", "stages.14b-pruned.options.mlp_score", "stages.14b-sft.seed"
REWARD = figures()["reward"]


def page_of(sweep: Path) -> str:
    return check(build_sweep_report(sweep).read_text(encoding="utf-8"))


def test_points_values_and_curves(tmp_path):
    axes = {SCORE: ["activation", "random"], LR: [1e-4, 3e-4, 1e-3]}
    sweep = write_sweep(tmp_path / "sweep", axes, ("14b-short", "14b-base"), "14b-base")
    record = json.loads((sweep / "sweep.json").read_text())
    lost = record["points"][4]
    lost |= {"state": "failed", "error": "the loss is <b>nan</b>", "figures": {"14b-base": {}}}
    write_json(sweep / "sweep.json", record)
    page = page_of(sweep)
    assert anchors(page) == ["points", "values", "curves", "settings"]
    assert "5 of 6 points finished, 1 failed, in" in text_of(parse(page))
    assert html.escape(lost["error"]) in page and "<b>nan" not in page
    names = [node.text for node in section(page, "points").iter("th") if node.get("scope") == "col"][3:]
    shown = rows(page, "points")
    for point in record["points"]:
        cells = shown[point["name"]]
        assert [text_of(cell) for cell in cells[:2]] == [setting(value) for value in point["settings"].values()]
        if point is lost:
            assert (text_of(cells[2]), cells[2].get("class")) == ("failed", "wrong")
            continue
        for cell, (key, value) in zip(cells[2:], point["figures"]["14b-base"].items(), strict=True):
            others = [p["figures"]["14b-base"][key] for p in record["points"] if p is not lost]
            best = max(others) if figures()[key].better == "higher" else min(others)
            assert text_of(cell) in (f"{value:.4f}", f"{value:.1%}") and figures()[key].label in names
            assert (cell.get("class") == "best") == (value == best), (point["name"], key)
    alts = re.findall('class="plot" role="img" aria-label="([^"]*)"', page)
    assert len(alts) == 4 + 1 and alts[0].endswith(" of 14b-base against lr.")  # the axis that has numbers
    assert alts[-1] == f"{figures()['kl'].label} of 14b-base against tokens for every point."
    assert [text_of(node) for node in section(page, "values").iter("li")] == [
        "mlp-score=activation",
        "mlp-score=random",
    ]
    assert [text_of(rows(page, "settings")[key][0]) for key in (LR, "seed")] == ["varies, lr", "1"]


def test_points_that_have_nothing_yet(tmp_path):
    sweep = write_sweep(tmp_path / "sweep", {LR: [1e-4, 3e-4]}, ("14b-short",), "14b-short")
    record = json.loads((sweep / "sweep.json").read_text())
    for point in record["points"]:
        point |= {"state": "unfinished", "figures": {"14b-short": {}}}
        for file in (sweep / point["stages"]["14b-short"]).iterdir():
            file.unlink()
    write_json(sweep / "sweep.json", record)
    page = page_of(sweep)
    assert anchors(page) == ["points", "settings"] and text_of(section(page, "points")).count("unfinished") == 2


def test_points_with_other_row_lengths_do_not_compare(tmp_path):
    sweep = write_sweep(tmp_path / "sweep", {LR: [1e-4, 3e-4, 1e-3]}, ("14b-short",), "14b-short")
    record = json.loads((sweep / "sweep.json").read_text())
    path = sweep / record["points"][0]["stages"]["14b-short"] / "manifest.json"
    told = json.loads(path.read_text())
    told["config"]["batch"]["length"] = 512
    write_json(path, told)
    page = page_of(sweep)
    heads = [text_of(node) for node in section(page, "points").iter("th") if node.get("scope") == "col"][1:]
    first, second = (dict(zip(heads, map(text_of, rows(page, "points")[f"point-{i}"]), strict=True)) for i in (0, 1))
    lost = {name for name, text in first.items() if text == "–"}
    assert lost == {figures()[name].label for name in ("kl", "ce", "bits_per_byte")} and "–" not in second.values()


@pytest.mark.parametrize("seeds", [2, 3])
def test_a_sweep_over_seeds(tmp_path, seeds):
    sweep = write_sweep(tmp_path / "seeds", {SEED: [0, 1, 2]}, ("14b-sft", "14b-reward", "14b-rl"), "14b-rl")
    for killed in range(seeds, 3):
        (sweep / "shared" / f"14b-rl-{killed}" / "manifest.json").unlink()
    page, ends = page_of(sweep), []
    assert anchors(page)[:2] == ["seeds", "points"] and "values" not in anchors(page)
    for seed in range(seeds):
        records = [json.loads(line) for line in (sweep / "shared" / f"14b-rl-{seed}" / "metrics.jsonl").open()]
        first, *_, last = [record["reward"] for record in records if record["kind"] == "eval"]
        ends.append((first, last))
    change = Change(REWARD, ends)
    told = plain(f"+{decimal(change.mean)} ± {decimal(change.half)}")
    before, after = np.mean(ends, axis=0)
    found = [plain(text_of(cell)) for cell in rows(page, "seeds")[REWARD.label]]  # the last: of 14b-rl
    assert found == [decimal(before), decimal(after), told, str(seeds), change.verdict]
    alts = re.findall('aria-label="([^"]*), every seed."', page)
    assert f"{REWARD.label} of 14b-rl against steps" in alts
    assert f"{figures()['judge_accuracy'].label} of 14b-reward against steps" in alts

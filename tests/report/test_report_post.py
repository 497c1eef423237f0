"""The report on post-training: what stages changed, some answers, and whether seeds agree that anything was learned."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import scipy.stats
from report_run import POST, recipe, write_json, write_post, write_run, write_seeds

from ministral_jax.report import sweep_seeds
from ministral_jax.report.collect import read_run
from ministral_jax.report.curves import curves
from ministral_jax.report.details import stages
from ministral_jax.report.page import build_report
from ministral_jax.report.post import lineages, post_training
from ministral_jax.report.sweep import build_sweep_report
from ministral_jax.report.sweep_seeds import Change, replicates
from ministral_jax.report.time import goodput
from ministral_jax.report.units import THIN, decimal, percent
from ministral_jax.stages import figures

THINK = '<code class="control">[THINK]</code>'


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_post(write_run(tmp_path_factory.mktemp("runs") / "run", "parent"))


@pytest.fixture(scope="module")
def page(run) -> str:
    return build_report(run).read_text(encoding="utf-8")


def parse(markup: str | None) -> ElementTree.Element:
    assert markup
    return ElementTree.fromstring(f"<div>{markup.removeprefix('<!DOCTYPE html>')}</div>")


def cells(markup: str | None, head: str) -> list[list[str]]:
    """Every table row whose first cell begins with `head`; the lines of a cell set apart by bars."""
    found = []
    for line in parse(markup).iter("tr"):
        texts = ["|".join(text for text in cell.itertext()) for cell in line]
        if texts[0].split("|")[0] == head:
            found.append(texts)
    return found


def evals(run: Path, stage: str) -> list[dict[str, Any]]:
    lines = (run / stage / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == "eval"]


def rewrite(run: Path, stage: str, change) -> None:
    path = run / stage / "metrics.jsonl"
    rows = [change(row) for row in map(json.loads, path.read_text().splitlines())]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows if row is not None))


def test_figures_before_and_after(run, page):
    made = post_training(read_run(run))
    for name, (key, write) in {"14b-sft": ("reward_accuracy", percent), "14b-rl": ("reward", decimal)}.items():
        [row] = cells(made, name)
        first, *_, last = evals(run, name)
        assert any(cell.split("|")[0] == f"{write(first[key])} → {write(last[key])}" for cell in row), key
        sums = "reward_accuracy_sums"
        assert f"sums {percent(first[sums])} → {percent(last[sums])}" in row[1].split("|")
    [sft], [rl], [instruct], [judge] = (
        cells(made, name) for name in ("14b-sft", "14b-rl", "14b-instruct", "14b-reward")
    )
    assert sft[0].split("|")[1:] == ["sft, from 14b-base", "learns given answers, and what parent would say"]
    assert rl[0].split("|")[1:] == ["grpo, from 14b-cot", "is rewarded for accuracy and format"]
    assert instruct[0].split("|")[2] == "learns what 14b-reward prefers"
    assert percent(evals(run, "14b-instruct")[-1]["win_rate"]) in instruct
    assert f"10.0{THIN}% → 0.2{THIN}%|length 20.0 → 29.8" in instruct
    last = evals(run, "14b-reward")[-1]
    calibrated = f"ECE {decimal(last['judge_ece_before'])} → {decimal(last['judge_ece'])}"
    assert calibrated in judge[-2].split("|") and "at temperature 1.70" in judge[-2]
    assert rl[-1].split("|") == [f"4{THIN}min 4{THIN}s", "20 steps", f"30.0{THIN}% generating"]
    assert "|".join(sft).count("generating") == 0
    for title in ("14b-sft → 14b-reward and 14b-instruct", "14b-cot → 14b-rl → 14b-reasoning"):
        assert f"From 14b-base: {title}" in page
    best = max((evals(run, name)[-1].get("reward_accuracy", 0), name) for name in POST)
    assert f"<h2>{best[1]} answers {percent(best[0])} of its held-out prompts right" in page


def test_the_page_holds_together(page):
    root = parse(page)
    assert "<script" not in page and not re.search(r'(?:src|href)="(?!#|data:)', page)
    ids = [node.get("id") for node in root.iter() if node.get("id")]
    assert len(ids) == len(set(ids)) and "post" in ids
    section = next(node for node in root.iter("section") if node.get("id") == "post")
    figures = list(section.iter("figure"))
    pictures = [node for figure in figures for node in figure.iter() if node.tag.endswith("svg")]
    assert len(figures) == 4 + 6 and len(pictures) == len(figures) + 1  # entropy and clipping are two in one
    assert all(node.get("aria-label") for node in pictures)
    assert not re.search(r'[dxy]="[^"]*(nan|inf)', page)


def test_answers_show_their_control_tokens_and_what_is_wrong(page):
    root = parse(page)
    lists = [node for node in root.iter("dl") if "told" in str(node.get("class"))]
    first, second = (["".join(part.itertext()) for part in told if part.tag == "dt"] for told in lists)
    assert first == second == ["4-2=?", "25-6=?", "[IMG] Sum?", "87*3=?"]
    answers = [["".join(part.itertext()) for part in told if part.tag == "dd"] for told in lists]
    assert [len(said) for said in answers] == [4 * 2, 4 * 3]  # a judge answers nothing
    assert all("[THINK]" in said and "[/THINK]" in said for said in answers[0])
    assert page.count(THINK) == 20 and '<span class="thinking">1 steps</span>' in page
    wrong = [node for told in lists for node in told if node.find(".//*[@aria-label='wrong']") is not None]
    assert len(wrong) == 5 and all("1 steps" in "".join(node.itertext()) for node in wrong)
    assert all("reward 0.100" in "".join(node.itertext()) for node in wrong)


def test_other_sections_know_these_stages(run):
    found = read_run(run)
    [rl], [instruct] = cells(stages(found), "14b-rl"), cells(stages(found), "14b-instruct")
    assert rl[1:4] == ["grpo", "14b-cot", "finished"] and rl[4:6] == ["–", "20"]
    assert instruct[2] == "14b-sft|judged by 14b-reward"
    assert cells(stages(found), "14b-sft")[0][2] == "14b-base|taught by parent"
    drawn = curves(found)
    assert drawn is not None and drawn.count("<figure") == len(POST)
    for label in ("win rate of 14b-instruct", "reward of 14b-rl", "pairs judged right of 14b-reward"):
        assert f'aria-label="{label} against steps."' in drawn
    assert "against tokens" in drawn and "20 steps, finished." in drawn
    time = goodput(found)
    assert time and "generating answers" in time and "judging them" in time
    assert cells(time, "14b-rl")[0][-2:] == [f"30.0{THIN}%", f"60.0{THIN}%"]
    assert cells(time, "14b-sft")[0][-2:] == [f"0.0{THIN}%", f"95.0{THIN}%"]


def test_only_what_has_begun(tmp_path):
    run = write_run(tmp_path / "run", "parent")
    assert post_training(read_run(run)) is None
    raw = recipe()
    raw["stages"] |= POST
    write_json(run / "recipe.json", raw)
    assert post_training(read_run(run)) is None and 'id="post"' not in build_report(run).read_text()
    (run / "14b-cot").mkdir()
    assert "14b-cot" in str(post_training(read_run(run)))
    write_post(run, stages=("14b-cot",))
    (run / "14b-cot" / "manifest.json").unlink()
    (run / "14b-cot" / "answers.json").write_text('{"answers": [{"prom')
    rewrite(run, "14b-cot", lambda row: row if row["step"] < 8 else None)
    write_json(run / "recipe.json", raw)
    found = read_run(run)
    assert [lineage.title for lineage in lineages(found)] == ["From 14b-base: 14b-cot → 14b-rl → 14b-reasoning"]
    made = post_training(found)
    [cot], [rl] = cells(made, "14b-cot"), cells(made, "14b-rl")
    assert cot[0].split("|")[1] == "sft, from 14b-base, unfinished" and "→" not in cot[1]
    assert cot[1].split("|")[0] == percent(evals(run, "14b-cot")[0]["reward_accuracy"])
    assert rl[0].split("|")[1] == "grpo, from 14b-cot, waiting" and set(rl[1:]) == {"–"}
    assert "14b-cot/answers.json could not be read" in build_report(run).read_text()


ODD = [math.nan, math.inf, -math.inf, 1e300, -1.0, None, "x", True, 10**400, [1]]


@pytest.mark.parametrize("odd", ODD, ids=str)
def test_metrics_no_axis_can_show(tmp_path, odd):
    run = write_post(write_run(tmp_path / "run", "parent"))
    for name in POST:
        rewrite(run, name, lambda row: row if row["kind"] == "time" else {**dict.fromkeys(row, odd), **_kept(row)})
        write_json(
            run / name / "answers.json", {"answers": [{"prompt": odd, "answer": "a", "reward": odd, "parts": odd}]}
        )
        manifest = json.loads((run / name / "manifest.json").read_text())
        write_json(run / name / "manifest.json", {**manifest, "metrics": dict.fromkeys(manifest["metrics"], odd)})
    page = build_report(run).read_text(encoding="utf-8")
    parse(page)
    assert 'id="post"' in page and not re.search(r'[dxy]="[^"]*(nan|inf)', page)


def _kept(row: dict[str, Any]) -> dict[str, Any]:
    """Of the last step nothing, not even which step it was."""
    return {"kind": row["kind"]} if row["step"] == 20 else {key: row[key] for key in ("kind", "step")}


def test_no_name_or_answer_becomes_markup(tmp_path):
    evil = "<img src=x onerror=alert(1)>\"'&$\x00\ud800"
    run = write_post(write_run(tmp_path / "run", "parent"))
    raw = json.loads((run / "recipe.json").read_text())
    raw["stages"]["14b-cot"] |= {"teacher": evil, "from": evil, "generate": {"prompts": evil, "rewards": {evil: 1}}}
    raw["stages"]["14b-rl"] |= {"rewards": {evil: {}}, "evaluate": evil}
    raw["stages"]["14b-sft"] |= {"from": "14b-reward", "generate": [evil]}  # a circle
    raw["stages"][evil] = {"do": "grpo", "from": evil}
    write_json(run / "recipe.json", raw)
    rewrite(run, "14b-cot", lambda row: {**row, f"reward_accuracy_{evil}": 0.5, f"reward_{evil}": 0.5})
    answers = [{"prompt": json.dumps(evil), "answer": evil + "[THINK]" + evil * 99}, 7, {"answer": 3}, {}]
    for name, content in {"14b-cot": {"answers": answers}, "14b-rl": answers, "14b-sft": {"answers": evil}}.items():
        write_json(run / name / "answers.json", content)
    page = build_report(run).read_text(encoding="utf-8")
    root = parse(page)
    assert not list(root.iter("img")) and not any(name.startswith("on") for node in root.iter() for name in node.attrib)
    assert page.count("onerror=") == page.count("&lt;img src=x onerror=") > 10
    assert f"{THINK}" in page and "not judged" in page and "…" in page
    assert {s.name for lineage in lineages(read_run(run)) for s in lineage.stages} == set(POST)


def test_intervals_are_those_of_students_t():
    rng = np.random.default_rng(0)
    for n in (2, 3, 8):
        before, after = rng.random((2, n))
        change = Change("reward", list(zip(before.tolist(), after.tolist(), strict=True)))
        low, high = scipy.stats.ttest_rel(after, before).confidence_interval(0.95)
        assert change.half is not None
        np.testing.assert_allclose([change.mean - change.half, change.mean + change.half], [low, high], rtol=1e-9)
        noisy = low < 0 < high
        assert change.verdict == ("within seed noise" if noisy else "better" if low > 0 else "worse")


def test_verdicts():
    rising, wide = [(0.1, 0.5), (0.1, 0.52), (0.1, 0.48)], [(0.1, 0.3), (0.1, 0.6), (0.1, 0.1)]
    assert Change("reward", rising).verdict == "better" and Change("loop_rate", rising).verdict == "worse"
    falling = [(b, a) for a, b in rising]
    assert Change("reward", falling).verdict == "worse" and Change("judge_ece", falling).verdict == "better"
    assert Change("reward", wide).verdict == "within seed noise"
    assert Change("reward", rising[:1]).verdict == "one seed" and Change("reward", [(0, 0)] * 3).verdict == "no change"


def test_a_sweep_over_seeds(tmp_path):
    sweep = write_seeds(tmp_path / "seeds")
    record = json.loads((sweep / "sweep.json").read_text())
    page = build_sweep_report(sweep).read_text(encoding="utf-8")
    assert "<h1>Over three seeds 14b-sft, 14b-reward and 14b-rl learn beyond seed noise</h1>" in page
    ends = [evals(sweep / "shared", f"14b-rl-{seed}") for seed in range(3)]
    after = np.array([rows[-1]["reward"] for rows in ends])
    change = after - [rows[0]["reward"] for rows in ends]
    reward = cells(page, "reward")[1]  # the first is that of 14b-sft
    assert reward[2].split("|") == [decimal(after.mean()), f"± {decimal(after.std(ddof=1))}"]
    assert reward[3].split("|")[0] == f"+{decimal(change.mean())}" and reward[5:] == ["3 of 3", "better"]
    assert len(cells(page, "answered right, sums")) == 2 and cells(page, "judge’s ECE, raw and calibrated")
    for metric in ("answered right", "reward", "loop rate"):
        assert f'aria-label="{metric} of 14b-rl against steps, every seed."' in page
    assert 'id="values"' not in page
    parse(page)
    assert {"reward", "reward_accuracy", "loop_rate", "win_rate", "judge_accuracy"} <= set(figures())

    noisy = lambda row, seed: row | ({"reward": [0.9, 0.1, 0.5][seed]} if row["step"] == 20 else {})
    for seed in range(3):
        rewrite(sweep / "shared", f"14b-rl-{seed}", lambda row, seed=seed: noisy(row, seed))
    rewrite(sweep / "shared", "14b-sft-1", lambda row: row if row["step"] < 15 else None)
    (sweep / "shared" / "14b-reward-2" / "metrics.jsonl").unlink()
    page = build_sweep_report(sweep).read_text(encoding="utf-8")
    assert "14b-rl does not</h1>" in page and "within seed noise" in page
    assert "over two seeds; shares change by percentage points. One other did not come as far." in page

    record["keys"] = {"stages.14b-rl.optimizer.lr": "lr"}
    assert replicates(record, sweep) == []
    assert sweep_seeds.seeds([]) is None

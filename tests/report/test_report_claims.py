"""What a page claims: nothing stale, nothing within the error, and nothing beside what was read on other rows."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from markupsafe import Markup
from matplotlib.colors import to_rgb
from pages import page_of, parse, plain, rows, section, text_of
from report_run import CHILDREN, picture, relink, told_by, write_json, write_rows, write_run
from rich.console import Console
from rich.table import Table

from ministral_jax.report import build_report, charts
from ministral_jax.report.plots import PALETTE, Axis, Line, accent
from ministral_jax.report.units import decimal
from ministral_jax.runs.reading import Run, read_run
from ministral_jax.runs.tables import stage_table, status_lines, status_table


def unplotted(shown: list[Line], _x: Axis, _y: Axis, alt: str, *_: object, **__: object) -> Markup | None:
    """A place for a plot: drawing them takes most of a page's time, and what these tests read is not drawn."""
    there = any(len(line.x) for line in shown)
    return Markup('<svg class="plot" role="img" aria-label="{}"></svg>').format(alt) if there else None


@pytest.fixture(scope="module", autouse=True)
def quick():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(charts, "lines", unplotted)
        yield


def stale(run: Run) -> dict[str, str]:
    return {stage.name: stage.stale for stage in run.stages.values() if stage.stale}


def terminal(table: Table) -> str:
    console = Console(width=200)
    with console.capture() as said:
        console.print(table)
    return said.get()


def findings(page: str) -> dict[str, str]:
    """What stands above the picture, by the model or stage it speaks of."""
    told = next((node for node in parse(page).iter("ul") if node.get("class") == "findings"), [])
    return {text_of(item[0]): plain(text_of(item)).partition(" ")[2] for item in told}


def change(run: Path, stage: str, **values: object) -> None:
    write_json(run / stage / "manifest.json", {**told_by(run, stage), **values})


def test_optional_stages_that_nobody_asked_for_are_not_missing(copy):
    raw = json.loads((copy / "recipe.json").read_text())
    raw["stages"] |= {f"8b-{name}": {"do": "sft", "from": "8b-base", "optional": True} for name in ("sft", "cot")}
    write_json(copy / "recipe.json", raw)
    page = page_of(copy)
    assert "25 stages finished, in" in page and "; 2 optional ones not run." in page
    assert "Optional and not run: 8b-sft, 8b-cot." in text_of(section(page, "stages"))
    assert "8b-sft" not in rows(page, "stages") and len(list(section(page, "settings").iter("details"))) == 25
    assert "25 of 25 stages" in terminal(status_table([copy]))
    assert status_lines(copy, read_run(copy))[0] == "optional and not run: 8b-sft, 8b-cot"
    (copy / "8b-sft").mkdir()
    (copy / "14b-hf" / "manifest.json").unlink()
    page = page_of(copy)
    assert "24 of 26 stages finished" in page and "; begun: 14b-hf, 8b-sft; 1 optional ones not run." in page


@pytest.mark.parametrize(("before", "after", "sure"), [(0.643, 0.639, False), (0.10, 0.46, True), (0.5, 0.64, False)])
def test_a_change_is_headlined_when_it_exceeds_the_error(copy, before, after, sure):
    """Of 64 prompts; the third would be one of 640."""
    records = [json.loads(line) for line in (copy / "14b-sft" / "metrics.jsonl").open()]
    first, *_, last = [record for record in records if record["kind"] == "eval"]
    first["accuracy"], last["accuracy"] = before, after
    write_rows(copy / "14b-sft" / "metrics.jsonl", records)
    change(copy, "14b-sft", metrics={"accuracy": after})
    relink(copy)
    page = page_of(copy)
    words = f"{before:.1%} → {after:.1%}".replace("%", " %") if sure else "no difference beyond the error"
    assert findings(page)["14b-sft"] == f"right answers: {words} (n = 64)."
    assert (rows(page, "post")["14b-sft"][0].get("class") == "best") == sure
    answers = json.loads((copy / "14b-sft" / "answers.json").read_text())
    write_json(copy / "14b-sft" / "answers.json", {"answers": answers["answers"]})
    assert "14b-sft" not in findings(page_of(copy))  # nobody knows of how many


def test_every_change_beyond_the_error_is_headlined(copy):
    """Not that of the chief figure alone; and the others not where chance explains them."""
    records = [json.loads(line) for line in (copy / "14b-sft" / "metrics.jsonl").open()]
    first, *_, last = [record for record in records if record["kind"] == "eval"]
    for key, before, after in (("accuracy", 0.5, 0.52), ("loop_rate", 0.5, 0.0)):
        first[key], last[key] = before, after
    write_rows(copy / "14b-sft" / "metrics.jsonl", records)
    change(copy, "14b-sft", metrics={"accuracy": 0.52, "loop_rate": 0.0})
    relink(copy)
    told = "right answers: no difference beyond the error; answers that loop: 50.0 % → 0.0 % (n = 64)."
    assert findings(page_of(copy))["14b-sft"] == told


def test_the_first_lines_say_what_came_out(page, run):
    summary = json.loads((run / "summary.json").read_text())["children"]
    for name, child in summary.items():
        kls = decimal(child["kl_final"]), decimal(child["kl_scratch"])
        assert f"KL to the parent {kls[0]} after" in findings(page)[name], name
        assert findings(page)[name].endswith(f"{kls[1]} from random weights.")
    assert "14b-reward" not in findings(page)  # pairs, of which nobody says how many


def test_prompts_with_their_pictures_before_and_after(page, run):
    """Every stage's answer stands beside that of the model it goes on from, to the same prompt."""
    first, second = (node for node in section(page, "post").iter("dl"))
    for told, stages in ((first, ["14b-base", "14b-sft", "14b-instruct"]), (second, ["14b-base", "14b-cot", "14b-rl"])):
        assert [text_of(next(row.iter("span"))) for row in told.iter("dd")] == 3 * stages
    said = [text_of(row) for row in first.iter("dd")]
    assert "before 14b-sft" in said[0] and "14b-instruct says 7" in said[2]
    [asked] = [node for node in first.iter("dt") if list(node.iter("img"))]
    assert next(asked.iter("img")).get("src") == f"data:image/png;base64,{picture(0)}"
    assert text_of(asked) == "[IMG] Sum?"  # of two pictures one was kept


def test_every_stage_that_answers_is_shown(copy):
    """Though others share more of their prompts."""
    own = [{"prompt": json.dumps(f"Say {n}."), "answer": "no", "before": {"answer": "what"}} for n in range(9)]
    write_json(copy / "14b-instruct" / "answers.json", {"prompts": 9, "answers": own})
    told = [text_of(row) for row in section(page_of(copy), "post").iter("dd")]
    assert sum(row.startswith("14b-instruct no") for row in told) == 2
    assert sum(row.startswith("14b-sft what") for row in told) == 2


def test_figures_on_rows_of_other_lengths_do_not_stand_together(copy):
    """A 14b that is distilled on rows of 256 tokens beside a family that is on rows of 128."""
    for name in ("14b-short", "14b-short-scratch"):
        told = told_by(copy, name)
        told["config"]["batch"]["length"] = 256
        write_json(copy / name / "manifest.json", told)
    relink(copy)
    summary = json.loads((copy / "summary.json").read_text())
    summary["children"]["14b"]["row_length"] = 256
    write_json(copy / "summary.json", summary)
    page, summary = page_of(copy), summary["children"]
    after_surgery, final, *_, bits, _ = (text_of(cell) for cell in rows(page, "numbers")["14b"][2:])
    assert after_surgery == final == bits == "– rows of 256"
    assert text_of(rows(page, "numbers")["8b"][3]) == decimal(summary["8b"]["kl_final"])
    heads = [text_of(node) for node in section(page, "numbers").iter("th") if node.get("scope") == "col"]
    assert "KL after surgery, rows of 128" in heads and "bits per byte, rows of 128" in heads
    assert "14b" not in findings(page)
    family = (copy / "family.svg").read_text()
    assert family.count("bits per byte</text>") == 3 and family.count("nats KL to parent</text>") == 2
    assert "KL on rows of 256: " in text_of(section(page, "recovery"))


def test_stale_figures_are_marked_and_left_out(copy):
    before = page_of(copy)
    change(copy, "8b-short", seconds=1.0)  # made again
    page, run = page_of(copy), read_run(copy)
    gone = {"8b-base", "8b-hf", "3b-pruned", "3b-short", "3b-base", "3b-hf"}
    assert stale(run).keys() == gone and stale(read_run(copy)) == stale(run)
    assert stale(run)["3b-pruned"] == "made from another 8b-short than the one that is here now"
    assert stale(run)["3b-base"] == "made from 3b-short, which is stale"
    for name in ("8b", "3b"):
        assert text_of(rows(page, "numbers")[name][3]) == "– stale", name
        assert findings(page)[name].startswith("is stale: it was made from")
    assert rows(page, "numbers")["14b"][3].text == rows(before, "numbers")["14b"][3].text
    assert len([node for node in section(page, "recovery").iter() if node.get("class") == "plot"]) == 1
    told = {name: text_of(node) for node in section(page, "stages").iter("th") if (name := text_of(node).split(" ")[0])}
    assert {name for name, text in told.items() if "stale: made from" in text} == gone
    assert "stale" not in text_of(section(before, "stages"))
    assert (copy / "family.svg").read_text().count("nats KL to parent</text>") == 1


def test_a_baseline_that_is_stale_takes_only_what_it_is_compared_by(copy):
    change(copy, "14b-short-scratch", seconds=1.0)
    _, _, after, final, scratch, *_ = (text_of(cell) for cell in rows(page_of(copy), "numbers")["14b"])
    assert scratch == "– stale" and "stale" not in after + final
    assert findings(page_of(copy))["14b"].endswith("tokens.")


def test_stale_post_training_shows_no_figures(copy):
    change(copy, "14b-base", seconds=1.0)
    page = page_of(copy)
    cells = [text_of(cell) for cell in rows(page, "post")["14b-sft"]]
    assert set(cells[:-1]) == {"–"} and "14b-sft" not in findings(page)


def test_a_run_without_a_family_has_a_table(copy):
    raw = json.loads((copy / "recipe.json").read_text())
    write_json(copy / "recipe.json", {**raw, "family": None})
    (copy / "summary.json").unlink()
    page = page_of(copy)
    table = rows(page, "numbers")
    heads = [text_of(node) for node in section(page, "numbers").iter("th") if node.get("scope") == "col"]
    kl, bits = heads.index("KL to the teacher") - 1, heads.index("bits per byte of text") - 1
    kls = {name: text_of(row[kl]) for name, row in table.items()}
    short = told_by(copy, "8b-short")["metrics"]
    assert kls["8b-base"] == "– rows of 512" and kls["8b-short"] == decimal(short["kl"])
    assert text_of(table["8b-base"][bits]) == "– rows of 512"
    assert "14b-pruned" in table and "right answers" not in heads


def test_a_family_that_is_not_whole_shows_what_is_finished(tmp_path):
    run = write_run(tmp_path / "run", "14b-base")
    told = rows(page_of(run), "numbers")["14b-short"]
    assert decimal(told_by(run, "14b-short")["metrics"]["kl"]) in [text_of(cell) for cell in told]


def test_settings_data_machines_and_what_steered(page, run):
    settings = text_of(section(page, "settings"))
    assert "14b-short, distill" in settings and "optimizer.lr 0.001" in settings and "optimizer.clip –" in settings
    assert len(list(section(page, "settings").iter("details"))) == 25  # folded, one a stage
    data = text_of(section(page, "data"))
    assert (
        "code jsonl, path mine/rows.jsonl, weight 0.6 " in data
        and "on_bad_row" not in data
        and f"512 {512:064x}"[:14] in data
    )
    assert "14b-short 4,800 rows" in data
    time = plain(text_of(section(page, "time")))
    assert "Ran on 4 × made-up chip on 2 hosts (25 stages)." in time and "jax 0.10.2 · commit 3f1c9ad0b7" in time
    drawn = [str(node.get("aria-label")) for node in section(page, "curves").iter() if node.get("class") == "spark"]
    assert drawn[:2] == ["learning rate of parent", "gradient norm of parent"] and len(drawn) == 2 * 13


def test_what_is_not_there_is_not_spoken_of(copy):
    """Without a random start nothing is said of it; an imported parent has been trained on nobody knows how much."""
    assert "random start" in text_of(section(page_of(copy), "recovery"))
    for name in CHILDREN:
        for stage in (f"{name}-short-scratch", f"{name}-base-scratch"):
            shutil.rmtree(copy / stage, ignore_errors=True)
    summary = json.loads((copy / "summary.json").read_text())
    write_json(copy / "summary.json", {**summary, "parent": {**summary["parent"], "tokens": 0}})
    page = page_of(copy)
    assert (
        "random start" not in text_of(section(page, "recovery")) and text_of(rows(page, "numbers")["parent"][1]) == "–"
    )


def test_the_table_of_stages_says_why_a_figure_is_missing(run):
    told = " ".join(terminal(stage_table(read_run(run))).split())
    assert "cross-entropy – (rows of 512)" in told and "rows of one length only: here of 128 tokens" in told
    assert "rows of" not in terminal(stage_table(read_run(run), ["14b-base", "8b-base", "14b-hf"]))


def test_what_is_read_under_teacher_forcing_says_so(page):
    for anchor in ("numbers", "images"):
        assert "under teacher forcing" in text_of(section(page, anchor))
    assert "images read right, teacher-forced" in text_of(section(page, "numbers"))
    assert "answers about images, teacher-forced" in text_of(section(page, "stages"))


def test_every_series_of_a_plot_has_its_own_colour(run, tmp_path, monkeypatch):
    """Those that a legend names, or that are marks alone; what has no name belongs to one that has, or is a rule."""
    drawn: list[list[Line]] = []
    monkeypatch.setattr(charts, "lines", lambda shown, *a, **k: drawn.append(list(shown)) or unplotted(shown, *a, **k))
    build_report(Path(shutil.copytree(run, tmp_path / "run")))
    for shown in drawn:
        hues = [line.colour for line in shown if line.label and len(line.x)]
        assert len(hues) == len(set(hues)), [(line.label, line.colour) for line in shown]
    assert sum(len([line for line in shown if line.label]) > 1 for shown in drawn) > 20
    for several in (1, 3, 5, 6, 11, 16):
        assert len({accent(i, several) for i in range(several + 1)}) == several + 1


def _seen(colour: str, blindness: np.ndarray) -> np.ndarray:
    """CIELAB of a colour as a dichromat sees it (Machado et al. 2009, applied to linear light)."""
    srgb = np.array(to_rgb(colour))
    light = np.clip(blindness @ np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4), 0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ light
    x, y, z = np.cbrt(np.maximum(xyz / [0.9505, 1.0, 1.089], 0.008856))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


PROTANOPIA = [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
DEUTERANOPIA = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]


@pytest.mark.parametrize("tone", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize("blindness", [np.eye(3), PROTANOPIA, DEUTERANOPIA], ids=["none", "protanopia", "deuteranopia"])
def test_colours_are_told_apart_by_colour_blind_readers(tone, blindness):
    """By a difference of ten in CIELAB, of which one or two are just seen; ramps by their neighbours."""
    hues = [_seen(PALETTE[f"model-{i}"][tone], np.array(blindness)) for i in range(6)]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(hues, 2)) > 10
    ramp = [_seen(PALETTE[f"ramp-{i}"][tone], np.array(blindness)) for i in range(16)]
    assert min(np.linalg.norm(a - b) for a, b in itertools.pairwise(ramp)) > 2


def test_nothing_is_cut(page):
    """What may be wider than a phone lies in a box that scrolls; what is hidden nowhere."""
    root = parse(page)
    boxes = [node for node in root.iter("div") if node.get("class") in ("scroll", "wide")]
    within = {id(table) for box in boxes for table in box.iter("table")}
    assert within == {id(table) for table in root.iter("table")} and len(within) > 8
    css = " ".join(node.text or "" for node in root.iter("style"))
    for box in (".scroll {", ".wide {"):
        assert "overflow-x: auto" in css[css.index(box) :].split("}")[0]


def test_loss_by_position_is_told(copy):
    found = {"8b-short": [(0, 3.25, 0.5, {}), (64, 4.5, 0.25, {})]}
    found["8b-base"] = [(0, 3.5, 0.75, {}), (128, 4.75, None, {"answers": 8, "accuracy": 0.375})]
    for name, octaves in found.items():
        told = told_by(copy, name)
        told["held_out"] = {
            "positions": [{"start": a, "counted": 9, "ce": ce, "kl": kl, **e} for a, ce, kl, e in octaves]
        }
        write_json(copy / name / "manifest.json", told)
    relink(copy)
    tables = section(page_of(copy), "numbers").iter("table")
    table = next(node for node in tables if "by position in the document" in node.get("aria-label", ""))
    told = [[text_of(cell) for cell in row] for row in table.iter("tr")]
    assert told[0] == ["stage", "0", "64", "128"]
    assert told[1:] == [["8b-short", "3.250 0.500", "4.500 0.250", "–"], ["8b-base", "3.500 0.750", "–", "4.750 38 %"]]

"""The page of a run: what is there is shown, in whatever state, and what is shown is what the run says of itself."""

from __future__ import annotations

import json
import math
import re
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
from pages import anchors, page_of, parse, plain, rows, section, text_of
from report_run import (
    CHILDREN,
    POST,
    recipe,
    relink,
    samples,
    told_by,
    write_json,
    write_rows,
    write_run,
    write_stage,
)

from ministral_jax.report import charts, family_figure
from ministral_jax.report.plots import PALETTE, Axis, Line, lines
from ministral_jax.report.units import count, decimal, duration, percent, tick
from ministral_jax.runs import reading
from ministral_jax.runs.reading import read_run
from ministral_jax.stages.figures import Curve, Figure, wilson
from ministral_jax.teachers.statistics import EDGES
from ministral_jax.teachers.summary import SplitSummary

SECTIONS = ["numbers", "recovery", "images", "post", "parent", "stored", "surgery", "cost", "stages", "time", "data"]
SECTIONS += ["settings", "curves"]
EVIL = "<img src=x onerror=alert(1)>\"'&${0}{{ 7*7 }}\x01"


def cells(page: str, anchor: str, head: str) -> list[str]:
    return [plain(text_of(cell)) for cell in rows(page, anchor)[head]]


def test_a_finished_run_has_every_section(page, run):
    assert anchors(page) == SECTIONS
    assert [link.get("href") for link in parse(page).iter("a")] == [f"#{name}" for name in SECTIONS]
    drawn = {name: sum(node.get("class") == "plot" for node in section(page, name).iter()) for name in SECTIONS}
    expected = {"recovery": 3, "parent": 1, "stored": 3, "surgery": 7, "post": 8, "curves": 12}
    assert {name: n for name, n in drawn.items() if n} == expected
    assert f"25 stages finished, in {duration(25 * 243.7)}." in page
    # of images, and of answers before and after: told by a sign and not by colour alone
    assert page.count('aria-label="wrong"') == 4 + 6 + 4
    assert not list(run.glob("*.tmp")) and page == page_of(run)  # the same files give the same page


def test_figures_are_those_of_the_summary(copy):
    summary = json.loads((copy / "summary.json").read_text())
    ends = {"kl_final": [0.4, 0.6], "bits_per_byte": [2.9, 3.1], "digit_accuracy": [0.9, 1.0]}
    summary["children"]["14b"] |= {"kl_final": 0.5, "kl_scratch": 0.25, "intervals": ends}
    write_json(copy / "summary.json", summary)
    ahead = told_by(copy, "8b-short-scratch")
    write_json(copy / "8b-short-scratch" / "manifest.json", {**ahead, "metrics": {"kl": 2.2}})
    relink(copy)
    page = page_of(copy)
    for name, entry in {"parent": summary["parent"], **summary["children"]}.items():
        told = [decimal(entry.get(key)) for key in ("kl_after_surgery", "kl_final", "kl_scratch")]
        told += [decimal(entry["bits_per_byte"], 3), percent(entry["digit_accuracy"])]
        if name == "14b":
            told[1], told[3], told[4] = "0.500 0.400 – 0.600", f"{told[3]} 2.900 – 3.100", f"{told[4]} 90.0 % – 100.0 %"
        sizes, _, *found = cells(page, "numbers", name)
        assert sizes == plain(f"{count(entry['parameters'])} {count(entry['decoder_parameters'])} decoder")
        assert found == list(map(plain, told))
    best = [name for name, row in rows(page, "numbers").items() for cell in row if cell.get("class") == "best"]
    assert best == ["8b", "3b"]  # the 14b is worse than its baseline now


def test_what_post_training_changed(page, run):
    records = [json.loads(line) for line in (run / "14b-sft" / "metrics.jsonl").open()]
    first, *_, last = [record for record in records if record["kind"] == "eval"]
    change = lambda key: plain(f"{percent(first[key])} → {percent(last[key])}")
    right, of_eight, reward, *_, time = cells(page, "post", "14b-sft")

    def shown(source="", count=64):
        key = f"accuracy{source and '_' + source}"
        low, high = (percent(end, 0) for end in wilson(last[key], count))
        return plain(f"{source} {change(key)} ({low} to {high}, n = {count})".lstrip())

    assert right == " ".join([shown(), shown("sums", 38), shown("pictures", 26)])
    assert of_eight.startswith(plain("90.0 % → 90.0 %")) and "pictures 100.0" in of_eight
    assert time == "4 min 4 s 20 steps, 64 prompts"
    parts = (f"{name} {decimal(first[key])} → {decimal(last[key])}" for name, key in (
        ("", "reward"), ("accuracy", "reward_accuracy"), ("format", "reward_format")))  # fmt: skip
    assert reward == " ".join(parts).strip()
    assert "pairs judged right" in " ".join(cells(page, "post", "14b-reward"))
    post = section(page, "post")
    assert next(post.iter("h3")).text == "From 14b-base: 14b-sft, 14b-reward, 14b-instruct"
    prompts, answers = ([text_of(n) for told in post.iter("dl") for n in told.iter(tag)] for tag in ("dt", "dd"))
    assert prompts == ["4-2=?", "25-6=?", "[IMG] Sum?"] * 2
    assert len(answers) == 3 * 6 and "✗ reward 0.100" in answers[3]  # a judge answers nothing
    assert page.count("<code>[THINK]</code>") == 12 and '<span class="thinking">1 steps</span>' in page


def test_what_a_stored_teacher_leaves_out(page, run):
    tail = told_by(run, "logits")["store"]["train"]["tail_mass"]
    found = cells(page, "stored", "train")
    assert found[:6] == ["topk, entries 32, bits 8", "160", "20 k", "5", "48.0 960 kB", "1.50"]
    assert found[6:] == [f"{100 * tail[key]:.2f} %" for key in ("mean", "p50", "p99")] + [decimal(2 * tail["mean"])]
    assert cells(page, "stored", "held")[5:] == ["–"] * 5


def test_bars_hold_all_tokens(run, monkeypatch):
    """181 bins are 30 bars of six and one of one."""
    counts, told = np.random.default_rng(0).integers(1, 50, len(EDGES)), told_by(run, "logits")["store"]["train"]
    told["tail_histogram"]["tokens"] = counts.tolist()
    drawn = []
    monkeypatch.setattr(charts, "lines", lambda shown, *_: drawn.append(shown))
    charts.left_out("a", SplitSummary.model_validate(told), "ink")
    [outline] = drawn[0]
    assert (outline.y[::2] == outline.y[1::2]).all() and (outline.x[1:-1:2] == outline.x[2::2]).all()
    np.testing.assert_allclose(outline.y[::2] * counts.sum(), np.add.reduceat(counts, np.arange(0, 181, 6)))
    widths = np.log10(outline.x[1::2] / outline.x[::2])
    np.testing.assert_allclose(widths, [widths[0]] * 30 + [widths[0] / 6])


def test_what_surgery_cut(page, run):
    for name in CHILDREN:
        recorded = told_by(run, f"{name}-pruned")["prune"]["kl"]
        told = [decimal(recorded.get(step)) for step in ("layers", "width", "mlp", "tie")]
        assert cells(page, "surgery", f"{name}-pruned")[4:] == told
    assert cells(page, "surgery", "3b-pruned")[:4] == ["7 → 5", "64 → 48", "224 → 144", "now tied"]
    scores = next(s for s in told_by(run, "8b-pruned")["prune"]["steps"] if s["step"] == "layers")
    [dropped] = set(range(8)) - set(scores["kept"])
    assert f"Layers: without {dropped}" in text_of(section(page, "surgery"))


def test_stages_say_what_they_were_made_from(page, copy):
    digests = {stage.name: stage.digest or "" for stage in read_run(copy).stages.values()}
    source, _, tokens, steps, *_, own = cells(page, "stages", "14b-instruct")
    assert source == f"14b-sft {digests['14b-sft'][:10]} judge 14b-reward {digests['14b-reward'][:10]}"
    assert (tokens, steps, own) == ("–", "20", digests["14b-instruct"][:10])
    assert cells(page, "time", "14b-rl")[-6:] == ["3 min 20 s", "60.0 %", "0", "6.0 s", "700", "5 GB"]
    manifest = copy / "8b-short" / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    broken = "3b-pruned is stale: it was made from another 8b-short than the one that is here now."
    assert broken in page_of(copy) and broken not in page


@pytest.mark.parametrize("until", ["parent", "14b-pruned", "14b-short", "14b-base"])
def test_a_run_that_was_killed(tmp_path, until):
    run = write_run(tmp_path / "run", until)
    write_stage(run / until, until, recipe()["stages"][until])
    (run / until / "manifest.json").unlink()
    page = page_of(run)
    expected = {"parent": "parent stages settings curves"}
    expected["14b-pruned"] = "numbers parent cost stages time data settings curves"
    assert (
        anchors(page)
        == expected.get(until, "numbers recovery parent surgery cost stages time data settings curves").split()
    )
    assert f"begun: {until}." in page
    stages = text_of(section(page, "stages"))
    assert stages.count("unfinished") == 1 and "waiting" in stages


def test_what_cannot_be_read_is_noted(copy):
    places = ("14b-hf/manifest.json", "14b-cot/answers.json", "run/summary.json", "run/samples.json")
    for place in places:
        (copy.parent / place if place.startswith("run") else copy / place).write_text('{"status": "fini')
    text = text_of(section(page_of(copy), "stages"))
    assert all(f"{place} could not be read and is left out." in text for place in places)


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf, 1e300, -1.0, 0.0], ids=str)
def test_values_no_axis_can_show(tmp_path, odd):
    run = write_run(tmp_path / "run", "8b-pruned", more=POST)
    write_stage(run / "14b-rl", "14b-rl", POST["14b-rl"])
    for stage in ("parent", "14b-short", "14b-short-scratch", "14b-rl"):
        records, path = [], run / stage / "metrics.jsonl"
        for i, record in enumerate(map(json.loads, path.open())):
            kept = record.keys() if i % 3 or record["kind"] == "time" else ("kind", "step", "tokens")
            records.append({key: value if key in kept else odd for key, value in record.items()})
        write_rows(path, records)
        manifest = told_by(run, stage)
        write_json(run / stage / "manifest.json", {**manifest, "metrics": dict.fromkeys(manifest["metrics"], odd)})
    relink(run)
    answers = [{"prompt": "7", "answer": "a", "reward": odd, "parts": {"accuracy": math.nan}}]
    write_json(run / "14b-rl" / "answers.json", {"answers": answers})
    assert {"recovery", "post"} <= set(anchors(page_of(run)))


def test_no_text_becomes_markup(tmp_path):
    run = write_run(tmp_path / "run", "8b-pruned")
    raw = recipe()
    raw["stages"] |= {EVIL: {"do": EVIL, "from": EVIL}, "../outside": {"do": "train"}, **POST}
    raw["family"]["children"] |= {EVIL: "14b-base"}
    write_json(run / "recipe.json", {**raw, "name": EVIL})
    write_json(tmp_path / "outside" / "manifest.json", {"status": "read"})
    write_stage(run / "14b-cot", "14b-cot", POST["14b-cot"])
    records = run / "14b-cot" / "metrics.jsonl"
    records.write_text(records.read_text().replace("reward_format", json.dumps(f"reward_{EVIL}")[1:-1]))
    said = {"versions": {EVIL: EVIL}, "git": EVIL, "inputs": {EVIL: {"stage": EVIL, "digest": EVIL}}}
    write_json(run / "14b-cot" / "manifest.json", {**told_by(run, "14b-cot"), **said})
    answers = [{"prompt": json.dumps(EVIL), "answer": f"{EVIL}[THINK]{EVIL * 99}"}, {"prompt": EVIL, "answer": EVIL}]
    write_json(run / "14b-cot" / "answers.json", {"answers": answers})
    [good] = samples(1)["images"]
    images = [good | {"question": EVIL, "label": EVIL, "answers": {EVIL: EVIL, "parent": EVIL}}]
    images += [good | {"png": png} for png in ("bm8gcG5n", "%%", EVIL, good["png"] * 999)]
    write_json(run / "samples.json", {"images": images})
    page = page_of(run)
    root = parse(page)
    assert [node.get("src", "")[:15] for node in root.iter("img")] == ["data:image/png;"]
    assert not any(name.startswith("on") for node in root.iter() for name in node.attrib)
    assert page.count("onerror=") == page.count("&lt;img src=x onerror=") > 20
    assert "{{ 7*7 }}" in page and "\x01" not in page  # no template in a template
    assert "<code>[THINK]</code>" in page and "…" in page and "outside/manifest" not in page
    family = (run / "family.svg").read_text(encoding="utf-8")
    assert "<img" not in family and ElementTree.fromstring(family) is not None


def test_a_verb_is_known_by_its_class_alone(tmp_path, monkeypatch):
    figures, curve = (Figure("largest", "largest <weight>", "", "lower"),), Curve("largest", "loss", "step")
    known = reading.verbs() | {"shrink": SimpleNamespace(figures=figures, curve=curve)}
    monkeypatch.setattr(reading, "verbs", lambda: known)
    more = {"small": {"do": "shrink", "from": "parent"}, "lost": {"do": "not-installed", "from": "parent"}}
    run = write_run(tmp_path / "run", "14b-pruned", more)
    for name, settings in more.items():
        write_stage(run / name, name, settings)
        records = [{"kind": k, "step": i, "loss": 1.0, "largest": 4 - i} for i in range(3) for k in ("train", "eval")]
        write_rows(run / name / "metrics.jsonl", records)
        write_json(run / name / "manifest.json", {**told_by(run, name), "metrics": {"largest": 2.0}})
    page = page_of(run)
    assert cells(page, "stages", "small")[1] == "largest <weight> 4.00 → 2.00"
    assert cells(page, "stages", "lost")[1] == "–"
    labels = [str(node.get("aria-label")) for node in parse(page).iter()]
    assert "largest <weight> of small against steps." in labels and not any("of lost" in label for label in labels)


def test_without_a_summary_and_with_many_images(copy):
    (copy / "summary.json").unlink()
    write_json(copy / "samples.json", samples(images=70))
    page = page_of(copy)
    assert anchors(page) == SECTIONS and "fewer tokens" not in text_of(
        section(page, "numbers")
    )  # none that is published
    assert page.count("image/png;base64") == 48 + 2 and "The first 48 of 70 are shown." in page
    assert page.count("Which digit is this?") == 1


@pytest.mark.parametrize("portrait", [False, True])
def test_family_areas_are_parameters(run, portrait):
    """Drawn areas over parameters is one constant for every matrix group of every model."""
    members, ratios = read_run(run).members, []
    root = ElementTree.fromstring(family_figure(members, portrait))
    towers = [group for group in root if sum(part.get("class") == "mlp" for part in group) > 1]
    for tower, spec in zip(towers, (member.spec for member in members), strict=True):
        for kind, component in (("mlp", "feed-forward"), ("attention", "attention")):
            width = sum(float(part.get("width", 0)) for part in tower if part.get("class") == kind)
            ratios.append(width / spec.components[component])
        kinds = [part.get("class") for part in tower]
        assert kinds.count("mlp") == spec.layers and kinds.count("embeddings") == (1 if spec.tied else 2)
    assert max(ratios) / min(ratios) < 1.01
    assert len({part.get("height") for tower in towers for part in tower}) == 1
    ElementTree.fromstring(family_figure([]))


def test_dark_and_light_share_every_figure(page):
    drawn = re.sub(r"<style>.*?</style>", "", "".join(re.findall(r"<svg.*?</svg>", page, flags=re.S)), flags=re.S)
    assert "var(--model-1)" in drawn and not re.search(r"#[0-9a-f]{6}\b", drawn)  # no colour but the scheme's
    assert set(re.findall(r"var\(--([\w-]+)\)", page)) - {"sans", "mono", "accent"} <= set(PALETTE)
    assert len({light for light, _ in PALETTE.values()}) == len(PALETTE)


def test_lines_that_cannot_be_drawn():
    log = Axis("y", log=True)
    for x, y in (([], []), ([1], [-1]), ([1, 2, math.inf], [math.nan, 1e300, 1])):
        assert lines([Line(x, y)], Axis(), log, "a") is None
    drawn = str(lines([Line([1, 2], [0.0, 1.0], label="a<b>&")], Axis(), log, '"<alt>"'))
    assert "a&lt;b&gt;&amp;" in drawn and "<alt>" not in drawn
    many = charts.thin(np.linspace(0.01, 0.02, 100_000))
    assert len(many) <= 400 and many.mean() == pytest.approx(0.015)
    np.testing.assert_allclose(charts.smooth(np.arange(100.0)), np.arange(100.0))  # a straight line stays one


def test_numbers_as_people_write_them():
    told = {
        count: {0: "0", 999: "999", 1000: "1 k", 1.48e6: "1.48 M", 999_999: "1 M", 1e30: "1 × 10³⁰", 2.4e10: "24 B"},
        decimal: {0.0: "0.000", 0.012: "0.012", 1.934: "1.93", 123.4: "123", -2.5: "-2.50", 3.1e-5: "3.1 × 10⁻⁵"},
        percent: {0.975: "97.5 %", 0.99973: "99.97 %", 1.0: "100.0 %", 0.0: "0.0 %"},
        duration: {4.24: "4.2 s", 59.7: "1 min", 725: "12 min 5 s", 11_520: "3 h 12 min", 183_600: "2 d 3 h"},
    }
    for write, texts in told.items():
        assert {value: plain(write(value)) for value in texts} == texts
        assert [write(value) for value in (None, math.nan, math.inf)] == ["–", "NaN", "∞"]
    assert plain(count(2.5e9, "FLOP", "si")) == "2.5 GFLOP"
    assert [tick(value) for value in (0.1, 0.05, 2.0, 1e-4, 20.0, 0.0)] == ["0.1", "0.05", "2", "10⁻⁴", "20", "0"]


@pytest.mark.parametrize("count", [2, 4, 12])
@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.filterwarnings("error")
def test_long_names_leave_room_for_the_curves(count, wide):
    name = "before.yarn-factor=4_long.yarn-factor=4_before.temperature-beta=0.1_long.temperature-beta=0.1"
    shown = [Line([0, 1, 2], [3.0, 2.0, 1.0], label=f"{name}_{n}") for n in range(count)]
    picture = str(lines(shown, Axis("tokens"), Axis("loss"), "Loss", wide=wide))
    assert ("before.yarn" in picture) == (count < 12)

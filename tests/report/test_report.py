"""The report: reads what a run leaves behind, in whatever state, and says it in one safe, self-contained page."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
from report_run import CHILDREN, TOKENS_PER_STEP, recipe, samples, spec_of, summary, write_json, write_run

from ministral_jax.errors import UserError
from ministral_jax.models.spec import PRESETS
from ministral_jax.report import build_report, family_figure
from ministral_jax.report.collect import crossing, read_run, series
from ministral_jax.report.details import flops_of, parameters_of, stages
from ministral_jax.report.markup import Html, el
from ministral_jax.report.style import PALETTE
from ministral_jax.report.units import THIN, count, decimal, duration, factor, percent, ranges, tick

SVG = "{http://www.w3.org/2000/svg}"


def page_of(run: Path) -> str:
    return build_report(run).read_text(encoding="utf-8")


def parse(page: str) -> ElementTree.Element:
    """The page is XML as well as HTML, so that an XML parser can judge its nesting and escaping."""
    assert page.startswith("<!DOCTYPE html>\n")
    return ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>\n"))


def text_of(root: ElementTree.Element) -> str:
    return " ".join(" ".join(root.itertext()).split())


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture(scope="module")
def page(finished) -> str:
    return page_of(finished)


def test_a_finished_run_is_one_self_contained_page(page, finished):
    root = parse(page)
    assert len(page.encode()) < 3_000_000
    assert not re.search(r"(?:src|href|data|action|xlink:href)=\"(?!#|data:image/png;base64,)", page)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg\")", page)
    assert not re.search(r"<script|\son\w+=|javascript:|@import|url\((?!#)", page)
    ids = [node.get("id") for node in root.iter() if node.get("id")]
    assert len(ids) == len(set(ids))
    targets = re.findall(r'(?:href="|url\()#([\w-]+)', page)
    assert targets and set(targets) <= set(ids)
    pictures = [node for node in root.iter() if node.tag in ("svg", f"{SVG}svg", "img")]
    assert len(pictures) > 30 and all(node.get("aria-label") or node.get("alt") for node in pictures)
    assert not list(finished.glob("*.tmp"))


def test_it_says_what_was_found(page):
    text = text_of(parse(page))
    for name in CHILDREN:
        assert re.search(rf"{name} reaches its scratch baseline’s KL with \d+(\.\d)?× fewer tokens", text)
    for section in ("numbers", "recovery", "images", "text", "parent", "surgery", "cost", "stages", "curves"):
        assert f'<section id="{section}">' in page
    assert "19 of 19 stages finished in 37 min 43 s" in text  # a narrow space is white space to split()
    assert "Read right of 24 held-out images: parent 24, 14b 24, 8b 23, 3b 21" in text
    assert "8b drops 1 of 8 layers" in text and "3b drops 2 of 7 layers" in text
    assert "3b keeps 48 of 64 directions" in text and "14b keeps 256 neurons per layer" in text
    assert page.count("image/png;base64") == 24
    assert page.count('aria-label="wrong"') == 4  # told by a sign, not by colour alone


def test_dark_and_light_share_every_figure(page):
    figures = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.S))
    drawn = re.sub(r"<style>.*?</style>", "", figures, flags=re.S)
    assert "var(--model-1)" in drawn
    assert not re.search(r"#[0-9a-f]{6}\b", drawn)  # no colour that the scheme does not set
    used = set(re.findall(r"var\(--([\w-]+)\)", page)) - {"sans", "mono", "accent"}
    assert used <= set(PALETTE)
    assert len({light for light, _ in PALETTE.values()}) == len(PALETTE)


@pytest.mark.parametrize(
    ("until", "expected"),
    [
        ("parent", "No model has been made yet"),
        ("14b-pruned", "and no child yet"),
        ("14b-short", "From one 1.48"),
        ("14b-base", "14b reaches its scratch baseline"),
    ],
)
def test_a_run_that_is_still_going(tmp_path, until, expected):
    run = write_run(tmp_path / "run", until)
    (run / until).mkdir()
    root = parse(page_of(run))
    assert expected in text_of(root)
    assert f"begun: {until}" in text_of(root)
    assert "samples" not in text_of(root)


def test_torn_and_repeated_lines(tmp_path):
    run = write_run(tmp_path / "run", "14b-pruned")
    metrics = run / "parent" / "metrics.jsonl"
    again = {"kind": "train", "step": 600, "tokens": 600 * TOKENS_PER_STEP, "loss": 1.25}
    before = read_run(run).stages[0]
    with metrics.open("ab") as file:
        file.write(json.dumps(again).encode() + b'\n[1]\nnull\n{"kind": "eval", "step": 700, "tok\xc3')
    after = read_run(run).stages[0]
    assert len(after.train) == len(before.train) == 600 and after.train[-1]["loss"] == 1.25
    assert after.evals == before.evals
    (run / "parent" / "manifest.json").write_text('{"status": "fini')
    run_read = read_run(run)
    assert run_read.stages[0].state == "unfinished" and "parent/manifest.json" in run_read.notes[0]
    page = page_of(run)
    assert "could not be read" in text_of(parse(page))
    assert page == page_of(run)  # the same files give the same page


def test_values_no_axis_can_show(tmp_path):
    run = write_run(tmp_path / "run", "8b-pruned")
    for stage in ("parent", "14b-short", "14b-short-scratch"):
        path = run / stage / "metrics.jsonl"
        odd = [math.nan, math.inf, -math.inf, 1e300, -1.0, 0.0, None, "x", True, 10**400]
        rows = [
            {"kind": kind, "step": 1000 + i, "tokens": 10**6 + i, "loss": value, "kl": value, "ce": value}
            for i, value in enumerate(odd)
            for kind in ("train", "eval")
        ]
        path.write_text(path.read_text() + "".join(json.dumps(row) + "\n" for row in rows))
    manifest = json.loads((run / "14b-pruned" / "manifest.json").read_text())
    prune = manifest["prune"]
    prune["kl"] = {"mlp": math.nan}
    prune["steps"] += [
        {"step": "layers", "scores": [math.nan, 1e308, "x", 1.0], "kept": [0, math.nan, 3], "score": None},
        {
            "step": "width",
            "retained_energy": math.inf,
            "spectrum": {"index": [0, 1, math.nan], "energy": [math.nan, -1]},
        },
        "nonsense",
    ]
    prune["steps"][0]["layers"] += [{"all": [math.nan] * 5, "kept": [], "kept_share": math.nan}, 7, {"all": [1]}]
    (run / "14b-pruned" / "manifest.json").write_text(json.dumps(manifest))
    figures = {"parameters": 1e30, "bits_per_byte": math.nan, "digit_accuracy": math.inf, "kl_final": -1e300}
    child = {**figures, "stages": {"short": "nowhere", "base": 3}}
    write_json(run / "summary.json", {"parent": figures, "children": {"14b": child, "x": {}}, "wall_seconds": math.inf})
    root = parse(page_of(run))
    assert "NaN" in text_of(root) and "∞" in text_of(root)
    assert not re.search(r'[dxy]="[^"]*(nan|inf)', ElementTree.tostring(root, encoding="unicode"))


def test_no_name_or_answer_becomes_markup(tmp_path):
    evil = "<img src=x onerror=alert(1)>\"'&${0}\x00\ud800"
    raw = recipe()
    raw["name"] = evil
    raw["stages"][evil] = {"do": evil, "from": evil}
    raw["stages"]["../outside"] = {"do": "train"}
    raw["family"]["children"] = {evil: "14b-base", "8b": "8b-base"}
    run = write_run(tmp_path / "run", "8b-pruned")
    write_json(run / "recipe.json", raw)
    write_json(tmp_path / "outside" / "manifest.json", {"status": "finished", "versions": {"read": "outside"}})
    manifest = json.loads((run / "14b-pruned" / "manifest.json").read_text())
    manifest.update(versions={evil: evil}, git=evil, spec={"layers": evil})
    write_json(run / "14b-pruned" / "manifest.json", manifest)
    image = {"pixels": [[[0, 0, 0]]], "question": evil, "label": evil, "answers": {"parent": evil, evil: "7"}}
    bad = [{"png": "bm8gcG5n"}, {"png": "%%"}, {"pixels": [[1]]}, {"pixels": [[[0] * 3] * 4000]}, 7, {}]
    text = [{"prompt": evil, "continuations": {"parent": evil}}]
    write_json(run / "samples.json", {"images": [image, *bad], "text": text})
    page = page_of(run)
    root = parse(page)
    assert [node.get("src", "")[:15] for node in root.iter("img")] == ["data:image/png;"]
    assert not any(name.startswith("on") for node in root.iter() for name in node.attrib)
    assert page.count("onerror=") == page.count("&lt;img src=x onerror=")
    assert "outside" not in text_of(root).replace("../outside", "")
    family = (run / "family.svg").read_text(encoding="utf-8")
    assert "onerror" in family and "<img" not in family
    ElementTree.fromstring(family)


def test_what_is_not_a_run(tmp_path):
    with pytest.raises(UserError, match="is not a directory"):
        build_report(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"is not a run: it has no recipe\.json"):
        build_report(tmp_path)
    for content in ("{", "[]", '{"stages": []}'):
        (tmp_path / "recipe.json").write_text(content)
        with pytest.raises(UserError, match="is not a recipe"):
            build_report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.json"]


def test_the_family_follows_from_the_stages_alone(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "summary.json").unlink()
    write_json(run / "recipe.json", {key: value for key, value in recipe().items() if key != "family"})
    found, told = read_run(run), read_run(finished)
    assert [m.name for m in found.models] == [m.name for m in told.models] == ["parent", *CHILDREN]
    for mine, theirs in zip(found.models, told.models, strict=True):
        assert {r: s.name for r, s in mine.stages.items()} == {r: s.name for r, s in theirs.stages.items()}
        for key in ("parameters", "decoder_parameters", "tokens", "kl_after_surgery", "kl_final", "kl_scratch"):
            assert mine.figures[key] == pytest.approx(theirs.figures[key]), key


def test_lineage_that_no_longer_holds_is_told(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    assert "was made from another" not in stages(read_run(run))
    manifest = run / "8b-short" / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    assert "3b-pruned was made from another 8b-short than the one that is here now" in stages(read_run(run))


def rows(*points: tuple[float, float]) -> list[dict[str, float]]:
    return [{"tokens": float(tokens), "kl": kl} for tokens, kl in points]


def test_crossing():
    scratch = rows((0, 8.0), (100, 4.0), (1000, 1.0))
    found = crossing(rows((0, 3.0), (100, 2.0), (200, 0.0 + 0.5), (1000, 0.1)), scratch)
    assert found is not None and found.tokens == pytest.approx(100 + 100 * (1.0 / 1.5))
    assert found.speedup == pytest.approx(1000 / found.tokens)
    at_once = crossing(rows((0, 0.5), (10, 0.4)), scratch)
    assert at_once is not None and (at_once.tokens, at_once.speedup) == (0.0, 100.0)
    never = crossing(rows((0, 3.0), (1000, 1.5)), scratch)
    assert never is not None and never.tokens is None and never.speedup is None
    assert crossing([], scratch) is None and crossing(scratch, []) is None and crossing(scratch, scratch[:1]) is None
    assert series([{"tokens": 1.0, "kl": math.nan}, {"kl": 2.0}, {"tokens": 3.0, "kl": 4.0}], "kl") == ([3.0], [4.0])


def test_crossing_agrees_with_the_summary(finished):
    from ministral_jax.runs.summary import token_speedup

    for child in read_run(finished).children:
        pruned, scratch = child.stages["short"].evals, child.stages["scratch_short"].evals
        found = crossing(pruned, scratch)
        assert found is not None and found.speedup == pytest.approx(token_speedup(pruned, scratch))


@pytest.mark.parametrize("name", PRESETS)
def test_components_add_up(name):
    spec = PRESETS[name]
    assert sum(parameters_of(spec).values()) == spec.parameters
    for length in (1, 4096):
        assert sum(flops_of(spec, length).values()) == spec.flops_per_token(length)


@pytest.mark.parametrize("portrait", [False, True])
def test_family_areas_are_parameters(portrait):
    """Drawn areas over parameters is one constant for every matrix group of every model."""
    told = summary()
    told["parent"]["spec"] = spec_of("parent")
    for name, entry in told["children"].items():
        entry["spec"] = spec_of(name).model_dump(mode="json")
    root = ElementTree.fromstring(family_figure(told, portrait))
    assert "8b: " in str(root.get("aria-label"))
    groups = root.findall(f"{SVG}g")[:4]
    ratios = []
    for group, spec in zip(groups, map(spec_of, ("parent", *CHILDREN)), strict=True):
        sizes = {
            kind: sum(float(r.get("width", 0)) for r in group if r.get("class") == kind)
            for kind in ("mlp", "attention")
        }
        parts = parameters_of(spec)
        ratios += [sizes["mlp"] / parts["feed-forward"], sizes["attention"] / parts["attention"]]
        assert sum(r.get("class") == "mlp" for r in group) == spec.layers
        assert sum(r.get("class") == "embeddings" for r in group) == (1 if spec.tied else 2)
    assert max(ratios) / min(ratios) < 1.01
    assert len({r.get("height") for group in groups for r in group}) == 1


def test_family_of_what_little_is_known():
    for told in (
        {},
        {"parent": None, "children": {}},
        {"parent": {}, "children": {"a": {}}},
        {"children": {"a": {"parameters": 5e6}}},
    ):
        ElementTree.fromstring(family_figure(told))


def test_many_images_and_none(tmp_path):
    import numpy as np

    run = write_run(tmp_path / "run", "parent")
    assert 'id="images"' not in page_of(run)
    write_json(run / "samples.json", samples(np.random.default_rng(1), images=70))
    page = page_of(run)
    assert page.count("image/png;base64") == 48 and "The first 48 of 70 are shown." in page


def test_markup_escapes_unless_it_is_markup():
    made = el("p", "<b>", Html("<b></b>"), ["&", None, [el("br")]], class_='"x"', hidden=False, data_x=1)
    assert made == '<p class="&quot;x&quot;" data-x="1">&lt;b&gt;<b></b>&amp;<br /></p>'
    assert not isinstance(Html("<b>") + "<i>", Html)  # what is concatenated is text again
    assert el("p", "a\x00\ud800b") == "<p>a\ufffd\ufffdb</p>"


def test_numbers_as_people_write_them():
    plain = lambda text: text.replace(THIN, " ")
    counts = {
        0: "0",
        7: "7",
        999: "999",
        1000: "1 k",
        1.48e6: "1.48 M",
        999_999: "1 M",
        23.98e9: "24 B",
        1e30: "1 × 10³⁰",
    }
    for value, text in counts.items():
        assert plain(count(value)) == text
    assert plain(count(2.5e9, "FLOP", "si")) == "2.5 GFLOP"
    decimals = {
        0.0: "0.000",
        0.012: "0.012",
        1.934: "1.93",
        12.34: "12.3",
        123.4: "123",
        3.1e-5: "3.1 × 10⁻⁵",
        -2.5: "-2.50",
    }
    for value, text in decimals.items():
        assert plain(decimal(value)) == text
    assert [tick(v) for v in (0.1, 0.05, 2.0, 1e-4, 20.0)] == ["0.1", "0.05", "2", "10⁻⁴", "20"]
    assert [plain(percent(v)) for v in (0.975, 0.99973, 1.0, 0.0)] == ["97.5 %", "99.97 %", "100.0 %", "0.0 %"]
    assert [factor(v) for v in (8.44, 12.3)] == ["8.4×", "12×"]
    times = {4.24: "4.2 s", 59.7: "1 min", 725: "12 min 5 s", 11_520: "3 h 12 min", 183_600: "2 d 3 h"}
    for value, text in times.items():
        assert plain(duration(value)) == text
    for write in (count, decimal, percent, factor, duration):
        assert [write(v) for v in (None, math.nan, math.inf)] == ["–", "NaN", "∞"]
    assert ranges([5, 3, 4, 9]) == "3–5, 9"

"""The page of a plan: whole, self-contained, and with the plan's own figures."""

import json
from dataclasses import fields

import pytest
from pages import check, parse, plain, rows, section, text_of

from ministral_jax.cli import main
from ministral_jax.planning.machine import parse_machine
from ministral_jax.planning.plan import Plan, make_plan
from ministral_jax.planning.table import KINDS
from ministral_jax.planning.timing.assumptions import Assumptions, meanings
from ministral_jax.recipe.load import load_recipe, order
from ministral_jax.report import plan as pages
from ministral_jax.report.units import count, duration, percent

RECIPE, MACHINE = "configs/ministral3_base.yaml", "configs/machines/v5p-256.yaml"
COMMAND = "ministral-jax plan it.yaml 'a=<b>' --on v5p:4x4x8"


def planned(*words: str, on: str = "v5p:4x4x8") -> Plan:
    recipe = load_recipe(RECIPE, [MACHINE, *words])
    names, assume = order(recipe, ["14b-short", "14b-hf"]), Assumptions(disk=5e8)
    return make_plan(recipe, names, parse_machine(on), assume=assume, price=4.0)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return planned("defaults.distill.batch.microbatches=256")  # more than there are rows for: an error


@pytest.fixture(scope="module")
def page(plan) -> str:
    return check(pages.plan_page(plan, COMMAND))


def stacks(page: str, anchor: str) -> dict[str, str]:
    """By stage the words beside and below its bar."""
    found = [row for row in section(page, anchor).iter("li") if len(row) == 2]
    return {text_of(row[0][0][0]): plain(f"{text_of(row[0])} {text_of(row[1][1])}") for row in found}


def test_verdict_and_findings_stand_first_errors_before_warnings(plan, page):
    text = plain(text_of(parse(page)))
    assert plan.title in text and f"{plan.errors} error" in text and "it fits" not in text
    assert f"cost {plain(count(plan.cost(plan.seconds)))} at 4.0 a chip-hour" in text
    assert f"disk {plain(count(plan.disk, 'B', 'si'))}" in text and plain(duration(plan.seconds)) in text
    told = next(node for node in parse(page).iter("ul") if "findings" in (node.get("class") or ""))
    levels = [text_of(item[0]) for item in told]
    assert levels == sorted(levels) and set(levels) == {"error", "warning"}
    assert {text_of(item) for item in told} == {f"{f.level} {f}" for f in plan.findings}
    assert "it fits" in pages.plan_page(planned(), COMMAND)


def test_every_stage_has_its_memory_time_and_row(plan, page):
    memory, time, table = stacks(page, "memory"), stacks(page, "spent"), rows(page, "costs")
    for stage in plan.stages:
        assert stage.memory and stage.time
        for item in stage.memory.peak.items:
            told = f"{item.name} {plain(count(item.bytes, 'B', 'si'))}"
            assert (told in memory[stage.name]) == (item.bytes >= 0.005 * stage.memory.peak.total)
        assert f"{stage.memory.peak.phase}: {plain(percent(plan.free(stage), 0))} free" in memory[stage.name]
        assert plain(duration(stage.seconds)) in time[stage.name]
        said = [plain(text_of(cell)) for cell in table[stage.name]]
        assert said[6] == plain(duration(stage.seconds)) and plain(percent(plan.mfu(stage))) == said[5]
    short = plan.stages[2]
    assert short.time and f"step {plain(duration(short.time.step_seconds))} MFU" in time[short.name]
    assert f"{plain(count(plan.speed(short)))} tokens/s/chip" in time[short.name]
    assert "fsdp: all 4 along x, all 4 along y" in text_of(section(page, "meshes"))


def test_bars_are_to_scale(plan, page):
    stage = plan.stages[2]
    picture = next(svg for svg in section(page, "memory").iter() if stage.name in (svg.get("aria-label") or ""))
    widths = [float(rect.get("width")) for rect in picture if rect.get("x")]
    assert widths == pytest.approx([1000 * i.bytes / plan.machine.chip.hbm for i in stage.memory.peak.items], abs=0.01)
    marks = {path.get("class"): path.get("d") for path in picture if path.get("d")}
    assert marks == {"all": "M1000.00 -4v28", "safe": "M920.00 -4v28"}
    shares = next(svg for svg in section(page, "spent").iter() if stage.name in (svg.get("aria-label") or ""))
    assert sum(float(rect.get("width")) for rect in shares if rect.get("x")) == pytest.approx(1000, abs=0.1)


def test_what_does_not_fit_is_torn_off_and_said():
    small = planned("mesh.data=1", "mesh.fsdp=4", "defaults.prune.mesh.context=1", on="v5p:1x2x2")
    page = check(pages.plan_page(small, COMMAND))
    stage = small.stages[2]
    assert small.free(stage) < 0 and 'class="torn"' in page
    assert f"{plain(percent(1 - small.free(stage), 0))} full" in stacks(page, "memory")[stage.name]
    bar = pages.bar([pages.Segment("a", "ink", 3, "3"), pages.Segment("b", "ink", 3, "3")], 4, "x", {"all": 0.5})
    assert 'x="750.00" width="250.00"' in bar


def test_stages_without_a_mesh_and_gpus_without_a_torus():
    page = check(pages.plan_page(planned("mesh.data=3"), COMMAND))
    assert "does not fit" in text_of(section(page, "meshes"))
    gpus = check(pages.plan_page(planned("mesh.data=1", "mesh.fsdp=128", on="h100:128"), COMMAND))
    assert "along" not in text_of(section(gpus, "meshes"))


def test_assumptions_are_explained_and_changed_ones_bold(plan, page):
    assert {name for names in meanings() for name in names} == {field.name for field in fields(Assumptions)}
    found = section(page, "assumptions")
    assert "sizes are those of mistral-small-3.1-24b" in text_of(found)
    bold = [text_of(node) for node in found.iter() if node.get("class") == "best"]
    assert bold[0] == "disk" and len(bold) == 2
    assert text_of(section(page, "command")) == f"Command {COMMAND}"
    assert len({colour for _, colour in pages._TIMES.values()}) == len(KINDS)


def test_output_is_by_the_end_of_its_name(tmp_path, capsys):
    words = ["plan", RECIPE, MACHINE, "parent", "--on", "v5p:4x4x8", "--output"]
    path = tmp_path / "plan.html"
    assert main([*words, str(path)]) == 0
    written = check(path.read_text())
    assert text_of(section(written, "command")) == f"Command ministral-jax {' '.join(words)} {path}"
    assert main([*words, str(tmp_path / "plan.json")]) == 0
    assert json.loads((tmp_path / "plan.json").read_text())["possible"]
    capsys.readouterr()
    path = tmp_path / "plan.pdf"
    assert main([*words, str(path)]) == 2
    assert f"--output {path}: must end in .json, for all figures, or in .html, for a page" in capsys.readouterr().err

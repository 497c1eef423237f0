"""Plans of the shipped recipes: what `plan` shows, writes and refuses; and the search for a faster mesh."""

import json

import pytest
from rich.console import Console

from ministral_jax.cli import main
from ministral_jax.errors import UserError
from ministral_jax.planning.command import parse_assumptions
from ministral_jax.planning.findings.memory import SPARE
from ministral_jax.planning.machine import parse_machine
from ministral_jax.planning.plan import make_plan, presumed_sizes
from ministral_jax.planning.search import search
from ministral_jax.planning.table import bar, duration, plan_view
from ministral_jax.planning.timing.assumptions import Assumptions
from ministral_jax.recipe.load import load_recipe, order

RECIPE = "configs/ministral3_base.yaml"
V5P = ("configs/machines/v5p-256.yaml", "v5p:4x4x8")


def planned(*words, on=V5P, stages=("14b-short",)):
    recipe = load_recipe(RECIPE, [on[0], *words])
    return make_plan(recipe, order(recipe, stages), parse_machine(on[1]), price=4.0)


@pytest.fixture(scope="module")
def plan():
    return planned()


def test_a_plan_adds_up(plan):
    stage = plan.stages[-1]
    assert plan.is_possible and [s.name for s in plan.stages] == ["parent", "14b-pruned", "14b-short"]
    assert plan.seconds == pytest.approx(sum(s.time.seconds for s in plan.stages))
    assert plan.cost(3600) == 4.0 * plan.machine.chips == 4.0 * 128
    step = next(phase for phase in stage.time.phases if phase.phase == "step")
    assert stage.time.step_seconds == pytest.approx(sum(part.seconds for part in step.parts))
    assert plan.speed(stage) == pytest.approx(256 * 16384 / step.seconds / 128)
    assert plan.mfu(stage) == pytest.approx(step.flops / step.seconds / (459e12 * 128))
    assert plan.free(stage) == pytest.approx(1 - stage.memory.peak.total / (95 * 2**30))


def test_the_command_shows_and_writes_it_and_says_by_its_code_whether_it_is_possible(tmp_path, capsys):
    path = tmp_path / "plan.json"
    words = ["plan", RECIPE, V5P[0], "14b-pruned", "--on", V5P[1], "--output", str(path)]
    assert main(words) == 0
    shown, written = capsys.readouterr().out, json.loads(path.read_text())
    assert "14b-pruned" in shown and "ministral3-base on v5p:4x4x8: 128 chips, 32 hosts" in shown
    assert "sizes of parent: those of mistral-small-3.1-24b" in shown
    assert written["possible"] and written["presumed_sizes"] == {"parent": "mistral-small-3.1-24b"}
    phases = written["stages"]["14b-pruned"]["memory"]["phases"]
    assert written["stages"]["14b-pruned"]["memory"]["peak"] == max(sum(items.values()) for items in phases.values())
    assert main([*words, "mesh.data=3", "defaults.prune.mesh.data=3"]) == 2
    shown = capsys.readouterr().out
    assert "does not fit" in shown and "error: stages.14b-pruned.mesh" in shown
    assert not json.loads(path.read_text())["possible"]


def test_what_a_plan_cannot_know_is_asked_for():
    recipe = load_recipe(RECIPE, ["stages.parent.path=/models/ours"])
    with pytest.raises(UserError, match=r"stages\.parent\.path = '/models/ours' is not here.*--sizes parent=PRESET"):
        presumed_sizes(recipe, ["parent"], {})
    assert presumed_sizes(recipe, ["parent"], {"parent": "ministral-3-14b"}) == {"parent": "ministral-3-14b"}
    for given, said in (({"parnt": "ministral-3-8b"}, "no stage 'parnt'"), ({"parent": "8b"}, "no preset '8b'")):
        with pytest.raises(UserError, match=said):
            presumed_sizes(recipe, ["parent"], given)


def test_assumptions_are_named_numbers():
    assert parse_assumptions(["matmul=0.5", "disk=2e9"]) == Assumptions(matmul=0.5, disk=2e9)
    cases = {
        "matmull=0.5": "did you mean matmul",
        "matmul=fast": "must be a number",
        "trip=true": "must be a number",
        "link=0": "must be a number above 0 to 1",
        "matmul=3": "must be a number above 0 to 1",
        "disk=0": "must be a number above 0 on",
        "overlap=2": "must be a number from 0 to 1",
        "trip=-1": "must be a number from 0 on",
        "trip=.nan": "must be a number from 0 on",
        "near=.inf": "must be a number from 0 on",
    }
    for word, said in {**cases, "matmul": "must be NAME=VALUE"}.items():
        with pytest.raises(UserError, match=said):
            parse_assumptions([word])


@pytest.mark.parametrize(
    ("on", "option", "value", "said"),
    [
        ("v5p:4x4x4", "--price", "-1", "--price -1 must be a number from 0 on"),
        ("v5p:4x4x4", "--price", "nan", "--price nan must be"),
        ("v5p:4x4x4", "--slices", "0", "--slices 0 must be at least 1"),
        ("here", "--slices", "3", "--slices 3 goes with a TPU's shape"),
        ("v5p:4x4x4", "--run-dir", "mine", "--run-dir mine goes with --on here"),
        ("v5p:4x4x4", "--output", "plan.txt", "must end in .json"),
        ("v5p:4x4x4", "--output", "nowhere/plan.json", "there is no directory nowhere"),
        ("v5p:4x4x4", "--output", "gs://bucket/plan.json", "is a URL"),
    ],
)
def test_an_option_that_means_nothing_is_refused_before_anything_is_planned(on, option, value, said, capsys):
    assert main(["plan", RECIPE, "--on", on, option, value]) == 2
    shown = capsys.readouterr()
    assert said in shown.err and not shown.out


def test_larger_tiles_and_then_one_kernel_make_a_faster_plan(plan):
    tiles = [
        planned("defaults.distill.compute.attention=blockwise", f"defaults.distill.compute.attention_block={block}")
        for block in (256, 128)
    ]
    seconds = [found.stages[-1].time.step_seconds for found in (plan, *tiles)]
    assert seconds[0] < 0.9 * seconds[1] < 0.6 * seconds[2], seconds


def test_a_search_finds_a_mesh_that_fits_and_is_no_slower(plan):
    recipe, machine = load_recipe(RECIPE, [*V5P[:1], "defaults.distill.batch.length=4096"]), parse_machine("v5p:2x2x2")
    small = make_plan(recipe, order(recipe, ["3b-short"]), machine)
    assert not small.is_possible  # the mesh of 128 chips
    best, *others = search(small.context, "3b-short", Assumptions())
    words = load_recipe(RECIPE, [V5P[0], "defaults.distill.batch.length=4096", *best.overrides])
    taken = make_plan(words, order(words, ["3b-short"]), machine)
    assert taken.stages[-1].mesh == best.plan.mesh and taken.stages[-1].time == best.plan.time
    assert taken.stages[-1].memory == best.plan.memory and taken.free(taken.stages[-1]) >= SPARE
    assert all(best.plan.seconds <= other.plan.seconds + 1e-3 for other in others)


def test_a_search_that_finds_nothing_says_so():
    recipe, machine = load_recipe(RECIPE), parse_machine("v5e:2x2")
    small = make_plan(recipe, order(recipe, ["14b-short"]), machine)
    with pytest.raises(UserError, match=r"stages\.14b-short: no mesh, microbatches and remat fit v5e:2x2 with 8%"):
        search(small.context, "14b-short", Assumptions())


def test_a_search_goes_on_after_a_stage_for_which_nothing_fits(tmp_path, capsys):
    path, small = tmp_path / "plan.json", ["defaults.distill.batch.length=1024", "data.patches=4096"]
    words = ["plan", RECIPE, "3b-short", *small, "--on", "h100:4", "--search", "--output", str(path)]
    assert main(words) == 2  # the mesh is that of 64 chips
    shown, found = capsys.readouterr().out, json.loads(path.read_text())["found"]
    assert "stages.14b-short: no mesh, microbatches and remat fit h100:4" in shown and found["14b-short"] == []
    assert " ".join(found["3b-short"][0]["overrides"]) in " ".join(shown.split())


def test_a_search_prefers_a_layout_without_warnings_to_one_that_is_hardly_faster():
    plan = planned()
    best, *others = search(plan.context, "14b-short", Assumptions())
    faster = [other for other in others if other.plan.seconds < best.plan.seconds]
    assert faster and not best.warnings and all(other.warnings for other in faster)
    assert best.plan.seconds < 1.1 * min(other.plan.seconds for other in faster)


def test_disk_holds_what_stages_leave_and_the_states_of_one():
    plan = planned(stages=("14b-base",))
    kept = 4 * sum(stage.spec.parameters for stage in plan.stages)
    assert plan.stages[-1].memory.written < plan.disk < kept + max(stage.memory.written for stage in plan.stages)
    assert plan.disk < sum(stage.memory.written for stage in plan.stages)


def test_no_figure_is_cut_at_120_columns():
    plan = planned(stages=("14b-base", "3b-base"))
    console = Console(width=120)
    with console.capture() as shown:
        console.print(plan_view(plan))
    for stage in plan.stages:
        row = next(line for line in shown.get().splitlines() if line.startswith(stage.name))
        figures = [f"{stage.memory.peak.total / 2**30:.1f}", duration(stage.seconds), f"{plan.free(stage):.0%}"]
        figures.append(f"{plan.cost(stage.seconds):,.0f}")
        assert all(f" {figure} " in row for figure in figures), row
        assert "…" not in row


def test_a_bar_is_as_long_whatever_its_shares():
    for shares in ({"matmul": 1.0}, {"matmul": 1, "loop": 1, "link": 1}, {"head": 1e-9, "memory": 5, "vision": 2}):
        assert len(bar(shares).plain) == 20
    assert bar({}).plain == ""
    assert [duration(s) for s in (0.0123, 3.44, 300, 7200, 3 * 86400)] == ["12 ms", "3.4 s", "5 min", "2 h", "3.0 d"]


def test_findings_stand_below_the_table():
    console = Console(width=200)
    with console.capture() as shown:
        console.print(plan_view(planned("defaults.distill.batch.microbatches=256")))
    text = shown.get()
    assert "error: stages.14b-short.batch" in text and text.index("error:") > text.index("where the time goes:")

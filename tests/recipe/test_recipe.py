"""The recipe: merging, overrides, the graph, and every error in one sentence."""

from pathlib import Path

import pytest
import yaml
from paths import ROOT

from ministral_jax.errors import UserError
from ministral_jax.models.spec import PRESETS
from ministral_jax.recipe.load import load_recipe, order, resolve_specs
from ministral_jax.recipe.types import Recipe
from ministral_jax.stages.distill import scratch_name
from ministral_jax.stages.rows import first_row

CONFIGS = ROOT / "configs"
TINY = CONFIGS / "tiny.yaml"


def small(**changes) -> dict:
    data = {"sources": {"digits": {"kind": "digits"}}}
    return {
        "data": data,
        "defaults": {"train": {"steps": 2, "batch": {"length": 64}}},
        "stages": {"a": {"do": "train", "model": "tiny-24b"}},
        **changes,
    }


def write(path: Path, raw: dict) -> Path:
    path.write_text(yaml.safe_dump(raw))
    return path


def test_layers_of_settings_in_order(tmp_path):
    raw = small(stages={"a": {"do": "train", "model": "tiny-24b", "batch": {"sequences": 3}}})
    stage = load_recipe(
        write(tmp_path / "r.yaml", raw), ["stages.a.optimizer.lr=1e-3", "defaults.train.steps=7"]
    ).stages["a"]
    assert (stage.steps, stage.batch.sequences, stage.batch.length) == (7, 3, 64)
    assert stage.optimizer.lr == 1e-3  # YAML reads 1e-3 as a string; the type makes it a number
    assert stage.optimizer.warmup == 20


def test_a_stage_has_its_own_data_over_the_recipes(tmp_path):
    raw = small()
    raw["stages"]["a"]["data"] = {"patches": 16}
    data = load_recipe(write(tmp_path / "r.yaml", raw)).stages["a"].data
    assert data.patches == 16 and list(data.sources) == ["digits"]


def test_an_override_does_not_reach_the_other_places_of_a_yaml_alias():
    recipe = load_recipe(TINY, ["stages.8b-base.steps=3", "stages.8b-base.model.rope.yarn_factor=8"])
    assert recipe.stages["8b-base"].steps == 3 != recipe.stages["14b-base"].steps
    specs = resolve_specs(recipe)
    assert (specs["8b-base"].rope.yarn_factor, specs["14b-base"].rope.yarn_factor) == (8, 4)


@pytest.mark.parametrize("name", ["tiny", "ministral3_base", "ministral3"])
def test_recipes_of_the_project_load_and_survive_json(name):
    recipe = load_recipe(CONFIGS / f"{name}.yaml")
    assert Recipe.model_validate(recipe.dump()) == recipe
    assert load_recipe(f"configs/{name}.yaml") == recipe


def test_the_real_recipe_ends_in_the_published_sizes():
    # models are imported in the real recipe; here they are named instead of read from disk
    real = CONFIGS / "ministral3.yaml"
    imports = [name for name, stage in load_recipe(real).stages.items() if stage.do == "import"]
    parent = "{do: train, model: mistral-small-3.1-24b, steps: 1}"
    specs = resolve_specs(load_recipe(real, [f"stages.{name}={parent}" for name in imports]))
    for child, preset in (("14b", "ministral-3-14b"), ("8b", "ministral-3-8b"), ("3b", "ministral-3-3b")):
        assert specs[f"{child}-base"] == PRESETS[preset]
        assert specs[f"{child}-short"].rope.yarn_factor == 1 and specs[f"{child}-short"].context == 16_384
        assert specs[f"{child}-instruct"] == specs[f"{child}-reasoning"] == PRESETS[preset]


@pytest.mark.parametrize(
    ("recipe", "override", "teacher", "weights"),
    [
        ("ministral3", [], "teacher", "Instruct"),
        ("ministral3", ["defaults.distill.teacher=parent"], "parent", "Base"),
        ("ministral3_base", [], "parent", "Base"),
        ("ministral3_base", ["defaults.distill.teacher=teacher"], "teacher", "Instruct"),
    ],
)
def test_who_teaches_the_base_models_is_one_key(recipe, override, teacher, weights):
    stages = load_recipe(CONFIGS / f"{recipe}.yaml", override).stages
    taught = [stage for name, stage in stages.items() if name.endswith(("-short", "-base"))]
    assert len(taught) == 6 and {stage.teacher for stage in taught} == {teacher}
    assert weights in stages[teacher].path


def test_the_base_family_is_the_full_ones_and_needs_the_parent_and_one_mix_alone():
    base, full = (load_recipe(CONFIGS / f"{name}.yaml") for name in ("ministral3_base", "ministral3"))
    names = order(base)
    read = [base.stages[name] for name in names]
    assert [stage.path for stage in read if stage.do == "import"] == ["/models/Mistral-Small-3.1-24B-Base-2503"]
    assert {tuple(stage.data.sources) for stage in read if hasattr(stage, "data")} == {("mix",)}
    for name in names:
        same = {"teacher": "parent"} if full.stages[name].do == "distill" else {}
        assert full.stages[name].model_copy(update=same) == base.stages[name]


def test_the_graph_of_tiny():
    recipe = load_recipe(TINY)
    names = order(recipe)
    assert names[0] == "parent" and len(names) == 25
    assert recipe.stages["8b-pruned"].source == "14b-short"  # the next size is cut from the short-context checkpoint
    assert {recipe.stages[n].teacher for n in names if recipe.stages[n].do == "distill"} == {"parent"}
    assert order(recipe, ["14b-base"]) == ["parent", "14b-pruned", "14b-short", "14b-base"]


def test_a_baseline_differs_only_in_where_its_weights_come_from():
    recipe = load_recipe(TINY, ["stages.8b-base.baseline=true", "stages.8b-base.baseline_lr=null"])
    specs = resolve_specs(recipe)
    for name in ("8b-short", "8b-base"):
        ours, scratch = recipe.stages[name], recipe.stages[scratch_name(name)]
        assert first_row(ours, recipe.stages) == scratch.first_row
        assert ours.evaluate.patience == 2 and scratch.evaluate.patience is None
        same = {"source": None, "model": None, "baseline": False, "baseline_lr": None, "first_row": None}
        same["evaluate"] = ours.evaluate
        rates = [stage.optimizer.lr for stage in (ours, scratch)]
        assert rates == ([2e-3, 8e-3] if name == "8b-short" else [5e-4, 5e-4])
        same["optimizer"] = ours.optimizer
        assert ours.model_copy(update=same) == scratch.model_copy(update=same)
        assert specs[name] == specs[scratch_name(name)]
    assert recipe.stages["8b-short-scratch"].source is None
    assert recipe.stages["8b-base-scratch"].source == "8b-short-scratch"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.8b-short.optimizer.lrr=1", "unknown key stages.8b-short.optimizer.lrr (did you mean lr?)"),
        ("stages.8b-shrt.steps=3", "no stage '8b-shrt' (did you mean 8b-short?)"),
        ("stages.8b-short.steps=abc", "stages.8b-short.steps: input should be a valid integer"),
        ("stages.8b-short.steps=0", "stages.8b-short.steps: input should be greater than or equal to 1, got 0"),
        ("dfaults.x=1", "unknown key dfaults (did you mean defaults?)"),
        ("defaults.distil.steps=3", "defaults.distil: no such kind of stage (did you mean distill?)"),
        ("mesh.fdsp=1", "tiny.yaml: unknown key mesh.fdsp (did you mean fsdp?)"),
        ("stages=3", "override 'stages=3': stages must be a mapping of named stages"),
        ("family.parent=parnt", "family.parent names stage 'parnt', which does not exist (did you mean parent?)"),
        ("family.children.8b=8b-pruned", "family.children.8b = '8b-pruned' must be a distil stage"),
        ("stages.8b-short.do=distil", "stages.8b-short.do: 'distil' is not one of"),
        ("stages.8b-short.model.contxt=1", "unknown key stages.8b-short.model.contxt (did you mean context?)"),
        ("stages.parent.model=tiny-24", "no preset 'tiny-24' (did you mean tiny-24b?)"),
        ("stages.parent.from=3b-base", "the stages form a cycle: parent -> 3b-base"),
        ("stages.8b-short.teacher=parnt", "needs stage 'parnt', which does not exist (did you mean parent?)"),
        (
            "family.children.8b=8b-bas",
            "family.children.8b names stage '8b-bas', which does not exist (did you mean 8b-base?)",
        ),
        (
            "stages.8b-short.batch.microbatches=3",
            "stages.8b-short.batch.microbatches: must divide batch.sequences = 8, got 3",
        ),
        ("stages.8b-short.batch.length=4096", "batch.length = 4096 exceeds the model's context of 128"),
        ("stages.8b-base.model.width=3", "model.width = 3 differs from the 64 of its source '8b-short'"),
        ("data.sources.code.kind=web", "data.sources.code.kind: input should be 'python-library'"),
        ("data.sources.code.wight=1", "unknown key data.sources.code.wight (did you mean weight?)"),
        ("stages.8b-short.loss.objctive=jsd", "unknown key stages.8b-short.loss.objctive (did you mean objective?)"),
        ("steps", "override 'steps' must have the form dotted.key=value"),
        ("stages.parent.steps.x=1", "'steps' is a value, not a mapping with keys"),
        ("name=../elsewhere", "name: string should match pattern"),
    ],
)
def test_errors_say_what_where_and_what_would_be_right(override, message):
    with pytest.raises(UserError) as error:
        resolve_specs(load_recipe(TINY, [override]))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.logits.codec.entris=3", "unknown key stages.logits.codec.entris (did you mean entries?)"),
        (
            "stages.logits.codec={kind: topp}",
            "codec: 'topp' is not one of topk, sampled, hidden, dense (did",
        ),
        ("stages.14b-short.teacher={stor: logits}", "unknown key stages.14b-short.teacher.stor (did you mean store?)"),
        ("stages.14b-short.teacher=logits", "'logits' is a record stage; write it as {store: logits}"),
        ("stages.14b-short.teacher={store: parent}", "teacher.store = 'parent' must be a record stage"),
        ("stages.14b-short.seed=1", "in the order of seed 1, 'logits' records 1728 to 2432 in the order of seed 0"),
        ("stages.14b-short.steps=300", "stages.14b-short reads rows 1728 to 4128 in"),
        ("stages.14b-short.loss.objective=jsd", "stages.14b-short.loss: objective 'jsd' does not go with"),
        (
            "stages.14b-short.batch.length=64",
            "batch.length = 64 differs from the 128 of the rows that 'logits' records",
        ),
        ("stages.14b-short.evaluate.rows=200", "is more than stages.logits.held_out_rows = 128"),
        ("stages.14b-pruned.from=logits", "stages.14b-pruned.from = 'logits' must be a stage that makes a model"),
        ("stages.logits.batch.length=4096", "stages.logits.batch.length = 4096 exceeds the model's context of"),
    ],
)
def test_a_stored_teacher_must_fit(override, message):
    with pytest.raises(UserError) as error:
        resolve_specs(load_recipe(CONFIGS / "tiny_stored.yaml", [override]))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_online_and_stored_differ_by_one_line():
    """Beside the record stage: whatever else a distil stage says holds for both."""
    online, stored = load_recipe(TINY), load_recipe(CONFIGS / "tiny_stored.yaml")
    ours, theirs = online.stages["14b-short"], stored.stages["14b-short"]
    assert (ours.teacher, theirs.teacher_stage) == ("parent", "logits")
    assert ours == theirs.model_copy(update={"teacher": "parent"})
    assert order(stored, ["14b-short"]) == ["parent", "logits", "14b-pruned", "14b-short"]


def test_what_begins_anew_takes_no_source(tmp_path):
    raw = small()
    raw["stages"]["b"] = {**raw["stages"]["a"], "from": "a"}
    with pytest.raises(UserError, match=r"stages\.b\.from = 'a': a stage that does 'train' goes on from no other"):
        resolve_specs(load_recipe(write(tmp_path / "a.yaml", raw)))


def test_a_target_larger_than_its_source(tmp_path):
    with pytest.raises(UserError, match=r"stages.8b-pruned: layers = 9 is larger than the source's 8"):
        resolve_specs(load_recipe(TINY, ["stages.8b-pruned.model={preset: tiny-8b, layers: 9}"]))


def test_a_teacher_with_another_vocabulary(tmp_path):
    raw = yaml.safe_load(TINY.read_text())
    raw["stages"]["other"] = {"do": "train", "steps": 1, "model": {"preset": "tiny-24b", "vocab": 4096}}
    raw["stages"]["14b-short"]["teacher"] = "other"
    with pytest.raises(UserError, match=r"vocabulary of 2048 differs from the 4096 of teacher 'other'"):
        resolve_specs(load_recipe(write(tmp_path / "r.yaml", raw)))


def test_files_that_are_no_recipe(tmp_path):
    with pytest.raises(UserError, match="is not a file"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "a.yaml").write_text("stages: [")
    with pytest.raises(UserError, match="is not valid YAML"):
        load_recipe(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("- 1")
    with pytest.raises(UserError, match="must be a mapping"):
        load_recipe(tmp_path / "b.yaml")
    with pytest.raises(UserError, match="stage name 'a b' must be letters"):
        load_recipe(write(tmp_path / "c.yaml", small(stages={"a b": {"do": "train", "model": "tiny-24b"}})))
    with pytest.raises(UserError, match="stage name 'data' is taken"):  # a run keeps its packed rows there
        load_recipe(write(tmp_path / "d.yaml", small(stages={"data": {"do": "train", "model": "tiny-24b"}})))

"""The model card of an export: what a hub reads of it, lineage, figures and licence."""

import re
import shutil
from pathlib import Path

import jax
import pytest
import yaml
from model_cases import random_params, vlm

from ministral_jax.distributed.placement import MeshConfig, Placement, Rules, make_mesh
from ministral_jax.errors import UserError
from ministral_jax.files import write_json
from ministral_jax.stages.card import CardConfig, lineage, read_card, write_card
from ministral_jax.stages.export import export_stage
from ministral_jax.stages.manifest import digest
from ministral_jax.training.checkpoint import save_params

SMALL = vlm(layers=1)


def stage(run, name, do, parent=None, **more):
    """A finished stage, by its manifest."""
    (run / name).mkdir(parents=True)
    inputs = {"parent": {"stage": parent, "digest": digest(run / parent)}} if parent else {}
    told = {"stage": name, "do": do, "status": "finished", "config": {"do": do}, "inputs": inputs}
    write_json(run / name / "manifest.json", told | {"spec": SMALL.model_dump(mode="json")} | more)


@pytest.fixture
def run(tmp_path):
    """Three generations, the last with parameters."""
    stage(tmp_path, "parent", "train", tokens=5_000_000, steps=100, metrics={"ce": 2.5})
    held_out = {"intervals": {"kl": [0.02, 0.04]}, "documents": 66}
    stage(tmp_path, "short", "distill", "parent", tokens=2000, steps=7, metrics={"kl": 0.03}, held_out=held_out)
    params = random_params(SMALL)
    (tmp_path / "child").mkdir()
    files = save_params(tmp_path / "child" / "params", params)
    stage_metrics = {"accuracy": 0.5, "prompts": 100}
    (tmp_path / "child").rename(tmp_path / "kept")
    stage(tmp_path, "child", "grpo", "short", files=files, metrics=stage_metrics)
    (tmp_path / "kept" / "params").rename(tmp_path / "child" / "params")
    return tmp_path


def parts(text):
    _, front, body = re.split(r"^---\n", text, maxsplit=2, flags=re.M)
    return yaml.safe_load(front), body


def test_an_export_has_a_card(run):
    placement = Placement(make_mesh(MeshConfig(), jax.devices()[:1]), Rules())
    export_stage(run / "child", run / "hf", "float32", placement)
    front, body = parts((run / "hf" / "README.md").read_text())
    assert front["library_name"] == "transformers" and front["license"] == "unknown"
    assert front["tags"] == ["mistral3", "ministral_jax", "distillation"]
    assert front["pipeline_tag"] == "image-text-to-text" and "base_model" not in front and "language" not in front
    lines = [line for line in body.splitlines() if line.startswith("| ")]
    order = [line.split(" | ")[0].strip("| ") for line in lines if re.search(r"\| (train|distill|grpo) \|", line)]
    assert order == ["parent", "short", "child"]
    assert "| short | KL to the teacher, nats per token | 0.03 | 0.02 to 0.04 | 66 documents |" in lines
    assert "| child | right answers | 50.0% | 40.4% to 59.6% | 100 prompts |" in lines  # Wilson's
    assert "| weights | float32 |" in lines and "tokenizer.apply_chat_template(messages" in body
    assert "Unknown." in body and "AutoModelForImageTextToText.from_pretrained" in body


def test_where_nothing_may_be_written_nothing_is_computed(run, tmp_path):
    placement = Placement(make_mesh(MeshConfig(), jax.devices()[:1]), Rules())
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="file exists and is not an export"):
        export_stage(run / "short", tmp_path / "file", "float32", placement)  # which has no parameters


def test_a_model_is_no_stage(run, tmp_path):
    placement = Placement(make_mesh(MeshConfig(), jax.devices()[:1]), Rules())
    (tmp_path / "brought").mkdir()
    (tmp_path / "brought" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="brought is a model and no finished stage; an import stage"):
        export_stage(tmp_path / "brought", tmp_path / "hf", "float32", placement)


def test_what_the_user_says_stands_in_it(run, tmp_path):
    config = CardConfig(license="apache-2.0", base_model="owner/Parent-24B", languages=("en", "no"))
    front, body = parts(write_card(run / "child", tmp_path / "card", "native", "bfloat16", config).read_text())
    assert front["base_model"] == "owner/Parent-24B" and front["language"] == ["en", "no"]
    assert front["license"] == "apache-2.0" and "`apache-2.0`, that of the parent" in body
    assert "--load-format mistral" in body


def test_a_parent_from_a_hub_is_named(tmp_path):
    stage(tmp_path, "parent", "import", config={"do": "import", "path": "hf://owner/Parent-24B@main"})
    front, body = parts(write_card(tmp_path / "parent", tmp_path / "card", "hf", "float32", CardConfig()).read_text())
    assert front["base_model"] == "owner/Parent-24B" and "in one stage (`import`)" in body
    assert 'tokenizer("Once upon a time"' in body and "apply_chat_template" not in body


def test_a_lineage_is_found_from_within_its_directory(run, monkeypatch):
    monkeypatch.chdir(run / "child")
    assert [made.name for made in lineage(Path())] == ["parent", "short", "child"]


def test_a_lineage_ends_where_a_parent_is_gone(run, tmp_path):
    (run / "short" / "manifest.json").unlink()
    _, body = parts(write_card(run / "child", tmp_path / "card", "gguf", "q4_0", CardConfig()).read_text())
    assert "| short |" not in body and "| child | grpo |" in body and "in one stage (`grpo`)" in body
    assert "--mmproj mmproj.gguf" in body and "| weights | q4_0 |" in body


def test_what_cannot_be_written_is_said_before_anything_is_loaded(run, monkeypatch):
    shutil.rmtree(run / "child" / "params")
    (run / "mine").mkdir()
    (run / "mine" / "notes").write_text("mine")
    placement = Placement(make_mesh(MeshConfig(), jax.devices()[:1]), Rules())
    with pytest.raises(UserError, match="mine exists and is not an export of this program"):
        export_stage(run / "child", run / "mine", "float32", placement)
    with pytest.raises(UserError, match=r"^\. has no name of its own"):
        export_stage(run / "child", Path(), "float32", placement)
    stage(run, "made", "import")
    needs = "made: format fp8 needs rows to find scales on, and "
    with pytest.raises(UserError, match=f"{needs}no stage that it comes from reads any"):
        export_stage(run / "made", run / "fp8", "float32", placement, "fp8")
    stage(run, "cut", "import", "made")
    (run / "made" / "manifest.json").unlink()
    with pytest.raises(UserError, match="made, which it comes from, does not lie beside it"):
        export_stage(run / "cut", run / "fp8", "float32", placement, "fp8")
    monkeypatch.setattr("ministral_jax.interop.gguf_format.find_spec", lambda name: None)
    with pytest.raises(UserError, match="format = gguf needs gguf"):
        export_stage(run / "child", run / "gguf", "float32", placement, "gguf")


def test_what_no_hub_would_take_is_refused():
    """By the flag that the user wrote."""
    for values, said in [
        ({"license": "Apache 2.0"}, r"^--license: .* ids such as apache-2.0, .* got 'Apache 2.0'$"),
        ({"base_model": "24B"}, r"^--base-model: .* OWNER/NAME, got '24B'$"),
        ({"languages": ["English"]}, r"^--language: .* codes such as en"),
    ]:
        with pytest.raises(UserError, match=said):
            read_card(values)

"""The command line: bad input is one sentence and exit code 2, and harms nothing that is there."""

import json
import re
import shutil
from pathlib import Path

import jax
import pytest
from PIL import Image

import ministral_jax
from ministral_jax.cli import main
from ministral_jax.errors import UserError
from ministral_jax.files import write_json
from ministral_jax.recipe.load import load_recipe, resolve_specs
from ministral_jax.runs.identity import identity
from ministral_jax.stages.manifest import digest

MICRO = Path(__file__).with_name("micro.yaml")


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """As on a laptop; the suite's eight are for meshes."""
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *backend: devices)


def snapshot(directory: Path) -> dict:
    """Every file but the packed data, the mark of the owner and the log, with its content."""
    besides = {"data", ".owner", "log.txt"}
    return {p: p.read_bytes() for p in directory.rglob("*") if p.is_file() and not besides & {*p.parts}}


def refused(capsys, *argv: str) -> str:
    """Run a command that must fail as bad input does; its one line."""
    assert main(argv) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("ministral-jax: ")
    return error


def run(capsys, run_dir: Path, *rest: str) -> str:
    return refused(capsys, "run", str(MICRO), *rest, "--run-dir", str(run_dir))


def finish(run_dir: Path, name: str, **inputs: dict) -> None:
    """A stage that is finished, as far as its manifest goes."""
    recipe, directory = load_recipe(MICRO), run_dir / name
    directory.mkdir(parents=True)
    stage = identity(recipe.stages[name], resolve_specs(recipe)[name])
    write_json(directory / "stage.json", stage)
    made = {"stage": name, "do": recipe.stages[name].do, "status": "finished", "inputs": inputs}
    write_json(directory / "manifest.json", made | stage)


@pytest.fixture
def finished_parent(tmp_path) -> Path:
    finish(tmp_path / "run", "parent")
    return tmp_path / "run"


def test_a_setting_newer_than_the_run_has_its_default(capsys, finished_parent):
    path = finished_parent / "parent" / "stage.json"
    stage = json.loads(path.read_text())
    del stage["config"]["data"]["sources"]["code"]["thinking"]
    write_json(path, stage)
    error = run(capsys, finished_parent, "stages.parent.seed=9")
    assert "begun with other settings: config.seed was 0, now 9" in error


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.parent.stepps=1", "did you mean steps?"),
        ("stages.parent.steps=many", "input should be a valid integer"),
        ("stages.parent.from=3b-short", "form a cycle"),
        ("stages.14b-pruned.model.layers=4", "layers = 4 is larger than the source's 3"),
        ("data.tokenizer.vocab=600", "the tokenizer has 600 tokens but the model's vocab is 512"),
        ("data.sources.code={kind: text, path: nowhere.txt}", "nowhere.txt"),
        ("14b-shrt", "no stage '14b-shrt' in recipe 'micro' (did you mean 14b-short?)"),
    ],
)
def test_a_bad_recipe_writes_nothing(capsys, tmp_path, override, message):
    assert message in run(capsys, tmp_path / "run", override)
    assert snapshot(tmp_path / "run") == {}


def test_bad_data_is_found_before_anything_is_computed(capsys, tmp_path, monkeypatch):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for name in ("empty", "latin"):
        path = tmp_path / f"{name}.txt"
        message = run(capsys, tmp_path / "run", f"data.sources.code={{kind: text, path: {path}}}", "parent")
        assert str(path) in message
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": "broken.png", "question": "?", "answer": "1"}) + "\n")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    source = f"data.sources.code={{kind: jsonl, path: {tmp_path / 'rows.jsonl'}}}"
    assert "broken.png" in run(capsys, tmp_path / "run", source, "parent")
    Image.new("RGB", (40, 30)).save(tmp_path / "broken.png")
    monkeypatch.setattr("ministral_jax.data.images.MOST_PIXELS", 1000)
    assert "40 x 30 = 1200 pixels" in run(capsys, tmp_path / "run", source, "parent")
    assert snapshot(tmp_path / "run") == {}


def test_other_settings_than_the_finished_stages(capsys, finished_parent):
    before = snapshot(finished_parent)
    message = run(capsys, finished_parent, "stages.parent.optimizer.lr=0.5")
    assert "stage 'parent'" in message and "config.optimizer.lr was 0.0003, now 0.5" in message
    assert snapshot(finished_parent) == before


def test_saving_more_often_is_no_other_setting(capsys, finished_parent):
    more = ("stages.parent.checkpoint.every=1", "data.sources.code.limit=3")
    message = run(capsys, finished_parent, *more, "14b-pruned")
    assert "config.data.sources.code.limit was 12, now 3" in message


def test_a_stage_made_from_another_parent_than_the_one_there(capsys, finished_parent):
    source = finished_parent / "parent" / "manifest.json"
    finish(finished_parent, "14b-pruned", parent={"stage": "parent", "digest": digest(source.parent)})
    source.write_text(source.read_text().replace("train", "trained"))
    message = run(capsys, finished_parent, "14b-pruned")
    assert "stage '14b-pruned'" in message and "was made from another parent 'parent' than the one there now" in message


def test_a_manifest_that_is_no_json(capsys, finished_parent):
    (finished_parent / "parent" / "manifest.json").write_text('{"status": ')
    assert "is not valid JSON" in run(capsys, finished_parent)


def test_report_and_export_of_what_is_no_run(capsys, tmp_path):
    assert "is not a run: it has no recipe.json" in refused(capsys, "report", str(tmp_path))
    assert "is not a finished stage" in refused(capsys, "export", str(tmp_path), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_finished_stage_whose_checkpoint_is_gone(capsys, finished_parent):
    shutil.rmtree(finished_parent / "data", ignore_errors=True)
    assert "params is not a checkpoint" in run(capsys, finished_parent, "14b-pruned")


def test_a_loss_that_is_no_number(capsys, tmp_path):
    mad = ("stages.parent.optimizer.lr=1e30", "stages.parent.optimizer.warmup=0", "stages.parent.checkpoint.every=1")
    message = run(capsys, tmp_path, "parent", *mad)
    assert re.search(
        r"the (loss|norm of the gradient) is (nan|inf) at step \d; the state of step \d is kept in .*parent/state",
        message,
    )
    assert not (tmp_path / "parent" / "manifest.json").exists()


def test_load_of_what_is_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match="neither a finished stage"):
        ministral_jax.load(tmp_path)

"""Models by their names on the hub. No test here goes on the network: what downloads is replaced, or the hub is one on
the loopback."""

from __future__ import annotations

import fnmatch
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from interop_cases import SPEC
from loopback_hub import loopback_hub

import ministral_jax
from ministral_jax import cli
from ministral_jax.errors import UserError
from ministral_jax.interop import hub
from ministral_jax.recipe.load import load_fetched
from ministral_jax.settings import Rooted
from ministral_jax.stages.import_ import Import

errors = pytest.importorskip("huggingface_hub.errors")

NAME = "mistralai/Small"


class Hub:
    """A hub with one repository, and a cache of it."""

    def __init__(self, files: Path, cache: Path):
        self.files, self.cache, self.asked, self.fault = files, cache, [], None

    def snapshot_download(self, repository, *, revision, allow_patterns, local_files_only) -> str:
        wanted = [f for f in self.files.iterdir() if any(fnmatch.fnmatch(f.name, p) for p in allow_patterns)]
        missing = [file for file in wanted if not (self.cache / file.name).is_file()]
        if local_files_only:
            if missing or not self.cache.is_dir():
                raise errors.LocalEntryNotFoundError("not all here")
            return str(self.cache)
        self.asked.append((repository, revision))
        if self.fault is not None:
            raise self.fault
        self.cache.mkdir(exist_ok=True)
        for file in missing:
            shutil.copy(file, self.cache)
        return str(self.cache)


@pytest.fixture
def repository(exported, tmp_path, monkeypatch):
    """With weights in both formats, as Mistral releases them."""
    for name in (
        "consolidated.safetensors",
        "params.json",
        "tekken.json",
        "README.md",
        "picture.png",
        "chat_template.jinja",
    ):
        (exported / name).write_text("{}")
    found = Hub(exported, tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.snapshot_download", found.snapshot_download)
    monkeypatch.chdir(tmp_path)
    return found


def test_one_format_is_downloaded_once_and_read(repository, params):
    assert hub.cached(NAME) is None
    _, found = ministral_jax.load(NAME)
    assert jax.tree.all(jax.tree.map(np.array_equal, found, params))
    here = {file.name for file in repository.cache.iterdir()}
    configs = {"config.json", "generation_config.json", "processor_config.json", "params.json"}
    assert here == configs | {"model.safetensors", "tekken.json", "chat_template.jinja"}
    asked = len(repository.asked)
    assert hub.downloaded(NAME) == hub.cached(NAME) == repository.cache
    assert len(repository.asked) == asked


def test_what_was_cut_off_goes_on(repository):
    hub.downloaded(NAME)
    (repository.cache / "model.safetensors").unlink()
    assert hub.cached(NAME) is None
    hub.downloaded(f"{NAME}@v1")
    assert (repository.cache / "model.safetensors").is_file()
    assert repository.asked[-1] == (NAME, "v1")


def test_mistrals_own_format_is_taken_where_there_is_no_other(repository):
    (repository.files / "config.json").unlink()
    (repository.files / "model.safetensors").unlink()
    hub.downloaded(NAME)
    assert (repository.cache / "consolidated.safetensors").is_file()


def test_a_stage_imports_by_name(repository, tmp_path):
    stage = Import(do="import", path=Rooted.at(NAME, tmp_path))
    assert stage.path == f"hf://{NAME}"
    assert Import.model_validate(stage.model_dump()) == stage
    assert stage.is_gone and not repository.asked
    stage.fetch()
    assert not stage.is_gone
    assert stage.resolve(None, "stages.a") == SPEC


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("mistralai/Small", "mistralai/Small"),
        ("mistralai/Small@v1", "mistralai/Small@v1"),
        ("hf://someone/Small", "someone/Small"),
        (Path("hf://someone/Small"), "someone/Small"),
        ("models/small", None),
        ("/mistralai/Small", None),
        ("mistralai/Small/hf", None),
        ("gs://mistralai/Small", None),
        ("../mistralai/Small", None),
    ],
)
def test_what_is_a_name_and_what_a_path(text, name, tmp_path):
    assert hub.hub_name(text, tmp_path) == name


def test_a_directory_is_taken_before_a_name(tmp_path):
    (tmp_path / "mistralai").mkdir()
    assert hub.hub_name(NAME, tmp_path) is None
    assert Import(do="import", path=Rooted.at(NAME, tmp_path)).path == str(tmp_path / NAME)


@pytest.fixture
def served(exported, tmp_path, monkeypatch):
    """A repository of a hub on the loopback, and how many bytes of each file it has sent."""
    (exported / "pytorch_model.bin").write_bytes(b"0" * 1000)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "_READ_AHEAD", 512)
    with loopback_hub(exported, NAME) as (address, sent):
        at = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", at)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        yield exported, sent


def test_doctor_downloads_no_weights(served, capsys):
    files, sent = served
    code, said = cli.main(["doctor", str(files)]), capsys.readouterr().out
    assert cli.main(["doctor", NAME]) == code
    assert capsys.readouterr().out == said
    assert 0 < sent["model.safetensors"] < (files / "model.safetensors").stat().st_size / 3
    assert not sent["pytorch_model.bin"] and hub.cached(NAME) is None


def test_doctor_calls_a_file_on_the_hub_by_its_name_there(served, capsys):
    files, _ = served
    weights = files / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert cli.main(["doctor", f"{NAME}@main"]) == 1
    said = capsys.readouterr().out
    assert f"{NAME}@main/model.safetensors: cut short, {weights.stat().st_size} bytes" in said


def test_a_dry_run_downloads_no_weights(served, tmp_path, capsys):
    files, sent = served
    (tmp_path / "own.yaml").write_text(f"{{name: own, stages: {{parent: {{do: import, path: {NAME}}}}}}}")
    assert cli.main(["run", "own.yaml", "--dry-run"]) == 0
    assert "parent" in capsys.readouterr().out
    assert 0 < sent["model.safetensors"] < (files / "model.safetensors").stat().st_size / 3


def test_what_is_downloaded_has_companions_from_the_first(repository, tmp_path):
    rows = f"""
data: {{tokenizer: {{file: bundled}}, sources: {{rows: {{kind: text, path: .}}}}}}
stages:
  parent: {{do: import, path: {NAME}}}
  half: {{do: sft, from: parent, steps: 1, batch: {{sequences: 1, length: 8}}, optimizer: {{lr: 1.0e-3}}}}
"""
    (tmp_path / "own.yaml").write_text(rows.replace("from: parent", "from: nobody"))
    with pytest.raises(UserError, match="needs stage 'nobody'"):
        load_fetched(tmp_path / "own.yaml")
    assert not repository.asked
    (tmp_path / "own.yaml").write_text(rows)
    assert "parent-evaluated" in load_fetched(tmp_path / "own.yaml").stages
    assert repository.asked


def fault(kind):
    """One of the hub's answers, made without the request that it would belong to."""
    made = kind.__new__(kind)
    Exception.__init__(made, "the hub says no\nat length")
    return made


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (
            errors.LocalEntryNotFoundError,
            "is not on this machine, .* run `hf download mistralai/Small --include '\\*.json' --include '\\*.jinja' "
            r"--include 'SYSTEM_PROMPT.txt' --include 'model\*.safetensors'`, with 'consolidated\*.safetensors' as the "
            "last where the repository has only Mistral's own format; or give a directory$",
        ),
        (errors.GatedRepoError, "let only users in who agree to their terms"),
        (errors.RepositoryNotFoundError, "neither a directory here nor on the hub"),
        (errors.RevisionNotFoundError, "no such revision"),
        (errors.HfHubHTTPError, "could not be downloaded: the hub says no; run again, what is here is kept$"),
        (TimeoutError, "could not be downloaded: the hub says no"),
    ],
)
def test_what_the_hub_answers_is_one_sentence(repository, kind, sentence):
    repository.fault = fault(kind)
    with pytest.raises(UserError, match=f"^{NAME}.*{sentence}") as said:
        hub.downloaded(NAME)
    assert "\n" not in str(said.value)


def test_what_is_missing_is_said(repository, monkeypatch):
    (repository.files / "model.safetensors").unlink()
    (repository.files / "consolidated.safetensors").unlink()
    with pytest.raises(UserError, match=f"^{NAME}: the hub has no model.safetensors or consolidated.safetensors"):
        hub.downloaded(NAME)
    monkeypatch.setattr(hub, "find_spec", lambda name: None)
    assert hub.cached(NAME) is None
    with pytest.raises(UserError, match=r"needs huggingface_hub; in the checkout, pip install -e '.\[hub\]'"):
        hub.downloaded(NAME)


def test_what_can_be_no_name_is_said():
    with pytest.raises(UserError, match=r"^org/na--me can be no name on the hub: .*na--me"):
        hub.downloaded("org/na--me")


@pytest.mark.parametrize("command", [["doctor"], ["generate", "--prompt", "a"]])
def test_what_is_no_place_hears_of_names(tmp_path, capsys, command):
    assert cli.main([*command, str(tmp_path / "someone/Small")]) == 2
    assert "Small is not a directory; a model on the hub is hf://owner/name" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*command, "https://hub/mistralai/Small"])
    assert "s3://bucket/name or hf://owner/name" in capsys.readouterr().err


def test_an_import_of_what_is_no_place_hears_of_names(tmp_path):
    with pytest.raises(UserError, match="is not a directory; a model on the hub is hf://owner/name"):
        Import(do="import", path=str(tmp_path / "someone/Small")).resolve(None, "stages.a")
    with pytest.raises(UserError, match=r"^path = https://.* s3://bucket/name or hf://owner/name$"):
        Import(do="import", path="https://hub/mistralai/Small").resolve(None, "stages.a")


def test_a_name_without_its_owner_is_said(capsys):
    with pytest.raises(SystemExit):
        cli.main(["doctor", "hf://name"])
    assert "hf://name names no model on the hub; give hf://owner/name" in capsys.readouterr().err

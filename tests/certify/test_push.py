"""What would go to a hub, and what goes: through an interface of the hub that only writes down what it is asked."""

import sys
import types
from importlib.machinery import ModuleSpec

import pytest

from ministral_jax import cli
from ministral_jax.certify.certificate import FILE, Certificate
from ministral_jax.certify.checks import file_digests


class Hub(types.ModuleType):
    """huggingface_hub, as far as it is used."""

    def __init__(self):
        super().__init__("huggingface_hub")
        self.__spec__ = ModuleSpec("huggingface_hub", None)
        self.asked, self.token, self.fault = [], "hf_secret", None
        self.HfApi, self.get_token = lambda: self, lambda: self.token

    def create_repo(self, *args, **named):
        if self.fault:
            raise self.fault
        self.asked.append(("create", args, named))

    def upload_folder(self, **named):
        self.asked.append(("upload", named))
        return "the address"


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    return hub


@pytest.fixture
def export(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.gguf").write_bytes(b"0" * 2_000_000)
    (tmp_path / ".hidden").write_text("mine")
    return tmp_path


def certificate(export, holds) -> None:
    found = Certificate(holds=holds, format="hf", against="child", checks=[], files=file_digests(export))
    (export / FILE).write_text(found.model_dump_json())


def push(export, *options) -> int:
    return cli.main(["push", str(export), "owner/name", *options])


def test_a_dry_run_lists_and_sends_nothing(hub, export, capsys):
    certificate(export, True)
    assert push(export, "--dry-run") == 0
    said = capsys.readouterr()
    assert "2.000 MB  model.gguf" in said.out and ".hidden" not in said.out
    assert "certified against child" in said.err and hub.asked == []


def test_an_export_is_sent(hub, export, capsys):
    assert push(export, "--private") == 0
    (_, made, how), (_, sent) = hub.asked
    assert made == ("owner/name",) and how == {"private": True, "exist_ok": True}
    assert sent["repo_id"] == "owner/name" and sent["allow_patterns"] == ["config.json", "model.gguf"]
    said = capsys.readouterr()
    assert "not certified" in said.err and "the address" in said.err and "secret" not in said.out + said.err


def changed(hub, export):
    certificate(export, True)
    (export / "config.json").write_text("[]")


FAULTS = {
    "the certificate": (lambda hub, export: certificate(export, False), "is not child; certify it against the stage"),
    "another file": (changed, "config.json is not as it was certified"),
    "no certificate": (lambda hub, export: (export / FILE).write_text("{"), "is no certificate of this program"),
    "no weights": (lambda hub, export: (export / "model.gguf").unlink(), "has no weights"),
    "a pointer": (
        lambda hub, export: (export / "tekken.json").write_text("version https://git-lfs.github.com/spec/v1\noid 0"),
        "tekken.json is a Git LFS pointer, not the file itself",
    ),
    "no certificate, and a file that is cut short": (
        lambda hub, export: (export / "model.safetensors").write_bytes(b"0"),
        "ministral-jax doctor says more",
    ),
    "no login": (lambda hub, export: setattr(hub, "token", None), "HF_TOKEN"),
    "the hub": (
        lambda hub, export: setattr(hub, "fault", RuntimeError("403: not yours\nmore")),
        "push to owner/name: 403: not yours",
    ),
    "a hub that says nothing": (
        lambda hub, export: setattr(hub, "fault", TimeoutError()),
        "push to owner/name: TimeoutError",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_sent_is_said(hub, export, fault, capsys):
    plant, words = FAULTS[fault]
    plant(hub, export)
    assert push(export) == 2 and words in capsys.readouterr().err
    assert hub.asked == []


def test_a_name_that_is_none(export, capsys):
    for name in ("name", "hf://owner/name"):
        assert cli.main(["push", str(export), name]) == 2
        assert "is not OWNER/NAME" in capsys.readouterr().err


def test_a_directory_that_is_not_there(tmp_path, capsys):
    assert push(tmp_path / "nowhere") == 2
    assert "nowhere is not a directory" in capsys.readouterr().err

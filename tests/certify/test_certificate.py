"""An export is certified against what it was made from; what is not the model is not, and controls fail."""

import json
import shutil

import gguf
import jax
import numpy as np
import pytest
from model_cases import random_params, vlm

from ministral_jax import cli
from ministral_jax.certify import certificate, readers, serving
from ministral_jax.certify.checks import checks
from ministral_jax.certify.controls import CONTROLS, Control, change_tensor, copied
from ministral_jax.certify.gguf_file import set_key
from ministral_jax.certify.in_card import section_of
from ministral_jax.data.config import TokenizerConfig
from ministral_jax.data.tokenizer import export_tokenizer, load_tokenizer
from ministral_jax.interop.export import Export, export
from ministral_jax.interop.formats import FORMATS
from ministral_jax.interop.hf import export_hf
from ministral_jax.models.spec import RopeSpec

pytestmark = pytest.mark.usefixtures("quickly")
SPEC = vlm(vocab=320, context=40, rope=RopeSpec(theta=100, yarn_factor=4, original_context=16, temperature_beta=0.3))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """What was trained, as an export in float32, and the export in bfloat16 that is made of it."""
    place = tmp_path_factory.mktemp("pair")
    tokenizer = load_tokenizer(TokenizerConfig(file="bundled", vocab=320, special=64), place)
    params, files = random_params(SPEC), [export_tokenizer(tokenizer, place, SPEC.vision)]
    for name, dtype in (("trained", "float32"), ("hf", "bfloat16")):
        export_hf(params, SPEC, place / name, dtype, files)
    return place / "hf", place / "trained"


@pytest.fixture(autouse=True)
def ours_alone(monkeypatch):
    """Other programs have tests of their own; and one device is enough."""
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *backend: devices)
    monkeypatch.setattr(readers, "find_spec", lambda name: None)
    for module in (certificate, serving):
        monkeypatch.setattr(module, "has_llama", lambda: False)


HEAD, LICENCE = "---\nlicense: mit\n---\n# Name\n", "## Licence\n\nmit\n"


def test_an_export_is_certified(pair, monkeypatch, capsys):
    directory, trained = pair
    monkeypatch.chdir(directory)
    (directory / "README.md").write_text(f"{HEAD}\n## Certificate\n\nyesterday\n\n{LICENCE}")
    assert cli.main(["certify", ".", "--against", str(trained)]) == 0
    said = capsys.readouterr().out
    found = certificate.Certificate.model_validate_json((directory / "certificate.json").read_bytes())
    assert found.holds and "\nhf: certified" in said and found.not_installed == ["transformers"]
    assert [r.prompt for r in found.readings] == ["text", "image", "long"]
    assert all(r.to_ours == 0 and 0 < r.kl < 1e-3 for r in found.readings)
    assert [f.control for f in found.controls] == [c.name for c in CONTROLS["hf"]]
    assert all(f.fails and f.difference > 100 * found.limit for f in found.controls)
    assert {"config.json", "model.safetensors", "tekken.json"} <= found.files.keys()
    assert not {"certificate.json", "README.md"} & found.files.keys()
    card = (directory / "README.md").read_text()
    assert card.startswith(f"{HEAD}\n{LICENCE}\n## Certificate\n\nCertified against `trained`")
    assert "| long |" in card and "yesterday" not in card and card.count("## Certificate") == 1
    assert "bit for bit" in card and f"The weights are {found.serving.bytes / 1e6:.1f} MB." in card


def edit(directory, change) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def test_a_comparison_that_tells_nothing_certifies_nothing(pair, monkeypatch):
    nothing = Control("nothing changed", lambda spec: True, lambda directory, spec: None)
    monkeypatch.setitem(CONTROLS, "hf", (nothing,))
    found = certificate.certify(*pair)
    assert not found.holds and all(check.holds for check in found.checks)
    assert [failure.fails for failure in found.controls] == [False]
    assert "nothing changed is not told by ministral_jax" in section_of(found)


SCALES = {"attention": {"input": 1.0, "mixed": 1.0}, "mlp": {"input": 1.0, "hidden": 1.0}}
LAYERS = jax.tree.map(lambda scale: np.full(SPEC.layers, scale, np.float32), SCALES)


@pytest.fixture(scope="module")
def others(pair, tmp_path_factory):
    """A directory of each other format."""
    place, files = tmp_path_factory.mktemp("others"), [pair[1] / "tekken.json"]
    for name in ("native", "fp8", "gguf"):
        scales = {"decoder": {"layers": LAYERS}} if name == "fp8" else None
        export(Export(random_params(SPEC), SPEC, "bfloat16", files, scales), FORMATS[name], place / name)
    return place


def test_other_formats_are_certified(pair, others, capsys):
    limits = {"native": 1e-3, "fp8": 0.5, "gguf": 1e-3}
    absent = {"native": [], "fp8": ["transformers with accelerate"], "gguf": ["llama.cpp"]}
    assert cli.main(["certify", *(str(others / name) for name in limits), "--against", str(pair[1])]) == 0
    said = capsys.readouterr().out
    for name, kl in limits.items():
        found = certificate.Certificate.model_validate_json((others / name / "certificate.json").read_bytes())
        assert found.holds and found.format == name and f"{name}: certified" in said, found
        assert [r.prompt for r in found.readings] == ["text", "image", "long"] and len(found.controls) == 4
        assert found.not_installed == absent[name]
        assert all(0 < reading.kl < kl for reading in found.readings)


KEYS = {
    "rope.scaling.original_context_length": (lambda n: 2 * n, "'original_context': 32"),
    "rope.scaling.yarn_log_multiplier": (lambda multiplier: 0.0, "'attention_factor': 1.13"),
    "rope.scaling.yarn_beta_fast": (lambda beta: 2 * beta, "'beta_fast': 64"),
    "attention.layer_norm_rms_epsilon": (lambda epsilon: 2 * epsilon, "norm_eps is 1.99"),
    "context_length": (lambda n: n - 1, "context is 39, trained with 40"),
    "block_count": (lambda n: n + 1, "tensor blk.2.attn_norm.weight is missing"),
    "attention.head_count_kv": (lambda n: 0, "kv_heads: Input should be greater"),
}


@pytest.mark.parametrize("key", KEYS)
def test_a_key_of_another_model_is_seen_in_the_file_alone(pair, others, tmp_path, key):
    copied(others / "gguf", copy := tmp_path / "copy")
    change, words = KEYS[key]
    set_key(key, change)(copy, SPEC)
    found, *_ = checks(copy, pair[1], readers.opened(pair[1]), "gguf")
    failed = [check.said for check in found if not check.holds]
    assert len(failed) == 1 and words in failed[0], failed


FAULTS = {
    "another weight": (
        lambda d: change_tensor(d, "layers.1.mlp.up_proj.weight", lambda x: x * 2), "layers.1.mlp.up_proj.weight: not",
    ),
    "another temperature": (
        lambda d: edit(d, lambda c: c["text_config"]["rope_parameters"].update(llama_4_scaling_beta=0.2)),
        "'temperature_beta': 0.2",
    ),
    "another tokenizer": (
        lambda d: (d / "tekken.json").write_bytes((d / "tekken.json").read_bytes() + b" "), "tekken.json is another",
    ),
    "another end": (lambda d: edit(d, lambda c: c["text_config"].update(eos_token_id=5)), "eos_token_id 5"),
    "a template that says something else": (
        lambda d: (d / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}"), "another text",
    ),
    "no tensor": (lambda d: change_tensor(d, "norm.weight", None), "norm.weight"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_the_model_is_not_certified(pair, tmp_path, fault):
    copy = shutil.copytree(pair[0], tmp_path / "copy")
    plant, words = FAULTS[fault]
    plant(copy)
    found, *_ = checks(copy, pair[1], readers.opened(pair[1]), "hf")
    failed = [check.said for check in found if not check.holds]
    assert len(failed) and any(words in said for said in failed), found


@pytest.mark.parametrize(
    "files, more, words",
    [
        (("config.json", "model.safetensors"), "consolidated.safetensors", "two formats"),
        (("config.json", "model.safetensors"), "model.gguf", "two formats"),
        (("model.gguf",), "model-q4.gguf", "model-q4.gguf too"),
    ],
)
def test_a_certificate_is_of_all_that_lies_there(pair, tmp_path, capsys, files, more, words):
    for name in (*files, more):
        (tmp_path / name).write_text("{}")
    assert cli.main(["certify", str(pair[0]), str(tmp_path), "--against", str(pair[1])]) == 2
    said = capsys.readouterr()
    assert words in said.err and said.out == ""  # before the first is compared


def test_a_certificate_has_the_names_of_two_directories(pair, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(pair[0])
    assert cli.main(["certify", ".", "--against", str(pair[0])]) == 2
    assert f"{pair[0]} is compared with itself" in capsys.readouterr().err
    assert cli.main(["certify", str(tmp_path / "none"), "--against", "."]) == 2
    assert "none is not a directory" in capsys.readouterr().err


def test_what_is_compared_with_is_a_model(pair, tmp_path, capsys):
    assert cli.main(["certify", str(pair[0]), "--against", str(tmp_path)]) == 2
    assert "neither a finished stage" in capsys.readouterr().err


@pytest.mark.parametrize("kind, words", [(None, "is no GGUF file, or damaged"), ("Q5_0", "norm.weight is Q5_0; F32")])
def test_a_file_that_cannot_be_read_is_not_certified(pair, tmp_path, kind, words):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    if kind is not None:
        writer = gguf.GGUFWriter(path, "mistral3")
        writer.add_tensor("norm.weight", np.zeros(22, np.uint8), raw_dtype=gguf.GGMLQuantizationType[kind])
        for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            write()
        writer.close()
    found, *_, ours = checks(tmp_path, pair[1], readers.opened(pair[1]), "gguf")
    assert ours is None and not found[-1].holds and words in found[-1].said


def test_figures_of_logits():
    p, q = np.random.default_rng(0).standard_normal((2, 5, 7))
    soft = np.exp(p) / np.exp(p).sum(-1, keepdims=True), np.exp(q) / np.exp(q).sum(-1, keepdims=True)
    expected = (soft[0] * np.log(soft[0] / soft[1])).sum() / 5
    assert certificate.divergence(p, q + 3) == pytest.approx(expected, rel=1e-12)
    assert certificate.difference(p, p) == 0 and certificate.difference(p * np.nan, p) == np.inf

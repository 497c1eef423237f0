"""What stands in an exported GGUF file, read by the library that other programs read it with."""

import tracemalloc
from itertools import pairwise

import gguf
import jax
import numpy as np
import pytest
from model_cases import TEXT, VISION, YARN, random_params, vlm
from pydantic import ValidationError

from ministral_jax.data.config import TokenizerConfig
from ministral_jax.data.tokenizer import load_tokenizer
from ministral_jax.errors import UserError
from ministral_jax.interop import gguf_format
from ministral_jax.interop.export import Export, export
from ministral_jax.interop.formats import FORMATS
from ministral_jax.interop.hf import Slot, export_hf, slots
from ministral_jax.models.spec import RopeSpec
from ministral_jax.models.vision import MEAN
from ministral_jax.stages.base import Graph
from ministral_jax.stages.export import Export as ExportStage

# Rows of 64 and 32 can become whole numbers, those of 48 (the feed-forward's) cannot.
SPEC = vlm(rope=YARN, width=64, mlp_width=48)


def written(spec, directory, dtype="float32", files=(), params=None):
    export(Export(params or random_params(spec), spec, dtype, files), FORMATS["gguf"], directory)
    return directory


def read(file) -> tuple[dict, dict]:
    """Keys, and tensors as (type, values)."""
    reader = gguf.GGUFReader(file)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {t.name: (t.tensor_type.name, gguf.dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    return keys, tensors


@pytest.fixture(scope="module")
def params():
    return random_params(SPEC)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, params):
    return written(SPEC, tmp_path_factory.mktemp("gguf") / "out", params=params)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(TokenizerConfig(vocab=2000), tmp_path_factory.mktemp("tokenizer"))


def test_sizes_are_under_the_keys_of_mistral3(whole):
    keys, _ = read(whole / "model.gguf")
    ours = {name.removeprefix("mistral3."): value for name, value in keys.items() if name.startswith("mistral3.")}
    assert keys["general.architecture"] == "mistral3"
    assert ours == pytest.approx(
        {
            "vocab_size": 48,
            "context_length": 48,
            "embedding_length": 64,
            "block_count": 2,
            "feed_forward_length": 48,
            "attention.head_count": 4,
            "attention.head_count_kv": 2,
            "attention.key_length": 8,
            "attention.value_length": 8,
            "attention.layer_norm_rms_epsilon": 1e-5,
            "attention.temperature_scale": 0.3,
            "rope.dimension_count": 8,
            "rope.freq_base": 100,
            "rope.scaling.original_context_length": 12,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4,
            "rope.scaling.yarn_beta_fast": 0.5,
            "rope.scaling.yarn_beta_slow": 0.1,
            "rope.scaling.yarn_log_multiplier": 1,
        }
    )


def test_only_what_a_model_has_is_said_of_its_rope(tmp_path):
    beta = RopeSpec(theta=1e4, temperature_beta=0.3, original_context=12)
    rescaled = YARN.model_copy(update={"attention_factor": 1.5, "temperature_beta": 0.0})
    plain, warm, large = (
        {
            name: value
            for name, value in read(written(spec, tmp_path / str(i)) / "model.gguf")[0].items()
            if "scal" in name
        }
        for i, spec in enumerate((TEXT, *(TEXT.model_copy(update={"rope": rope}) for rope in (beta, rescaled))))
    )
    assert plain == {}
    assert warm.keys() == {"mistral3.attention.temperature_scale", "mistral3.rope.scaling.original_context_length"}
    assert large["mistral3.rope.scaling.attn_factor"] == 1.5
    assert "mistral3.attention.temperature_scale" not in large


def test_weights_are_those_of_the_model(whole, params):
    """Of the decoder and of the tower; of queries and keys the features that are rotated together are neighbours."""
    hf = {slot.path + str(slot.layer): slot.take(params) for slot in slots(SPEC)}
    _, text = read(whole / "model.gguf")
    _, vision = read(whole / "mmproj.gguf")
    names = {slot.name: slot for slot in [*slots(SPEC, gguf_format._TEXT), *slots(SPEC, gguf_format._VISION)]}
    assert text.keys() | vision.keys() == names.keys() | {"v.token_embd.img_break"}
    assert {"token_embd.weight", "blk.1.attn_output.weight", "output.weight"} < text.keys()
    assert {"v.patch_embd.weight", "v.blk.1.ffn_down.weight", "mm.patch_merger.weight", "mm.2.weight"} < vision.keys()
    for name, slot in names.items():
        theirs, (kind, ours) = hf[slot.path + str(slot.layer)], (text | vision)[name]
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            half = (SPEC.head_width if slot.path.startswith("decoder") else SPEC.vision.head_width) // 2
            heads = theirs.reshape(-1, 2 * half, theirs.shape[1])
            turned = np.empty_like(heads)
            turned[:, 0::2], turned[:, 1::2] = heads[:, :half], heads[:, half:]
            theirs = turned.reshape(theirs.shape)
        assert kind == "F32" and np.array_equal(ours, theirs), name
    assert np.array_equal(vision["v.token_embd.img_break"][1], params["decoder"]["embed"][12])


def test_the_tower_is_a_pixtral_projector(whole):
    keys, _ = read(whole / "mmproj.gguf")
    assert (keys["general.architecture"], keys["general.type"]) == ("clip", "mmproj")
    assert keys["clip.projector_type"] == "pixtral" and keys["clip.has_vision_encoder"] and keys["clip.use_silu"]
    ours = {name.removeprefix("clip.vision."): value for name, value in keys.items() if "vision." in name}
    assert ours.pop("image_mean") == pytest.approx(MEAN.tolist()) and len(ours.pop("image_std")) == 3
    assert ours == pytest.approx(
        {
            "projection_dim": 64,
            "image_size": 32,
            "patch_size": 2,
            "embedding_length": 16,
            "feed_forward_length": 24,
            "block_count": 2,
            "attention.head_count": 2,
            "attention.layer_norm_epsilon": 1e-5,
            "spatial_merge_size": 2,
        }
    )


def test_a_tied_head_is_left_out(tmp_path):
    _, tensors = read(written(TEXT.model_copy(update={"tied": True}), tmp_path / "out") / "model.gguf")
    assert "output.weight" not in tensors and not (tmp_path / "out" / "mmproj.gguf").exists()


@pytest.mark.parametrize(
    "dtype, head, matrix, tower, error",
    [
        ("float16", "F16", "F16", "F16", 2**-11),
        ("bfloat16", "BF16", "BF16", "BF16", 2**-8),
        ("q8_0", "Q8_0", "Q8_0", "F16", 1 / 127),
        ("q4_0", "Q8_0", "Q4_0", "F16", 1 / 7),
    ],
)
def test_number_formats(tmp_path, whole, params, dtype, head, matrix, tower, error):
    directory = written(SPEC, tmp_path / "out", dtype, params=params)
    exact = read(whole / "model.gguf")[1] | read(whole / "mmproj.gguf")[1]
    keys, text = read(directory / "model.gguf")
    _, vision = read(directory / "mmproj.gguf")
    kinds = {name: kind for name, (kind, _) in (text | vision).items()}
    assert kinds["output.weight"] == head
    assert kinds["blk.0.attn_q.weight"] == kinds["token_embd.weight"] == kinds["blk.0.attn_output.weight"] == matrix
    assert kinds["v.blk.0.attn_q.weight"] == kinds["mm.1.weight"] == tower
    # rows of 48, norms, and the two that llama.cpp convolves with
    assert kinds["blk.0.ffn_down.weight"] == ("F16" if dtype.startswith("q") else matrix)
    assert {kinds[name] for name in kinds if name.endswith("norm.weight")} == {"F32"}
    assert kinds["v.patch_embd.weight"] == kinds["mm.patch_merger.weight"] == ("F32" if tower == "BF16" else "F16")
    assert gguf.LlamaFileType(keys["general.file_type"]).name.endswith(matrix)
    for name, (_, values) in (text | vision).items():
        assert np.abs(values - exact[name][1]).max() <= error * np.abs(exact[name][1]).max(), name


def test_a_tied_embedding_has_eight_bits_where_others_have_four(tmp_path):
    spec = SPEC.model_copy(update={"tied": True, "vision": None})
    _, tensors = read(written(spec, tmp_path / "out", "q4_0") / "model.gguf")
    assert tensors["token_embd.weight"][0] == "Q8_0" and tensors["blk.0.attn_q.weight"][0] == "Q4_0"


def test_the_tokenizer_gives_the_same_tokens(tmp_path, tokenizer):
    """The file's own pieces and merges, joined as a reader does, on words that Tekken does not split."""
    spec = TEXT.model_copy(update={"vocab": 2004})
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}")
    files = [tokenizer.path, tmp_path / "chat_template.jinja"]
    keys, _ = read(written(spec, tmp_path / "out", files=files) / "model.gguf")
    told = {name.removeprefix("tokenizer."): value for name, value in keys.items() if name.startswith("tokenizer.")}
    pieces, kinds = told.pop("ggml.tokens"), told.pop("ggml.token_type")
    order = {merge: n for n, merge in enumerate(told.pop("ggml.merges"))}
    assert told == {
        "ggml.model": "gpt2",
        "ggml.pre": "tekken",
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 2,
        "ggml.unknown_token_id": 0,
        "ggml.padding_token_id": 11,
        "ggml.add_bos_token": True,
        "ggml.add_eos_token": False,
        "chat_template": "{{ bos_token }}",
    }
    assert len(pieces) == len(kinds) == 2004 and pieces[10] == "[IMG]" and pieces[2003] == "[PAD2003]"
    kind = gguf.TokenType
    assert kinds == [kind.CONTROL] * 1000 + [kind.NORMAL] * 1000 + [kind.UNUSED] * 4
    ids = {piece: i for i, piece in enumerate(pieces)}
    letters = {bytes([byte]): pieces[1000 + byte] for byte in range(256)}
    for word in (" the", " returning", "Émile", "日本語", " naïveté", "\n\n", " self", "==="):
        parts = [letters[bytes([byte])] for byte in word.encode()]
        while pairs := [(order[p], i) for i, p in enumerate(map(" ".join, pairwise(parts))) if p in order]:
            at = min(pairs)[1]
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        assert [ids[part] for part in parts] == tokenizer.encode(word), word


def test_one_tensor_is_in_memory_at_a_time(tmp_path, monkeypatch):
    spec = TEXT.model_copy(update=dict(layers=8, width=128, mlp_width=512, vocab=512))
    params = random_params(spec)
    largest = 4 * spec.width * spec.mlp_width
    assert 4 * spec.parameters > 20 * largest
    monkeypatch.setattr(gguf_format, "_ROWS", 2**14)
    written(TEXT, tmp_path / "first", "q8_0")  # what is imported and kept is no tensor
    tracemalloc.start()
    written(spec, tmp_path / "out", "q8_0", params=params)
    used = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert used < 2 * largest


def test_all_processes_fetch_the_same_tensors(tmp_path, params, monkeypatch):
    """In one order: those that do not write would wait for ever otherwise."""
    taken, take = [], Slot.take
    monkeypatch.setattr(Slot, "take", lambda self, params: taken.append((self.path, self.layer)) or take(self, params))
    written(SPEC, tmp_path / "out", params=params)
    by_writer = list(taken)
    taken.clear()
    for tensor in FORMATS["gguf"].tensors(Export(params, SPEC, "float32")):
        tensor.value()
    assert taken == by_writer and len(taken) == 46


def test_an_export_is_replaced_and_nothing_else(tmp_path, params):
    written(SPEC, tmp_path / "out", params=params)
    other = jax.tree.map(lambda p: p + 1, params)
    written(SPEC, tmp_path / "out", params=other)
    assert np.array_equal(read(tmp_path / "out/model.gguf")[1]["output_norm.weight"][1], other["decoder"]["norm"])
    export_hf(params, SPEC, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.gguf"))
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    gguf.GGUFWriter(foreign / "model.gguf", "llama").write_header_to_file()
    with pytest.raises(UserError, match=r"is not an export of this program"):
        written(SPEC, foreign, params=params)


def test_what_llama_cpp_cannot_say_is_refused(tmp_path, monkeypatch):
    for vision, eps, message in [
        (dict(rope_theta=1e3), 1e-5, r"vision.rope_theta is 1000, but .* has 10000"),
        (dict(), 1e-6, r"vision.norm_eps is 1e-05, but .* norm_eps, which is 1e-06"),
    ]:
        spec = vlm(vision=VISION.model_copy(update=vision), norm_eps=eps)
        with pytest.raises(UserError, match=message):
            written(spec, tmp_path / "out")
    with pytest.raises(UserError, match=r"'int4'; float32, float16, bfloat16, q8_0 and q4_0 can be written"):
        written(TEXT, tmp_path / "out", "int4")
    monkeypatch.setattr(gguf_format, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs gguf, which is not installed; .*'\.\[gguf\]'"):
        written(TEXT, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    stage = ExportStage(do="export", source="a", format="gguf")
    with pytest.raises(UserError, match=r"^stages.b: format = gguf needs gguf"):  # before anything is run
        stage.check_sizes(TEXT, Graph({"b": stage}, {"a": TEXT}), "stages.b")


@pytest.mark.parametrize(
    "dtype, path, value, said",
    [
        ("float16", "head", 1e5, r"output.weight holds 100000, and F16, .* ends at 65504; bfloat16"),
        ("float16", "head", np.nan, r"output.weight holds numbers that are not finite, which dtype float16"),
        ("q8_0", "embed", -9e6, r"token_embd.weight holds 9e\+06, and Q8_0, .* ends at 8.31901e\+06"),
        ("q4_0", "embed", 6e5, r"token_embd.weight holds 600000, and Q4_0, in which dtype q4_0 writes it, ends at"),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_what_float16_cannot_hold_is_refused_by_every_process(tmp_path, monkeypatch, dtype, path, value, said, first):
    """Before the first one writes, for which the others would wait."""
    monkeypatch.setattr("ministral_jax.interop.export.is_first", lambda: first)
    spec = TEXT.model_copy(update={"width": 32})
    params = random_params(spec)
    params["decoder"][path][0, 0] = value
    with pytest.raises(UserError, match=said):
        written(spec, tmp_path / "out", dtype, params=params)
    assert not list(tmp_path.iterdir())


def test_a_stage_has_a_number_format_of_its_format():
    assert ExportStage(do="export", source="a", format="gguf", dtype="q4_0").dtype == "q4_0"
    with pytest.raises(ValidationError, match=r"format hf has no dtype q4_0; it has float32, bfloat16"):
        ExportStage(do="export", source="a", dtype="q4_0")

"""Files that were made to do harm, or spoilt: what a header, an index and a configuration say is checked first."""

import json
import struct

import numpy as np
import pytest
from interop_cases import write

from ministral_jax import files
from ministral_jax.errors import UserError
from ministral_jax.interop import safetensors
from ministral_jax.interop.checkpoint import import_checkpoint, read_spec


def entry(*shape, dtype="F32", at=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(at)}


HUGE = 2**62
HEADERS = {
    "is no name of at most 256 printable characters": {"a\nb": entry(2, at=[0, 8])},
    "is 5, expected dtype, shape and data_offsets": {"a": 5},
    "tensor 'a' is .*expected dtype, shape": {"a": {"dtype": "F32"}},
    "has dtype 'F4'; I64": {"a": entry(1, dtype="F4")},
    r"has dtype \[\]": {"a": entry(1) | {"dtype": []}},
    r"has shape \[-1\], expected at most 64 whole": {"a": entry(-1)},
    r"has shape \[1.0\]": {"a": entry(1.0)},
    r"has shape \[True\]": {"a": entry(True)},
    r"has shape '1'": {"a": entry() | {"shape": "1"}},
    r"has shape \[1, 1.*": {"a": entry(*[1] * 65)},
    r"has data_offsets \[0\]": {"a": entry(1, at=[0])},
    r"has data_offsets \[-4, 0\]": {"a": entry(1, at=[-4, 0])},
    r"has data_offsets \[0, 4.0\]": {"a": entry(1, at=[0, 4.0])},
    r"has 4 bytes, not those of F32 \[2\]": {"a": entry(2)},
    r"has -4 bytes, not": {"a": entry(1, at=[4, 0])},
    r"has 0 bytes, not those of F32 \[4611686018427387904, 0\]": {"a": entry(HUGE, 0, at=[0, 0])},
    "tensor 'b' overlaps the one before it": {"a": entry(1), "b": entry(1)},
    "tensor 'c' overlaps": {"a": entry(2, at=[0, 8]), "c": entry(1, at=[4, 8])},
    "tensor 'a' leaves bytes before it that are of none": {"a": entry(1, at=[4, 8])},
    "the last 4 bytes of the file are of no tensor": {"a": entry(1)},
    "__metadata__ is .*, expected texts by name": {"__metadata__": {"writer": 1}, "a": entry(2, at=[0, 8])},
}


@pytest.mark.parametrize("said", HEADERS)
def test_a_header_that_does_not_fit_its_file(tmp_path, said):
    header = json.dumps(HEADERS[said]).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(UserError, match=f"a.safetensors: not a valid safetensors header: .*{said}"):
        safetensors.read(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{}}', "the key 'a' stands twice"),
        (b'{"a":{"dtype":"F32","dtype":"F16","shape":[1],"data_offsets":[0,4]}}', "the key 'dtype' stands twice"),
        (b"[" * 100_000, "recursion"),
        ('{"a":1}'.encode("utf-16"), "not valid JSON"),
        (b"[]", "expected a JSON object"),
    ],
)
def test_a_header_that_is_no_object(tmp_path, header, said):
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(UserError, match=f"not a valid safetensors header: .*{said}"):
        safetensors.read(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=f"not a valid safetensors header: .*{said}"):
        safetensors.metadata(tmp_path / "a.safetensors")


def test_a_long_header_is_not_read(tmp_path, monkeypatch):
    write(tmp_path / "a.safetensors", {"a": np.zeros(3, np.float32)})
    monkeypatch.setattr(safetensors, "MOST_JSON", 50)
    with pytest.raises(UserError, match=r"it has [0-9]+ bytes, at most 50 can be read"):
        safetensors.read(tmp_path / "a.safetensors")


def test_tensors_in_any_order_and_empty_ones_fill_a_file(tmp_path):
    header = {
        "b": entry(0, at=(4, 4)),
        "c": entry(at=(4, 8)),
        "a": entry(1),
        "d": entry(0, at=(0, 0)),
        "__metadata__": None,
    }
    text = json.dumps(header).encode()
    content = struct.pack("<Q", len(text)) + text + np.array([1, 2], np.float32).tobytes()
    (tmp_path / "a.safetensors").write_bytes(content)
    found = {name: tensor.read().tolist() for name, tensor in safetensors.read(tmp_path / "a.safetensors").items()}
    assert found == {"b": [], "c": 2.0, "a": [1.0], "d": []} and not safetensors.metadata(tmp_path / "a.safetensors")


@pytest.fixture
def indexed(exported):
    """The export under an index; `name(file)` says that its weights lie there."""

    def name(file):
        names = safetensors.read(exported / "model-00001-of-00001.safetensors")
        index = json.dumps({"weight_map": dict.fromkeys(names, file)})
        (exported / "model.safetensors.index.json").write_text(index)
        return exported

    (exported / "model.safetensors").rename(exported / "model-00001-of-00001.safetensors")
    return name


@pytest.mark.parametrize(
    "name",
    ["../hf/model-00001-of-00001.safetensors", "./model-00001-of-00001.safetensors", "/etc/a.safetensors",
     "..\\a.safetensors", "a\0.safetensors", "..", "", "x" * 300 + ".safetensors", "config.json", "\ud800.safetensors"],
)  # fmt: skip
def test_a_name_leads_nowhere_else(indexed, name):
    with pytest.raises(
        UserError, match=r"index.json: not a valid index: .* is no name of a .safetensors file beside it"
    ):
        import_checkpoint(indexed(name))


def test_a_link_leads_out_of_a_directory_only_to_the_blobs_of_a_hub_cache(indexed, tmp_path):
    shard = "model-00001-of-00001.safetensors"
    directory = indexed(shard)
    (directory / shard).rename(tmp_path / "elsewhere")
    (directory / shard).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a link out of its directory; put the file itself there"):
        read_spec(directory)
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0", tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in directory.iterdir():
        (blobs / f"of {file.name}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(blobs / f"of {file.name}")
    assert read_spec(snapshot)


@pytest.mark.parametrize(
    ("section", "changes", "said"),
    [
        ("text_config", {"num_hidden_layers": 10**12}, "says 1000000000000 layers, its files have only [0-9]+ tensors"),
        ("vision_config", {"num_hidden_layers": 10**12}, "says 1000000000000 layers"),
        ("text_config", {"vocab_size": 10**15}, "has shape .*, its configuration says"),
        ("text_config", {"layer_types": 5}, "layer_types has 5, this model family has full attention"),
        ("text_config", {"layer_types": [["full_attention"]]}, r"layer_types has \['full_attention'\], this model"),
        ("text_config", {"sliding_window": "wide"}, "sliding_window is 'wide', this model family has full attention"),
        ("text_config", {"tie_word_embeddings": "false"}, 'tie_word_embeddings is "false", this model family has true'),
    ],
)
def test_sizes_are_held_against_the_files_before_anything_is_made(exported, section, changes, said):
    config = json.loads((exported / "config.json").read_text())
    config[section] |= changes
    (exported / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=said):
        import_checkpoint(exported)


def test_a_configuration_that_unpacks_to_much(exported, monkeypatch):
    monkeypatch.setattr(files, "MOST_JSON", 1000)
    with pytest.raises(UserError, match=r"config.json holds more than 1000 bytes of JSON"):
        read_spec(exported)

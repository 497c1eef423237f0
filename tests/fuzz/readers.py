"""Tiny valid files of every kind that is read from outside, and what reads each."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from mutations import Mutation, spoilt_image, spoilt_json, spoilt_rows, spoilt_safetensors
from PIL import Image

from ministral_jax.data.bad_rows import Unusable
from ministral_jax.data.chat import render
from ministral_jax.data.config import SourceConfig, TokenizerConfig
from ministral_jax.data.images import open_image, resize
from ministral_jax.data.sources import open_source, read_rows
from ministral_jax.data.tokenizer import Tokenizer, load_tokenizer
from ministral_jax.doctor.examine import examine
from ministral_jax.errors import UserError
from ministral_jax.interop import safetensors
from ministral_jax.interop.checkpoint import import_checkpoint
from ministral_jax.interop.hf import slots
from ministral_jax.interop.hf_config import to_config
from ministral_jax.interop.native import NATIVE_TABLE
from ministral_jax.interop.native_config import to_params
from ministral_jax.interop.slots import table_slots
from ministral_jax.models.spec import ModelSpec, RopeSpec, VisionSpec

MIB = 2**20
VISION = VisionSpec(layers=2, width=8, mlp_width=8, heads=2, head_width=4, patch_size=2, max_image_size=32)
SPEC = ModelSpec(
    layers=2, width=8, mlp_width=8, heads=2, kv_heads=1, head_width=4, vocab=291, context=64, vision=VISION,
    rope=RopeSpec(yarn_factor=2.0, original_context=16, temperature_beta=0.1),
)  # fmt: skip


@dataclass(frozen=True)
class Reader:
    """`read` takes the directory in which the `valid` files lie; one of those that `spoil` names is spoilt first."""

    valid: dict[str, bytes]
    spoil: dict[str, Mutation]
    read: Callable[[Path], Any]
    bound: int = 256 * MIB
    """Bytes that may be allocated beside those of the files."""


def _weights(directory: Path) -> dict[str, bytes]:
    """Of `SPEC`, in two files with their index."""
    everything, found, index = slots(SPEC), {}, {}
    for number, part in enumerate((everything[:12], everything[12:]), 1):
        name = f"model-{number:05}-of-00002.safetensors"
        zeros = [(slot.name, np.zeros(slot.shape, np.float32)) for slot in part]
        tensors = [safetensors.Pending(name, x.dtype, x.shape, lambda x=x: x) for name, x in zeros]
        safetensors.write(directory / name, tensors, {"format": "pt"})
        found[name] = (directory / name).read_bytes()
        index |= {slot.name: name for slot in part}
    return found | {"model.safetensors.index.json": json.dumps({"metadata": {}, "weight_map": index}).encode()}


def _eight_bits(directory: Path) -> dict[str, bytes]:
    """`SPEC` as it is released: the decoder's matrices in FP8 with a scale each."""
    arrays: dict[str, np.ndarray] = {}
    for slot in slots(SPEC):
        is_eight = slot.name.startswith("layers.") and len(slot.shape) == 2
        arrays[slot.name] = np.zeros(slot.shape, ml_dtypes.float8_e4m3fn if is_eight else np.float32)
        if is_eight:
            base = slot.name.removesuffix("weight")
            arrays |= {f"{base}{name}": np.ones((), np.float32) for name in ("weight_scale_inv", "activation_scale")}
    pending = [safetensors.Pending(name, x.dtype, x.shape, lambda x=x: x) for name, x in arrays.items()]
    safetensors.write(directory / "model.safetensors", pending)
    scheme = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
    config = to_config(SPEC, "bfloat16") | {"quantization_config": scheme}
    content = (directory / "model.safetensors").read_bytes()
    return {"model.safetensors": content, "config.json": json.dumps(config).encode()}


_NATIVE = "consolidated.safetensors"


def _native(directory: Path) -> dict[str, bytes]:
    """`SPEC` in Mistral's own format."""
    zeros = [(slot.name, np.zeros(slot.shape, np.float32)) for slot in table_slots(SPEC, NATIVE_TABLE)]
    pending = [safetensors.Pending(name, x.dtype, x.shape, lambda x=x: x) for name, x in zeros]
    safetensors.write(directory / _NATIVE, pending)
    return {_NATIVE: (directory / _NATIVE).read_bytes(), "params.json": json.dumps(to_params(SPEC)).encode()}


def _read_header(directory: Path) -> None:
    path = directory / "model-00001-of-00002.safetensors"
    safetensors.metadata(path)
    for tensor in safetensors.read(path).values():
        tensor.read().sum()


_SPECIAL = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"),
    *("[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]", "[ARGS]", "[THINK]", "[/THINK]"),
)  # fmt: skip


def _tekken() -> bytes:
    pieces = [bytes([n]) for n in range(256)] + [b"he", b"ll", b"lo", b"hello", b"  "]
    vocab = [{"rank": n, "token_bytes": base64.b64encode(p).decode(), "token_str": None} for n, p in enumerate(pieces)]
    special = [{"rank": n, "token_str": name, "is_control": True} for n, name in enumerate(_SPECIAL)]
    config = {
        "pattern": r"\p{L}+|\p{N}|[^\p{L}\p{N}]+", "num_vocab_tokens": len(pieces), "version": "v13",
        "default_vocab_size": len(pieces) + 30, "default_num_special_tokens": 30,
    }  # fmt: skip
    image = {"image_patch_size": 2, "max_image_size": 32, "spatial_merge_size": 2}
    return json.dumps({"config": config, "vocab": vocab, "special_tokens": special, "image": image}).encode()


def _load(directory: Path, **settings: int) -> Tokenizer:
    config = TokenizerConfig(file=str(directory / "tekken.json"), **settings)
    return load_tokenizer(config, directory / "cache")


def _read_tokenizer(directory: Path) -> None:
    for settings in ({}, {"vocab": 290, "special": 30}):
        tokenizer = _load(directory, **settings)
        ids = [*tokenizer.encode("hello, w\u00f6rld 42"), *tokenizer.control_ids]
        tokenizer.decode(ids)
        assert all(0 <= token < tokenizer.vocab for token in [*ids, tokenizer.special("<s>")])
        assert tokenizer.byte_lengths.shape == (tokenizer.vocab,)


def _pictures() -> dict[str, bytes]:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    forms: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "png": (noise, {"exif": exif, "icc_profile": b"profile" * 20}),
        "gray.png": (noise.convert("L"), {}),
        "palette.png": (noise.convert("P"), {"transparency": 0}),
        "deep.png": (Image.fromarray(np.arange(384, dtype=np.uint16).reshape(16, 24)), {}),
        "jpeg": (noise, {"exif": exif}),
        "cmyk.jpeg": (noise.convert("CMYK"), {"progressive": True}),
        "webp": (noise, {"exif": exif}),
        "lossless.webp": (noise.convert("RGBA"), {"lossless": True}),
        "gif": (noise.convert("P"), {"save_all": True, "append_images": [noise.rotate(90).convert("P")]}),
        "tiff": (noise, {"compression": "tiff_lzw"}),
        "float.tiff": (Image.fromarray(np.linspace(0, 1, 384, dtype=np.float32).reshape(16, 24)), {}),
        "jpeg.tiff": (noise, {"compression": "jpeg"}),
        "bmp": (noise, {}),
        "ppm": (noise, {}),
        "jp2": (noise, {}),
    }
    found = {}
    for name, (image, options) in forms.items():
        image.save(file := io.BytesIO(), {"jp2": "JPEG2000"}.get(form := name.split(".")[-1], form), **options)
        found[name] = file.getvalue()
    return found


def _picture(name: str) -> Callable[[Path], Any]:
    return lambda directory: resize(open_image(directory / name, "row 1"), VISION)


def _rows() -> dict[str, bytes]:
    """To be read as documents, as prompts and as pairs."""
    user, said = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    tool = {"type": "function", "function": {"name": "add", "description": "d", "parameters": {"type": "object"}}}
    shown = {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]}
    thought = {"role": "assistant", "content": [{"type": "thinking", "thinking": "so"}, {"type": "text", "text": "4"}]}
    called = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "c1"},
    ]
    rows: list[dict[str, Any]] = [
        {"text": "hello world"},
        {"text": "<image> a picture", "images": ["a.png"]},
        {"question": "2+2?", "answer": "4", "level": 3},
        {"messages": [{"role": "system", "content": "Be brief."}, user, said, user, {**said, "weight": 0}]},
        {"messages": [user, *called, said], "tools": [tool]},
        {"messages": [shown, said]},
        {"messages": [{"role": "user", "content": "<image>?"}, said], "images": ["a.png"]},
        {"messages": [user, thought]},
        {"prompt": "2+2?", "chosen": "4", "rejected": "5", "probability": 0.9},
        {"chosen": [user, said], "rejected": [user, {**said, "content": "5"}], "score_chosen": 2, "score_rejected": 1},
        {"instruction": "q", "completions": [{"response": name, "overall_score": n} for n, name in enumerate("ab")]},
    ]  # fmt: skip
    lines = [json.dumps(row).encode() for row in rows]
    return {"rows": b"\n".join(lines), "prompts": b"\n".join(lines[2:]), "pairs": b"\n".join(lines[-3:])}


def _read_rows(**how: bool) -> Callable[[Path], None]:
    """Of the errors of rows that cannot be used one is raised, the worst to read."""

    def read(directory: Path) -> None:
        tokenizer, bad = _load(directory), list[UserError]()
        source = open_source("rows", SourceConfig(kind="jsonl", path=str(directory / "rows.jsonl")))
        for found in read_rows(source, **how):
            try:
                if isinstance(found, Unusable):
                    raise found.error
                for messages in filter(None, (found.messages, found.rejected)):
                    render(messages, tokenizer, VISION, found.where, found.tools)
            except UserError as error:
                bad.append(error)
        if bad:
            raise min(bad, key=lambda error: (str(error).isprintable(), -len(str(error))))

    return read


def _examine(directory: Path) -> None:
    """All that the doctor says is to be one sentence each; a fault is raised."""
    found = examine(directory)
    for finding in sorted(found, key=lambda finding: (finding.said.isprintable(), finding.level != "red")):
        if finding.level == "red" or not finding.said.isprintable():
            raise UserError(finding.said)


def readers(directory: Path) -> dict[str, Reader]:
    """By name; `directory` is a place to write in."""
    weights, tekken, pictures = _weights(directory), {"tekken.json": _tekken()}, _pictures()
    model = weights | {"config.json": json.dumps(to_config(SPEC, "float32")).encode()}
    shards = {name: spoilt_safetensors for name in weights if name.endswith(".safetensors")}
    index, config, tokens = (
        {name: spoilt_json} for name in ("model.safetensors.index.json", "config.json", "tekken.json")
    )
    native = _native(directory)
    eight = _eight_bits(directory)
    rows = {name: tekken | {"rows.jsonl": content, "a.png": pictures["png"]} for name, content in _rows().items()}
    ways = {"rows": {}, "prompts": {"prompts": True}, "pairs": {"pairs": True}}
    return {
        "safetensors": Reader(weights, {"model-00001-of-00002.safetensors": spoilt_safetensors}, _read_header),
        "weights": Reader(model, shards, import_checkpoint),
        "index": Reader(model, index, import_checkpoint),
        "config": Reader(model, config, import_checkpoint),
        "fp8": Reader(eight, config | {"model.safetensors": spoilt_safetensors}, import_checkpoint),
        "native": Reader(native, {"params.json": spoilt_json, _NATIVE: spoilt_safetensors}, import_checkpoint),
        "doctor": Reader(model | tekken, shards | index | config | tokens, _examine),
        "tokenizer": Reader(tekken, tokens, _read_tokenizer),
        **{name: Reader(rows[name], {"rows.jsonl": spoilt_rows}, _read_rows(**ways[name])) for name in rows},
        **{
            f"image {name}": Reader({name: content}, {name: spoilt_image}, _picture(name), 1536 * MIB)
            for name, content in pictures.items()
        },
    }


def kind_of(number: int, names: list[str]) -> str:
    """What file `number` is: the kinds take turns, the forms of images together two of them."""
    images = [name for name in names if name.startswith("image ")]
    others = [name for name in names if name not in images]
    turn, place = divmod(number, len(others) + 2)
    return others[place] if place < len(others) else images[(2 * turn + place) % len(images)]

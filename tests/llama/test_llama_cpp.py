"""Exported GGUF files in llama.cpp: logits, tokens and image embeddings are those of the model that was exported."""

from __future__ import annotations

from copy import deepcopy
from functools import cache, reduce
from operator import getitem

import pytest

llama_cpp = pytest.importorskip("llama_cpp")

import chat_cases  # noqa: E402
import gguf  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
from llama_cpp.llama_chat_format import Jinja2ChatFormatter  # noqa: E402
from model_cases import random_params, relative  # noqa: E402
from PIL import Image  # noqa: E402
from scipy.special import log_softmax  # noqa: E402

from ministral_jax.data.chat import render  # noqa: E402
from ministral_jax.data.config import TokenizerConfig  # noqa: E402
from ministral_jax.data.conversation import parse_messages, parse_tools  # noqa: E402
from ministral_jax.data.images import image_tokens, patch_positions, patchify, resize  # noqa: E402
from ministral_jax.data.tokenizer import export_template, load_tokenizer  # noqa: E402
from ministral_jax.interop import gguf_format  # noqa: E402
from ministral_jax.interop.export import Export, export  # noqa: E402
from ministral_jax.interop.formats import FORMATS  # noqa: E402
from ministral_jax.interop.hf import slots  # noqa: E402
from ministral_jax.interop.llama import loaded, seen  # noqa: E402
from ministral_jax.models.spec import ModelSpec, RopeSpec, VisionSpec  # noqa: E402
from ministral_jax.models.vlm import VLM, abstract_params  # noqa: E402

pytestmark = pytest.mark.llama

ORIGINAL, BEYOND = 32, 200
# As the real family: groups of queries, H·h that is not D, YaRN by 16 and a temperature from a short original context
# on. All rows are multiples of 32.
UNTIED = ModelSpec(
    layers=3, width=96, mlp_width=160, heads=4, kv_heads=2, head_width=32, vocab=2000, context=512,
    rope=RopeSpec(theta=1e4, yarn_factor=16, original_context=ORIGINAL, temperature_beta=0.1),
    vision=VisionSpec(layers=2, width=32, mlp_width=96, heads=2, head_width=16, patch_size=4, max_image_size=64),
)  # fmt: skip


def rope(spec: ModelSpec, **changes) -> ModelSpec:
    return spec.model_copy(update={"rope": spec.rope.model_copy(update=changes)})


TIED = UNTIED.model_copy(update={"tied": True, "vision": None})
OTHERS = {
    "without YaRN": UNTIED.model_copy(update={"rope": RopeSpec(theta=1e4)}),
    "temperature alone": rope(UNTIED, yarn_factor=1.0),
    "cos and sin rescaled, other bounds": rope(UNTIED, attention_factor=1.3, beta_fast=4.0, beta_slow=0.5),
}
TOKENS = np.random.RandomState(1).randint(1000, UNTIED.vocab, ORIGINAL + BEYOND).astype(np.int32)
BOUND = 1e-5
"""Of the divergence of a file in float16, nats per token."""
EXACT = 1e-9
"""Of one in float32."""


TEXTS = [
    "The quick brown fox, 12345 times.",
    "Crème brûlée, naïveté; ÉCOLE",
    "日本語のテキスト 한국어 עברית",
    "a\n\n  b\tc\r\n",
    "🙂👍🏽",
    "def f(x):\n    return x + 1\n",
    "don't WON'T I'll",
    "[INST] is text here",
    "",
]


def made(spec: ModelSpec) -> dict:
    """Parameters with logits of a standard deviation of about 2: an entropy of 5.4 nats, where 7.6 are the most. What
    rounding does to the divergence grows with the logits' square."""
    params = random_params(spec)
    params["decoder"]["norm"] *= 2
    if spec.tied:
        params["decoder"]["embed"] *= (spec.vocab / spec.width) ** 0.5
    return params


@cache
def exported(spec: ModelSpec) -> tuple[dict, np.ndarray]:
    """Parameters, and log-probabilities beyond the original context, float64."""
    params = made(spec)
    return params, log_probabilities(spec, params)


def log_probabilities(spec: ModelSpec, params: dict) -> np.ndarray:
    logits = jax.jit(VLM(spec).apply)({"params": params}, TOKENS[None])[0, ORIGINAL:]
    return log_softmax(np.asarray(logits, np.float64), -1)


def write(spec, params, directory, dtype="float16", files=()):
    export(Export(params, spec, dtype, files), FORMATS["gguf"], directory)
    return directory


def compared(directory, ours) -> tuple[float, float]:
    """KL of llama.cpp from ours, nats per token, and the share of tokens with the same first choice."""
    with loaded(directory / "model.gguf", 256) as model:
        theirs = log_softmax(model.logits(TOKENS)[ORIGINAL:].astype(np.float64), -1)
    kl = np.sum(np.exp(ours) * (ours - theirs), -1)
    return float(kl.mean()), float(np.mean(ours.argmax(-1) == theirs.argmax(-1)))


@pytest.mark.parametrize("spec", [UNTIED, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "dtype, bound, share",
    [("float32", EXACT, 1), ("float16", BOUND, 0.99), ("bfloat16", 1e-3, 0.95), ("q8_0", 0.1, 0.8), ("q4_0", 1, 0.3)],
)
def test_logits_beyond_the_original_context(spec, tmp_path, dtype, bound, share):
    params, ours = exported(spec)
    kl, same = compared(write(spec, params, tmp_path / "out", dtype), ours)
    print(f"\n{dtype}: KL {kl:.2e}, the same first choice {same:.1%}")
    assert kl <= bound and same >= share


def as_written(file, spec: ModelSpec) -> dict:
    """The parameters that a file holds."""
    tensors = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(file).tensors}
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), abstract_params(spec))
    for slot in slots(spec, gguf_format._TEXT):
        leaf = reduce(getitem, slot.path.split("/"), params)
        leaf[... if slot.layer is None else slot.layer] = slot.view(tensors[slot.name])
    return params


@pytest.mark.parametrize("spec", [UNTIED, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", ["q8_0", "q4_0"])
def test_whole_numbers_mean_the_same(spec, tmp_path, dtype):
    """Against what the file holds: what is left is that llama.cpp multiplies by activations of 8 bits."""
    params, _ = exported(spec)
    written = as_written(write(spec, params, tmp_path / "out", dtype) / "model.gguf", spec)
    kl, same = compared(tmp_path / "out", log_probabilities(spec, written))
    print(f"\n{dtype}, its own numbers: KL {kl:.2e}, the same first choice {same:.1%}")
    assert kl < 3e-3 and same > 0.9


@pytest.mark.parametrize("spec", OTHERS.values(), ids=OTHERS)
def test_other_ways_to_tell_positions(spec, tmp_path):
    params, ours = exported(spec)
    kl, same = compared(write(spec, params, tmp_path / "out", "float32"), ours)
    assert kl <= EXACT and same == 1


@pytest.mark.parametrize("spec", [UNTIED, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("changes", [{"temperature_beta": 0.0}, {"yarn_factor": 8.0}], ids=str)
def test_a_key_that_is_missing_or_wrong_shows(spec, tmp_path, changes):
    params, ours = exported(spec)
    shows(*compared(write(rope(spec, **changes), params, tmp_path / "out"), ours))


@pytest.mark.parametrize("spec", [UNTIED, TIED], ids=["untied", "tied"])
def test_queries_and_keys_that_are_not_permuted_show(spec, tmp_path, monkeypatch):
    params, ours = exported(spec)
    for path in ("decoder/layers/attention/q", "decoder/layers/attention/k"):
        name, pattern = gguf_format._TEXT[path]
        monkeypatch.setitem(gguf_format._TEXT, path, (name, pattern.replace("s r) D", "r s) D")))
    shows(*compared(write(spec, params, tmp_path / "out"), ours))


def test_a_head_that_is_dropped_shows(tmp_path):
    params, ours = exported(UNTIED)
    headless = {**params, "decoder": {name: leaf for name, leaf in params["decoder"].items() if name != "head"}}
    shows(*compared(write(UNTIED.model_copy(update={"tied": True}), headless, tmp_path / "out"), ours))


def shows(kl: float, same: float) -> None:
    print(f"\nKL {kl:.2e}, the same first choice {same:.1%}")
    assert kl > 10 * BOUND and same < 0.99


def test_text_becomes_the_same_tokens(tmp_path):
    """Words, numbers, scripts, spaces and control tokens, with a vocabulary whose merges are cut."""
    tokenizer = load_tokenizer(TokenizerConfig(vocab=UNTIED.vocab), tmp_path / "tokenizer")
    write(UNTIED, made(UNTIED), tmp_path / "out", files=[tokenizer.path])
    with loaded(tmp_path / "out/model.gguf", 64) as model:
        assert [model.tokenize(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
        assert model.tokenize("[INST]a[/INST]", special=True) == [3, *tokenizer.encode("a"), 4]


def test_the_template_in_the_file_makes_the_same_chats(tmp_path):
    """Conversations without pictures, rendered by llama-cpp-python and cut into tokens by llama.cpp."""
    tokenizer = load_tokenizer(TokenizerConfig(vocab=UNTIED.vocab, special=64), tmp_path / "tokenizer")
    tokenizer = chat_cases.versions(tokenizer, tmp_path)["v13"]
    files = [tokenizer.path, *export_template(tokenizer.path, tmp_path)]
    write(UNTIED, made(UNTIED), tmp_path / "out", files=files)
    fields = gguf.GGUFReader(tmp_path / "out/model.gguf").fields
    form = Jinja2ChatFormatter(fields["tokenizer.chat_template"].contents(), eos_token="</s>", bos_token="<s>")
    cases = [c for c in chat_cases.CASES.values() if c.version == "v13" and "image" not in str(c.messages)]
    assert len(cases) > 5
    with loaded(tmp_path / "out/model.gguf", 64) as model:
        for case in cases:
            messages, tools = deepcopy(case.messages), case.tools or []
            text = form(messages=messages, tools=case.tools).prompt
            parsed = parse_messages(deepcopy(case.messages), tmp_path, "row 1", case.is_prompt)
            ours = render(parsed, tokenizer, None, "row 1", parse_tools(tools, "row 1")).tokens
            assert model.tokenize(text, special=True) == ours.tolist()


SIZES = [(3, 5), (5, 3), (2, 4), (1, 8), (8, 8)]
"""Rows and columns of tokens; llama.cpp takes no picture of fewer than 8 as it is."""


@pytest.fixture(scope="module", params=["float32", "float16"])
def towers(request, tmp_path_factory):
    place, params = tmp_path_factory.mktemp("towers"), made(UNTIED)
    tokenizer = load_tokenizer(TokenizerConfig(vocab=UNTIED.vocab), place / "tokenizer")
    return write(UNTIED, params, place / "out", request.param, [tokenizer.path]), params


def embedded(params: dict, picture: np.ndarray) -> np.ndarray:
    """What we make of a picture, uint8 [H, W, 3]: its rows of tokens with [IMG_BREAK] between them."""
    vision = UNTIED.vision
    rows, columns = (side // vision.stride for side in picture.shape[:2])
    layout = np.array(image_tokens(rows, columns, (10, 12, 13)))[:-1]
    slot = np.where(layout == 10, np.cumsum(layout == 10) - 1, -1)
    y, x = patch_positions(rows, columns, vision.merge)
    images = {"patches": patchify(picture, vision.patch_size, vision.merge), "patch_image": np.ones_like(y)}
    images = {name: value[None, None] for name, value in (images | {"patch_row": y, "patch_col": x}).items()}
    images |= {"image_slot": slot[None]}
    return np.asarray(VLM(UNTIED).apply({"params": params}, layout[None], images, method=VLM._embed)[0])


def theirs(directory, pictures: list[np.ndarray]) -> list[np.ndarray]:
    found = []
    with loaded(directory / "model.gguf", 64) as model:
        for picture in pictures:
            with seen(model, directory / "mmproj.gguf", picture) as tokens:
                found.append(tokens.embeddings())
    return found


def noise(height: int, width: int) -> np.ndarray:
    return np.random.RandomState(2).randint(0, 256, (height, width, 3), np.uint8)


def test_image_embeddings(towers):
    """Of pictures that need no resizing. llama.cpp's GELU of the projector is the tanh approximation, in float16, hence
    the bound."""
    directory, params = towers
    pictures = [noise(rows * UNTIED.vision.stride, columns * UNTIED.vision.stride) for rows, columns in SIZES]
    for size, picture, other in zip(SIZES, pictures, theirs(directory, pictures), strict=True):
        ours = embedded(params, picture)
        difference = relative(other, ours)
        print(f"\n{size}: largest difference {difference:.1e} of the largest value")
        assert other.shape == ours.shape and difference <= 3e-3
        assert relative(other[::-1], ours) > 0.1


def test_what_memory_held_before_does_not_show(towers):
    """The breaks between rows are memory that llama.cpp has not set, times 0."""
    with loaded(towers[0] / "model.gguf", 64) as model:
        for n in range(8):
            if n % 2:  # else what was left behind by the one before
                left = [np.full(size, np.nan, np.float32) for size in (500, 5_000, 20_000, 100_000, 400_000) * 8]
                del left
            with seen(model, towers[0] / "mmproj.gguf", noise(12, 20)) as tokens:
                assert np.isfinite(tokens.embeddings()).all()


def test_a_picture_that_is_resized(towers):
    """llama.cpp resamples as we do, but to other sizes: it rounds sides to tokens where we take one more, and knows no
    longest side."""
    directory, params = towers
    near, other, large = noise(39, 55), noise(36, 50), noise(80, 40)
    by_us = [resize(Image.fromarray(picture), UNTIED.vision) for picture in (near, other, large)]
    ours, found = embedded(params, by_us[0]), theirs(directory, [near, other, large, *by_us])
    print(f"\nresized by llama.cpp {relative(found[0], ours):.1e}, by us {relative(found[3], ours):.1e}")
    assert relative(found[0], ours) <= 3e-3 and relative(found[3], ours) <= 3e-3
    tokens = lambda rows, columns: rows * (columns + 1) - 1
    assert [len(one) for one in found[1:3]] == [tokens(5, 6), tokens(10, 5)]
    assert [len(one) for one in found[4:]] == [tokens(5, 7), tokens(8, 4)]

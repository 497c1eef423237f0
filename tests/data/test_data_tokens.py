"""Tokenizer, image layout and chat format against mistral-common, the family's own."""

import hashlib
import json
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.protocol.instruct.chunk import ImageChunk, TextChunk
from mistral_common.protocol.instruct.messages import AssistantMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers import image as reference
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from PIL import Image

from ministral_jax.data import tokenizer as tokenizer_module
from ministral_jax.data.chat import ANSWER, TEXT, TRAINABLE, render, render_text
from ministral_jax.data.config import TokenizerConfig
from ministral_jax.data.conversation import Message, Thought, parse_messages
from ministral_jax.data.images import (
    image_tokens,
    open_image,
    patch_positions,
    patchify,
    resize,
    token_grid,
)
from ministral_jax.data.tokenizer import check_vocab, export_tokenizer, load_tokenizer, text_of
from ministral_jax.errors import UserError
from ministral_jax.models.spec import PRESETS, VisionSpec
from ministral_jax.models.vision import MEAN, STD, normalise

TINY = TokenizerConfig(vocab=2048, special=64)
VISION = PRESETS["tiny-24b"].vision
REAL_VISION = VisionSpec()


def test_cut_vocabulary_is_the_beginning_of_the_bundled_one(tokenizer):
    bundled = Tekkenizer.from_file(tokenizer_module._bundled())
    cut = Tekkenizer.from_file(tokenizer.path)
    assert tokenizer.vocab == cut.n_words == 2048
    for i in range(64, 2048):
        assert cut.id_to_byte_piece(i) == bundled.id_to_byte_piece(i - 64 + bundled.num_special_tokens)
        assert tokenizer.byte_lengths[i] == len(cut.id_to_byte_piece(i))
    for token in Tekkenizer.DEPRECATED_SPECIAL_TOKENS:
        assert tokenizer.special(token["token_str"]) == token["rank"]
    assert tokenizer.image_ids == (10, 12, 13) and (tokenizer.bos, tokenizer.eos) == (1, 2)
    assert not tokenizer.byte_lengths[:64].any()
    assert tokenizer.digest == hashlib.sha256(tokenizer.path.read_bytes()).hexdigest()
    written = tokenizer.path.stat().st_mtime_ns
    cache = tokenizer.path.parents[1]
    again = load_tokenizer(TINY, cache)
    assert (again.path, again.digest) == (tokenizer.path, tokenizer.digest)
    assert again.path.stat().st_mtime_ns == written
    # The released checkpoints' own files are used as they are.
    own = load_tokenizer(TokenizerConfig(file=str(tokenizer.path)), cache)
    assert own.path.read_bytes() == tokenizer.path.read_bytes()


def test_text_survives_and_control_tokens_in_it_stay_text(tokenizer):
    @settings(deadline=None)  # a busy machine is slow, not wrong
    @given(st.text())
    def survives(text):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.byte_lengths[ids].sum() == len(text.encode())

    survives()
    assert min(tokenizer.encode("</s>[IMG]<pad>")) >= 64


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (dict(file="nowhere/tekken.json"), "'nowhere/tekken.json' is not a file; give the path of a tekken.json"),
        (dict(vocab=200_000), "vocab = 200000 with 1000 special tokens leaves 199000 .* can give 256 to 150000"),
        (dict(vocab=300, special=64), "leaves 236 text tokens"),
        (dict(file="{tmp}/list.json"), "is not a usable tekken.json"),
        (dict(file="{tmp}/list.json", vocab=2048), "is not a usable tekken.json"),
    ],
)
def test_bad_tokenizers(config, sentence, tmp_path):
    (tmp_path / "list.json").write_text("[1]")
    if "file" in config:
        config["file"] = config["file"].format(tmp=tmp_path)
    with pytest.raises(UserError, match=sentence):
        load_tokenizer(TokenizerConfig(**config), tmp_path)


def test_tokenizer_and_model_must_agree(tokenizer):
    check_vocab(tokenizer, PRESETS["tiny-24b"])
    with pytest.raises(UserError, match="2048 tokens but the model's vocab is 1024"):
        check_vocab(tokenizer, PRESETS["tiny-24b"].model_copy(update=dict(vocab=1024)))
    with pytest.raises(UserError, match="is id 10 but the model's image_token is 11"):
        check_vocab(tokenizer, PRESETS["tiny-24b"].model_copy(update=dict(image_token=11)))
    with pytest.raises(UserError, match=r"no special token '\[AUDIO\]'"):
        tokenizer.special("[AUDIO]")


@settings(deadline=None)
@given(st.integers(1, 6000), st.integers(1, 6000), st.sampled_from([REAL_VISION, VISION]))
def test_image_tokens_are_laid_out_as_in_mistral_common(width, height, vision):
    config = reference.ImageConfig(vision.patch_size, vision.max_image_size, vision.merge)
    encoder = reference.ImageEncoder(config, reference.SpecialImageIDs(10, 12, 13))
    columns, rows = encoder._image_to_num_tokens(SimpleNamespace(size=(width, height)))
    assert token_grid(width, height, vision) == (rows, columns)
    tokens = image_tokens(rows, columns, (10, 12, 13))
    expected = ([10] * columns + [12]) * rows
    assert tokens == [*expected[:-1], 13]


def test_patches_are_in_merge_block_order():
    patch, merge, rows, columns = 3, 2, 2, 3
    size = (rows * merge * patch, columns * merge * patch, 3)
    pixels = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    expected, places = [], []
    for block_row in range(rows):
        for block_column in range(columns):
            for dy in range(merge):
                for dx in range(merge):
                    y, x = block_row * merge + dy, block_column * merge + dx
                    square = pixels[y * patch : (y + 1) * patch, x * patch : (x + 1) * patch]
                    expected.append([square[i, j, c] for c in range(3) for i in range(patch) for j in range(patch)])
                    places.append((y, x))
    patches = patchify(pixels, patch, merge)
    assert patches.dtype == np.uint8 and np.array_equal(patches, expected)
    assert np.array_equal(np.stack(patch_positions(rows, columns, merge), 1), places)
    picture = reference.normalize(pixels.astype(np.float32), tuple(MEAN), tuple(STD))
    flat = patchify(picture.transpose(1, 2, 0), patch, merge)
    np.testing.assert_allclose(normalise(jnp.asarray(patches)), flat, rtol=0, atol=4 * np.finfo(np.float32).eps)


def test_pictures_are_resized_to_the_grid_and_composited_on_white(tmp_path):
    clear = Image.new("RGBA", (50, 29), (0, 0, 0, 0))
    clear.putpixel((0, 0), (10, 20, 30, 255))
    clear.save(tmp_path / "clear.png")
    opened = open_image(tmp_path / "clear.png", "row 1")
    assert opened.getpixel((0, 0)) == (10, 20, 30) and opened.getpixel((1, 1)) == (255, 255, 255)
    assert resize(opened, REAL_VISION).shape == (56, 56, 3)
    assert resize(Image.new("RGB", (64, 2)), VISION).shape == (4, 32, 3)  # the longest edge is limited to 32
    exact = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8))
    assert np.array_equal(resize(exact, VISION), np.asarray(exact))
    for mode in ("L", "P", "CMYK", "LA", "1", "I;16"):
        image = Image.new(mode, (5, 5))
        image.save(tmp_path / "mode.tiff")
        assert open_image(tmp_path / "mode.tiff", "row 1").mode == "RGB"


PICTURE = Image.new("RGB", (10, 6), (200, 30, 30))
WITH_IMAGES = {
    "image first": [("What is it?", PICTURE), ("Red",)],
    "image first already": [(PICTURE, "What is it?"), ("Red",)],
    "two images": [(PICTURE, "and", PICTURE), ("Both",), ("So?",), ("a",)],
}


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_images_are_encoded_as_in_mistral_common(name, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "transform_image", lambda image, size: np.zeros((3, *size[::-1])))  # needs OpenCV
    theirs = MistralTokenizer.from_file(export_tokenizer(tokenizer, tmp_path, VISION), ValidationMode.finetuning)

    def content(parts):
        chunks = [TextChunk(text=part) if isinstance(part, str) else ImageChunk(image=part) for part in parts]
        return parts[0] if len(parts) == 1 else chunks

    turns = WITH_IMAGES[name]
    kinds = (("user", UserMessage), ("assistant", AssistantMessage)) * 2
    request = [kind(content=content(parts)) for (_, kind), parts in zip(kinds, turns, strict=False)]
    encoded = theirs.encode_chat_completion(ChatCompletionRequest(messages=request))
    messages = tuple(Message(role, parts) for (role, _), parts in zip(kinds, turns, strict=False))
    ours = render(messages, tokenizer, VISION, "row 1")
    assert ours.tokens.tolist() == encoded.tokens and len(ours.pictures) == len(encoded.images)

    def spans(flag):
        on = np.flatnonzero(ours.flags & flag)
        return [ours.tokens[run].tolist() for run in np.split(on, np.flatnonzero(np.diff(on) > 1) + 1)]

    answers = [tokenizer.encode(text) for (text,) in turns[1::2]]
    assert spans(ANSWER) == answers and spans(TRAINABLE) == [[*answer, tokenizer.eos] for answer in answers]


def test_plain_text_and_released_tokenizer_layout(tokenizer, tmp_path):
    rendered = render_text("a text", tokenizer, "here")
    assert rendered.tokens.tolist() == [1, *tokenizer.encode("a text"), 2]
    assert set(rendered.flags.tolist()) == {TRAINABLE | TEXT}
    exported = json.loads(export_tokenizer(tokenizer, tmp_path, VISION).read_text())
    assert exported["image"] == dict(image_patch_size=2, max_image_size=32, spatial_merge_size=2)
    assert export_tokenizer(tokenizer, tmp_path, None).read_bytes() == tokenizer.path.read_bytes()
    (tmp_path / "marked.json").write_bytes(b"\xef\xbb\xbf" + tokenizer.path.read_bytes())
    assert load_tokenizer(TokenizerConfig(file=str(tmp_path / "marked.json")), tmp_path).digest == tokenizer.digest


def test_openai_style_messages(tmp_path):
    raw = [
        {"role": "system", "content": "s"},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "t"},
                {"type": "image_url", "image_url": {"url": "a.png"}},
                {"type": "image_url", "image_url": "file:///b.png"},
                {"type": "image", "image": "c/d.png"},
            ],
        },
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "h"}, {"type": "text", "text": "u"}]},
    ]
    system, user, assistant = parse_messages(raw, tmp_path, "row 1")
    assert system.parts == ("s",) and assistant.parts == (Thought("h"), "u")
    assert user.parts == ("t", tmp_path / "a.png", tmp_path / "/b.png", tmp_path / "c/d.png")


def test_a_character_waits_for_all_of_its_bytes(tokenizer):
    text = "naïve 😀 日本"
    tokens, add = tokenizer.encode(text), text_of(tokenizer, (tokenizer.eos,))
    assert len(tokens) > len(text)
    pieces = [add([token]) for token in tokens]
    assert "".join(pieces) == text and "�" not in "".join(pieces)
    cut = text_of(tokenizer, (tokenizer.eos,))([*tokenizer.encode("a😀")[:-1], tokenizer.eos], final=True)
    assert cut == "a�"
    assert text_of(tokenizer, ())([tokenizer.special("[THINK]"), tokenizer.eos], final=True) == "[THINK]</s>"

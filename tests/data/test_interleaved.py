"""Texts with pictures in them: where the pictures stand, that all of the text counts and no picture, that nothing is
torn apart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ministral_jax.data.chat import TEXT, TRAINABLE, render_interleaved, render_text
from ministral_jax.data.config import DataConfig, SourceConfig
from ministral_jax.data.images import image_tokens
from ministral_jax.data.pipeline import Order, batches, held_out
from ministral_jax.data.prepare import prepare
from ministral_jax.data.sources import open_source, read_documents, source_digest
from ministral_jax.errors import UserError
from ministral_jax.models.spec import PRESETS

VISION = PRESETS["tiny-24b"].vision
LENGTH, PATCHES, ROWS = 64, 64, 40


def text_of(n: int) -> str:
    return f"{n}: before <image>after <image>é"


@pytest.fixture
def folder(tmp_path):
    """Rows of two pictures each, whose colour says which row they are of, and a long text without any."""
    folder = tmp_path / "web"
    folder.mkdir()
    rows = [{"text": text_of(n), "images": [f"{n}-{k}.png" for k in range(2)]} for n in range(ROWS)]
    for n in range(ROWS):
        for k in range(2):
            Image.new("RGB", (8, 4), (n, k, 200)).save(folder / f"{n}-{k}.png")
    rows.append({"text": "no picture, but <image> in letters. " * 40})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def config(folder, **changes):
    source = dict(kind="jsonl", path=str(folder / "rows.jsonl"), **changes)
    return DataConfig(tokenizer=dict(vocab=2048, special=64), sources=dict(web=source), held_out=0.2, patches=PATCHES)


def read(folder, *rows):
    (folder / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(read_documents(open_source("web", SourceConfig(kind="jsonl", path=str(folder / "some.jsonl")))))


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({"text": "a <image> b<image>", "images": ["0-0.png", "0-1.png"]}, ["a ", "0-0.png", " b", "0-1.png"]),
        ({"text": "<image>a", "image": "0-0.png"}, ["0-0.png", "a"]),
        ({"text": "a<image>", "images": [{"path": "0-0.png", "bytes": None}]}, ["a", "0-0.png"]),
        ({"text": "a", "images": ["0-0.png", "0-1.png"]}, ["0-0.png", "0-1.png", "a"]),
    ],
)
def test_pictures_stand_where_the_text_says_so(folder, row, parts):
    (document,) = read(folder, row)
    assert [part.name if isinstance(part, Path) else part for part in document.parts] == parts
    assert document.text is None and document.messages == ()


@pytest.mark.parametrize("more", [{}, {"images": None}])
def test_without_pictures_the_place_of_one_is_letters(folder, more, tokenizer):
    (document,) = read(folder, {"text": "a <image> b", **more})
    assert document.text == "a <image> b" and document.parts == ()
    rendered = render_text(document.text, tokenizer, "")
    assert tokenizer.decode(rendered.tokens.tolist()) == "a <image> b"


def test_all_of_the_text_is_a_target_and_no_picture_is(folder, tokenizer):
    picture = folder / "7-0.png"
    rendered = render_interleaved(("one ", picture, picture, " two"), tokenizer, VISION, "")
    shown, one, two = image_tokens(1, 2, tokenizer.image_ids), tokenizer.encode("one "), tokenizer.encode(" two")
    assert rendered.tokens.tolist() == [tokenizer.bos, *one, *shown, *shown, *two, tokenizer.eos]
    counted = [0] + [1] * len(one) + [0] * 2 * len(shown) + [1] * (len(two) + 1)
    assert (rendered.flags == np.array(counted) * (TRAINABLE | TEXT)).all()
    assert [p.shape for p in rendered.pictures] == [(4, 8, 3)] * 2 and (rendered.pictures[1] == (7, 0, 200)).all()
    with pytest.raises(UserError, match=r"^row 3: has an image but the model has no vision"):
        render_interleaved(("one", picture), tokenizer, None, "row 3")


def documents_of(data, split):
    """Of every packed document the row, its positions there, the first patch of each of its pictures' tokens, and its
    text."""
    count = data.counts["train"]["rows"]
    for batch in held_out(data, 4) if split == "held_out" else batches(data, 1, Order(0), range(count)):
        for n in range(len(batch["tokens"])):
            none = {"images": None, "image_slot": np.full(LENGTH, -1)}
            row = none | {key: array[n] for key, array in batch.items() if key != "image_sizes"}
            for segment in range(1, row["segments"].max() + 1):
                at = np.flatnonzero(row["segments"] == segment)
                slots = row["image_slot"][at]
                patches = [VISION.merge**2 * slot for slot in slots[slots >= 0]]
                yield row, at, patches, data.tokenizer.decode(row["tokens"][at].tolist())


def test_packed_rows_keep_text_and_pictures_together(folder, tmp_path, tokenizer):
    """Each document whole, beside its own pictures; every token of its text is predicted, whatever stands before it."""
    data = prepare(config(folder), LENGTH, VISION, tmp_path / "data")
    image = image_tokens(1, 2, tokenizer.image_ids)
    seen: dict[str, set[int]] = {"train": set(), "held_out": set()}
    for split, numbers in seen.items():
        for row, at, patches, text in documents_of(data, split):
            assert set(row["answer_mask"][at]) == {0}
            labels = row["tokens"][at][1:]
            pictured = np.isin(labels, tokenizer.image_ids)
            assert (row["loss_mask"][at] == [*(~pictured).astype(float), 0]).all()
            if not patches:
                assert "letters" in text
                continue
            number = int(text.partition(":")[0])
            numbers.add(number)
            first, *rest = map(tokenizer.encode, text_of(number).split("<image>"))
            expected = [*first, *(token for piece in rest for token in (*image, *piece))]
            assert row["tokens"][at].tolist() == [tokenizer.bos, *expected, tokenizer.eos]
            assert row["text_bytes"][at].sum() == len(text_of(number).replace("<image>", "").encode())
            images = np.repeat(np.arange(len(row["images"].grids)), row["images"].grids.prod(axis=1))
            first, second = images[np.array(patches) // VISION.merge**2].reshape(2, -1)
            assert (first == first[0]).all() and (second == first[0] + 1).all()
            red, green = (row["images"].patches[patches, 4 * c] for c in (0, 1))
            assert red.tolist() == [number] * 4 and green.tolist() == [0, 0, 1, 1]
    assert seen["train"] | seen["held_out"] == set(range(ROWS)) and not seen["train"] & seen["held_out"]
    assert 3 < len(seen["held_out"]) < 20


def test_another_picture_is_noticed_and_another_place_is_not(folder, tmp_path):
    source = lambda where: source_digest(config(where).sources["web"], tmp_path / "data")
    before = source(folder)
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    assert source(moved) == before
    Image.new("RGB", (8, 4), "white").save(folder / "39-1.png")
    assert source(folder) not in (before, None)
    (folder / "39-1.png").unlink()
    assert source(folder) != before


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "word " * 80, "image": "0-0.png"}, "makes 166 tokens with images but a row holds batch.length"),
        ({"text": "large", "images": ["large.png"] * 2}, "needs 512 image patches but a row holds data.patches = 64"),
        ({"text": "gone", "image": "gone.png"}, "gone.png does not exist"),
        ({"text": "a <image>", "images": ["0-0.png", "1-0.png"]}, "'1-0.png' is not shown"),
    ],
)
def test_rows_that_cannot_be_used_are_named_or_left_out(folder, tmp_path, row, reason):
    Image.new("RGB", (100, 100)).save(folder / "large.png")
    with (folder / "rows.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=rf"row {ROWS + 2}.*{reason}"):
        prepare(config(folder), LENGTH, VISION, tmp_path / "data")
    data = prepare(config(folder, on_bad_row="skip"), LENGTH, VISION, tmp_path / "data")
    assert data.counts["left_out"]["web"]["rows"] == 1

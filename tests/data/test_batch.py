"""The same document is the same row of the batch, packed on disk or put there by a sampler."""

import numpy as np
from PIL import Image
from safetensors.numpy import save

from ministral_jax.data.batch import bucket, images_of_rows, one_per_row
from ministral_jax.data.chat import render
from ministral_jax.data.conversation import Message
from ministral_jax.data.images import to_patches
from ministral_jax.data.rows import decode_row
from ministral_jax.models.spec import PRESETS

VISION = PRESETS["tiny-24b"].vision


def test_a_packed_row_of_one_document_is_that_of_a_prompt(tokenizer):
    pictures = [Image.new("RGB", size, "red") for size in ((9, 6), (4, 4))]
    document = render((Message("user", (*pictures, "Which?")),), tokenizer, VISION, "here")
    images, size = to_patches(document.pictures, VISION), len(document.tokens)
    sizes, one = np.array([size], np.int32), np.ones(1, np.int32)
    record = dict(tokens=document.tokens, flags=document.flags, sizes=sizes, documents=one, **images._asdict())
    packed, shown = decode_row(save(record), bucket(size), tokenizer)
    batch = one_per_row([document.tokens, [1, 2]], rows=3)
    for key, array in batch.items():
        assert array.shape == (3, bucket(size)) and array.dtype == np.int32
        np.testing.assert_array_equal(array[0], packed[key], key)
        assert not array[2].any()
    for ours, theirs in zip(shown, images, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    found = images_of_rows([images, None], batch["tokens"] == tokenizer.image_ids[0])
    assert found["images"].tolist() == [images, None, None] and (found["image_slot"][1:] == -1).all()
    assert found["image_slot"].max() == images.grids.prod(axis=1).sum() - 1
    assert images_of_rows([None], batch["tokens"] < 0) == {}
    assert batch["labels"][1, :2].tolist() == [2, 0] and batch["positions"][1, :3].tolist() == [0, 1, 0]
    assert one_per_row([[1, 2]], shortest=40)["tokens"].shape == (1, 48)
    assert set(packed) - set(batch) == {"loss_mask", "answer_mask", "text_bytes", "document"}


def test_few_shapes_are_compiled():
    sizes = {bucket(n): n for n in range(1, 1025)}
    assert list(sizes) == [32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024] and all(k == n for k, n in sizes.items())

"""A few held-out questions about images, with what the model would answer: what a reader looks at before any figure."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ministral_jax.data.images import thumbnail, unpatchify
from ministral_jax.data.pipeline import held_out
from ministral_jax.data.prepare import PackedData
from ministral_jax.distributed.collectives import is_first
from ministral_jax.files import write_json

SAMPLES = 16

Batch = dict[str, Any]


def write_samples(
    path: Path, data: PackedData, batch_size: int, limit_rows: int, predictions: list[np.ndarray]
) -> None:
    """`{"images": [{"png" in base64, "question", "label", "answer"}]}` of the first held-out questions about an image;
    the first process writes them.

    `predictions` are the most probable next tokens `[B, T]` per batch of `held_out(..)`; the answer is read off
    under teacher forcing.
    """
    if not is_first():
        return
    batches = zip(held_out(data, batch_size, limit_rows), predictions, strict=True)
    samples = (sample for batch, predicted in batches for sample in _samples(data, batch, predicted))
    write_json(path, {"images": list(islice(samples, SAMPLES))})


def _samples(data: PackedData, batch: Batch, predicted: np.ndarray) -> Iterator[dict[str, str]]:
    if "image_slot" not in batch or data.vision is None:
        return
    for number, tokens in enumerate(batch["tokens"]):
        row = {key: value[number] for key, value in batch.items()}
        answered = row["answer_mask"] > 0
        for segment in np.unique(row["segments"][answered]):
            document = row["segments"] == segment
            slots = row["image_slot"][document & (row["image_slot"] >= 0)]
            if slots.size == 0:
                continue
            # of the first merged token's first patch
            here = row["patch_image"] == row["patch_image"][slots[0] * data.vision.merge**2]
            places = row["patch_row"][here], row["patch_col"][here]
            (positions,) = np.nonzero(document & answered)
            question = document & (np.arange(len(document)) <= positions[0])
            yield {
                "png": thumbnail(unpatchify(row["patches"][here], *places, data.vision.patch_size)),
                "question": data.tokenizer.decode(tokens[question].tolist()),
                "label": data.tokenizer.decode(tokens[positions + 1].tolist()),
                "answer": data.tokenizer.decode(predicted[number][positions].tolist()),
            }

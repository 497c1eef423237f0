"""A few held-out questions about images, with what the model would answer: what a reader looks at before any figure."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ministral_jax.data.images import ImagePatches, thumbnail, unpatchify
from ministral_jax.data.pipeline import held_out
from ministral_jax.data.prepare import PackedData
from ministral_jax.distributed.collectives import is_first
from ministral_jax.files import write_json
from ministral_jax.models.spec import VisionSpec

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
    if "images" not in batch or data.vision is None:
        return
    arrays = {key: value for key, value in batch.items() if key != "image_sizes"}
    for number, tokens in enumerate(batch["tokens"]):
        row = {key: value[number] for key, value in arrays.items()}
        answered = row["answer_mask"] > 0
        for segment in np.unique(row["segments"][answered]):
            document = row["segments"] == segment
            slots = row["image_slot"][document & (row["image_slot"] >= 0)]
            if slots.size == 0:
                continue
            (positions,) = np.nonzero(document & answered)
            question = document & (np.arange(len(document)) <= positions[0])
            yield {
                "png": thumbnail(_picture(row["images"], slots[0], data.vision)),
                "question": data.tokenizer.decode(tokens[question].tolist()),
                "label": data.tokenizer.decode(tokens[positions + 1].tolist()),
                "answer": data.tokenizer.decode(predicted[number][positions].tolist()),
            }


def _picture(images: ImagePatches, slot: int, vision: VisionSpec) -> np.ndarray:
    """uint8 `[H, W, 3]` of which one merged token is `slot` of the row."""
    ends = images.grids.prod(axis=1).cumsum()
    number = int(np.searchsorted(ends, slot, side="right"))
    last, (rows, columns) = ends[number] * vision.merge**2, images.grids[number].tolist()
    return unpatchify(images.patches[last - rows * columns * vision.merge**2 : last], rows, columns, vision)

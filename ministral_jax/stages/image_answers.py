"""A few held-out questions about images, with what the model would answer: what a reader looks at before any figure."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ministral_jax.data.images import unpatchify
from ministral_jax.data.pipeline import held_out
from ministral_jax.data.prepare import PackedData
from ministral_jax.distributed.collectives import is_first
from ministral_jax.files import write_json

SAMPLES = 16
THUMBNAIL = 256
"""Longest side in pixels."""

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
    samples: list[dict[str, Any]] = []
    for batch, predicted in zip(held_out(data, batch_size, limit_rows), predictions, strict=True):
        for row in range(batch["tokens"].shape[0]):
            samples += _row_samples(data, {key: value[row] for key, value in batch.items()}, predicted[row])
            if len(samples) >= SAMPLES:
                write_json(path, {"images": samples[:SAMPLES]})
                return
    write_json(path, {"images": samples})


def _row_samples(data: PackedData, row: Batch, predicted: np.ndarray) -> list[dict[str, Any]]:
    if "image_slot" not in row or data.vision is None:
        return []
    samples = []
    answered = row["answer_mask"] > 0
    for segment in np.unique(row["segments"][answered]):
        document = row["segments"] == segment
        slots = row["image_slot"][document & (row["image_slot"] >= 0)]
        if slots.size == 0:
            continue
        block = data.vision.merge**2  # patches of one merged token
        image = row["patch_image"][slots[0] * block]
        here = row["patch_image"] == image
        places = row["patch_row"][here], row["patch_col"][here]
        (positions,) = np.nonzero(document & answered)
        question = document & (np.arange(len(document)) <= positions[0])
        samples.append(
            {
                "png": _png(unpatchify(row["patches"][here], *places, data.vision.patch_size)),
                "question": data.tokenizer.decode(row["tokens"][question].tolist()),
                "label": data.tokenizer.decode(row["tokens"][positions + 1].tolist()),
                "answer": data.tokenizer.decode(predicted[positions].tolist()),
            }
        )
    return samples


def _png(pixels: np.ndarray) -> str:
    image, file = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()

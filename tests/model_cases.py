"""Small models and packed batches that the model, parity and interop tests share. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from ministral_jax.data.bins import binned
from ministral_jax.distributed.placement import Bins
from ministral_jax.interop.hf import slots
from ministral_jax.models.spec import ModelSpec, RopeSpec, VisionSpec
from ministral_jax.models.vlm import VLM, Compute, abstract_params

IMG, BREAK, END = 10, 12, 13
PLAIN = Compute()

VISION = VisionSpec(layers=2, width=16, mlp_width=24, heads=2, head_width=8, patch_size=2, max_image_size=32)
# H·h = 32 is not D = 20, and the original context is a fraction of the documents' length.
TEXT = ModelSpec(
    layers=2, width=20, mlp_width=28, heads=4, kv_heads=2, head_width=8, vocab=48, context=48, vision=None,
    rope=RopeSpec(theta=1e4),
)  # fmt: skip
# Both ends of the ramp fall inside the head and between whole numbers, so that rounding them shows.
YARN = RopeSpec(theta=100, yarn_factor=4, original_context=12, temperature_beta=0.3, beta_fast=0.5, beta_slow=0.1)


@dataclass(frozen=True)
class Document:
    """Tokens [n], and normalised images [3, height, width] in the order of their [IMG] tokens."""

    tokens: np.ndarray
    images: tuple[np.ndarray, ...] = ()


@dataclass(frozen=True)
class Case:
    spec: ModelSpec
    rows: tuple[tuple[Document, ...], ...]

    @property
    def documents(self) -> list[Document]:
        return [document for row in self.rows for document in row]


def text(length: int, seed: int, spec: ModelSpec = TEXT) -> Document:
    return Document(np.random.RandomState(seed).randint(14, spec.vocab, length).astype(np.int32))


def with_images(grids: list[tuple[int, int]], between: int, seed: int, spec: ModelSpec) -> Document:
    """Images of `grids` merged tokens (rows, columns), each followed by its token layout and `between` text tokens."""
    random, side = np.random.RandomState(seed), spec.vision.stride
    tokens, images = [1], []
    for rows, columns in grids:
        images.append(random.standard_normal((3, rows * side, columns * side)).astype(np.float32))
        layout = ([IMG] * columns + [BREAK]) * rows
        tokens += [*layout[:-1], END, *random.randint(14, spec.vocab, between)]
    return Document(np.array(tokens, np.int32), tuple(images))


def vlm(**changes) -> ModelSpec:
    return TEXT.model_copy(update={"vision": VISION, **changes})


def image_case(spec: ModelSpec) -> Case:
    """Two rows: three documents with and without images of different sizes, and one long document with an image."""
    first = with_images([(2, 3), (3, 1)], 4, 1, spec), text(7, 2, spec), with_images([(1, 2)], 5, 3, spec)
    return Case(spec, (first, (with_images([(2, 2)], 30, 4, spec),)))


CASES = {
    "text": Case(TEXT, ((text(40, 5),),)),
    "text_tied_long": Case(TEXT.model_copy(update={"tied": True, "rope": YARN}), ((text(48, 6), text(9, 7)),)),
    "text_yarn_alone": Case(
        TEXT.model_copy(update={"rope": YARN.model_copy(update={"temperature_beta": 0.0})}), ((text(40, 8),),)
    ),
    "text_temperature_alone": Case(
        TEXT.model_copy(update={"rope": RopeSpec(theta=1e4, original_context=12, temperature_beta=0.3)}),
        ((text(40, 9),),),
    ),
    "images": image_case(vlm(rope=YARN)),
    "images_tied": image_case(vlm(tied=True, norm_eps=1e-3)),
}


def patches(image: np.ndarray, spec: VisionSpec) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Patches [n, 3pp] in merge-block order, and their rows and columns [n]."""
    p, m = spec.patch_size, spec.merge
    flat = rearrange(image, "c (by dy py) (bx dx px) -> (by bx dy dx) (c py px)", py=p, px=p, dy=m, dx=m)
    grid = np.mgrid[: image.shape[1] // p, : image.shape[2] // p]
    rows, columns = rearrange(grid, "yx (by dy) (bx dx) -> yx (by bx dy dx)", dy=m, dx=m)
    return flat, rows, columns


def pack(case: Case, padding: int = 3, order: list[int] | None = None) -> dict[str, np.ndarray]:
    """The project's batch: `tokens`, `positions`, `segments` [B, T], and the five image arrays if any document has
    images, each row's in a bin of its own. Every row ends in padding."""
    rows = [[row[i] for i in order or range(len(row))] for row in case.rows]
    length = max(sum(len(d.tokens) for d in row) for row in rows) + padding
    batch = {name: np.zeros((len(rows), length), np.int32) for name in ("tokens", "positions", "segments")}
    slot, packed = np.full((len(rows), length), -1, np.int32), []
    for b, row in enumerate(rows):
        at, image, arrays = 0, 0, []
        for number, document in enumerate(row, 1):
            here = slice(at, at + len(document.tokens))
            batch["tokens"][b, here] = document.tokens
            batch["positions"][b, here] = np.arange(len(document.tokens))
            batch["segments"][b, here] = number
            before = sum(len(a[0]) for a in arrays) // 4
            for pixels in document.images:
                image += 1
                flat, y, x = patches(pixels, case.spec.vision)
                arrays.append((flat, np.full(len(flat), image), y, x))
            places = at + np.flatnonzero(document.tokens == IMG)
            slot[b, places] = before + np.arange(len(places))
            at = here.stop
        packed.append(arrays)
    if not any(packed):
        return batch
    count = max(sum(len(a[0]) for a in arrays) for arrays in packed) + 4
    names, width = ("patches", "patch_image", "patch_row", "patch_col"), case.spec.vision.patch_width
    for name in names:
        shape, kind = ((len(rows), count, width), np.float32) if name == "patches" else ((len(rows), count), np.int32)
        batch[name] = np.zeros(shape, kind)
    for b, arrays in enumerate(packed):
        for name, parts in zip(names, zip(*arrays, strict=True), strict=False):
            joined = np.concatenate(parts)
            batch[name][b, : len(joined)] = joined
    return batch | {name: batch[name][:, None] for name in names} | {"image_slot": slot}


def by_row(batch: dict, vision: VisionSpec) -> dict:
    """A host's batch whose rows each have their pictures in one bin of their own; no image arrays without any."""
    return binned(batch, Bins(shards=len(batch["tokens"])), vision)


def inputs(batch: dict) -> dict:
    """Arguments of `VLM` from a batch."""
    images = {k: batch[k] for k in ("patches", "patch_image", "patch_row", "patch_col", "image_slot") if k in batch}
    return {**{k: batch[k] for k in ("tokens", "positions", "segments")}, "images": images or None}


def random_params(spec: ModelSpec, seed: int = 0, dtype=np.float32) -> dict:
    """Every leaf random, gains too."""
    random = np.random.RandomState(seed)

    def fill(path, leaf):
        value = random.standard_normal(leaf.shape)
        if "norm" in str(path[-1]):
            return (1 + 0.3 * value).astype(dtype)
        return (value * (leaf.shape[-2] if "attention" not in str(path) else spec.width) ** -0.5).astype(dtype)

    return jax.tree_util.tree_map_with_path(fill, abstract_params(spec))


def targets(batch: dict, vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels and positive weights [B, T], 0 on padding, that depend on a document's tokens and not on its place."""
    labels = (batch["tokens"] * 7 + batch["positions"] * 5) % vocab
    weights = np.where(batch["segments"] > 0, 0.5 + (batch["positions"] * 3 % 5) / 5, 0)
    return labels, weights


def loss(params: dict, spec: ModelSpec, batch: dict, compute: Compute = PLAIN) -> tuple[jax.Array, jax.Array]:
    """Weighted cross-entropy summed over tokens, and the logits [B, T, V]."""
    labels, weights = targets(batch, spec.vocab)
    logits = VLM(spec, compute).apply({"params": params}, **inputs(batch))
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)[..., 0]
    return -jnp.sum(picked * weights), logits


def loss_and_grads(params: dict, spec: ModelSpec, batch: dict, compute: Compute = PLAIN):
    """((loss, logits), gradients)."""
    return jax.jit(jax.value_and_grad(lambda p: loss(p, spec, batch, compute), has_aux=True))(params)


def by_hf_name(tree: dict, spec: ModelSpec) -> dict[str, np.ndarray]:
    """Parameters or their gradients under Hugging Face names without prefixes, in Hugging Face shapes."""
    return {slot.name: slot.take(tree) for slot in slots(spec)}


def relative(a, b) -> float:
    """max|a - b| / max|b|."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.max(np.abs(a - b)) / np.max(np.abs(b)))

"""Fine-tuning on packed rows is fine-tuning on their documents, one at a time, and on what the assistant says alone."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from model_cases import YARN, by_row, random_params
from paths import TESTS
from sampling_cases import placed

from ministral_jax.data.bins import binned
from ministral_jax.data.conversation import spell
from ministral_jax.data.images import patchify, resize
from ministral_jax.data.pipeline import Order, batches
from ministral_jax.data.prepare import prepare
from ministral_jax.data.sources import open_source, read_documents
from ministral_jax.data.tokenizer import text_of
from ministral_jax.distributed.placement import Bins
from ministral_jax.losses.head import LossHead
from ministral_jax.losses.targets import LossOptions
from ministral_jax.models.vlm import IMAGE_KEYS, VLM, Compute
from ministral_jax.recipe.load import load_recipe, resolve_specs
from ministral_jax.stages.distill import FROZEN
from ministral_jax.stages.teaching import distillation
from ministral_jax.stages.train import next_token_loss
from ministral_jax.teachers.teacher import online_targets
from ministral_jax.training.state import split_frozen

pytestmark = pytest.mark.usefixtures("quickly")
LENGTH, ROWS = 64, 8
RECIPE = load_recipe(TESTS.joinpath("micro_post.yaml"))
STAGE = RECIPE.stages["sft"]
# With what long context adds, so that positions that do not restart show: plain RoPE sees differences alone.
SPEC = resolve_specs(RECIPE, ["sft"])["sft"].model_copy(update={"rope": YARN})
TOKEN_KEYS = ("tokens", "positions", "segments", "labels", "loss_mask", "image_slot")

# A token's loss is reached through about 30 sums in a row (two towers, two layers, the head), the longest of 512 terms;
# one in another order differs by sqrt(terms) * 2^-24 of its size at most, as the signs of roundings are random: 1.3e-6.
# Over the loss of a batch these average out; to a gradient each of them is added once more on the way back.
LOSS_TOLERANCE = 512**0.5 * 2**-24
GRADIENT_TOLERANCE = 2 * 30**0.5 * LOSS_TOLERANCE


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare(STAGE.data, LENGTH, SPEC.vision, tmp_path_factory.mktemp("packed"))


@pytest.fixture(scope="module")
def batch(data) -> dict[str, np.ndarray]:
    """Rows that all hold several documents, some of them text and two images."""

    def mixed(found: dict[str, np.ndarray]) -> bool:
        documents = found["segments"].max(axis=1)
        images = np.array([0 if row is None else len(row.grids) for row in found["images"]])
        several = (documents > 1).all() and documents.sum() > 2 * ROWS
        return bool(several and ((documents > images) & (images > 1)).any() and (images == 0).any())

    every = (found for found in batches(data, ROWS, Order(), steps=range(40)) if "images" in found)
    return next(found for found in every if mixed(found))


@pytest.fixture(scope="module")
def documents(batch) -> list[dict[str, np.ndarray]]:
    """Each document of the batch as a row of its own, `[T]`."""
    return [packed([cut(row, s)]) for row in each(batch) for s in range(1, row["segments"].max() + 1)]


def each(batch: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """The rows of a batch, each with the patches of its own pictures."""
    found = {key: array[:, 0] if key in IMAGE_KEYS[:4] else array for key, array in by_row(batch, SPEC.vision).items()}
    return [{key: array[row] for key, array in found.items()} for row in range(len(batch["tokens"]))]


def cut(row: dict[str, np.ndarray], segment: int) -> dict[str, Any]:
    """A document of a row: its tokens, which of them count, and its images, `(patches, rows, columns)` of each."""
    here = row["segments"] == segment
    assert (np.diff(np.flatnonzero(here)) == 1).all()
    slots = row["image_slot"][here & (row["image_slot"] >= 0)]
    images = []
    for image in dict.fromkeys(row["patch_image"][slots * SPEC.vision.merge**2].tolist()):
        mine = row["patch_image"] == image
        images.append(tuple(row[key][mine] for key in ("patches", "patch_row", "patch_col")))
    assert len(slots) * SPEC.vision.merge**2 == sum(len(patches) for patches, *_ in images)
    # position t says whether t + 1 counts, and the document's first token never does
    return dict(tokens=row["tokens"][here], counts=np.roll(row["loss_mask"][here], 1), images=images)


def packed(pieces: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """A row of documents, written out from the contract of a batch and not from the project's packing."""
    row: dict[str, np.ndarray] = {key: np.zeros(LENGTH, np.int32) for key in TOKEN_KEYS}
    row |= {key: np.zeros(STAGE.data.patches, np.int32) for key in ("patch_image", "patch_row", "patch_col")}
    row["patches"] = np.zeros((STAGE.data.patches, SPEC.vision.patch_width), np.uint8)
    row["loss_mask"] = np.zeros(LENGTH, np.float32)
    row["image_slot"] -= 1
    at = filled = image = 0
    for number, piece in enumerate(pieces, 1):
        size = len(piece["tokens"])
        here = slice(at, at + size)
        row["tokens"][here], row["segments"][here], row["positions"][here] = piece["tokens"], number, np.arange(size)
        row["loss_mask"][at : at + size - 1] = piece["counts"][1:]
        places = at + np.flatnonzero(piece["tokens"] == SPEC.image_token)
        row["image_slot"][places] = filled // SPEC.vision.merge**2 + np.arange(len(places))
        for patches, y, x in piece["images"]:
            image += 1
            there = slice(filled, filled + len(patches))
            row["patches"][there], row["patch_row"][there], row["patch_col"][there] = patches, y, x
            row["patch_image"][there] = image
            filled = there.stop
        at = here.stop
    row["labels"] = np.roll(row["tokens"], -1)
    return row


def one(row: dict[str, np.ndarray], **changes) -> dict[str, np.ndarray]:
    """A batch of one row, its images in one bin."""
    found = {key: array[None] for key, array in {**row, **changes}.items()}
    return found | {key: found[key][None] for key in IMAGE_KEYS[:4]}


@pytest.fixture(scope="module", params=["answers", "teacher"])
def with_gradient(request):
    """`batch -> ((loss sum, metrics), gradient)` of a fine-tuning stage."""
    place = placed(dict(fsdp=1))
    heads, compute = LossHead(place), Compute()
    trainable, frozen = split_frozen(random_params(SPEC), FROZEN)
    if request.param == "answers":
        loss = next_token_loss(SPEC, compute, heads)
    else:
        targets = online_targets(SPEC, compute, place.rules)
        loss = distillation(VLM(SPEC, compute), LossOptions(ce_weight=0.5), heads, targets)
        frozen["teacher"] = random_params(SPEC, seed=1)
    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return lambda batch: jax.device_get(run(trainable, frozen, batch))


def test_a_packed_batch_is_its_documents_one_at_a_time(batch, documents, with_gradient):
    (total, metrics), gradient = with_gradient(binned(batch, Bins(2, 2), SPEC.vision))
    alone = [with_gradient(one(document)) for document in documents]
    assert len(documents) > 2 * ROWS
    for name, (value, count) in metrics.items():
        values, counts = zip(*(found[name] for (_, found), _ in alone), strict=True)
        assert count == sum(counts) == batch["loss_mask"].sum()
        np.testing.assert_allclose(value, np.sum(values, dtype=np.float64), rtol=LOSS_TOLERANCE, err_msg=name)
    np.testing.assert_allclose(total, sum(float(t) for (t, _), _ in alone), rtol=LOSS_TOLERANCE)
    summed = jax.tree.map(lambda *leaves: np.sum(leaves, axis=0, dtype=np.float64), *(g for _, g in alone))
    worst = 0.0
    for path, ours in jax.tree_util.tree_leaves_with_path(gradient):
        theirs = summed
        for key in path:
            theirs = theirs[key.key]
        scale = np.abs(theirs).max()
        assert scale > 0, path
        worst = max(worst, float(np.abs(ours - theirs).max() / scale))
    print(f"gradient: {worst:.1e} of a leaf's largest at most, {GRADIENT_TOLERANCE:.1e} allowed")
    assert worst < GRADIENT_TOLERANCE


def test_a_document_does_not_see_the_others_of_its_row(documents, with_gradient):
    """The same document between others, further back and after other images: its loss and gradient stay."""
    pieces = [cut(document, 1) for document in documents]
    pictured = [n for n, piece in enumerate(pieces) if piece["images"]]
    plain = [n for n, piece in enumerate(pieces) if not piece["images"]]
    # (the document, what stands before it, what after it) twice over
    for own, *rows in (
        (pictured[0], (plain[0],), (pictured[1],)),
        (plain[2], (plain[0],), (pictured[0],)),
    ):
        found = []
        for before in rows:
            row = packed([pieces[n] for n in (*before, own)])
            (loss, metrics), gradient = with_gradient(one(row, loss_mask=row["loss_mask"] * (row["segments"] == 2)))
            found.append((loss, metrics["loss"][1], gradient))
        (loss, count, gradient), (other_loss, other_count, other_gradient) = found
        assert count == other_count == pieces[own]["counts"].sum() > 0
        np.testing.assert_allclose(loss, other_loss, rtol=LOSS_TOLERANCE)
        for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(other_gradient), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=GRADIENT_TOLERANCE * np.abs(b).max())


def test_what_counts_is_what_the_assistant_says_and_its_end(data, documents):
    """Against the sources: by its question, or its picture, every document's answer is found."""
    said: dict[str | bytes, str] = {}
    for name, source in STAGE.data.sources.items():
        for document in read_documents(open_source(name, source)):
            question, answer = document.messages
            key: str | bytes = spell(question)
            if not isinstance(question.parts[0], str):
                picture = resize(question.parts[0], SPEC.vision)
                flat = patchify(picture, SPEC.vision.patch_size, SPEC.vision.merge)
                key = flat.tobytes()
            assert said.setdefault(key, spell(answer) + "</s>") == spell(answer) + "</s>"
    pictures = 0
    for document in documents:
        piece, text = cut(document, 1), text_of(data.tokenizer, ())
        question, _, answer = text(piece["tokens"], final=True).removeprefix("<s>[INST]").partition("[/INST]")
        counted = text_of(data.tokenizer, ())(document["labels"][document["loss_mask"] > 0], final=True)
        pictures += len(piece["images"])
        key = piece["images"][0][0].tobytes() if piece["images"] else question
        assert counted == answer == said[key]
    assert pictures > 2

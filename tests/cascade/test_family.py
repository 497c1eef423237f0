"""The finished run of configs/tiny.yaml (`make cascade`): quality, exports against transformers, and the report."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

import ministral_jax
from ministral_jax.data.pipeline import held_out, prepare
from ministral_jax.evaluation import model_inputs
from ministral_jax.manifest import read_manifest, spec_of
from ministral_jax.recipe import load_recipe

pytestmark = pytest.mark.cascade

RUN = Path(__file__).parents[2] / "runs" / "tiny"
CHILDREN = ("14b", "8b", "3b")


@pytest.fixture(scope="module")
def summary():
    assert (RUN / "summary.json").is_file(), "run `make cascade` first"
    return json.loads((RUN / "summary.json").read_text())


def test_every_stage_is_finished():
    names = json.loads((RUN / "recipe.json").read_text())["stages"]
    assert [name for name in names if read_manifest(RUN / name) is None] == []


@pytest.mark.parametrize("child", CHILDREN)
def test_pruning_and_distilling_beats_distilling_from_scratch(summary, child):
    figures = summary["children"][child]
    assert figures["kl_final"] < figures["kl_scratch"]
    assert figures["kl_final"] < figures["kl_after_surgery"]
    assert figures["token_speedup"] >= {"14b": 8, "8b": 3, "3b": 3}[child]


@pytest.mark.parametrize("child", CHILDREN)
def test_children_still_read_digits(summary, child):
    assert summary["parent"]["digit_accuracy"] >= 0.9
    assert summary["children"][child]["digit_accuracy"] >= summary["parent"]["digit_accuracy"] - 0.05


def test_the_family_has_the_axis_pattern_of_the_real_one():
    spec = {name: spec_of(read_manifest(RUN / f"{name}-base")) for name in CHILDREN}
    parent = spec_of(read_manifest(RUN / "parent"))
    assert parent.model_copy(update={"mlp_width": parent.mlp_width // 2, "rope": None}).layers == spec["14b"].layers
    assert (parent.width, parent.mlp_width // 2) == (spec["14b"].width, spec["14b"].mlp_width)
    for larger, smaller in (("14b", "8b"), ("8b", "3b")):
        for axis in ("layers", "width", "mlp_width"):
            assert getattr(spec[smaller], axis) < getattr(spec[larger], axis)
    assert [spec[name].tied for name in CHILDREN] == [False, False, True]
    assert len({(s.heads, s.kv_heads, s.head_width) for s in spec.values()}) == 1
    assert any(s.heads * s.head_width != s.width for s in spec.values())


@pytest.fixture(scope="module")
def rows():
    """Held-out rows of the long stage, text and images."""
    stage = load_recipe("configs/tiny.yaml").stages["14b-base"]
    data = prepare(stage.data, stage.batch.length, spec_of(read_manifest(RUN / "14b-base")).vision, RUN / "data")
    batch = next(held_out(data, 2, 2))
    assert (batch["image_slot"] >= 0).any() and (batch["text_bytes"] > 0).any()
    return data, batch


@pytest.mark.parametrize("child", CHILDREN)
def test_an_export_gives_the_same_logits_in_transformers(rows, child):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    data, batch = rows
    exported = RUN / f"{child}-hf" / "hf"
    model, params = ministral_jax.load(RUN / f"{child}-base")
    ours = np.asarray(jax.jit(model.apply)({"params": params}, batch["tokens"], **model_inputs(batch)))

    again_model, again_params = ministral_jax.load(exported)
    again = np.asarray(jax.jit(again_model.apply)({"params": again_params}, batch["tokens"], **model_inputs(batch)))
    np.testing.assert_allclose(again, ours, rtol=0, atol=2e-5 * np.abs(ours).max())

    theirs = transformers.Mistral3ForConditionalGeneration.from_pretrained(exported, dtype=torch.float32).eval()
    compared = {"text": 0, "image": 0}
    for document in np.unique(batch["segments"][0]):
        (where,) = np.nonzero(batch["segments"][0] == document)
        pixels = _pixels(batch, where, data.vision)
        inputs = {"input_ids": torch.tensor(batch["tokens"][0, where][None].astype(np.int64))}
        if pixels is not None:
            inputs |= {"pixel_values": torch.tensor(pixels[None]), "image_sizes": torch.tensor([pixels.shape[1:]])}
        with torch.no_grad():
            logits = theirs(**inputs).logits[0].numpy()
        np.testing.assert_allclose(logits, ours[0, where], rtol=0, atol=2e-5 * np.abs(ours).max())
        compared["text" if pixels is None else "image"] += 1
    assert compared["text"] >= 1 and compared["image"] >= 1


def _pixels(batch, where, vision) -> np.ndarray | None:
    """The image of a document of row 0, `[3, H, W]` normalised, put together patch by patch."""
    slots = batch["image_slot"][0, where]
    if (slots < 0).all():
        return None
    image = batch["patch_image"][0, slots.max() * vision.merge**2]
    (patches,) = np.nonzero(batch["patch_image"][0] == image)
    row, column = batch["patch_row"][0, patches], batch["patch_col"][0, patches]
    p = vision.patch_size
    pixels = np.zeros((3, (row.max() + 1) * p, (column.max() + 1) * p), np.float32)
    for r, c, patch in zip(row, column, batch["patches"][0, patches], strict=True):
        pixels[:, r * p : (r + 1) * p, c * p : (c + 1) * p] = patch.reshape(3, p, p)
    return pixels


def test_exports_carry_their_tokenizer():
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    for child in CHILDREN:
        tokenizer = Tekkenizer.from_file(RUN / f"{child}-hf" / "hf" / "tekken.json")
        assert tokenizer.n_words == 2048


def test_the_report_is_one_page_that_needs_nothing_else(summary):
    page = (RUN / "report.html").read_text()
    assert len(page) < 3_000_000
    assert 'src="http' not in page and 'href="http' not in page and "@import" not in page
    assert summary["wall_seconds"] > 0

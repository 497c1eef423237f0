"""The finished run of configs/tiny.yaml (`make cascade`): quality, exports against transformers, and the report."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from model_cases import by_row

import ministral_jax
from ministral_jax.data.pipeline import held_out
from ministral_jax.data.prepare import prepare
from ministral_jax.files import read_jsonl
from ministral_jax.losses.evaluation import model_inputs
from ministral_jax.models.vision import MEAN, STD
from ministral_jax.recipe.load import load_recipe
from ministral_jax.stages.manifest import finished, read_manifest

pytestmark = pytest.mark.cascade

RUN = Path(__file__).parents[2] / "runs" / "tiny"
CHILDREN = ("14b", "8b", "3b")


@pytest.fixture(scope="module")
def summary():
    assert (RUN / "summary.json").is_file(), "run `make cascade` first"
    return json.loads((RUN / "summary.json").read_text())


def test_every_stage_is_finished():
    stages = json.loads((RUN / "recipe.json").read_text())["stages"]
    assert [name for name, s in stages.items() if not s["optional"] and read_manifest(RUN / name) is None] == []


def evaluations(stage: str) -> list[dict]:
    return [r for r in read_jsonl(RUN / stage / "metrics.jsonl") if r["kind"] == "eval"]


def test_fine_tuning_answers_held_out_questions():
    assert evaluations("14b-sft")[-1]["accuracy_pictures"] > 0.7
    worked = evaluations("14b-cot")[-1]
    assert worked["accuracy_pictures"] > 0.6
    assert worked["accuracy_sums"] > evaluations("14b-cot")[0]["accuracy_sums"]


def test_a_larger_model_teaches_the_8b_to_answer():
    first, *_, last = evaluations("8b-sft")
    assert last["kl"] < first["kl"] / 2
    assert last["accuracy_pictures"] > first["accuracy_pictures"] + 0.2


def test_a_judge_tells_right_from_wrong():
    """One pair in ten is mislabelled: nobody can be right about more than nine in ten."""
    assert 0.65 < finished(RUN / "14b-reward").metrics["judge_accuracy"] <= 0.95


def test_preferences_end_the_loops():
    first, *_, last = evaluations("14b-instruct")
    assert first["sampled_loop_rate"] > 0.02 > last["sampled_loop_rate"]
    assert last["win_rate"] > 0.5


def test_rewards_rise():
    first, *_, last = evaluations("14b-rl")
    assert last["sampled_reward"] > first["sampled_reward"] + 0.05
    assert last["reward_format"] > first["reward_format"]


@pytest.mark.parametrize("child", CHILDREN)
def test_pruning_and_distilling_beats_distilling_from_scratch(summary, child):
    """Beyond what other held-out documents would say."""
    figures = summary["children"][child]
    assert figures["kl_final"] < figures["kl_after_surgery"]
    assert figures["intervals"]["kl_final"][1] < figures["intervals"]["kl_scratch"][0]


def test_held_out_figures_are_of_many_documents(summary):
    """Of more than fifty files of text beside the pictures, and every figure has an interval."""
    stage = load_recipe("configs/tiny.yaml").stages["8b-short"]
    data = prepare(stage.data, stage.batch.length, finished(RUN / "8b-short").spec.vision, RUN / "data")
    files = [np.unique(b["document"][b["text_bytes"] > 0]) for b in held_out(data, 8, stage.evaluate.rows)]
    assert len(np.unique(np.concatenate(files))) >= 50
    for member in (summary["parent"], *summary["children"].values()):
        assert member["row_length"] == summary["parent"]["row_length"]
        for name in ("bits_per_byte", "digit_accuracy"):
            low, high = member["intervals"][name]
            assert low < member[name] < high


@pytest.mark.parametrize("child", CHILDREN)
def test_children_still_read_digits(summary, child):
    assert summary["parent"]["digit_accuracy"] >= 0.9
    assert summary["children"][child]["digit_accuracy"] >= summary["parent"]["digit_accuracy"] - 0.05


def test_the_family_has_the_axis_pattern_of_the_real_one():
    spec = {name: finished(RUN / f"{name}-base").spec for name in CHILDREN}
    parent = finished(RUN / "parent").spec
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
    data = prepare(stage.data, stage.batch.length, finished(RUN / "14b-base").spec.vision, RUN / "data")
    batch = by_row(next(held_out(data, 2, 2)), data.vision)
    assert (batch["image_slot"] >= 0).any() and (batch["text_bytes"] > 0).any()
    return data, batch


EXPORTS = {"14b-hf": "14b-base", "8b-hf": "8b-base", "3b-hf": "3b-base", "14b-reasoning-hf": "14b-reasoning"}


@pytest.mark.parametrize("export", EXPORTS)
def test_an_export_gives_the_same_logits_in_transformers(rows, export):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    data, batch = rows
    exported = RUN / export / "hf"
    model, params = ministral_jax.load(RUN / EXPORTS[export])
    ours = np.asarray(jax.jit(model.apply)({"params": params}, batch["tokens"], **model_inputs(batch)))

    again_model, again_params = ministral_jax.load(exported)
    again = np.asarray(jax.jit(again_model.apply)({"params": again_params}, batch["tokens"], **model_inputs(batch)))
    np.testing.assert_allclose(again, ours, rtol=0, atol=2e-5 * np.abs(ours).max())

    theirs = transformers.Mistral3ForConditionalGeneration.from_pretrained(exported, dtype=torch.float32).eval()
    compared = {"text": 0, "image": 0}
    documents = {(row, int(n)) for row, segments in enumerate(batch["segments"]) for n in np.unique(segments) if n}
    for row, document in sorted(documents):
        (where,) = np.nonzero(batch["segments"][row] == document)
        pixels = _pixels({key: value[row] for key, value in batch.items()}, where, data.vision)
        inputs = {"input_ids": torch.tensor(batch["tokens"][row, where][None].astype(np.int64))}
        if pixels is not None:
            inputs |= {"pixel_values": torch.tensor(pixels[None]), "image_sizes": torch.tensor([pixels.shape[1:]])}
        with torch.no_grad():
            logits = theirs(**inputs).logits[0].numpy()
        np.testing.assert_allclose(logits, ours[row, where], rtol=0, atol=2e-5 * np.abs(ours).max())
        compared["text" if pixels is None else "image"] += 1
    assert compared["text"] >= 1 and compared["image"] >= 1


def _pixels(row, where, vision) -> np.ndarray | None:
    """The image of a document (the positions `where` of a row), `[3, H, W]` normalised, put together patch by patch."""
    slots = row["image_slot"][where]
    if (slots < 0).all():
        return None
    row = {name: row[name][0] for name in ("patches", "patch_image", "patch_row", "patch_col")}  # its one bin
    (patches,) = np.nonzero(row["patch_image"] == row["patch_image"][slots.max() * vision.merge**2])
    r, c, p = row["patch_row"][patches], row["patch_col"][patches], vision.patch_size
    pixels = np.zeros((3, (r.max() + 1) * p, (c.max() + 1) * p), np.float32)
    for y, x, patch in zip(r * p, c * p, row["patches"][patches], strict=True):
        pixels[:, y : y + p, x : x + p] = patch.reshape(3, p, p)
    return ((pixels.transpose(1, 2, 0) / 255 - MEAN) / STD).transpose(2, 0, 1)


def test_exports_carry_their_tokenizer():
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    for export in EXPORTS:
        tokenizer = Tekkenizer.from_file(RUN / export / "hf" / "tekken.json")
        assert tokenizer.n_words == 2048


def test_the_report_is_one_page_that_needs_nothing_else(summary):
    page = (RUN / "report.html").read_text()
    assert len(page) < 3_000_000
    assert 'src="http' not in page and 'href="http' not in page and "@import" not in page
    assert summary["wall_seconds"] > 0

"""Preferences as pairs for a policy: every way of writing one, what of it is learnt, and how it lies in a row."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from ministral_jax.data.chat import SECOND, TRAINABLE, Rendered, render, render_pair
from ministral_jax.data.config import DataConfig, SourceConfig, TokenizerConfig
from ministral_jax.data.conversation import Document, spell
from ministral_jax.data.documents import group_key
from ministral_jax.data.jsonl import parse_row
from ministral_jax.data.pipeline import Order, batches, held_out
from ministral_jax.data.prepare import prepare
from ministral_jax.data.rows import pairs_per_row
from ministral_jax.data.tokenizer import load_tokenizer, text_of
from ministral_jax.errors import UserError
from ministral_jax.models.spec import VisionSpec

TOKENIZER = TokenizerConfig(vocab=512, special=64)
VISION = VisionSpec(layers=1, width=16, mlp_width=24, heads=1, head_width=16, patch_size=2, max_image_size=16)
ASKED, YES, NO = (
    {"role": role, "content": text} for role, text in (("user", "2+2?"), *[("assistant", t) for t in "45"])
)
SYSTEM = {"role": "system", "content": "Sums."}
FORMS = {
    "texts": {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
    "a prompt of messages": {"prompt": [ASKED], "chosen": [YES], "rejected": [NO]},
    "messages and texts": {"messages": [ASKED], "chosen": "4", "rejected": "5"},
    "whole conversations": {"chosen": [ASKED, YES], "rejected": [ASKED, NO]},
    "UltraFeedback, binarised": {
        "prompt": "2+2?",
        "prompt_id": "f0e3",
        "messages": [ASKED, YES],
        "chosen": [ASKED, YES],
        "rejected": [ASKED, NO],
        "score_chosen": 8.5,
        "score_rejected": 7.0,
    },
    "UltraFeedback, as it was": {
        "source": "sums",
        "instruction": "2+2?",
        "completions": [
            {"model": "a", "response": "5", "overall_score": 7.0},
            {"model": "b", "response": "4", "overall_score": 8.5},
            {"model": "c", "response": "4", "overall_score": 8.5},
        ],
    },
    "JSON in strings": {"prompt": json.dumps([ASKED]), "chosen": json.dumps([YES]), "rejected": json.dumps([NO])},
}


def read(row: dict, tmp_path, pairs: bool = True, prompts: bool = False) -> tuple[Document, ...]:
    return parse_row(json.dumps(row).encode(), tmp_path / "rows.jsonl", "row", "row 1", prompts, pairs)


@pytest.mark.parametrize("form", FORMS)
def test_every_way_of_writing_a_pair_is_one_document(form, tmp_path):
    (pair,) = read(FORMS[form], tmp_path)
    assert [spell(m) for m in pair.messages] == ["2+2?", "4"] and [spell(m) for m in pair.rejected] == ["2+2?", "5"]
    assert (pair.margin == 1.5) if "UltraFeedback" in form else math.isnan(pair.margin)
    # the same rows are a judge's two questions
    assert [spell(d.messages[-1]) for d in read(FORMS[form], tmp_path, pairs=False)] == ["A", "B"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pairs", [True, False])
def test_preferences_of_one_prompt_are_held_out_together_wherever_their_file_lies(form, pairs, tmp_path):
    row = FORMS[form]
    answers = {
        "chosen": [*row["chosen"][:-1], {**YES, "content": "four"}] if isinstance(row.get("chosen"), list) else "four",
        "completions": [{"response": "four", "overall_score": 9.0}, {"response": "five", "overall_score": 1.0}],
    }
    others = row | {key: answer for key, answer in answers.items() if key in row}
    others.pop("prompt_id", None)
    others |= {"messages": others["chosen"]} if "messages" in others and row["messages"] == row["chosen"] else {}
    asked = read(row, tmp_path, prompts=True, pairs=False)  # as `generate` reads it
    found = (*read(row, tmp_path, pairs), *read(others, tmp_path / "elsewhere", pairs), *asked)
    assert len({group_key(document) for document in found}) == 1
    other = json.loads(json.dumps(row).replace("2+2?", "2+3?"))
    assert {group_key(d) for d in read(other, tmp_path, pairs)}.isdisjoint(map(group_key, found))


def test_of_ultrafeedback_the_other_answer_is_one_scored_lower(tmp_path):
    completions = [{"response": str(n), "overall_score": 8.5} for n in range(3)]
    row = {"instruction": "2+2?", "completions": [*completions, {"response": "5", "overall_score": 7.0}]}
    assert {read(row | {"source": str(n)}, tmp_path)[0].margin for n in range(8)} == {1.5}
    with pytest.raises(UserError, match=r"^row 1: all completions are the same or scored 8.5; leave the row out$"):
        read({"instruction": "2+2?", "completions": completions}, tmp_path)
    (prompt,) = read({"instruction": "2+2?", "completions": completions}, tmp_path, pairs=False, prompts=True)
    assert [spell(message) for message in prompt.messages] == ["2+2?"]


def test_margins_are_a_judges_or_of_scores(tmp_path):
    margin = lambda **given: read(FORMS["texts"] | given, tmp_path)[0].margin
    assert margin(probability=0.5) == 0 and margin(probability=1) == math.inf
    assert margin(probability=0.8) == pytest.approx(math.log(4), rel=1e-12)
    assert margin(score_chosen=9, score_rejected=2) == 7 and margin(score_chosen=3, score_rejected=3) == 0
    assert margin(probability=None) != margin(probability=None)


WRONG = {
    "no pair": ({"messages": [ASKED, YES]}, "is no pair"),
    "half a pair": ({"prompt": "2+2?", "chosen": "4"}, "a pair needs both"),
    "a text": ({"text": "4"}, "is no pair"),
    "the same twice": ({**FORMS["texts"], "rejected": "4"}, "are the same"),
    "an empty answer": ({**FORMS["texts"], "rejected": " "}, "'rejected' must be text that is not empty"),
    "a probability that is none": ({**FORMS["texts"], "probability": 1.5}, "must be from 1/2 to 1"),
    "the wrong way round": ({**FORMS["texts"], "probability": 0.2}, "must be from 1/2 to 1"),
    "a probability in words": ({**FORMS["texts"], "probability": "high"}, "'probability' must be a number, got 'high'"),
    "scores the wrong way round": ({**FORMS["texts"], "score_chosen": 1, "score_rejected": 3}, "exchange the answers"),
    "one score": ({**FORMS["texts"], "score_chosen": 1}, "'score_rejected' must be a number"),
    "a score that is no number": (
        {**FORMS["texts"], "score_chosen": 1, "score_rejected": math.nan},
        "must be a number",
    ),
    "one completion": ({"instruction": "2+2?", "completions": [{"response": "4"}]}, "two or more"),
    "a completion without score": (
        {"instruction": "2+2?", "completions": [{"response": "4"}, {"response": "5"}]},
        "'overall_score' must be a number",
    ),
    "equal completions": (
        {"instruction": "2+2?", "completions": 2 * [{"response": "4", "overall_score": 1}]},
        "all completions are the same",
    ),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_row_that_is_no_pair_is_named(fault, tmp_path):
    row, words = WRONG[fault]
    with pytest.raises(UserError, match=r"^row 1: ") as error:
        read(row, tmp_path)
    assert words in str(error.value)


def sides(pair: Document, tokenizer) -> list[Rendered]:
    """Both conversations as they were rendered."""
    found = render_pair(pair, tokenizer, None)
    (second,) = np.flatnonzero(found.flags & SECOND)
    return [Rendered(found.tokens[part], found.flags[part]) for part in (slice(0, second), slice(second, None))]


def test_only_the_answers_are_learnt(tmp_path):
    tokenizer = load_tokenizer(TOKENIZER, tmp_path)
    earlier = [SYSTEM, ASKED, {**YES, "content": "It is 4."}, {**ASKED, "content": "Sure?"}]
    (pair,) = read({"prompt": earlier, "chosen": [YES], "rejected": [NO]}, tmp_path)
    for found, messages, said in zip(
        sides(pair, tokenizer), (pair.messages, pair.rejected), ("4</s>", "5</s>"), strict=True
    ):
        assert text_of(tokenizer, ())(found.tokens[found.flags & TRAINABLE > 0], final=True) == said
        # each is the conversation that it would be alone
        np.testing.assert_array_equal(found.tokens, render(messages, tokenizer, None, "").tokens)


def test_what_a_model_drew_is_not_tokenised_anew_but_by_another_tokenizer(tmp_path):
    tokenizer, drawn = load_tokenizer(TOKENIZER, tmp_path), {"chosen": [88, 2], "rejected": [89, 90, 91]}
    row = FORMS["texts"] | {"tokens": {"tokenizer": tokenizer.digest, **drawn}}
    prompt = render(read(row, tmp_path)[0].messages[:1], tokenizer, None, "").tokens.tolist()
    for found, ids in zip(sides(read(row, tmp_path)[0], tokenizer), drawn.values(), strict=True):
        assert found.tokens.tolist() == prompt + ids
        assert (found.flags & TRAINABLE > 0).tolist() == [False] * len(prompt) + [True] * len(ids)
    other = FORMS["texts"] | {"tokens": {"tokenizer": "another", **drawn}}
    plain = sides(read(FORMS["texts"], tmp_path)[0], tokenizer)
    for found, as_text in zip(sides(read(other, tmp_path)[0], tokenizer), plain, strict=True):
        np.testing.assert_array_equal(found.tokens, as_text.tokens)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Pairs with and without a picture, in rows of 64 tokens."""
    root = tmp_path_factory.mktemp("pairs")
    Image.new("RGB", (8, 8), "red").save(root / "red.png")
    rows = [
        {"prompt": f"{n}+1=?", "chosen": str(n + 1), "rejected": "x", "probability": 0.5 + n / 100} for n in range(30)
    ]
    rows += [{"prompt": f"{n}?", "image": "red.png", "chosen": "red", "rejected": "no"} for n in range(10)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"rows": SourceConfig(kind="jsonl", path=str(root / "rows.jsonl"))}
    config = DataConfig(tokenizer=TOKENIZER, sources=source, held_out=0.2, patches=64)
    return prepare(config, 64, VISION, root / "data", pairs=True)


def test_rows_hold_whole_pairs_with_their_margins_and_pictures(packed):
    rows = packed.counts["train"]["rows"]
    batch = next(batches(packed, rows, Order(0)))
    assert batch["margin"].shape == (rows, pairs_per_row(64)) and batch["margin"].dtype == np.float32
    seen, pictures = 0, 0
    text = lambda tokens: text_of(packed.tokenizer, ())(tokens, final=True)
    for n in range(rows):
        row = {name: array[n] for name, array in batch.items()}
        count = int(row["segments"].max())
        assert count % 2 == 0
        for pair in range(count // 2):
            parts = [row["segments"] == s for s in (2 * pair + 1, 2 * pair + 2)]
            asked, answers = zip(*(text(row["tokens"][p]).split("[/INST]") for p in parts), strict=True)
            assert asked[0] == asked[1] and answers[0] != answers[1] and all(a.endswith("</s>") for a in answers)
            assert [text(row["labels"][p & (row["loss_mask"] > 0)]) for p in parts] == [*answers]
            assert (row["positions"][parts[1]] == np.arange(parts[1].sum())).all()
            if answers[0] == "red</s>":
                shown = [set(row["image_slot"][p]) - {-1} for p in parts]  # each answer has its own
                assert len(shown[0]) == len(shown[1]) == 4 and not shown[0] & shown[1]
                assert math.isnan(row["margin"][pair])
                pictures += 1
            else:
                p = 0.5 + (int(answers[0].removesuffix("</s>")) - 1) / 100
                assert row["margin"][pair] == pytest.approx(math.log(p / (1 - p)), abs=1e-6)
            seen += 1
        assert not row["margin"][count // 2 :].any()
    assert seen == packed.counts["train"]["sources"]["rows"]["documents"] and pictures > 3
    assert "rows.jsonl row 31" in packed.counts["unjudged"]
    out = next(held_out(packed, packed.counts["held_out"]["rows"] + 1))
    assert not out["margin"][-1].any() and not out["segments"][-1].any()


@pytest.mark.parametrize(("length", "patches", "words"), [(32, 64, "in two answers"), (64, 16, "32 image patches")])
def test_a_pair_is_never_cut(packed, tmp_path, length, patches, words):
    rows = [{"prompt": "1?", "chosen": "x " * 4, "rejected": "y"} for _ in range(3)]
    rows[1] |= {"image": str(tmp_path / "red.png")} if patches == 16 else {"chosen": "x y z " * 8}
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"rows": SourceConfig(kind="jsonl", path=str(tmp_path / "rows.jsonl"))}
    config = DataConfig(tokenizer=TOKENIZER, sources=source, patches=patches)
    with pytest.raises(UserError, match=r"rows\.jsonl row 2") as error:
        prepare(config, length, VISION, tmp_path / "data", pairs=True)
    assert words in str(error.value)


def test_kinds_without_pairs_are_refused_and_preferences_made_here_are_pairs(tmp_path):
    config = lambda kind: DataConfig(tokenizer=TOKENIZER, sources={"one": SourceConfig(kind=kind, limit=40)})
    with pytest.raises(UserError, match=r"data\.sources\.one of kind 'arithmetic' has no pairs"):
        prepare(config("arithmetic"), 96, None, tmp_path, pairs=True)
    data = prepare(config("preferences"), 96, None, tmp_path, pairs=True)
    assert (
        data.counts["train"]["sources"]["one"]["documents"] + data.counts["held_out"]["sources"]["one"]["documents"]
        == 40
    )
    # read as anything else they are other rows
    assert prepare(config("preferences"), 96, None, tmp_path).digest != data.digest

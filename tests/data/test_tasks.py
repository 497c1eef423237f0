"""Tasks made here: their answers are right, their working is, and a judge's pairs are what they say."""

import re
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from sklearn.datasets import load_digits

from ministral_jax.data import tasks
from ministral_jax.data.chat import ANSWER, TRAINABLE, render
from ministral_jax.data.config import SourceConfig
from ministral_jax.data.documents import tokenise
from ministral_jax.data.prompts import _drawn
from ministral_jax.data.sources import open_source, read_documents
from ministral_jax.models.spec import PRESETS

VISION = PRESETS["tiny-24b"].vision
LONGEST = {"arithmetic": 40, "digit-sum": 24, "needle": 120, "instructions": 30, "preferences": 96}
"""Tokens of a document with the tiny tokenizer."""


def read(kind, prompts=False, **options):
    return list(read_documents(open_source(kind, SourceConfig(kind=kind, **options)), prompts))


def parts(document, message=-1) -> Any:
    return document.messages[message].parts


@pytest.mark.parametrize("kind", LONGEST)
def test_documents_are_short_and_depend_on_their_number_alone(kind, tokenizer):
    documents = read(kind)
    each = 2 if kind == "preferences" else 1
    assert len(documents) == 4000 * each == len({d.name for d in documents})
    assert documents[: 50 * each] == read(kind, limit=50)
    sizes = [len(render(d.messages, tokenizer, VISION, d.where).tokens) for d in documents]
    assert max(sizes) <= LONGEST[kind]
    prompts = read(kind, prompts=True, limit=50)
    assert len(prompts) == 50 and all(d.messages[-1].role == "user" and d.columns["answer"] for d in prompts)
    few, many = (open_source(kind, SourceConfig(kind=kind, limit=n)) for n in (2, 3))
    assert few.digest != many.digest and few.digest == open_source("other", few.config).digest


def test_arithmetic_is_right_and_so_is_each_step():
    keys = {}
    for document in read("arithmetic"):
        (question,), (thought, answer) = parts(document, 0), parts(document)
        ((a, operator, b),) = re.findall(r"^(\d{1,3})([-+*])(\d{1,2})=\?$", question)
        assert answer == document.columns["answer"] == str(eval(f"{a}{operator}{b}")) and int(answer) >= 0
        steps = [step.partition("=") for step in thought.text.split()]
        assert all(str(eval(done)) == value for done, _, value in steps if value)
        assert len(steps) == (len(a) if operator == "*" else max(len(a), len(b)))
        # Each step leaves a digit of the answer, the units first; the last one all that is left.
        *lower, last = [value or done for done, _, value in steps]
        assert int("".join([last, *(step[-1] for step in reversed(lower))])) == int(answer)
        assert keys.setdefault(question, document.key) == document.key
    assert len(keys) == len(set(keys.values())) > 2500
    assert min(sum(operator in question for question in keys) for operator in "+-*") > 400
    plain = read("arithmetic", thinking=False, limit=50)
    assert [parts(d) for d in plain] == [parts(d)[1:] for d in read("arithmetic", limit=50)]
    assert tasks._add(37, 48) == "7+8=15 3+4+1=8" and tasks._add(5, 97) == "5+7=12 9+1=10"
    assert tasks._subtract(52, 37) == "12-7=5 5-3-1=1" and tasks._subtract(100, 1) == "10-1=9 10-1=9 1-1=0"
    assert tasks._multiply(37, 8) == "7*8=56 3*8+5=29"


def test_digit_sums_show_the_digits_that_are_added(tokenizer):
    pixels, labels = load_digits(return_X_y=True)
    known = {
        (image * 255 / 16).round().astype(np.uint8).tobytes(): int(n) for image, n in zip(pixels, labels, strict=True)
    }
    for document in read("digit-sum", limit=300):
        picture, question = parts(document, 0)
        thought, answer = parts(document)
        shown = np.asarray(picture)
        assert shown.shape == (8, 16, 3) and question == "Sum?" and np.array_equal(shown[..., 0], shown[..., 2])
        left, right = (known[half.tobytes()] for half in np.split(shown[..., 0], 2, axis=1))
        assert thought.text == f"{left}+{right}" and answer == document.columns["answer"] == str(left + right)
        rendered = render(document.messages, tokenizer, VISION, "")
        answers = rendered.tokens[rendered.flags & ANSWER > 0]
        assert tokenizer.decode(answers.tolist()) == answer and rendered.pictures[0].shape == (8, 16, 3)
    (answer,) = parts(read("digit-sum", thinking=False, limit=1)[0])
    assert answer == read("digit-sum", limit=1)[0].columns["answer"]


def test_needles_are_digits_at_any_depth_of_few_and_many_words(tokenizer):
    """So that a row of 512 tokens has answers at all positions up to there."""
    known = {np.asarray(parts(d, 0)[0]).tobytes(): d.columns["answer"] for d in read("digits")}
    documents, octaves, depths = read("needle", words=200), [], []
    for document in documents:
        (place, picture), *more = [(n, part) for n, part in enumerate(parts(document, 0)) if not isinstance(part, str)]
        before, after = (
            " ".join(side).split() for side in (parts(document, 0)[:place], parts(document, 0)[place + 1 :])
        )
        assert not more and after.pop() == "Digit?" and {*before, *after} <= set(tasks.WORDS)
        assert parts(document) == (known[np.asarray(picture).tobytes()],) == (document.columns["answer"],)
        octaves.append((len(before) + len(after)).bit_length() - 1)
        depths.append(len(before) / (len(before) + len(after)))
        assert 1 <= len(before) + len(after) <= 200
    assert np.bincount(octaves) == pytest.approx(len(documents) / 8, rel=0.15)  # 1, 2 to 3, .., 64 to 127, 128 to 200
    assert np.histogram(np.array(depths)[np.array(octaves) > 5], 4)[0] == pytest.approx(250, rel=0.2)
    assert {d.columns["answer"] for d in documents} == set("0123456789")
    sizes = [len(render(d.messages, tokenizer, VISION, "").tokens) for d in documents]
    assert 440 < max(sizes) <= 500 and 0.25 < np.mean(np.array(sizes) > 128) < 0.35
    few, many = (open_source("needle", SourceConfig(kind="needle", limit=9, words=n)) for n in (1, 2))
    assert few.digest != many.digest
    assert read("needle", limit=50) == read("needle", limit=50, words=40)


CHECKS = {
    "max_words": lambda text, value: len(text.split()) <= value,
    "starts_with": lambda text, value: text.startswith(value),
    "ends_with": lambda text, value: text.endswith(value),
    "contains": lambda text, value: value in text,
    "lines": lambda text, value: len(text.split("\n")) == value,
    "uppercase": lambda text, value: text.isupper() == value,
    "lowercase": lambda text, value: text.islower() == value,
}


def satisfied(constraints, text):
    return all(CHECKS[constraint["kind"]](text, constraint["value"]) for constraint in constraints)


def test_answers_follow_their_instructions():
    documents = read("instructions")
    for document in documents:
        (answer,) = parts(document)
        assert answer == document.columns["answer"] and satisfied(document.columns["constraints"], answer)
    assert {c["kind"] for d in documents for c in d.columns["constraints"]} == set(CHECKS)
    found = {parts(d, 0)[0]: d.columns["answer"] for d in documents}
    assert found["Say cat 3 times."] == "cat cat cat" and found["Say dog in capitals."] == "DOG"
    assert found["Count to 5."] == "1 2 3 4 5"
    assert all(found[q] == "\n".join(re.findall(r"(\w+) (?:and|on)", q)) for q in found if "lines" in q)


def test_preferences_are_right_but_for_one_in_ten(tokenizer, tmp_path):
    pairs = read("preferences", prompts=True)
    asked = {d.key: d for kind in ("arithmetic", "instructions") for d in read(kind)}
    faults = {"wrong": 0, "unfinished": 0, "format": 0, "repetition": 0}
    for pair in pairs:
        task, columns = asked[pair.key], pair.columns
        assert pair.messages == task.messages[:-1] and columns["answer"] == task.columns["answer"]
        right, wrong = (
            columns[key] for key in (("rejected", "chosen") if columns["flipped"] else ("chosen", "rejected"))
        )
        assert right == columns["answer"] != wrong and wrong.strip()
        assert not satisfied(task.columns.get("constraints", [{"kind": "max_words", "value": 0}]), wrong)
        faults[columns["fault"]] += 1
    flipped = np.mean([pair.columns["flipped"] for pair in pairs])
    assert abs(flipped - 0.1) < 4 * (0.1 * 0.9 / len(pairs)) ** 0.5
    assert min(faults.values()) > 900

    documents = read("preferences")
    for pair, ab, ba in zip(pairs, documents[::2], documents[1::2], strict=True):
        chosen, rejected = pair.columns["chosen"], pair.columns["rejected"]
        assert (ab.name, ba.name) == (f"{pair.name}#ab", f"{pair.name}#ba") and ab.key == ba.key == pair.key
        assert parts(ab) == ("A",) and parts(ba) == ("B",)
        (question,), (other,) = parts(ab, 0), parts(ba, 0)
        assert question.endswith(f"\nA: {chosen}\nB: {rejected}\nBetter: A or B?")
        assert other.endswith(f"\nA: {rejected}\nB: {chosen}\nBetter: A or B?")
    flags = render(documents[0].messages, tokenizer, VISION, "").flags
    assert (flags & TRAINABLE).sum() == 2 and flags[-2:].all()  # A or B, and the end


def test_a_question_is_held_out_everywhere_or_nowhere(tokenizer, tmp_path):
    sides = {}
    for kind in ("arithmetic", "instructions", "preferences"):
        source = open_source(kind, SourceConfig(kind=kind, limit=1500))
        held_out = tokenise(source, tokenizer, VISION, tmp_path).drawn(0.2)
        for document, side in zip(read_documents(source), held_out, strict=True):
            assert sides.setdefault(document.key, side) == side
    assert 0.15 < np.mean(list(sides.values())) < 0.25


def test_digits_are_those_of_scikit_learn():
    pixels, labels = load_digits(return_X_y=True)
    pixels = (pixels.reshape(-1, 8, 8) * 255 / 16).round().astype(np.uint8)
    documents = read("digits")
    assert len(documents) == 1797 and {parts(document)[0] for document in documents} == set("0123456789")
    for document in documents:
        number = int(document.name.removeprefix("digit-"))
        picture = np.asarray(parts(document, 0)[0])
        assert picture.dtype == np.uint8 and (picture == pixels[number][..., None]).all()
        assert parts(document) == (document.columns["answer"],) == (str(labels[number]),)
        assert parts(document, 0)[1] == "Digit?"


def digits_in(document) -> list[bytes]:
    """The pixels of each digit that its pictures show side by side."""
    pictures = [np.asarray(part) for part in parts(document, 0) if not isinstance(part, str)]
    return [digit.tobytes() for picture in pictures for digit in np.split(picture, picture.shape[1] // 8, axis=1)]


def pictured(**options) -> dict[str, list]:
    """Documents of every kind that shows digits."""
    found = {kind: read(kind, **options) for kind in tasks.KINDS if kind != "preferences"}
    return {kind: documents for kind, documents in found.items() if any(map(digits_in, documents[:20]))}


@pytest.mark.parametrize("share", [0.02, 0.05, 0.1, 0.2, 0.5])
def test_no_picture_that_is_held_out_is_trained_on(share, tokenizer, tmp_path):
    """Whatever asks about it: packed rows and prompts of all kinds together."""
    split: dict[bool, set[bytes]] = {True: set(), False: set()}
    kinds = pictured()
    assert set(kinds) == {"digits", "digit-sum", "needle"}
    for kind, documents in kinds.items():
        source = open_source(kind, SourceConfig(kind=kind))
        stored, as_prompts = tokenise(source, tokenizer, VISION, tmp_path).drawn(share), _drawn(documents, share)
        assert (stored == as_prompts).all() and abs(stored.mean() - share) < 3 * (
            share * (1 - share) / tasks.GROUPS
        ) ** 0.5
        for document, side in zip(documents, stored, strict=True):
            split[bool(side)].update(digits_in(document))
    assert not split[True] & split[False] and len(split[True] | split[False]) == 1797


def test_sums_are_of_all_digits():
    """Though both are of one group: no sum is left out, none has a few pictures only."""
    documents = read("digit-sum")
    assert {d.columns["answer"] for d in documents} == {str(n) for n in range(19)}
    assert len({digit for d in documents for digit in digits_in(d)}) > 1700
    assert len({tuple(digits_in(d)) for d in documents}) > 3500


def test_a_setting_belongs_to_kinds_that_have_what_it_sets():
    with pytest.raises(ValidationError, match="kind 'instructions' has no thinking that could be left out"):
        SourceConfig(kind="instructions", thinking=False)
    with pytest.raises(ValidationError, match="kind 'digits' takes no words; only 'needle' has some"):
        SourceConfig(kind="digits", words=3)
    with pytest.raises(ValidationError, match="kind 'arithmetic' takes no path"):
        SourceConfig(kind="arithmetic", path="x")

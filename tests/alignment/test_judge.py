"""The pairwise judge: what it reads, both orders, its temperature; and what a reward stage measures of it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from model_cases import random_params, vlm
from sampling_cases import placed

from ministral_jax.alignment.calibration import calibration_floor, expected_calibration_error, fit_temperature
from ministral_jax.alignment.judge import Judge
from ministral_jax.data.config import TokenizerConfig
from ministral_jax.data.conversation import Message, Thought, ToolCall
from ministral_jax.data.pairwise import judge_messages
from ministral_jax.data.tokenizer import load_tokenizer, text_of
from ministral_jax.models.vlm import VLM, Compute
from ministral_jax.stages.reward import examine

SPEC = vlm(vocab=512, context=64)
CONVERSATION = (Message("user", ("1+1=?",)),)
ANSWERS, OTHERS = ["2", "11", "2"], ["3", "2", "2"]
# Both see the same numbers; a logit of order one is a sum of D = 20 of them, after two layers of such sums.
FP32 = 1e-5
sigmoid = lambda x: 1 / (1 + np.exp(-x))


@pytest.fixture(scope="module")
def judge(tmp_path_factory) -> Judge:
    tokenizer = load_tokenizer(TokenizerConfig(vocab=SPEC.vocab, special=64), tmp_path_factory.mktemp("tokenizer"))
    return Judge(SPEC, Compute(), placed(dict(fsdp=1)), tokenizer, on_step=lambda _: None)


@pytest.fixture(scope="module")
def params() -> dict:
    return random_params(SPEC)


def asked(judge: Judge, a: str, b: str, conversation=CONVERSATION) -> np.ndarray:
    return judge.tokens(judge_messages(conversation, a, b))


def reads(judge: Judge, tokens) -> str:
    return text_of(judge.tokenizer, ())(tokens, final=True)


def plain_logit(judge: Judge, params: dict, question: np.ndarray) -> float:
    """Of A over B from one forward pass of the question alone."""
    logits = np.asarray(VLM(SPEC, Compute()).apply({"params": params}, question[None]))[0, -1]
    (a,), (b,) = (judge.tokenizer.encode(letter) for letter in "AB")
    return float(logits[a] - logits[b])


def test_the_logit_is_that_of_a_over_b_at_the_end_of_each_question(judge, params):
    """Questions of several lengths in one batch, more than one batch of them, in their order."""
    questions = [asked(judge, "2" * n, "3") for n in (1, 9, 4)]
    plain = [plain_logit(judge, params, question) for question in questions]
    assert np.ptp(plain) > 0.05
    many = judge.logits(params, questions * 30)
    np.testing.assert_allclose(many, plain * 30, rtol=0, atol=FP32)
    assert judge.logits(params, []).shape == (0,)


def test_the_probability_is_the_mean_of_both_orders_at_the_temperature(judge, params):
    conversations = [CONVERSATION] * len(ANSWERS)
    won = judge.win_probability(params, conversations, ANSWERS, OTHERS)
    lost = judge.win_probability(params, conversations, OTHERS, ANSWERS)
    assert won.dtype == np.float64
    np.testing.assert_allclose(won + lost, 1, rtol=0, atol=1e-15)
    assert won[2] == 0.5 and abs(won[:2] - 0.5).min() > 1e-3
    pairs = list(zip(ANSWERS, OTHERS, strict=True))
    forth = np.array([plain_logit(judge, params, asked(judge, a, b)) for a, b in pairs])
    back = np.array([plain_logit(judge, params, asked(judge, b, a)) for a, b in pairs])
    for temperature in (1.0, 0.25, 4.0):
        heated = replace(judge, temperature=temperature)
        found = heated.win_probability(params, conversations, ANSWERS, OTHERS)
        expected = (sigmoid(forth / temperature) + 1 - sigmoid(back / temperature)) / 2
        np.testing.assert_allclose(found, expected, rtol=0, atol=FP32 / temperature)


def test_equal_answers_are_never_told_apart_by_rounding(judge, params):
    """sigmoid(x) + sigmoid(-x) is not 1 in floating point for every x."""
    same, other = [str(n) for n in range(20)], ["no"] * 20
    for temperature in (0.1, 0.3, 1.0):
        found = replace(judge, temperature=temperature).win_probability(
            params, [CONVERSATION] * 40, same + other, same * 2
        )
        assert (found[:20] == 0.5).all() and (found[20:] != 0.5).all()


def test_a_question_beyond_the_context_loses_its_middle_and_is_answered(judge, params):
    short = asked(judge, "2", "3")
    assert reads(judge, short) == "<s>[INST]user: 1+1=?\nA: 2\nB: 3\nBetter: A or B?[/INST]"
    wide = replace(judge, spec=SPEC.model_copy(update={"context": 10**6}))
    for length in (SPEC.context - len(short) + 1, SPEC.context - len(short) + 2, 500):
        answer = "7" * length
        whole, question = asked(wide, answer, "3"), asked(judge, answer, "3")
        assert len(question) == min(len(whole), SPEC.context)
        half = SPEC.context // 2
        np.testing.assert_array_equal(question[:half], whole[:half])
        np.testing.assert_array_equal(question[-half:], whole[-half:])
    text = reads(judge, question)
    assert text.startswith("<s>[INST]user: 1+1=?\nA: 777") and text.endswith("777\nB: 3\nBetter: A or B?[/INST]")
    won, lost = judge.win_probability(params, [CONVERSATION] * 2, [answer, "3"], ["3", answer])
    assert 0 < won < 1 and won + lost == pytest.approx(1, abs=1e-15)


def test_earlier_turns_are_read_without_their_reasoning(judge):
    conversation = (
        Message("user", ("1+1=?",)),
        Message("assistant", (Thought("one and one"), "2"), (ToolCall("add", {"a": 1}),)),
        Message("tool", ("2",)),
        Message("assistant", (Thought("so it is"), "Two.")),
        Message("user", ("Sure?",)),
    )
    wide = replace(judge, spec=SPEC.model_copy(update={"context": 1000}))
    assert reads(wide, asked(wide, "yes", "no", conversation)) == (
        '<s>[INST]user: 1+1=?\nassistant: 2[TOOL_CALLS]add[ARGS]{"a": 1}\ntool: 2\nassistant: Two.\nuser: Sure?\n'
        "A: yes\nB: no\nBetter: A or B?[/INST]"
    )


# ---- what a reward stage measures -----------------------------------------------------------------------------------


class Stub:
    """A judge whose logit for a question is written in it."""

    def tokens(self, messages):
        return messages

    def logits(self, params, questions):
        return np.array(questions, np.float64) * params


def rows(forth, back, references):
    """Pairs as `held_out_pairs` gives them: the first answer in place A, then in place B."""
    flipped = {"A": "B", "B": "A"}
    return [
        tuple(SimpleNamespace(messages=m, reference=r) for m, r in ((x, ref), (y, flipped[ref])))
        for x, y, ref in zip(forth, back, references, strict=True)
    ]


def test_the_temperature_is_of_every_other_pair_and_the_figures_of_the_rest():
    rng = np.random.RandomState(0)
    references = np.array(list("AB"))[rng.randint(0, 2, 40)]
    better = (references == "A").astype(float)
    forth = rng.normal(2 * better - 1, 2)
    back = rng.normal(1 - 2 * better + 0.7, 2)  # it prefers place A
    pairs = rows(forth, back, references)
    found = examine(Stub(), 1.0, pairs)  # type: ignore[arg-type]

    # by hand: the first answer, which the judge sees in place A and in place B, is better by the mean of both
    fit, rest, temperature = slice(0, None, 2), slice(1, None, 2), found["judge_temperature"]
    mean = lambda of, t: (sigmoid(forth[of] / t) + 1 - sigmoid(back[of] / t)) / 2
    grid = np.geomspace(0.05, 20, 1001)
    entropy = [-np.mean(np.log(np.where(better[fit] == 1, mean(fit, t), 1 - mean(fit, t)))) for t in grid]
    assert temperature == pytest.approx(grid[np.argmin(entropy)], rel=0.01)
    each = np.concatenate([forth[fit], back[fit]]), np.concatenate([better[fit], 1 - better[fit]])
    assert abs(np.log(temperature / fit_temperature(*each))) > 0.1  # which order by order would be another one

    at = lambda t: mean(rest, t)
    assert found["judge_pairs"] == len(better[rest])
    assert found["judge_accuracy"] == np.mean((at(temperature) > 0.5) == (better[rest] == 1))
    assert found["judge_ece_before"] == pytest.approx(expected_calibration_error(at(1.0), better[rest]), abs=1e-12)
    assert found["judge_ece"] == pytest.approx(expected_calibration_error(at(temperature), better[rest]), abs=1e-12)
    assert found["judge_ece_floor"] == calibration_floor(at(temperature))
    assert 0.5 < found["judge_accuracy"] < 1 and found["judge_ece"] != found["judge_ece_before"]

    # logits that are three times as large are three times as warm, and as well calibrated afterwards
    sharp = examine(Stub(), 3.0, pairs)  # type: ignore[arg-type]
    assert sharp["judge_temperature"] == pytest.approx(3 * temperature, rel=1e-5)
    assert sharp["judge_ece"] == pytest.approx(found["judge_ece"], abs=1e-5)

    # what is said of the rest does not move the temperature, and turns the accuracy round
    changed = rows(*(np.where(np.arange(40) % 2, -x, x) for x in (forth, back)), references)
    turned = examine(Stub(), 1.0, changed)  # type: ignore[arg-type]
    assert turned["judge_temperature"] == temperature
    assert turned["judge_accuracy"] == pytest.approx(1 - found["judge_accuracy"])


def test_figures_of_known_logits_by_hand():
    """A judge that is right at log-odds of log 3 in three of four pairs is calibrated."""
    sure = np.log(3)
    fit = [(sure, -sure, "A")] * 3 + [(sure, -sure, "B")]
    rest = [(sure, -sure, "A"), (-sure, sure, "A"), (sure, -sure, "A"), (sure, -sure, "A")]
    pairs = rows(*zip(*(pair for both in zip(fit, rest, strict=True) for pair in both), strict=True))
    for scale in (1.0, 2.0):
        found = examine(Stub(), scale, pairs)  # type: ignore[arg-type]
        assert found["judge_temperature"] == pytest.approx(scale, rel=1e-5)
        assert found["judge_accuracy"] == 0.75
        assert found["judge_ece_before"] == pytest.approx(abs(0.75 - sigmoid(scale * sure)), abs=1e-12)
        assert found["judge_ece"] == pytest.approx(0, abs=1e-5)

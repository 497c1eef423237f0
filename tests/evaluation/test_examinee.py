"""The three requests against a forward pass and its logits, and against themselves in other batches and on a mesh."""

import numpy as np
import pytest
from examinee_cases import continued, direct, examinee, prompts
from mesh_cases import placement

from ministral_jax.errors import UserError
from ministral_jax.evaluation.examinee import Continued, Manner, windows
from ministral_jax.sampling.engine import Completion, Prompt

pytestmark = pytest.mark.usefixtures("quickly")
MANNER = Manner(max_tokens=9)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return examinee(tmp_path_factory.mktemp("one"), batch=4)


@pytest.fixture(scope="module")
def said(one):
    return one.say(prompts(one.tokenizer), MANNER)


def expected(one, prompt: Prompt, tokens: list[int]) -> tuple[float, bool]:
    logprobs = direct(one, [*prompt.tokens, *tokens[:-1]], prompt.images)[-len(tokens) :]
    return logprobs[np.arange(len(tokens)), tokens].sum(), np.array_equal(logprobs.argmax(-1), tokens)


def test_likelihoods_are_those_of_a_forward_pass(one):
    requests = continued(one.tokenizer)
    chosen = [n for n, request in enumerate(requests) if len(request.prompt.tokens) < 80]
    assert len(chosen) == 8 and any(requests[n].prompt.images for n in chosen)
    found = one.likelihoods([requests[n] for n in chosen])
    for n, likelihood in zip(chosen, found, strict=True):
        logprob, _ = expected(one, *requests[n])
        assert likelihood.logprob == pytest.approx(logprob, abs=2e-5)
        assert not likelihood.greedy and not likelihood.truncated


def test_what_is_said_is_most_probable_at_each_place(one, said):
    for prompt, answer in zip(prompts(one.tokenizer)[:4], said, strict=False):
        assert len(answer.tokens) == 9 and answer.stopped == "length"
        assert expected(one, prompt, [*answer.tokens])[1]
        (likelihood,) = one.likelihoods([Continued(prompt, answer.tokens)])
        assert likelihood.greedy
        (other,) = one.likelihoods([Continued(prompt, [*answer.tokens[:-1], answer.tokens[-1] ^ 1])])
        assert not other.greedy


def test_a_text_is_counted_once_whatever_its_length(one):
    tokens = [int(t) for t in np.random.RandomState(1).randint(64, 512, 2 * one.context + 5)]
    pieces = [*windows(tokens, 1, one.context)]
    assert [t for piece in pieces for t in piece.tokens] == tokens
    assert [len(piece.prompt.tokens) for piece in pieces] == [1, 1, 92]
    assert [len(piece.tokens) for piece in pieces] == [96, 96, 5]
    by_hand = [
        direct(one, [1, *tokens[:95]])[np.arange(96), tokens[:96]],
        direct(one, tokens[95:191])[np.arange(96), tokens[96:192]],
        direct(one, tokens[100:196])[np.arange(91, 96), tokens[192:]],
    ]
    short = direct(one, [1, *tokens[:4]])[np.arange(5), tokens[:5]].sum()
    assert one.rolling([tokens, tokens[:5]]) == pytest.approx([np.concatenate(by_hand).sum(), short], abs=1e-4)


def test_what_is_too_long_loses_its_beginning_and_says_so(one, said):
    long = prompts(one.tokenizer)[4]
    assert len(long.tokens) > 100
    (found,) = one.likelihoods([Continued(long, [70, 80])])
    whole = [*long.tokens, 70, 80][-97:]
    logprobs = direct(one, whole[:-1])
    assert found.truncated and found.logprob == pytest.approx(logprobs[94, 70] + logprobs[95, 80], abs=2e-5)
    assert [answer.truncated for answer in said] == [False] * 4 + [True]
    kept = Prompt(long.tokens[-(96 - 9) :])
    assert expected(one, kept, [*said[4].tokens])[1]
    picture = next(prompt for prompt in prompts(one.tokenizer) if prompt.images)
    with pytest.raises(UserError, match="images cannot be cut off"):
        one.likelihoods([Continued(picture, [70] * 96)])


def test_neither_the_batch_nor_the_mesh_matters(one, said, tmp_path):
    requests = continued(one.tokenizer)
    first = one.likelihoods(requests)
    mesh = placement(data=2, fsdp=2, tensor=2)
    for other in examinee(tmp_path, None, 96, batch=1), examinee(tmp_path, mesh, 96, batch=16):
        found = other.likelihoods(requests)
        assert [one[1:] for one in found] == [one[1:] for one in first]
        np.testing.assert_allclose([one.logprob for one in found], [one.logprob for one in first], rtol=0, atol=5e-5)
        assert other.say(prompts(one.tokenizer), MANNER) == said


@pytest.mark.parametrize(
    ("text", "thought", "stopped", "answer", "thinking"),
    [
        ("a;b", "", None, "a;b", None),
        ("a\n\nb", "", "until", "a", None),
        ("b", "a\n\na", None, "b", "a\n\na"),
        ("b\n\nc", "a", "until", "b", "a"),
    ],
)
def test_an_answer_ends_before_a_text_and_without_its_reasoning(one, text, thought, stopped, answer, thinking):
    tokenizer = one.tokenizer
    opens, closes = tokenizer.thinking_ids
    begun = Prompt([1, opens] if thought else [1])
    tokens = [*([*tokenizer.encode(thought), closes] if thought else []), *tokenizer.encode(text)]
    going = Completion(0, 0, tokens, [], [], None)
    found = one._heard(begun, going, ("\n\n",))
    assert found is None if stopped is None else found[:2] == (answer, thinking)
    ended = one._heard(begun, going._replace(tokens=[*tokens, tokenizer.eos], stopped="stop"), ("\n\n",))
    assert ended[:2] == (answer, thinking) and ended.stopped == (stopped or "stop")
    if thought:
        unfinished = Completion(0, 0, tokenizer.encode(thought), [], [], "length")
        assert one._heard(begun, unfinished, ())[:2] == ("", thought)

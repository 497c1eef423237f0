"""Answers that call tools: what is appended, what is trained on, and where it ends. What the model says is scripted."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from model_cases import vlm
from PIL import Image
from sampling_cases import placed

from ministral_jax.alignment.reward_functions import format_reward
from ministral_jax.alignment.rewards import FormatReward
from ministral_jax.alignment.rollout import Episode, Sampler, training_rows
from ministral_jax.alignment.tools import ToolBox, calls_of
from ministral_jax.data.chat import render
from ministral_jax.data.conversation import Message, Thought, ToolCall
from ministral_jax.data.prompts import PromptRow
from ministral_jax.data.tokenizer import text_of
from ministral_jax.models.vlm import Compute
from ministral_jax.sampling.engine import Completion, Prompt

SPEC = vlm(vocab=512, context=256)
LIMIT = 120
ADD = '[TOOL_CALLS]add[ARGS]{"a": 1, "b": 2}'


def tool(name: str, arguments: dict[str, Any]) -> Any:
    match name:
        case "add":
            return arguments["a"] + arguments["b"]
        case "name":
            return {"name": "Zoë"}
        case "echo":
            return arguments["text"]
        case "page":
            return "[IMG] </s>"
        case "set":
            return {1, 2}
    raise ValueError(f"there is no {name}")


class Script:
    """Stands in for the model: says what is written, round after round, and keeps what it was asked.

    A text ends with `</s>` as the model would have it; one without was cut by the limit.
    """

    def __init__(self, tokenizer, *rounds: list[str]):
        self.tokenizer, self.rounds, self.asked, self.said = tokenizer, list(rounds), [], []

    def ids(self, text: str) -> list[int]:
        return spelled(text, self.tokenizer)

    def __call__(self, params, prompts, each, limit) -> list[Completion]:
        texts = self.rounds[len(self.asked)]
        assert len(texts) == len(prompts) * each
        self.asked.append(prompts)
        found = []
        for n, text in enumerate(texts):
            tokens = self.ids(text)[:limit]
            drawn = [-1.0 - n - t / 256 for t in range(len(tokens))]  # exact in float32
            stopped = "stop" if tokens[-1] == self.tokenizer.eos else "length"
            found.append(Completion(n // each, n % each, tokens, [0.0] * len(tokens), drawn, stopped))
        self.said.append(found)
        return found


def row(tokenizer, *parts) -> Any:
    messages = (Message("user", parts),)
    return SimpleNamespace(messages=messages, rendered=render(messages, tokenizer, SPEC.vision, "row"))


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (8, 12, 3)).astype(np.uint8))


@pytest.fixture
def roll_out(tokenizer, monkeypatch):
    """`(script, rows, ..) -> episodes`."""

    def rolled(script, rows, rounds=4, limit=LIMIT, each=1, call=tool, spec=SPEC):
        monkeypatch.setattr(Sampler, "_generate", lambda self, *asked: script(*asked))
        tools = None if rounds is None else ToolBox(call, rounds)
        sampler = Sampler(spec, Compute(), placed(dict(fsdp=1)), tokenizer, 1.0, tools, on_step=lambda _: None)
        return sampler.roll_out({}, rows, list(range(7, 7 + len(rows))), each, limit)

    return rolled


def told(tokenizer, episode) -> list[str]:
    """What the tools returned, as the model reads it."""
    text = text_of(tokenizer, ())([t for t, own in zip(episode.tokens, episode.own, strict=True) if not own], True)
    return re.findall(r"\[TOOL_RESULTS\](.*?)\[/TOOL_RESULTS\]", text, re.DOTALL)


def test_an_answer_with_tools_is_the_conversation_of_the_template(tokenizer, roll_out):
    """Two calls at once, control tokens in a result, one more round; beside it an answer without a call, left alone."""
    rows = [row(tokenizer, picture(1), "Sum?"), row(tokenizer, "Hello")]
    script = Script(
        tokenizer,
        [f"[THINK]Hm: {ADD}[/THINK]I add.{ADD}[TOOL_CALLS]page[ARGS]{{}}</s>", "Hi!</s>"],
        ["And?[TOOL_CALLS]name[ARGS]{}</s>"],
        ["Zo, 3.</s>"],
    )
    episodes = roll_out(script, rows)
    calls = ToolCall("add", {"a": 1, "b": 2}), ToolCall("page", {})
    whole = (
        *rows[0].messages,
        Message("assistant", (Thought(f"Hm: {ADD}"), "I add."), calls),
        *(Message("tool", (text,)) for text in ("3", "[IMG] </s>")),
        Message("assistant", ("And?",), (ToolCall("name", {}),)),
        Message("tool", ('{"name": "Zoë"}',)),
        Message("assistant", ("Zo, 3.",)),
    )
    # in its reasoning the template spells a call out in letters, the model in control tokens
    spelled = text_of(tokenizer, ())
    rendered = render(whole, tokenizer, SPEC.vision, "whole")
    found = [*episodes[0].prompt.tokens, *episodes[0].tokens]
    assert spelled(found, True) == spelled(rendered.tokens, True)
    after = lambda tokens: list(tokens)[list(tokens).index(tokenizer.special("[/THINK]")) :]
    assert after(found) == after(rendered.tokens)
    # its own are exactly the tokens that fine-tuning would count
    own = [False] * len(episodes[0].prompt.tokens) + episodes[0].own
    assert own[-len(after(found)) :] == (rendered.flags & 1).astype(bool).tolist()[-len(after(found)) :]
    assert told(tokenizer, episodes[0]) == ["3", "[IMG] </s>", '{"name": "Zoë"}']
    assert episodes[0].stopped == episodes[1].stopped == "stop"
    assert episodes[1].tokens == script.ids("Hi!</s>") and all(episodes[1].own)

    # every round was asked with all that came before, and with the prompt's images
    first, second, third = (asked[0] for asked in script.asked)
    assert [len(asked) for asked in script.asked] == [2, 1, 1]
    for earlier, later in ((first, second), (second, third)):
        assert list(later.tokens[: len(earlier.tokens)]) == list(earlier.tokens)
        assert later.tokens[-1] == tokenizer.special("[/TOOL_RESULTS]")
        assert later.images is earlier.images is not None
    assert len({prompt.seed for prompt in (first, second, third)}) == 3


def test_only_what_the_model_drew_is_trained_on(tokenizer, roll_out):
    rows = [row(tokenizer, picture(1), "Sum?"), row(tokenizer, "Hello")]
    script = Script(tokenizer, [f"I add.{ADD}</s>", "Hi!</s>"], [f"{ADD}</s>"], ["3</s>"])
    episodes = roll_out(script, rows)
    batch = training_rows(episodes, SPEC, 32)
    for n, drawn in enumerate([[script.said[0][0], script.said[1][0], script.said[2][0]], [script.said[0][1]]]):
        trained = batch["loss_mask"][n] > 0
        assert batch["labels"][n, trained].tolist() == [t for c in drawn for t in c.tokens]
        assert batch["old_logprobs"][n, trained].tolist() == [x for c in drawn for x in c.processed_logprobs]
        assert not batch["old_logprobs"][n, ~trained].any()
        text = [*episodes[n].prompt.tokens, *episodes[n].tokens]
        assert batch["tokens"][n, : len(text)].tolist() == text and batch["segments"][n].sum() == len(text)
    results = sum(not own for own in episodes[0].own)
    assert results == 2 * len(script.ids("[TOOL_RESULTS]3[/TOOL_RESULTS]"))
    assert (batch["image_slot"][0] >= 0).sum() == 6 and (batch["image_slot"][1] < 0).all()


def test_an_answer_never_exceeds_its_limit(tokenizer, roll_out):
    """By one token less or more: results and one token after them fit, or the call is the end of it."""
    call, result = f"{ADD}</s>", "[TOOL_RESULTS]3[/TOOL_RESULTS]"
    rows, ids = [row(tokenizer, "Hello")], Script(tokenizer).ids
    needed = len(ids(call)) + len(ids(result))
    long = "It is three, of course.</s>"

    (left,) = roll_out(Script(tokenizer, [call]), rows, limit=needed)
    assert (left.tokens, left.stopped, all(left.own)) == (ids(call), "stop", True)
    (left,) = roll_out(Script(tokenizer, [call]), rows, limit=len(ids(call)))
    assert (left.tokens, left.stopped) == (ids(call), "stop")

    for more in range(1, len(ids(long)) + 2):
        script = Script(tokenizer, [call], [long])
        (cut,) = roll_out(script, rows, limit=needed + more)
        assert cut.tokens == (ids(call) + ids(result) + ids(long))[: needed + more]
        assert len(cut.own) == len(cut.logprobs) == len(cut.tokens)
        assert cut.own[needed:] == [True] * min(more, len(ids(long)))
        assert cut.logprobs[needed:] == script.said[1][0].processed_logprobs[:more]
        assert cut.stopped == ("length" if more < len(ids(long)) else "stop")

    # the model's context is a limit too
    context = len(rows[0].rendered.tokens) + needed
    (left,) = roll_out(Script(tokenizer, [call]), rows, spec=SPEC.model_copy(update={"context": context}))
    assert left.tokens == ids(call)
    script = Script(tokenizer, [call], ["3"])
    (more,) = roll_out(script, rows, spec=SPEC.model_copy(update={"context": context + 1}))
    assert more.tokens == ids(call + result + "3")


@pytest.mark.parametrize(
    ("call", "results"),
    [
        ("[TOOL_CALLS]add", ["error: no [ARGS] after the name of the tool"]),
        ("[TOOL_CALLS]add[ARGS]{a: 1}", ["error: arguments of add are not a JSON object"]),
        ("[TOOL_CALLS]add[ARGS][1, 2]", ["error: arguments of add are not a JSON object"]),
        ("[TOOL_CALLS]a b[ARGS]{}", ["error: 'a b' is not the name of a tool"]),
        ("[TOOL_CALLS]sub[ARGS]{}", ["error: there is no sub"]),
        ('[TOOL_CALLS]add[ARGS]{"a": 1}', ["error: 'b'"]),
        ("[TOOL_CALLS]set[ARGS]{}", ["error: Object of type set is not JSON serializable"]),
        # half a character, which UTF-8 cannot hold
        ('[TOOL_CALLS]echo[ARGS]{"text": "\\ud800"}', ["\N{REPLACEMENT CHARACTER}"]),
        (f"[TOOL_CALLS]add{ADD}", ["error: no [ARGS] after the name of the tool", "3"]),
    ],
)
def test_what_goes_wrong_is_told_to_the_model(tokenizer, roll_out, call, results):
    script = Script(tokenizer, [f"{call}</s>"], ["Oh.</s>"])
    (episode,) = roll_out(script, [row(tokenizer, "Hello")])
    assert told(tokenizer, episode) == results
    assert text_of(tokenizer, ())(episode.tokens, True).endswith("[/TOOL_RESULTS]Oh.</s>")


def test_rounds_are_bounded(tokenizer, roll_out):
    called = []

    def counted(name, arguments):
        called.append(name)
        return "again"

    for rounds in (1, 3):
        called.clear()
        script = Script(tokenizer, *[["[TOOL_CALLS]add[ARGS]{}</s>"]] * (rounds + 1))
        (episode,) = roll_out(script, [row(tokenizer, "Hello")], rounds, call=counted)
        assert called == ["add"] * rounds and len(script.asked) == rounds + 1
        assert told(tokenizer, episode) == ["again"] * rounds
        assert episode.stopped == "stop"
    (episode,) = roll_out(Script(tokenizer, [f"{ADD}</s>"]), [row(tokenizer, "Hello")], rounds=None)
    assert all(episode.own)


@pytest.mark.parametrize("said", [f"[IMG]{ADD}</s>", ADD, f"[THINK]{ADD}[/THINK]3</s>", "3</s>"])
def test_no_tool_is_called(tokenizer, roll_out, said):
    """An `[IMG]` of the model's own would be an image in a prompt; a call that was cut, or only thought of, is none."""
    script = Script(tokenizer, [said])
    (episode,) = roll_out(script, [row(tokenizer, "Hello")])
    assert episode.tokens == script.ids(said) and all(episode.own) and len(script.asked) == 1


def test_an_image_token_after_a_result_stops_it_too(tokenizer, roll_out):
    script = Script(tokenizer, [f"{ADD}</s>"], [f"[IMG]{ADD}</s>"])
    (episode,) = roll_out(script, [row(tokenizer, picture(1), "Hello")])
    assert told(tokenizer, episode) == ["3"] and len(script.asked) == 2
    slots = training_rows([episode], SPEC, 32)["image_slot"][0]
    assert (slots >= 0).sum() == 6 and (slots[len(episode.prompt.tokens) :] < 0).all()


def test_samples_of_a_prompt_that_say_the_same_go_on_with_random_numbers_of_their_own(tokenizer, roll_out):
    script = Script(tokenizer, [f"{ADD}</s>"] * 4, ["3</s>"] * 4)
    roll_out(script, [row(tokenizer, "Hello")] * 2, each=2)
    assert len({prompt.seed for asked in script.asked for prompt in asked}) == 2 + 4


def spelled(text, tokenizer) -> list[int]:
    """Tokens of a text whose control tokens are meant, not their letters."""
    pieces = re.split(r"(\[/?[A-Z_]+\]|</s>)", text)
    return [t for n, p in enumerate(pieces) for t in ([tokenizer.special(p)] if n % 2 else tokenizer.encode(p))]


def test_calls_are_read_from_a_completion(tokenizer):
    text = '[THINK]so[/THINK]See.[TOOL_CALLS]f-1[ARGS]{"a": "é [1]"}[TOOL_CALLS]g[ARGS] {} </s>'
    assert calls_of(spelled(text, tokenizer), tokenizer) == [ToolCall("f-1", {"a": "é [1]"}), ToolCall("g", {})]
    assert calls_of(tokenizer.encode(text), tokenizer) == []  # letters
    for nothing in ("It is [ARGS]{}", "[THINK][TOOL_CALLS]f[ARGS]{}[/THINK]no", ""):
        assert calls_of(spelled(nothing, tokenizer), tokenizer) == []
    letters = spelled('[TOOL_CALLS]f[ARGS]{"a": "', tokenizer) + tokenizer.encode('[TOOL_CALLS]g[ARGS]"}')
    assert calls_of(letters, tokenizer) == [ToolCall("f", {"a": "[TOOL_CALLS]g[ARGS]"})]
    for text, problem in {
        "f": "no [ARGS] after the name of the tool",
        "[ARGS]{}": "'' is not the name of a tool",
        "f g[ARGS]{}": "'f g' is not the name of a tool",
        'f[ARGS]{"a": 1': "arguments of f are not a JSON object",
        "f[ARGS]7": "arguments of f are not a JSON object",
        "f[ARGS]" + "{" * 10**4: "arguments of f are not a JSON object",
    }.items():
        (found,) = calls_of(spelled("[TOOL_CALLS]" + text, tokenizer), tokenizer)
        assert found.arguments is None and found.problem == problem


@pytest.mark.parametrize(
    ("text", "thinking", "answer"),
    [
        ("[THINK]2+2[/THINK]4</s>", "2+2", "4"),
        ("4</s>", None, "4"),
        ("[THINK]2+2", "2+2", ""),
        ("[THINK]2+2[/THINK]4[THINK]or 5</s>", "2+2", ""),
        ("4[THINK]2+2", None, ""),
        ("so [THINK]2+2[/THINK]4</s>", None, "so [THINK]2+2[/THINK]4"),
        ("[THINK]a[THINK]b[/THINK]c[/THINK]d</s>", "a[THINK]b", "c[/THINK]d"),
    ],
)
def test_only_control_tokens_open_and_close_a_thinking_chunk(tokenizer, text, thinking, answer):
    sampler = Sampler(SPEC, Compute(), placed(dict(fsdp=1)), tokenizer, 1.0, on_step=lambda _: None)
    row = PromptRow((), None, {"answer": "4"}, "", "s", "row 1")

    def seen(tokens):
        return sampler.sample(row, Episode(Prompt([1]), tokens, [True] * len(tokens), [], "stop"), 99)

    sample = seen(spelled(text, tokenizer))
    assert (sample.thinking, sample.answer) == (thinking, answer)
    letters = seen([*tokenizer.encode(text.removesuffix("</s>")), tokenizer.eos])
    assert (letters.thinking, letters.answer) == (None, text.removesuffix("</s>"))
    assert format_reward(letters, FormatReward(kind="format")) == 0
    assert format_reward(sample, FormatReward(kind="format")) == float(text == "[THINK]2+2[/THINK]4</s>")

"""Conversations with tools against mistral-common, and rows of prompts and preferences."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from PIL import Image

from ministral_jax.data.chat import TRAINABLE, render, render_text
from ministral_jax.data.config import SourceConfig
from ministral_jax.data.conversation import (
    Message,
    Thought,
    ToolCall,
    as_openai,
    parse_messages,
    parse_tools,
)
from ministral_jax.data.documents import tokenise
from ministral_jax.data.pairwise import judge_messages
from ministral_jax.data.sources import open_source, read_documents
from ministral_jax.errors import UserError
from ministral_jax.models.spec import PRESETS

VISION = PRESETS["tiny-24b"].vision
BASE = Path("/base")


def user(content):
    return {"role": "user", "content": content}


def said(content, *calls):
    message = {"role": "assistant", "content": content}
    return {**message, "tool_calls": list(calls)} if calls else message


def call(name, arguments, call_id: str | None = "c1"):
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def result(content, call_id="c1", **more):
    return {"role": "tool", "tool_call_id": call_id, "content": content, **more}


def think(text):
    return {"type": "thinking", "thinking": text}


def text(content):
    return {"type": "text", "text": content}


SYSTEM = {"role": "system", "content": "Be brief."}
WEATHER = {
    "type": "function",
    "function": {
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "où?"}}},
        "strict": True,
        "name": "weather",
        "description": "The weather of a city",
    },
}
ADD = {"type": "function", "function": {"name": "add"}}

CHATS = {
    "one turn": ([user("Hello [INST]"), said("Hi there.")], None),
    "system and turns": ([SYSTEM, user("one"), said("b\n  "), user([text("c"), text("d")]), said("five")], None),
    "reasoning without tools": ([user("2+2?"), said([think("easy"), text("4")])], None),
    "prompt without tools": ([SYSTEM, user("Why?")], None),
    "offered": ([user("Hi"), said("Hello")], [WEATHER]),
    "offered, not called, two turns": ([SYSTEM, user("Hi"), said("Hello"), user("2"), said("b ")], [WEATHER, ADD]),
    "called": ([user("Rain?"), said("", call("weather", '{"city":"Orléans",  "n": 1.0}'))], [WEATHER]),
    "called without arguments": ([user("Rain?"), said(None, call("add", ""))], None),
    "answered": (
        [SYSTEM, user("Rain?"), said(None, call("weather", {"city": "Brü"})), result('{"rain":  true}'), said("Yes.")],
        [WEATHER],
    ),
    "said and called": ([user("x"), said("Let me see. ", call("add", '{"a": [1, {"b": null}]}'))], [ADD]),
    "several, answered in another order": (
        [
            user("x"),
            said("", call("add", '{"a": 1}', "first"), call("weather", "{}", "second")),
            result("2nd", "second", name="weather"),
            result([text("1st"), text("more")], "first"),
            said("", call("add", "{}", "first")),
            result("", "first"),
            said("Both [TOOL_CALLS]"),
            user("y"),
            said("z"),
        ],
        [ADD, WEATHER],
    ),
    "reasoning": (
        [
            {"role": "system", "content": [text("Think:"), think("so")]},
            user("x"),
            said([think("call it"), text("one moment")], call("add", '{"a": 1}')),
            result("2"),
            said([think("fine"), text("It is 2. ")]),
        ],
        [ADD],
    ),
    "prompt": ([SYSTEM, user("Rain?")], [WEATHER]),
    "prompt after a result": ([user("x"), said("", call("add", "{}")), result("2")], [ADD]),
}  # fmt: skip


def rendered(raw, tools, tokenizer, prompt=False):
    messages = parse_messages(raw, BASE, "row 1", prompt)
    return render(messages, tokenizer, VISION, "row 1", parse_tools(tools or [], "row 1"))


@pytest.mark.parametrize("name", CHATS)
def test_chats_with_tools_are_encoded_as_in_mistral_common(name, tokenizer):
    raw, tools = CHATS[name]
    mode = ValidationMode.test if name.startswith("prompt") else ValidationMode.finetuning
    theirs = MistralTokenizer.from_file(tokenizer.path, mode)
    request = ChatCompletionRequest.from_openai(json.loads(json.dumps(raw)), tools=tools)
    expected = theirs.encode_chat_completion(request).tokens
    assert rendered(raw, tools, tokenizer, name.startswith("prompt")).tokens.tolist() == expected
    if raw[-1]["role"] == "assistant":  # as a prompt it is what the same conversation gives without its last message
        prompt = rendered(raw, tools, tokenizer, prompt=True)
        assert prompt.tokens.tolist() == rendered(raw[:-1], tools, tokenizer, prompt=True).tokens.tolist()
        assert prompt.tokens.tolist() == expected[: len(prompt.tokens)] and not set(prompt.flags) - {0, TRAINABLE}


SPOKEN = {
    "one turn": ["Hi there.</s>"],
    "system and turns": ["b\n</s>", "five</s>"],
    "reasoning without tools": ["[THINK]easy[/THINK]4</s>"],
    "reasoning": [
        '[THINK]call it[/THINK]one moment[TOOL_CALLS]add[ARGS]{"a": 1}</s>', "[THINK]fine[/THINK]It is 2. </s>",
    ],
    "several, answered in another order": [
        '[TOOL_CALLS]add[ARGS]{"a": 1}[TOOL_CALLS]weather[ARGS]{}</s>', "[TOOL_CALLS]add[ARGS]{}</s>",
        "Both [TOOL_CALLS]</s>", "z</s>",
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", SPOKEN)
def test_what_the_assistant_wrote_and_nothing_else_is_a_target(name, tokenizer):
    document = rendered(*CHATS[name], tokenizer)
    on = np.flatnonzero(document.flags)
    assert set(document.flags[on]) == {TRAINABLE}
    runs = np.split(document.tokens[on], np.flatnonzero(np.diff(on) > 1) + 1)
    assert [tokenizer.tekken.decode(run.tolist(), SpecialTokenPolicy.KEEP) for run in runs] == SPOKEN[name]


ORDERS = [
    ("hello", "must be a list"),
    ([], "user and assistant in turn: the assistant's turn is missing at the end"),
    ([user("a")], "user and assistant in turn: the assistant's turn is missing at the end"),
    ([user("a"), user("b")], "user and assistant in turn: the assistant's turn is missing at the end"),
    ([user(""), said("b")], "message from user is empty"),
    ([user(3), said("b")], "string or a list of chunks, got 3"),
    ([user([{"type": "audio"}]), said("b")], "cannot hold .*audio"),
    ([user([{"type": "image", "image": "https://x/y.png"}]), said("b")], "'https://x/y.png' is not a local file"),
    ([user("a"), said([{"type": "image", "image": "b.png"}])], "message from assistant cannot hold"),
    ([user("a"), SYSTEM, said("c")], "message 2 is from 'system' where 'assistant' or 'user' was expected"),
    ([said("c")], "message 1 is from 'assistant' where 'system' or 'user' was expected"),
    ([SYSTEM, user("a"), said("b"), user("c")], "the assistant's turn is missing at the end"),
    ([user("a"), result("b")], r"\['user', 'tool'\] .*message 2 is from 'tool' .*no tool call waits for a result"),
    ([user("a"), said("b"), result("c")], "message 3 is from 'tool' where .*no tool call waits for a result"),
    ([user("a"), said("", call("f", "{}")), said("c")], "message 3 is from 'assistant' where 'tool' was expected"),
    (
        [user("a"), said("", call("f", "{}"), call("g", "{}", "c2")), result("1"), said("c")],
        "message 4 is from 'assistant' where 'tool' was expected",
    ),
    ([user("a"), said("", call("f", "{}")), result("b", "c9")], r"tool call 'c9', which nobody made .*\['c1'\]"),
    (
        [user("a"), said("", call("f", "{}"), call("g", "{}", "c2")), result("1"), result("1")],
        r"message 4 answers tool call 'c1', .*which has its result; \['c2'\]",
    ),
    ([user("a"), said("", call("f", "{}")), result("b"), user("c")], "message 4 is from 'user' where 'assistant'"),
    ([user("a"), said("", call("f", "{}")), {"role": "tool", "content": "b"}], "needs the 'tool_call_id' .* got None"),
    ([user("a"), said("", call("f", "[1]"))], r"tool call f has arguments that are not a JSON object: '\[1\]'"),
    ([user("a"), said("", call("f", "{'a': 1}"))], "tool call f has arguments that are not a JSON object"),
    ([user("a"), said("", call("f", 7))], "tool call f has arguments that are not a JSON object: '7'"),
    ([user("a"), said("", call("f g", "{}"))], "a tool call must be .* got .*f g"),
    ([user("a"), {"role": "assistant", "tool_calls": "f"}], "'tool_calls' is a string that holds no JSON, 'f'; give"),
    ([user("a"), {"role": "assistant", "tool_calls": ["f"]}], "'tool_calls' is a string that holds no JSON, 'f'"),
    ([user("a"), said("", call("f", "{}", None))], "tool call f needs an 'id' of its own, got None"),
    ([user("a"), said("", call("f", "{}"), call("g", "{}"))], "tool call g needs an 'id' of its own, got 'c1'"),
    ([user("a"), said(" \n")], "message from assistant is an empty completion"),
    ([user("a"), said(None)], "message from assistant is an empty completion"),
    ([user("a"), said([think(" ")])], "message from assistant is an empty completion"),
    ([user([think("x")]), said("b")], "message from user cannot hold"),
    ([user("a"), said("", call("f", "{}")), result([{"type": "image", "image": "a.png"}])], "from tool cannot hold"),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "sentence"), ORDERS)
def test_bad_conversations_are_one_sentence(raw, sentence):
    with pytest.raises(UserError, match=f"^here row 7: .*{sentence}") as error:
        parse_messages(raw, BASE, "here row 7")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        ([], "'system' or 'user' must follow before there is anything to answer"),
        ([SYSTEM], "'user' must follow before there is anything to answer"),
        ([user("a"), said("", call("f", "{}"), call("g", "{}", "c2")), result("1")], "'tool' must follow before"),
        ([user("a"), said("b"), user("c"), said("")], "empty completion"),
    ],
)
def test_bad_prompts_are_one_sentence(raw, sentence):
    with pytest.raises(UserError, match=f"^here row 7: .*{sentence}"):
        parse_messages(raw, BASE, "here row 7", prompt=True)


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        ("weather", "'tools' is a string that holds no JSON, 'weather'; give a list"),
        (["weather"], "'tools' is a string that holds no JSON, 'weather'; give a list"),
        ('{"name": "f"}', "'tools' must be a list of functions, got {'name': 'f'}"),
        ([{"type": "function", "function": {"description": "x"}}], "a tool must be .* got .*'x'"),
        ([{"type": "retrieval", "function": {"name": "x"}}], "a tool must be .* got .*retrieval"),
        ([{"type": "function", "function": {"name": "x", "parameters": "none"}}], "'parameters' is a string that hol"),
        ([{"type": "function", "function": {"name": "x", "parameters": ["a"]}}], "tool x must have"),
    ],
)
def test_bad_tools_are_one_sentence(raw, sentence):
    with pytest.raises(UserError, match=f"^here row 7: {sentence}"):
        parse_tools(raw, "here row 7")


def test_messages_can_be_written_as_json():
    raw, _ = CHATS["reasoning"]
    shown = as_openai(
        (*parse_messages(raw, BASE, "row 1"), Message("user", (Image.new("RGB", (4, 4)), Path("a"), "t")))
    )
    assert json.loads(json.dumps(shown)) == list(shown)
    assert shown[:2] == ({**raw[0]}, user("x"))
    assert shown[2] == said(raw[2]["content"], call("add", '{"a": 1}'))
    assert shown[3] == result("2")
    assert shown[5] == user([{"type": "image"}, {"type": "image"}, text("t")])


@pytest.fixture
def source(tmp_path):
    def write(*rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return open_source("chats", SourceConfig(kind="jsonl", path=str(path)))

    return write


def test_rows_as_documents_and_as_prompts(source, tokenizer, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    chat, tools = CHATS["answered"]
    rows = source(
        {"messages": chat, "tools": tools, "rubrics": ["kind"]},
        {"question": "2+2?", "answer": "4", "image": "a.png", "level": 3},
        {"messages": [user("x"), said("y")], "tools": None, "answer": "y"},
    )
    documents, prompts = list(read_documents(rows)), list(read_documents(rows, prompts=True))
    for document, prompt in zip(documents, prompts, strict=True):
        assert document.messages[:-1] == prompt.messages and document.messages[-1].role == "assistant"
        assert (document.name, document.columns, document.tools) == (prompt.name, prompt.columns, prompt.tools)
    assert documents[0].columns == {"rubrics": ["kind"]} and documents[0].tools[0]["function"]["name"] == "weather"
    assert documents[1].columns == {"answer": "4", "image": "a.png", "level": 3}
    assert documents[2].columns == {"answer": "y"} and documents[2].tools == ()
    stored = tokenise(rows, tokenizer, VISION, tmp_path)
    assert np.array_equal(stored.tokens[: stored.starts[1]], rendered(chat, tools, tokenizer).tokens)

    only = source({"messages": [user("x")], "answer": "1"}, {"prompt": "p"}, {"prompt": [SYSTEM, user("q")]})
    assert [p.messages[-1].parts for p in read_documents(only, prompts=True)] == [("x",), ("p",), ("q",)]
    with pytest.raises(UserError, match=r"rows.jsonl row 1: .*the assistant's turn is missing at the end"):
        list(read_documents(only))
    with pytest.raises(UserError, match=r"row 1: has \['text'\] but needs 'messages', 'prompt', or 'question' and"):
        list(read_documents(source({"text": "t"}), prompts=True))
    with pytest.raises(UserError, match=r"row 1: image .*none.png does not exist"):
        list(read_documents(source({"messages": [user([{"type": "image", "image": "none.png"}])]}), prompts=True))
    with pytest.raises(UserError, match=r"data.sources.chats is plain text, of kind 'python-library': it has no"):
        library = SourceConfig(kind="python-library", limit=1)
        next(read_documents(open_source("chats", library), prompts=True))


def test_preferences_become_both_orders_of_a_judgement(source, tokenizer, tmp_path):
    chat = [SYSTEM, user("a"), said([think("hm"), text("b")]), user("c")]
    rows = source(
        {"messages": chat, "chosen": "good", "rejected": "bad", "by": "x"},
        {"prompt": "p", "chosen": [said("yes")], "rejected": [said([think("w"), text("no")])]},
        *({"prompt": f"q{n}", "chosen": "1", "rejected": "2"} for n in range(200)),
    )
    documents = list(read_documents(rows))
    assert [d.name for d in documents[:3]] == ["rows.jsonl:1#ab", "rows.jsonl:1#ba", "rows.jsonl:2#ab"]
    assert documents[0].messages == (
        Message("user", ("system: Be brief.\nuser: a\nassistant: b\nuser: c\nA: good\nB: bad\nBetter: A or B?",)),
        Message("assistant", ("A",)),
    )
    assert documents[1].messages[-1].parts == ("B",) and documents[1].columns["by"] == "x"
    assert documents[2].messages[0].parts == ("user: p\nA: yes\nB: no\nBetter: A or B?",)
    prompts = list(read_documents(rows, prompts=True))
    assert len(prompts) == 202 and prompts[0].messages == parse_messages(chat, BASE, "", prompt=True)
    assert (prompts[0].columns["chosen"], prompts[0].name) == ("good", "rows.jsonl:1")

    held_out = tokenise(rows, tokenizer, None, tmp_path).drawn(0.3).reshape(-1, 2)
    assert np.array_equal(held_out[:, 0], held_out[:, 1]) and 0.2 < held_out.mean() < 0.4
    assert len(documents) == held_out.size

    for row, sentence in [
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same, 'a'; leave the row out"),
        ({"prompt": "p", "chosen": "a", "rejected": " "}, "'rejected' must be text that is not empty, got ' '"),
        ({"prompt": "p", "chosen": [user("a")], "rejected": "b"}, "chosen: roles .*the assistant's turn is missing"),
        ({"chosen": "a", "rejected": "b"}, r"has \['chosen', 'rejected'\] but needs"),
    ]:
        with pytest.raises(UserError, match=f"rows.jsonl row 1: {sentence}"):
            list(read_documents(source(row)))


def test_a_judgement_is_short_and_knows_images_and_calls(tokenizer):
    conversation = (
        Message("user", (Path("a.png"), "what?")),
        Message("assistant", (Thought("hm"), "See."), (ToolCall("f", {"a": 1}, None, "c1"),)),
        Message("tool", ("2",), call_id="c1"),
    )
    (message,) = judge_messages(conversation, "x", "y")
    turns = 'user: [image]what?\nassistant: See.[TOOL_CALLS]f[ARGS]{"a": 1}\ntool: 2\n'
    assert message.parts == (turns + "A: x\nB: y\nBetter: A or B?",)
    (empty,) = judge_messages((), "", "")
    assert len(tokenizer.encode(empty.parts[0])) < 25
    assert [len(tokenizer.encode(choice)) for choice in "AB"] == [1, 1]
    assert re.match(r"[AB]", tokenizer.decode(tokenizer.encode("A")))


@pytest.mark.parametrize("name", ["call_abc_123456", "1", "toolu_01A09q90qw90lq917835lq9", "abcdefghi"])
def test_guard_ids_of_tool_calls_need_not_be_nine_letters(name, tokenizer):
    """The template does not show them; without one, or answered by name alone, a call is refused."""
    chat = [user("x"), said("", call("add", "{}", name)), result("2", name), said("2")]
    usual = [user("x"), said("", call("add", "{}", "a1b2c3d4e")), result("2", "a1b2c3d4e"), said("2")]
    assert rendered(chat, [ADD], tokenizer).tokens.tolist() == rendered(usual, [ADD], tokenizer).tokens.tolist()
    nameless = {key: value for key, value in call("add", "{}", name).items() if key != "id"}
    with pytest.raises(UserError, match="tool call add needs an 'id' of its own, got None"):
        rendered([user("x"), said("", nameless), result("2", name), said("2")], [ADD], tokenizer)
    with pytest.raises(UserError, match=r"needs the 'tool_call_id' of the call it answers|answers tool call"):
        rendered([chat[0], chat[1], {"role": "tool", "name": "add", "content": "2"}, said("2")], [ADD], tokenizer)


@pytest.mark.parametrize("text", ["<s>Hello", "<s><s>", "</s>", "<s>[INST]a[/INST]b</s>", "[IMG]", "<pad><unk>"])
def test_guard_letters_of_control_tokens_stay_letters(text, tokenizer):
    plain = render_text(text, tokenizer, "row 1").tokens
    chat = rendered([user(text), said(text)], [], tokenizer).tokens
    for tokens, frame in ((plain, ["<s>", "</s>"]), (chat, ["<s>", "[INST]", "[/INST]", "</s>"])):
        control = [int(token) for token in tokens if token in tokenizer.control_ids]
        assert control == [tokenizer.special(piece) for piece in frame]
    assert tokenizer.decode(plain.tolist()) == text and tokenizer.decode(chat.tolist()) == 2 * text

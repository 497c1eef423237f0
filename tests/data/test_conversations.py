"""Thirty conversations, token by token as mistral-common encodes them."""

from __future__ import annotations

from copy import deepcopy

import chat_cases
import numpy as np
import pytest
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers import image as reference
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from ministral_jax.data.chat import render
from ministral_jax.data.conversation import parse_messages, parse_tools
from ministral_jax.errors import UserError


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return chat_cases.write_pictures(tmp_path_factory.mktemp("conversations"))


@pytest.fixture(scope="module")
def versions(tokenizer, place):
    return chat_cases.versions(tokenizer, place)


def test_there_are_thirty():
    assert len(chat_cases.CASES) == 30 and {case.version for case in chat_cases.CASES.values()} == {"v11", "v13", "v15"}


@pytest.mark.parametrize("name", chat_cases.CASES)
def test_a_conversation_is_encoded_as_by_mistral_common(name, versions, place, monkeypatch):
    monkeypatch.setattr(reference, "transform_image", lambda image, size: np.zeros((3, *size[::-1])))  # needs OpenCV
    case = chat_cases.CASES[name]
    tokenizer = versions[case.version]
    messages = parse_messages(deepcopy(case.messages), place, "row 1", case.is_prompt)
    ours = render(messages, tokenizer, chat_cases.VISION, "row 1", parse_tools(case.tools or [], "row 1"))
    mode = ValidationMode.test if case.is_prompt else ValidationMode.finetuning
    theirs = MistralTokenizer.from_file(tokenizer.path, mode)
    request = ChatCompletionRequest.from_openai(chat_cases.with_pictures(case.messages, place), tools=case.tools)
    encoded = theirs.encode_chat_completion(request)
    assert ours.tokens.tolist() == encoded.tokens and len(ours.pictures) == len(encoded.images)


@pytest.mark.parametrize(
    ("messages", "what"),
    [
        ([chat_cases.user("a"), chat_cases.user("b")], "texts side by side in one turn"),
        ([chat_cases.THINKING, chat_cases.user("a")], "reasoning of the system"),
    ],
)
def test_what_v15_renders_in_another_way_is_refused(versions, messages, what):
    with pytest.raises(UserError, match=f"row 1: .*is a file of v15; {what} can be rendered as in v13 alone"):
        render(parse_messages(messages, versions["v15"].path, "row 1", True), versions["v15"], None, "row 1")

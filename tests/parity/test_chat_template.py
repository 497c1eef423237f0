"""Thirty conversations, rendered by transformers with the chat template of an export, token by token as ours."""

from __future__ import annotations

import json
from copy import deepcopy

import chat_cases
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import AutoTokenizer

from ministral_jax.data.chat import render
from ministral_jax.data.config import TokenizerConfig
from ministral_jax.data.conversation import parse_messages, parse_tools
from ministral_jax.data.tokenizer import export_template, load_tokenizer
from ministral_jax.interop.hf_config import to_config
from ministral_jax.models.spec import PRESETS

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return chat_cases.write_pictures(tmp_path_factory.mktemp("conversations"))


@pytest.fixture(scope="module")
def versions(place):
    """By version, our tokenizer and the one of transformers that knows control tokens by their names, as
    `AutoProcessor` loads it."""
    tokenizer, found = load_tokenizer(TokenizerConfig(vocab=2048, special=64), place / "cache"), {}
    for version, ours in chat_cases.versions(tokenizer, place).items():
        (place / version / "config.json").write_text(json.dumps(to_config(PRESETS["tiny-24b"], "float32")))
        export_template(place / version / "tekken.json", place / version)
        found[version] = ours, AutoTokenizer.from_pretrained(place / version, mistral_format=False)
    return found


@pytest.mark.parametrize("name", chat_cases.CASES)
def test_the_exported_template_renders_a_conversation_as_ours(name, versions, place):
    case = chat_cases.CASES[name]
    ours, theirs = versions[case.version]
    messages = parse_messages(deepcopy(case.messages), place, "row 1", case.is_prompt)
    tokens = render(messages, ours, chat_cases.VISION, "row 1", parse_tools(case.tools or [], "row 1")).tokens
    shown = theirs.apply_chat_template(deepcopy(case.messages), tools=case.tools, return_dict=True)["input_ids"]
    # a processor puts rows of [IMG] and [IMG_BREAK], and one [IMG_END], where the template has one [IMG]
    image, line_break, end = ours.image_ids
    followed = np.isin(np.append(tokens[1:], 0), (image, line_break, end))
    once = [int(t) for t, more in zip(tokens, followed, strict=True) if not (t in (image, line_break) and more)]
    assert shown == [image if token == end else token for token in once]


def test_the_template_stands_beside_what_transformers_takes_first(versions, place):
    """Chats through `AutoTokenizer` are mistral-common's all the same."""
    ours, theirs = versions["v13"]
    default = AutoTokenizer.from_pretrained(place / "v13")
    assert type(default).__name__ == "MistralCommonBackend"
    asked = [chat_cases.S, chat_cases.user("Hello [INST]")]
    expected = render(parse_messages(asked, place, "row 1", True), ours, None, "row 1").tokens.tolist()
    assert default.apply_chat_template(asked, return_dict=True)["input_ids"] == expected
    # what a template cannot: in it a control token that a user spells is one
    assert theirs.apply_chat_template(asked, return_dict=True)["input_ids"].count(ours.special("[INST]")) == 2
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 11)

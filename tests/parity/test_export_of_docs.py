"""The recipe of docs/own_model.md to its end: transformers loads the export, and chats as the model was trained."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import jax.numpy as jnp  # noqa: E402
from own_model import work_through  # noqa: E402
from transformers import AutoModelForImageTextToText, AutoTokenizer  # noqa: E402

import ministral_jax  # noqa: E402
from ministral_jax.data.chat import render  # noqa: E402
from ministral_jax.data.config import TokenizerConfig  # noqa: E402
from ministral_jax.data.conversation import parse_messages, parse_tools  # noqa: E402
from ministral_jax.data.tokenizer import load_tokenizer  # noqa: E402

pytestmark = pytest.mark.parity

ADD = {"type": "function", "function": {"name": "add", "description": "", "parameters": {}}}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "What? [INST]"}
THOUGHT = {"role": "assistant", "content": [{"type": "thinking", "thinking": "so"}, {"type": "text", "text": "It is."}]}
CHATS = {
    "user": ([USER], None),
    "system and turns": ([SYSTEM, USER, {"role": "assistant", "content": "So"}, USER], None),
    "reasoning": ([USER, THOUGHT, USER], None),
    "tools": ([USER], [ADD]),
    "called": ([USER, {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "abcdefghi", "content": "2"}], [ADD]),
}  # fmt: skip


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    place = tmp_path_factory.mktemp("own")
    printed = work_through(place, run_python=lambda text: True)
    assert any("[INST]" in text and "[/INST]" in text for text in printed)  # what the page's own snippet shows
    return place / "runs/rehearsal/half-hf/hf"


def test_the_export_gives_the_logits_of_ours(half):
    tokens = np.random.default_rng(0).integers(64, 2048, (2, 24))
    model, params = ministral_jax.load(half)
    ours = model.apply({"params": params}, jnp.array(tokens))
    with torch.no_grad():
        loaded = AutoModelForImageTextToText.from_pretrained(half, dtype=torch.float32)
        theirs = loaded(input_ids=torch.tensor(tokens)).logits
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * float(theirs.abs().max()))


def test_what_its_card_tells_to_do_does_it(half, monkeypatch, capsys):
    (snippet,) = re.findall(r"```python\n(.*?)```", (half / "README.md").read_text(), re.S)
    monkeypatch.chdir(half)
    exec(snippet.replace("max_new_tokens=100", "max_new_tokens=2"), {})
    assert "Once upon a time" in capsys.readouterr().out


@pytest.mark.parametrize("name", CHATS)
def test_chats_are_those_that_the_model_was_trained_on(name, half, tmp_path):
    messages, tools = CHATS[name]
    theirs = AutoTokenizer.from_pretrained(half).apply_chat_template(json.loads(json.dumps(messages)), tools=tools)
    tokenizer = load_tokenizer(TokenizerConfig(file=str(half / "tekken.json")), tmp_path)
    parsed = parse_messages(messages, tmp_path, "row", prompt=True)
    ours = render(parsed, tokenizer, None, "row", parse_tools(tools or [], "row"))
    assert ours.tokens.tolist() == theirs["input_ids"]

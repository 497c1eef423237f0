"""Thirty conversations, and the tokenizer files in whose versions they are rendered."""

from __future__ import annotations

import base64
import json
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ministral_jax.data.config import TokenizerConfig
from ministral_jax.data.tokenizer import Tokenizer, export_tokenizer, load_tokenizer
from ministral_jax.models.spec import PRESETS

VISION = PRESETS["tiny-24b"].vision


class Case(NamedTuple):
    version: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None

    @property
    def is_prompt(self) -> bool:
        return self.messages[-1]["role"] != "assistant"


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": parts[0] if len(parts) == 1 and isinstance(parts[0], str) else [*parts]}


def said(content: Any, *calls: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": content} | ({"tool_calls": [*calls]} if calls else {})


def call(name: str, arguments: str, call_id: str = "abcdefghi") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def result(content: str, call_id: str = "abcdefghi") -> dict[str, Any]:
    return {"role": "tool", "content": content, "tool_call_id": call_id}


def text(content: str) -> dict[str, str]:
    return {"type": "text", "text": content}


def think(content: str) -> dict[str, str]:
    return {"type": "thinking", "thinking": content}


def tool(name: str, description: str = "", **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


S = {"role": "system", "content": "Be brief."}
THINKING = {"role": "system", "content": [text("Think first, so:"), think("your thoughts"), text("Then answer.")]}
WIDE, SMALL = ({"type": "image", "image": f"{name}.png"} for name in ("wide", "small"))
ADD, WEATHER = (
    tool("add", "Adds two numbers.", a={"type": "number"}),
    tool("weather", "Où pleut-il ?", city={"type": "string"}),
)
ONE = call("add", '{"a": 1, "b": [2, null]}')
TWO = call("weather", '{"city": "Orléans"}', "123456789")

CASES = {
    "one turn": Case("v13", [user("Hello"), said("Hi there.")]),
    "system": Case("v13", [S, user("2+2?"), said("4")]),
    "turns": Case("v13", [S, user("2+2?"), said("4"), user("And 3+3?"), said("6"), user("Thanks"), said("Welcome")]),
    "neighbours": Case("v13", [S, user("one"), user("two"), said("three"), said("four"), user("five"), said("six")]),
    "chunks": Case("v13", [user(text("a"), text("b")), said([text("c"), text("d")])]),
    "other letters": Case("v13", [user("Où ? 日本語 😀 naïve"), said("Ça va. ½ ≠ 0,5 €\u00a0!")]),
    "blanks": Case("v13", [user("  a\n\n\tb  \n"), said("\n  x = 1\n\n\n  y\n")]),
    "numbers and code": Case("v13", [user("```python\nfor i in range(1234):\n    f(i)\n```"), said("O(n), 1234.5e-6")]),
    "prompt": Case("v13", [user("Why?")]),
    "prompt after turns": Case("v13", [S, user("2+2?"), said("4"), user("Sure?")]),
    "reasoning": Case("v13", [user("2+2?"), said([think("easy"), text("4")])]),
    "reasoning in turns": Case("v13",
        [THINKING, user("2+2?"), said([think("so"), text("4")]), user("3+3?"), said([think("hm"), text("6")])]),
    "reasoning, prompt": Case("v13", [THINKING, user("2+2?")]),
    "tools offered": Case("v13", [S, user("Hi"), said("Hello")], [ADD, WEATHER]),
    "tools, prompt": Case("v13", [user("Rain?")], [WEATHER]),
    "called": Case("v13", [user("1+2?"), said("", ONE)], [ADD]),
    "said and called": Case("v13", [user("1+2?"), said("Let me see.", ONE)], [ADD]),
    "answered": Case("v13",
        [S, user("1+2?"), said(None, ONE), result("3"), said("It is 3."), user("Sure?"), said("Yes")], [ADD]),
    "two calls": Case("v13",
        [user("x"), said("", ONE, TWO), result("3"), result('{"rain": true}', "123456789"), said("3, rain")], [ADD,
        WEATHER]),
    "result, prompt": Case("v13", [user("x"), said("", call("add", "{}")), result("2")], [ADD]),
    "reasoning and calls": Case("v13",
        [S, user("x"), said([think("call it"), text("wait")], ONE), result("2"),
        said([think("fine"), text("It is 2.")])], [ADD]),
    "picture first": Case("v13", [user(WIDE, text("What?")), said("A wall")]),
    "picture last": Case("v13", [S, user(text("What?"), SMALL), said("A dot")]),
    "two pictures": Case("v13", [user(WIDE, text("and"), SMALL), said("Both"), user("So?"), said("Nothing")]),
    "pictures and tools": Case("v13",
        [user(SMALL, text("Add")), said("", ONE), result("3"), said("3"), user(WIDE)], [ADD]),
    "v15, turns": Case("v15", [S, user("2+2?"), said("4"), user("Sure?")]),
    "v15, reasoning and calls": Case("v15",
        [S, user("x"), said([think("call"), text("wait")], ONE), result("2"), said("2")], [ADD]),
    "v15, picture": Case("v15", [user(text("What?"), SMALL), said([think("small"), text("A dot")])]),
    "v11, turns": Case("v11", [S, user("2+2?"), said("4"), user("3+3?"), said("6"), user("Why?")]),
    "v11, picture": Case("v11", [S, user(WIDE, text("and"), SMALL), said("Both")]),
}  # fmt: skip


def write_pictures(directory: Path) -> Path:
    """Into a directory, which is returned."""
    Image.new("RGB", (30, 10), (200, 30, 30)).save(directory / "wide.png")
    Image.new("RGB", (5, 6), (30, 30, 200)).save(directory / "small.png")
    return directory


def with_pictures(messages: list[dict[str, Any]], directory: Path) -> list[dict[str, Any]]:
    """Pictures within the messages, as mistral-common reads them."""
    messages = deepcopy(messages)
    for message in messages:
        for n, chunk in enumerate(message["content"] if isinstance(message["content"], list) else []):
            if chunk["type"] == "image":
                content = base64.b64encode((directory / chunk["image"]).read_bytes()).decode()
                message["content"][n] = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{content}"}}
    return messages


def versions(tokenizer: Tokenizer, directory: Path) -> dict[str, Tokenizer]:
    """A tokenizer as it is exported, under each of the version numbers."""
    raw, found = json.loads(export_tokenizer(tokenizer, directory, VISION).read_text()), {}
    effort = {"type": "enum", "values": ["none", "high"], "accepts_none": True, "default": "high"}
    pieces = {
        "v11": [(34, "<SPECIAL_34>"), (35, "<SPECIAL_35>")],  # it knows no reasoning
        "v13": [],
        "v15": [(36, "[MODEL_SETTINGS]"), (37, "[/MODEL_SETTINGS]")],
    }
    for version in pieces:
        changed = deepcopy(raw) | {"config": raw["config"] | {"version": version}}
        if version == "v15":
            changed["model_settings_builder"] = {"reasoning_effort": effort}
        for rank, piece in pieces[version]:
            changed["special_tokens"][rank]["token_str"] = piece
        (directory / version).mkdir()
        (directory / version / "tekken.json").write_text(json.dumps(changed))
        config = TokenizerConfig(file=str(directory / version / "tekken.json"))
        found[version] = load_tokenizer(config, directory / "cache")
    return found

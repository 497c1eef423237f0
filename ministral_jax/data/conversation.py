"""Conversations: what a document holds, read from messages in the OpenAI style and written back to them."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any, Literal, NamedTuple

from PIL import Image

from ministral_jax.errors import UserError
from ministral_jax.places import place

_KEYS = {"role", "content", "tool_calls", "tool_call_id", "weight"}
_NEXT = {
    "system": ("user",),
    "user": ("assistant", "user"),
    "assistant": ("user", "assistant"),
    "tool": ("assistant",),
}
_HINTS = ("annotations", "cache_control", "signature")  # of servers, about a chunk that is read without them
_NOTHING: tuple[Any, ...] = (None, "", [], {})
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")  # what mistral-common accepts as the name of a function


@dataclass(frozen=True)
class Thought:
    """Reasoning before an answer."""

    text: str


class ToolCall(NamedTuple):
    """A function called with `arguments`, a JSON object; where it is malformed they are None and `problem` says why."""

    name: str
    arguments: dict[str, Any] | None
    problem: str | None = None
    id: str = ""
    """Ties a result to its call in a file; the template does not show it."""


Part = str | Thought | Path | Image.Image


@dataclass(frozen=True)
class Message:
    """One turn: text, reasoning and images (as paths, or decoded in RGB); the tools that the assistant calls."""

    role: Literal["system", "user", "assistant", "tool"]
    parts: tuple[Part, ...]
    calls: tuple[ToolCall, ...] = ()
    call_id: str = ""
    """Of a tool's result: the call it answers."""
    target: bool = True
    """Whether what the assistant says here is learnt: `weight` 1, not 0, of its row."""


@dataclass(frozen=True)
class Document:
    """Plain `text`, `parts` of text and images that stand in it, or a conversation of `messages` with the `tools` it
    may use.

    name: unique and stable. key: what is hashed to order documents, their names where empty. group: what is hashed to
    hold a document out, its key where empty; those of one group stay together. columns: the other keys of its row.
    where: for error messages. Of a pair `messages` end with the answer that was chosen, `rejected` with the other, and
    `margin` says by how much: see `pairwise.pair_document`.
    """

    name: str
    where: str
    text: str | None = None
    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    columns: dict[str, Any] = field(default_factory=dict)
    key: str = ""
    group: str = ""
    parts: tuple[str | Path, ...] = ()
    rejected: tuple[Message, ...] = ()
    margin: float = math.nan


def parse_messages(raw: Any, base: Path, where: str, prompt: bool = False) -> tuple[Message, ...]:
    """Check and convert messages in the OpenAI style; image paths are relative to `base`.

    Accepted content is a string or a list of `{"type": "text", "text": ..}`, `{"type": "image_url", "image_url": path
    or {"url": path}}`, `{"type": "image", "image" or "path" or "url": path}` from the user and `{"type": "thinking",
    "thinking": ..}` from the assistant or the system. The assistant may also, or only, have `tool_calls`, and a
    `weight` of 0 where what it says is not to be learnt. An optional system message comes first, then user and
    assistant alternate; neighbours of one role are joined, as mistral-common joins them. Every call is answered by a
    message from the role tool with its `tool_call_id`, and the assistant goes on. Results come back in the order of
    their calls, as there.

    The assistant is last; as a `prompt` the conversation ends before the assistant's last message, which may be absent.

    Raises:
        UserError: anything else; begins with `where`.
    """
    if not isinstance(raw, list) or not all(isinstance(m, dict) for m in raw):
        raise UserError(f"{where}: 'messages' must be a list of objects with 'role' and 'content'")
    messages: list[Message] = []
    expected: tuple[str, ...] = ("system", "user")
    waiting: list[str] = []
    for number, item in enumerate(raw, 1):
        role = item.get("role")
        if role not in expected:
            unasked = ", since no tool call waits for a result" if role == "tool" else ""
            raise _disorder(
                raw, f"message {number} is from {role!r:.80} where {_either(expected)} was expected{unasked}", where
            )
        message = _parse_message(role, item, base, where)
        if role != "tool":
            waiting = [call.id for call in message.calls]
        elif message.call_id in waiting:
            waiting.remove(message.call_id)
        else:
            raise UserError(
                f"{where}: message {number} answers tool call {message.call_id!r:.80}, which nobody made or which has "
                f"its result; {waiting!s:.200} wait for theirs"
            )
        if messages and role == messages[-1].role != "tool":
            message = _joined(messages.pop(), message, f"{where}: message {number}")
        messages.append(message)
        expected = ("tool",) if waiting else _NEXT[role]
    last = messages[-1].role if messages else None
    if prompt and last == "assistant":
        messages.pop()
    elif prompt and (last not in ("user", "tool") or waiting):
        raise _disorder(raw, f"{_either(expected)} must follow before there is anything to answer", where)
    elif not prompt and last != "assistant":
        raise _disorder(raw, "the assistant's turn is missing at the end", where)
    elif not prompt and not any(message.target for message in messages if message.role == "assistant"):
        raise UserError(f"{where}: every turn of the assistant has weight 0: nothing is to be learnt; leave it out")
    for n, message in enumerate(messages):
        if message.calls:
            order = {call.id: k for k, call in enumerate(message.calls)}
            results = slice(n + 1, n + 1 + len(order))
            messages[results] = sorted(messages[results], key=lambda result, order=order: order[result.call_id])
    return tuple(messages)


def parse_tools(raw: Any, where: str) -> tuple[dict[str, Any], ...]:
    """Check functions offered in the OpenAI style and give them the keys, in the order, that the template shows. Raises
    `UserError`: not a list of `{"type": "function", "function": {"name": .., ..}}`; begins with `where`."""
    raw = from_json(raw, "tools", where)
    if not isinstance(raw, list):
        raise UserError(f"{where}: 'tools' must be a list of functions, got {raw!r:.80}")
    tools = []
    for tool in (from_json(tool, "tools", where) for tool in raw):
        if (function := _function(tool)) is None:
            raise UserError(
                f"{where}: a tool must be {{'type': 'function', 'function': {{'name': ..}}}} with a name of 1 to 64 "
                f"letters, digits, _ and -, got {tool!r:.80}"
            )
        _check_function(function, f"{where}: tool {function['name']}", "description", "parameters", "strict", "return")
        description = function.get("description") or ""
        parameters = from_json(function.get("parameters"), "parameters", where) or {}
        if not isinstance(description, str) or not isinstance(parameters, dict):
            raise UserError(
                f"{where}: tool {function['name']} must have a text as description and a JSON schema as parameters"
            )
        shown = {"name": function["name"], "description": description, "parameters": parameters}
        tools.append({"type": "function", "function": shown})
    return tuple(tools)


def parse_call(name: str, arguments: str | None) -> ToolCall:
    """A call that a completion makes, `arguments` None where it has no `[ARGS]`; one that cannot be carried out has a
    `problem`, to be answered by."""
    if arguments is None:
        return ToolCall(name[:64], None, "no [ARGS] after the name of the tool")
    if not _NAME.fullmatch(name):
        return ToolCall(name[:64], None, f"{name[:64]!r} is not the name of a tool")
    parsed = _json_object(arguments)
    return ToolCall(name, parsed, None if parsed is not None else f"arguments of {name} are not a JSON object")


def as_openai(messages: tuple[Message, ...]) -> tuple[dict[str, Any], ...]:
    """JSON-able messages: content is a string where it is one text, else chunks; an image is `{"type": "image"}`."""

    def chunk(part: Part) -> dict[str, str]:
        if isinstance(part, Thought):
            return {"type": "thinking", "thinking": part.text}
        return {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}

    found = []
    for message in messages:
        one_text = len(message.parts) == 1 and isinstance(message.parts[0], str)
        content = message.parts[0] if one_text else [chunk(part) for part in message.parts]
        shown: dict[str, Any] = {"role": message.role, "content": content}
        functions = [(call.id, {"name": call.name, "arguments": dump(call.arguments)}) for call in message.calls]
        if functions:
            shown["tool_calls"] = [{"id": name, "type": "function", "function": one} for name, one in functions]
        if message.role == "tool":
            shown["tool_call_id"] = message.call_id
        found.append(shown)
    return tuple(found)


def spell(message: Message, thinking: bool = True) -> str:
    """A message as one text: images as `[image]`, reasoning, if wanted, and calls as in the template."""
    parts = ["[image]" if isinstance(part, (PurePath, Image.Image)) else part for part in message.parts]
    texts = [
        f"[THINK]{p.text}[/THINK]" if isinstance(p, Thought) else p for p in parts if thinking or isinstance(p, str)
    ]
    calls = (f"[TOOL_CALLS]{call.name}[ARGS]{dump(call.arguments)}" for call in message.calls)
    return "".join([*texts, *calls])


def from_json(value: Any, key: str, where: str) -> Any:
    """A value, or what the JSON holds that a table keeps in its place; nothing is an empty list. Raises `UserError`: it
    is text that holds no JSON; begins with `where`."""
    while isinstance(value, str) and value:
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise UserError(f"{where}: {key!r} is a string that holds no JSON, {value[:40]!r}; give a list") from None
    return value or []


def dump(value: Any) -> str:
    """JSON as the template has it."""
    return json.dumps(value, ensure_ascii=False)


def image_path(value: Any, base: Path, where: str) -> Path:
    """Path of an image named in a row, relative to `base`: a string, or an object that has it as `path` or `url`.
    Raises `UserError`: neither, or a URL that is not read."""
    value = _named(value)
    if not isinstance(value, str) or not value or not value.isprintable():
        raise UserError(f"{where}: an image must be the path of a file, got {value!r:.80}")
    scheme, separator, rest = value.partition("://")
    if scheme in ("gs", "s3") and separator:
        return place(value, f"{where}: image")
    if value.startswith("data:") or (separator and scheme != "file"):
        raise UserError(f"{where}: image {value[:60]!r} is not a local file; save it and give its path")
    path = Path(rest if separator else value)
    return path if path.is_absolute() else base / path


def _named(image: Any) -> Any:
    return image.get("url") or image.get("path") if isinstance(image, dict) and not image.get("bytes") else image


def _disorder(raw: list[Any], why: str, where: str) -> UserError:
    roles = str([m.get("role") for m in raw])
    roles = roles if len(roles) <= 200 else roles[:200] + ".."
    return UserError(
        f"{where}: roles {roles} are not an optional system message followed by user and assistant in turn: {why}"
    )


def _either(roles: tuple[str, ...]) -> str:
    return " or ".join(map(repr, roles))


def _joined(before: Message, message: Message, where: str) -> Message:
    """Neighbours of one role as one message."""
    if before.target != message.target:
        raise UserError(f"{where} follows another of the assistant with another weight; they are one turn")
    return replace(before, parts=before.parts + message.parts, calls=before.calls + message.calls)


def _check_keys(role: Any, raw: dict[str, Any], where: str) -> None:
    """Nothing that a message says is passed over."""
    # a tool's result may be named: the template knows it by its place
    unknown = sorted(k for k in raw.keys() - _KEYS if raw[k] not in _NOTHING and (k, role) != ("name", "tool"))
    unknown = [k for k in unknown if (k, raw[k]) != ("prefix", False)]  # of what mistral-common writes
    if unknown:
        raise UserError(
            f"{where}: message from {role} has {unknown[0]!r:.80}, which is not read; accepted are {sorted(_KEYS)}"
        )
    weight = raw.get("weight")
    if weight is not None and (role != "assistant" or isinstance(weight, bool) or weight not in (0, 1)):
        raise UserError(f"{where}: weight {weight!r:.80} of a message from {role} must be 0 or 1, and the assistant's")


def _parse_message(role: Any, raw: dict[str, Any], base: Path, where: str) -> Message:
    _check_keys(role, raw, where)
    calls, content = (), raw.get("content")
    call_id: Any = raw.get("tool_call_id") if role == "tool" else ""
    chunks = content or "" if role == "assistant" else content
    chunks = [{"type": "text", "text": chunks}] if isinstance(chunks, str) else chunks
    if not isinstance(chunks, list):
        raise UserError(
            f"{where}: content of a message from {role} must be a string or a list of chunks, got {content!r:.80}"
        )
    parts = tuple(_parse_chunk(role, chunk, base, where) for chunk in chunks)
    if role == "assistant":
        calls = _parse_calls(raw.get("tool_calls") or [], where)
        if not calls and not any((part.text if isinstance(part, Thought) else str(part)).strip() for part in parts):
            raise UserError(
                f"{where}: message from assistant is an empty completion: it has neither text nor tool_calls"
            )
    elif role != "tool" and not any(parts):
        raise UserError(f"{where}: message from {role} is empty")
    elif not isinstance(call_id, str):
        raise UserError(
            f"{where}: a tool's result needs the 'tool_call_id' of the call it answers, got {call_id!r:.80}"
        )
    return Message(role, parts, calls, call_id, raw.get("weight") != 0)


def _parse_chunk(role: str, chunk: Any, base: Path, where: str) -> Part:
    kind = chunk.get("type") if isinstance(chunk, dict) else None
    names = {"image": ("image", "path", "url")}.get(kind, (kind,)) if isinstance(kind, str) else ()
    value = next((chunk[name] for name in names if chunk.get(name) is not None), None)
    value = _named(value) if kind in ("image", "image_url") else value
    if isinstance(value, str):
        for key in chunk.keys() - {"type", *names, *_HINTS}:
            if chunk[key] not in _NOTHING and (key, chunk[key]) != ("closed", True):
                raise UserError(f"{where}: {kind} of a message from {role} has {key!r}, which is not read")
        if kind == "text":
            return value
        if kind == "thinking" and role in ("assistant", "system"):
            return Thought(value)
        if kind in ("image", "image_url") and role == "user":
            return image_path(value, base, where)
    raise UserError(
        f"{where}: message from {role} cannot hold {chunk!r:.80}; accepted are text, the user's image or "
        "image_url, and thinking of the assistant or the system"
    )


def _parse_calls(raw: Any, where: str) -> tuple[ToolCall, ...]:
    calls: list[ToolCall] = []
    raw = from_json(raw, "tool_calls", where)
    for item in raw if isinstance(raw, list) else [raw]:
        call = from_json(item, "tool_calls", where)
        if (function := _function(call)) is None:
            raise UserError(
                f"{where}: a tool call must be {{'id': .., 'type': 'function', 'function': {{'name': .., 'arguments': "
                f"..}}}} with a name of 1 to 64 letters, digits, _ and -, got {call!r:.80}"
            )
        name, given = function["name"], function.get("arguments")
        _check_function(function, f"{where}: tool call {name}", "arguments")
        arguments = {} if given in (None, "") else _json_object(given) if isinstance(given, str) else given
        if not isinstance(arguments, dict):
            raise UserError(f"{where}: tool call {name} has arguments that are not a JSON object: {str(given)[:80]!r}")
        call_id = call.get("id")
        if not isinstance(call_id, str) or call_id in ("", "null", *(c.id for c in calls)):
            raise UserError(f"{where}: tool call {name} needs an 'id' of its own, got {call_id!r:.80}")
        calls.append(ToolCall(name, arguments, None, call_id))
    return tuple(calls)


def _function(item: Any) -> dict[str, Any] | None:
    """The `function` of a tool or of a call to one, if its name may be one."""
    kind = item.get("type") or "function" if isinstance(item, dict) else None
    function = item.get("function") if kind == "function" else None
    named = isinstance(function, dict) and isinstance(name := function.get("name"), str) and _NAME.fullmatch(name)
    return function if named else None


def _check_function(function: dict[str, Any], what: str, *read: str) -> None:
    """Nothing that a function or a call to it says is passed over; mistral-common leaves `strict` out, as here."""
    unread = [key for key in function if key not in ("name", *read) and function[key] not in _NOTHING]
    if unread:
        raise UserError(f"{what} has {unread[0]!r:.80}, which is not read; accepted are {sorted(('name', *read))}")


def _json_object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None

"""Rows of JSONL as documents.

A row is one of `{"text": ..}`, `{"question": .., "answer": ..}`, `{"messages": [..], "tools": [..]}` (tools optional;
see `conversation.parse_messages`) and a preference, `{"prompt" or "messages": .., "chosen": .., "rejected": ..}`, which
gives a judge's two documents; `chosen` and `rejected` may also be whole conversations that share their beginning. Read
as prompts, a row ends before its answer, may have none, and may be `{"prompt": text or messages}`.

Images stand in the messages, or beside them as `"image": path` or `"images": [path, ..]`: then they are shown where
the user's text says `<image>`, or before the first of it where it never does. Paths are relative to the JSONL file. A
key that is null is absent. Other keys are the document's columns, which rewards read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ministral_jax.data.conversation import Document, Message, from_json, parse_messages, parse_tools, spell
from ministral_jax.data.pairwise import judge_documents
from ministral_jax.errors import UserError
from ministral_jax.files import open_plain

_PLACE = "<image>"
_NEVER_READ = {
    **dict.fromkeys(("video", "videos", "audio", "audios"), "there are only text and images here"),
    **dict.fromkeys(("functions", "function_call"), "offer functions as 'tools', call them as 'tool_calls'"),
    **dict.fromkeys(("system", "system_prompt"), "begin 'messages' with one from the role system"),
    **dict.fromkeys(("conversations", "history"), "put all turns into 'messages'"),
}
"""Keys of other formats that change what a model sees."""


def lines_of(path: Path) -> Iterator[tuple[int, bytes]]:
    """(row number from 1, content) of the lines that are not blank. Raises `UserError`: see `files.open_plain`."""
    with open_plain(path) as file:
        for n, line in enumerate(file, 1):
            if line.strip():
                yield n, line


def json_row(line: bytes, where: str) -> Any:
    """The value of a row of JSONL, half a character (`\\ud83d` alone) as U+FFFD; `UserError` where it is not UTF-8 or
    not JSON."""
    try:
        row = json.loads(line.decode("utf-8"))
        return _whole(row) if b"\\ud" in line.lower() else row
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 (byte {error.start} of the row)") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); each line must be one object") from None


def _whole(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_whole(each) for each in value]
    return {_whole(key): _whole(each) for key, each in value.items()} if isinstance(value, dict) else value


def parse_row(line: bytes, path: Path, name: str, where: str, prompts: bool) -> tuple[Document, ...]:
    """The documents of a row of the JSONL file at `path`: two of a preference, else one; equal rows are held out
    together. Raises `UserError`: the row is malformed, or has a key of another format that would be lost; begins with
    `where`."""
    row = json_row(line, where)
    if not isinstance(row, dict):
        raise UserError(f"{where}: must be an object, got {str(row)[:40]}")
    row, key = {k: value for k, value in row.items() if value is not None}, hashlib.sha256(line.strip()).hexdigest()
    for unread in row.keys() & _NEVER_READ.keys():
        raise UserError(f"{where}: {unread!r} is not read; {_NEVER_READ[unread]}")
    pair = {"chosen", "rejected"} <= row.keys()
    shared, *answers = _answers(row, where) if pair else (None,)
    if "text" in row and "messages" not in row and not prompts and not pair:
        if row.keys() & {"image", "images"}:
            raise UserError(f"{where}: a 'text' has no images; put them into 'messages', with a question and an answer")
        return (Document(name, where, _string(row, "text", where), columns=_columns(row), key=key),)
    judged = pair and not prompts
    messages, tools = _conversation(row, shared, path.parent, where, prompts or judged)
    document = Document(name, where, None, messages, tools, _columns(row), key)
    return judge_documents(document, *_compared(answers, where)) if judged else (document,)


def _columns(row: dict[str, Any]) -> dict[str, Any]:
    """What is no part of the conversation; a question's images stay, as they are named."""
    if "messages" in row or "prompt" in row:
        used = {"messages", "prompt", "tools", "image", "images"}
    else:
        used = {"text", "question", "tools"}
    return {key: value for key, value in row.items() if key not in used}


def _conversation(
    row: dict[str, Any], shared: list[Any] | None, base: Path, where: str, prompts: bool
) -> tuple[tuple[Message, ...], tuple[dict[str, Any], ...]]:
    """Messages and tools of a row; `shared` is the beginning of a preference that is given as two conversations."""
    if shared is not None:
        raw: Any = shared
    elif "messages" in row:
        raw = from_json(row["messages"], "messages", where)
        if "prompt" in row:
            _check_prompt(_spoken(row["prompt"]), raw, where)
    elif "prompt" in row and prompts:
        prompt = _spoken(row["prompt"])
        raw = prompt if isinstance(prompt, list) else [_said("user", _string(row, "prompt", where))]
    elif "question" in row and "answer" in row:
        raw = [_said("user", _string(row, "question", where)), _said("assistant", _string(row, "answer", where))]
    else:
        raise _lacking(row, where, prompts)
    if (images := _images(row, where)) is not None:
        raw = _shown(raw, images, where)
    return parse_messages(raw, base, where, prompts), parse_tools(row.get("tools"), where)


def _said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def _lacking(row: dict[str, Any], where: str, prompts: bool) -> UserError:
    if not prompts and "prompt" in row and (lone := {"chosen", "rejected"} & row.keys()):
        (missing,) = {"chosen", "rejected"} - lone
        return UserError(f"{where}: has {lone.pop()!r} but no {missing!r}; a pair needs both")
    needed = "'messages', 'prompt'" if prompts else "'text', 'messages'"
    return UserError(f"{where}: has {sorted(row)} but needs {needed}, or 'question' and 'answer'")


def _spoken(value: Any) -> Any:
    """Messages, given as such or as their JSON; anything else as it is: it may be a text that looks like a list."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(ValueError, RecursionError):
            found = json.loads(value)
            if isinstance(found, list) and found and all(isinstance(m, dict) and "role" in m for m in found):
                return found
    return value


def _check_prompt(prompt: Any, messages: Any, where: str) -> None:
    """A prompt beside messages is what they begin with, or what the user says there."""
    known = messages if isinstance(messages, list) else []
    said = [str(message.get("content")).strip() for message in known if isinstance(message, dict)]
    if str(prompt).strip() not in said and not (isinstance(prompt, list) and prompt == known[: len(prompt)]):
        raise UserError(f"{where}: 'messages' do not hold the prompt, {str(prompt)[:40]!r}; give one of the two")


def _images(row: dict[str, Any], where: str) -> list[Any] | None:
    """Images named beside the messages; None where there is no key for them."""
    if {"image", "images"} <= row.keys():
        raise UserError(f"{where}: has 'image' and 'images'; name all of them in 'images'")
    images = row.get("images", [row["image"]] if "image" in row else None)
    if images is not None and not isinstance(images, list):
        raise UserError(f"{where}: 'images' must be a list of paths, got {images!r}")
    return images


def _shown(raw: Any, images: list[Any], where: str) -> Any:
    """Messages with the images that a row names beside them; what is malformed is left to `parse_messages`."""
    users = [m for m in raw if isinstance(m, dict) and m.get("role") == "user"] if isinstance(raw, list) else []
    chunks = [found for message in users if (found := _chunks(message)) is not None]
    if not users or len(chunks) < len(users):
        return raw
    if images and any(chunk.get("type") in ("image", "image_url") for each in chunks for chunk in each):
        raise UserError(f"{where}: has images in its messages and beside them; name each once")
    for message in raw:
        if (
            message not in users
            and images
            and _PLACE in str(message.get("content") if isinstance(message, dict) else "")
        ):
            raise UserError(f"{where}: {_PLACE} stands in a message that is not the user's; images are shown in those")
    places = sum(chunk.get("text", "").count(_PLACE) for each in chunks for chunk in each)
    if places and places != len(images):
        raise UserError(f"{where}: its text says {_PLACE} {places} times but {len(images)} images are named beside it")
    shown = iter([{"type": "image", "image": image} for image in images])
    if places:
        chunks = [[part for chunk in each for part in _split(chunk, shown)] for each in chunks]
    else:
        chunks[0] = [*shown, *chunks[0]]
    filled = iter([{**message, "content": each} for message, each in zip(users, chunks, strict=True)])
    return [next(filled) if message in users else message for message in raw]


def _chunks(message: dict[str, Any]) -> list[dict[str, Any]] | None:
    """A message's content as chunks; None where it is malformed."""
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    whole = isinstance(content, list) and all(
        isinstance(c, dict) and isinstance(c.get("text", ""), str) for c in content
    )
    return content if whole else None


def _split(chunk: dict[str, Any], images: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A chunk's text, cut where an image is to be shown."""
    before, *rest = chunk.get("text", "").split(_PLACE)
    yield {**chunk, "text": before} if "text" in chunk else chunk
    for text in rest:
        yield next(images)
        yield {**chunk, "text": text}


def _answers(row: dict[str, Any], where: str) -> tuple[list[Any] | None, Any, Any]:
    """The beginning that chosen and rejected share where both are conversations, and what differs."""
    chosen, rejected = _spoken(row["chosen"]), _spoken(row["rejected"])
    whole = isinstance(chosen, list) and isinstance(rejected, list) and len(chosen) > 1
    if not whole or (isinstance(chosen[0], dict) and chosen[0].get("role") == "assistant"):
        return None, chosen, rejected
    shared = [a for a, b in zip(chosen[:-1], rejected[:-1], strict=False) if a == b]
    if shared != chosen[:-1] or shared != rejected[:-1]:
        raise UserError(f"{where}: chosen and rejected must differ in their last message alone")
    _check_same_prompt(row, shared, where)
    return shared, chosen[-1:], rejected[-1:]


def _check_same_prompt(row: dict[str, Any], shared: list[Any], where: str) -> None:
    """What else the row says of the conversation is the beginning that both share."""
    prompt, messages = _spoken(row.get("prompt")), _spoken(row.get("messages"))
    last = shared[-1].get("content") if isinstance(shared[-1], dict) else None
    if prompt is not None and prompt not in (shared, last):
        raise UserError(f"{where}: chosen and rejected do not begin with the prompt, {str(prompt)[:40]!r}")
    if messages is not None and messages not in (shared, _spoken(row["chosen"]), _spoken(row["rejected"])):
        raise UserError(f"{where}: 'messages' are neither what chosen and rejected begin with nor one of them")


def _compared(answers: list[Any], where: str) -> tuple[str, str]:
    """The texts of the chosen and the rejected answer, which may be given as the assistant's message alone."""
    texts, opening = {}, {"role": "user", "content": "?"}
    for key, value in zip(("chosen", "rejected"), answers, strict=True):
        if isinstance(value, list) and value:
            value = spell(parse_messages([opening, *value], Path(), f"{where}: {key}")[-1], thinking=False)
        texts[key] = _string({key: value}, key, where)
    if texts["chosen"] == texts["rejected"]:
        raise UserError(f"{where}: chosen and rejected are the same, {texts['chosen'][:40]!r}; leave the row out")
    return texts["chosen"], texts["rejected"]


def _string(row: dict[str, Any], key: str, where: str) -> str:
    value = row[key]
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {key!r} must be text that is not empty, got {value!r}")
    return value

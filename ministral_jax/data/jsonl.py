"""Rows of JSONL as documents.

A row is one of `{"text": ..}`, `{"question": .., "answer": ..}`, `{"messages": [..], "tools": [..]}` (tools optional;
see `conversation.parse_messages`) and a preference, `{"prompt" or "messages": .., "chosen": .., "rejected": ..}`, which
gives a judge's two documents, or where pairs are read one of both answers; `chosen` and `rejected` may also be whole
conversations that share their beginning, and a row of UltraFeedback with all `completions` of an `instruction` is one,
too. How much better the chosen one is may stand beside them: `probability`, or `score_chosen` and `score_rejected`.
Read as prompts, a row ends before its answer, may have none, and may be `{"prompt": text or messages}`.

Images stand in the messages, or beside them or a text as `"image": path` or `"images": [path, ..]`: then they are shown
where the text, in messages the user's, says `<image>` (or has a chunk `{"type": "image"}` without a path), or before
the first of it where it never does. Paths are relative to the JSONL file. A key that is null is absent. Other keys are
the document's columns, which rewards read.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ministral_jax.data.conversation import Document, Message, from_json, image_path, parse_messages, parse_tools, spell
from ministral_jax.data.pairwise import judge_documents, pair_document
from ministral_jax.errors import UserError
from ministral_jax.files import digest_of, open_plain, stable_key, unique_keys
from ministral_jax.lazy import Lazy

if TYPE_CHECKING:
    from scipy import special
else:
    special = Lazy("scipy.special")

MOST_LINE = 2**26
"""Bytes of a row: a file that is packed may hold a line that memory does not."""
_PLACE = "<image>"
_NAMED = "name images as 'image' or 'images'"
_NEVER_READ = {
    **dict.fromkeys(("video", "videos", "audio", "audios"), "there are only text and images here"),
    **dict.fromkeys(("functions", "function_call"), "offer functions as 'tools', call them as 'tool_calls'"),
    **dict.fromkeys(("system", "system_prompt"), "begin 'messages' with one from the role system"),
    **dict.fromkeys(("conversations", "history"), "put all turns into 'messages'"),
    **dict.fromkeys((f"{a}{b}" for a in ("image_path", "image_url", "image_file", "img") for b in ("", "s")), _NAMED),
}
"""Keys of other formats that change what a model sees."""
_NEVER_LEARNT = {
    **dict.fromkeys(("weight", "loss_mask", "completion_mask", "assistant_masks"), "give turns a 'weight' of 0 or 1"),
    **dict.fromkeys(("input_ids", "attention_mask"), "give the text, which is tokenised here"),
    **dict.fromkeys(("chosen_response", "rejected_response"), "a pair is 'chosen' and 'rejected'"),
}
"""Keys of other formats that change what is learnt; of prompts they are columns."""


def lines_of(path: Path) -> Iterator[tuple[int, bytes]]:
    """(row number from 1, content) of the lines that are not blank. Raises `UserError`: see `files.open_plain`; or a
    line is longer than `MOST_LINE`."""
    with open_plain(path) as file:
        for n, line in enumerate(iter(lambda: file.readline(MOST_LINE + 1), b""), 1):
            if len(line) > MOST_LINE:
                raise UserError(
                    f"{path} row {n}: is longer than {MOST_LINE} bytes; divide it, or drop it from the file"
                )
            if line.strip():
                yield n, line


def json_row(line: bytes, where: str) -> Any:
    """The value of a row of JSONL, half a character (`\\ud83d` alone) as U+FFFD and NaN, which tables write where
    nothing is, as null; `UserError` where it is not UTF-8 or not JSON."""
    try:
        row = json.loads(line.decode("utf-8-sig"), parse_constant=_constant, object_pairs_hook=unique_keys)
        return _whole(row) if b"\\ud" in line.lower() else row
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 (byte {error.start} of the row)") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); each line must be one object") from None


def _constant(name: str) -> float | None:
    return None if name == "NaN" else float(name)


def _whole(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_whole(each) for each in value]
    return {_whole(key): _whole(each) for key, each in value.items()} if isinstance(value, dict) else value


def parse_row(
    line: bytes, path: Path, name: str, where: str, prompts: bool, pairs: bool = False
) -> tuple[Document, ...]:
    """The documents of a row of the JSONL file at `path`: two of a preference, else one; equal rows, and preferences
    of one prompt, are held out together. As `pairs` every row must be a preference, and is one document. Raises
    `UserError`: the row is malformed, or has a key of another format that would be lost; begins with `where`."""
    row = json_row(line, where)
    if not isinstance(row, dict):
        raise UserError(f"{where}: must be an object, got {row!r:.40}")
    row, key = {k: value for k, value in row.items() if value is not None}, hashlib.sha256(line.strip()).hexdigest()
    _check_row(row, where, prompts)
    if "completions" in row and "instruction" in row:
        row = _best_and_another(row, key, where, prompts)
    pair = {"chosen", "rejected"} <= row.keys()
    if pairs and not pair:
        raise UserError(f"{where}: is no pair; a row needs 'chosen' and 'rejected'")
    shared, *answers = _answers(row, where) if pair else (None,)
    if "text" in row and "messages" not in row and not prompts and not pair:
        text, parts = _text(row, path.parent, where)
        return (Document(name, where, text, columns=_rest(row, "text", "image", "images"), key=key, parts=parts),)
    judged = pair and not prompts
    messages, tools = _conversation(row, shared, path.parent, where, prompts or judged)
    if "messages" in row or ("prompt" in row and (prompts or pair)):
        columns = _rest(row, "messages", "prompt", "tools", "image", "images")
    else:
        columns = _rest(row, "question", "tools")  # its images stay, as they are named
    document = Document(name, where, None, messages, tools, columns, key, _asked(row, shared) if pair else "")
    if not judged:
        return (document,)
    chosen, rejected = (_answer(key, value, where) for key, value in zip(("chosen", "rejected"), answers, strict=True))
    if pairs and chosen != rejected:
        return (pair_document(document, chosen, rejected, _margin(row, where)),)
    return judge_documents(document, *_compared([chosen, rejected], where))


def _asked(row: dict[str, Any], shared: list[Any] | None) -> str:
    """A digest of what a preference is about: as the file has it, so that it does not depend on where it lies."""
    asked = shared if shared is not None else [row.get(key) for key in ("messages", "prompt", "question")]
    return digest_of([asked, *(row.get(key) for key in ("tools", "image", "images"))])


def _check_row(row: dict[str, Any], where: str, prompts: bool) -> None:
    """Nothing that changes what is seen or learnt is passed over; what is empty says nothing."""
    refused = _NEVER_READ if prompts else _NEVER_READ | _NEVER_LEARNT
    for key in row:
        if key in refused and row[key] not in ("", [], {}):
            raise UserError(f"{where}: {key!r:.80} is not read; {refused[key]}")
    if not prompts and len(lone := {"chosen", "rejected"} & row.keys()) == 1:
        (missing,) = {"chosen", "rejected"} - lone
        raise UserError(f"{where}: has {lone.pop()!r} but no {missing!r}; a pair needs both")


def _rest(row: dict[str, Any], *used: str) -> dict[str, Any]:
    """The columns of a row: what is no part of its text or conversation."""
    return {key: value for key, value in row.items() if key not in used and key not in _NEVER_READ}


def _text(row: dict[str, Any], base: Path, where: str) -> tuple[str | None, tuple[str | Path, ...]]:
    """The text of a row, in which `<image>` is letters; of one with images its parts instead."""
    text, keys = _string(row, "text", where), row.keys() & {"image", "images"}
    pieces = text.split(_PLACE)
    if not any(row[key] for key in keys) and (len(pieces) == 1 or not keys):
        return text, ()
    images = _images(row, where)
    if not any(piece.strip() for piece in pieces):
        raise UserError(f"{where}: 'text' is nothing but images; there is nothing to be learnt")
    if len(pieces) == 1:
        pieces = [*[""] * len(images), text]
    if (places := len(pieces) - 1) != len(images):
        left = f"; {images[places]!r:.80} is not shown" if places < len(images) else ""
        raise UserError(
            f"{where}: its text says {_PLACE} {places} times but {len(images)} images are named beside it{left}"
        )
    pictures = (image_path(image, base, where) for image in images)
    shown = (part for piece, picture in zip_longest(pieces, pictures) for part in (piece, picture))
    return None, tuple(part for part in shown if part)


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
    raw = _shown(raw, _images(row, where), where)
    return parse_messages(raw, base, where, prompts), parse_tools(row.get("tools"), where)


def _said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def _lacking(row: dict[str, Any], where: str, prompts: bool) -> UserError:
    needed = "'messages', 'prompt'" if prompts else "'text', 'messages'"
    return UserError(f"{where}: has {sorted(row)!s:.200} but needs {needed}, or 'question' and 'answer'")


def _spoken(value: Any) -> Any:
    """Messages, given as such, as one alone or as their JSON; anything else as it is: it may be a text that looks like
    a list."""
    if isinstance(value, dict) and "role" in value:
        return [value]
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


def _images(row: dict[str, Any], where: str) -> list[Any]:
    """Images named beside the messages or the text."""
    if {"image", "images"} <= row.keys():
        raise UserError(f"{where}: has 'image' and 'images'; name all of them in 'images'")
    images = row.get("images", [row["image"]] if "image" in row else [])
    if not isinstance(images, list):
        raise UserError(f"{where}: 'images' must be a list of paths, got {images!r:.80}")
    return images


def _shown(raw: Any, images: list[Any], where: str) -> Any:
    """Messages with the images that a row names beside them; what is malformed is left to `parse_messages`."""
    users = [m for m in raw if isinstance(m, dict) and m.get("role") == "user"] if isinstance(raw, list) else []
    chunks = [found for message in users if (found := _chunks(message)) is not None]
    if not users or len(chunks) < len(users):
        return raw
    places = sum(chunk.get("text", "").count(_PLACE) for each in chunks for chunk in each)
    if not places and not images:
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
    if places and places != len(images):
        raise UserError(
            f"{where}: its user says {_PLACE}, or shows an image that has no path, {places} times but {len(images)} "
            "images are named beside the messages"
        )
    shown = iter([{"type": "image", "image": image} for image in images])
    if places:
        chunks = [[part for chunk in each for part in _split(chunk, shown)] for each in chunks]
    else:
        chunks[0] = [*shown, *chunks[0]]
    filled = iter([{**message, "content": each} for message, each in zip(users, chunks, strict=True)])
    return [next(filled) if message in users else message for message in raw]


def _chunks(message: dict[str, Any]) -> list[dict[str, Any]] | None:
    """A message's content as chunks, an image without its path as the text that stands for one; None where it is
    malformed."""
    content, place = message.get("content"), {"type": "text", "text": _PLACE}
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list) or not all(isinstance(chunk, dict) for chunk in content):
        return None
    chunks = [{key: value for key, value in chunk.items() if value is not None} for chunk in content]
    whole = all(isinstance(chunk.get("text", ""), str) for chunk in chunks)
    return [place if chunk == {"type": "image"} else chunk for chunk in chunks] if whole else None


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
    said = prompt.strip() == str(last).strip() if isinstance(prompt, str) else prompt == shared
    if prompt is not None and not said:
        raise UserError(f"{where}: chosen and rejected do not begin with the prompt, {str(prompt)[:40]!r}")
    if messages is not None and messages not in (shared, _spoken(row["chosen"]), _spoken(row["rejected"])):
        raise UserError(f"{where}: 'messages' are neither what chosen and rejected begin with nor one of them")


def _answer(key: str, value: Any, where: str) -> tuple[Message, ...]:
    """An answer given as text, or as the assistant's messages alone."""
    if isinstance(value, list) and value:
        opening = {"role": "user", "content": "?"}
        return parse_messages([opening, *value], Path(), f"{where}: {key}")[1:]
    return (Message("assistant", (_string({key: value}, key, where),)),)


def _compared(turns: list[tuple[Message, ...]], where: str) -> tuple[str, str]:
    """The texts of the chosen and the rejected answer."""
    texts = {key: spell(turn[-1], thinking=False) for key, turn in zip(("chosen", "rejected"), turns, strict=True)}
    chosen, rejected = (_string(texts, key, where) for key in texts)
    if chosen == rejected:
        raise UserError(f"{where}: chosen and rejected are the same, {chosen[:40]!r}; leave the row out")
    return chosen, rejected


def _margin(row: dict[str, Any], where: str) -> float:
    """See `pair_document`."""
    if "probability" in row:
        probability = _number(row, "probability", where)
        if not 0.5 <= probability <= 1:
            raise UserError(f"{where}: 'probability' {probability} that chosen is better must be from 1/2 to 1")
        return float(special.logit(probability))
    if not row.keys() & {"score_chosen", "score_rejected"}:
        return math.nan
    margin = _number(row, "score_chosen", where) - _number(row, "score_rejected", where)
    if margin < 0:
        raise UserError(f"{where}: 'score_chosen' is {-margin:g} below 'score_rejected'; exchange the answers")
    return margin


def _number(row: dict[str, Any], key: str, where: str) -> float:
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{where}: {key!r} must be a number, got {value!r:.40}")
    return float(value)


def _best_and_another(row: dict[str, Any], key: str, where: str, prompts: bool) -> dict[str, Any]:
    """A row of UltraFeedback as a preference: the completion with the highest score, and another by the row's hash, as
    Zephyr's (arXiv 2310.16944) are drawn, but of those that are scored lower: an equal one is no preference,
    which matters where the row is more than a prompt."""
    found = row["completions"]
    if not isinstance(found, list) or len(found) < 2 or not all(isinstance(each, dict) for each in found):
        raise UserError(f"{where}: 'completions' must be a list of two or more objects, got {found!r:.60}")
    scores = [_number(each, "overall_score", where) for each in found]
    best = scores.index(max(scores))
    others = [n for n, each in enumerate(found) if each.get("response") != found[best].get("response")]
    others = [n for n in others if prompts or scores[n] < scores[best]]
    if not others:
        raise UserError(f"{where}: all completions are the same or scored {scores[best]:g}; leave the row out")
    other = others[stable_key(key) % len(others)]
    rest = {name: value for name, value in row.items() if name not in ("instruction", "completions")}
    names = {"chosen": best, "rejected": other}
    answers = {name: found[n].get("response") for name, n in names.items()}
    return {
        **rest,
        "prompt": row["instruction"],
        **answers,
        **{f"score_{name}": scores[n] for name, n in names.items()},
    }


def _string(row: dict[str, Any], key: str, where: str) -> str:
    value = row[key]
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {key!r} must be text that is not empty, got {value!r:.80}")
    return value

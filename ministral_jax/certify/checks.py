"""What can be checked of an export without running the model: sizes, every tensor, the words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from pydantic import BaseModel

from ministral_jax.certify.gguf_file import open_gguf, wrong_tensors
from ministral_jax.certify.readers import Opened, opened
from ministral_jax.data.chat import render
from ministral_jax.data.config import TokenizerConfig
from ministral_jax.data.conversation import parse_messages
from ministral_jax.data.tokenizer import Tokenizer, export_tokenizer, load_tokenizer, text_of
from ministral_jax.doctor.examine import examine
from ministral_jax.errors import UserError
from ministral_jax.files import file_digest
from ministral_jax.interop.checkpoint import open_checkpoint
from ministral_jax.interop.fp8_weights import Scaled
from ministral_jax.interop.slots import Checkpoint
from ministral_jax.models.spec import ModelSpec
from ministral_jax.models.vlm import Params
from ministral_jax.stages.base import stage_tokenizer

EIGHT_BITS = 2.0**-4
"""Of the Frobenius norm, the most that rounding to e4m3 with a fitting scale takes away: half a unit of three bits."""
CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "3 + 4?"},
    {"role": "assistant", "content": "7"},
    {"role": "user", "content": "And [INST] été?"},
]


class Check(BaseModel):
    name: str
    holds: bool
    said: str


def checks(
    directory: Path, checkpoint: Path, trained: Opened, layout: str
) -> tuple[list[Check], Tokenizer | None, Opened | None]:
    """All checks, the tokenizer of the export, and the export as we read it; None where it cannot be read."""
    found, tokenizer = [] if layout == "gguf" else [_examined(directory)], None
    try:
        tokenizer = _tokenizer(directory)
        found += _words(directory, checkpoint, tokenizer, trained.model.spec)
        held = open_gguf(directory, trained.model.spec, tokenizer) if layout == "gguf" else None
        ours = opened(directory) if held is None else held.opened(trained)
        sizes = _sizes(ours.model.spec, trained.model.spec)
        found.append(sizes)
        if sizes.holds and held is not None:
            found.append(_tensors(*wrong_tensors(held, trained.params)))
        elif sizes.holds:
            found.append(_tensors(*_wrong(open_checkpoint(directory), ours.params, trained.params)))
    except UserError as error:
        return [*found, Check(name="readable", holds=False, said=str(error))], tokenizer, None
    return found, tokenizer, ours if sizes.holds else None


def _examined(directory: Path) -> Check:
    red = [finding for finding in examine(directory) if finding.level == "red"]
    said = "; ".join(f"{finding.subject}: {finding.said}" for finding in red) or "nothing is red"
    return Check(name="doctor", holds=not red, said=said)


def file_digests(directory: Path) -> dict[str, str]:
    """SHA-256 of the files of an export, without what is written about it."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    about = {"certificate.json", "README.md"}
    return {path.relative_to(directory).as_posix(): file_digest(path) for path in files if path.name not in about}


def _sizes(file: ModelSpec, trained: ModelSpec) -> Check:
    mine, theirs = file.model_dump(mode="json"), trained.model_dump(mode="json")
    other = [f"{key} is {mine[key]}, trained with {theirs[key]}" for key in mine if mine[key] != theirs[key]]
    return Check(name="configuration", holds=not other, said="; ".join(other) or "the sizes and positions of training")


def _wrong(held: Checkpoint, ours: Params, trained: Params) -> tuple[list[str], int, set[str]]:
    """Tensors that are not the parameter, rounded to their dtype, or in FP8 to within rounding; how many there are, and
    of which kinds."""
    wrong, kinds = [], set()
    for slot in held.slots:
        tensor, value = held.tensors[slot.name], slot.take(trained)
        if isinstance(tensor, Scaled):
            kinds.add("FP8")
            lost = np.linalg.norm((slot.take(ours) - value).ravel().astype(np.float64))
            is_right = lost <= EIGHT_BITS * np.linalg.norm(value.ravel().astype(np.float64))
        else:
            kinds.add(tensor.dtype.name)
            is_right = np.array_equal(value.astype(tensor.dtype), tensor.read())
        if not is_right:
            wrong.append(slot.name)
    return wrong, len(held.slots), kinds


def _tensors(wrong: list[str], count: int, kinds: set[str]) -> Check:
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        return Check(name="tensors", holds=False, said=f"{wrong[0]}{more}: not the trained parameter")
    exact = "to within rounding" if kinds & {"FP8", "Q8_0", "Q4_0"} else "bit for bit"
    return Check(
        name="tensors", holds=True, said=f"{count} tensors, {exact} the trained ones in {', '.join(sorted(kinds))}"
    )


def _tokenizer(directory: Path) -> Tokenizer | None:
    if not (directory / "tekken.json").is_file():
        return None
    with TemporaryDirectory() as scratch:
        return load_tokenizer(TokenizerConfig(file=str(directory / "tekken.json")), Path(scratch))


def _words(directory: Path, checkpoint: Path, tokenizer: Tokenizer | None, spec: ModelSpec) -> Iterator[Check]:
    wanted = _wanted(checkpoint, spec)
    if tokenizer is None or wanted is None:
        missing = "the checkpoint was trained with" if tokenizer is None else "the checkpoint has"
        same = tokenizer is None and wanted is None
        said = "neither has any" if same else f"no tekken.json to compare: {missing} {'one' if wanted else 'none'}"
        yield Check(name="tokenizer", holds=wanted is None, said=said)
    else:
        same = (directory / "tekken.json").read_bytes() == wanted
        yield Check(name="tokenizer", holds=same, said=f"tekken.json {'as trained with' if same else 'is another'}")
    if tokenizer is not None:
        yield _beginning(tokenizer)
        yield _template(directory, tokenizer)


def _wanted(checkpoint: Path, spec: ModelSpec) -> bytes | None:
    """The `tekken.json` that an export of the checkpoint has to hold."""
    if not (checkpoint / "manifest.json").is_file():
        path = checkpoint / "tekken.json"
        return path.read_bytes() if path.is_file() else None
    tokenizer = stage_tokenizer(checkpoint)
    if tokenizer is None:
        return None
    with TemporaryDirectory() as scratch:
        return export_tokenizer(tokenizer, Path(scratch), spec.vision).read_bytes()


def _beginning(tokenizer: Tokenizer) -> Check:
    """One <s> before a chat; ids that configurations name are examined by the doctor."""
    ids = _chat(tokenizer)
    holds = ids[0] == tokenizer.bos and ids.count(tokenizer.bos) == 1
    said = f"<s> is {tokenizer.bos}, once before a chat" if holds else "a chat does not begin with one <s>"
    return Check(name="BOS", holds=holds, said=said)


def _chat(tokenizer: Tokenizer) -> list[int]:
    messages = parse_messages(CHAT, Path(), "the chat", prompt=True)
    return render(messages, tokenizer, None, "the chat").tokens.tolist()


def _template(directory: Path, tokenizer: Tokenizer) -> Check:
    """The template writes what training read."""
    path = directory / "chat_template.jinja"
    if not path.is_file():
        return Check(name="template", holds=True, said="none: mistral-common renders chats by tekken.json")
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    frame = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    frame.globals |= {"raise_exception": refuse, "strftime_now": lambda form: ""}
    frame.filters["tojson"] = lambda value, **how: json.dumps(value, ensure_ascii=False, **how)
    try:
        template = frame.from_string(path.read_text(encoding="utf-8"))
        text = template.render(messages=CHAT, bos_token="<s>", eos_token="</s>", add_generation_prompt=True)
    except TemplateError as error:
        return Check(name="template", holds=False, said=f"cannot be rendered: {error}")
    same = text == text_of(tokenizer, ())(_chat(tokenizer), final=True)
    digest = file_digest(path)[:12]
    return Check(
        name="template",
        holds=same,
        said=f"{digest} renders {'the' if same else 'another text than the'} chat of training",
    )

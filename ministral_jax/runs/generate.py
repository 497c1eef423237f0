"""`ministral-jax generate`: text from a checkpoint, to the terminal as it comes or as rows of JSONL."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Iterator
from math import gcd
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import numpy as np
from pydantic import ValidationError

from ministral_jax import load
from ministral_jax.console import say
from ministral_jax.data.bad_rows import first_of
from ministral_jax.data.chat import Rendered, render
from ministral_jax.data.config import TokenizerConfig
from ministral_jax.data.conversation import Document, Message
from ministral_jax.data.jsonl import json_row, lines_of, parse_row
from ministral_jax.data.tokenizer import Tokenizer, load_tokenizer, text_of
from ministral_jax.distributed.placement import MeshConfig, Placement, Rules, make_mesh
from ministral_jax.distributed.processes import poll_slow
from ministral_jax.errors import UserError
from ministral_jax.interop.checkpoint import is_checkpoint, read_spec
from ministral_jax.interop.hub import located, refuse_missing
from ministral_jax.models.spec import ModelSpec
from ministral_jax.models.vlm import VLM
from ministral_jax.places import fetched, refuse_url
from ministral_jax.sampling.engine import Completion, Prompt, SamplingOptions, as_prompt, last, stream, watched
from ministral_jax.stages.base import stage_tokenizer
from ministral_jax.stages.manifest import finished, refuse_export

ROWS = 16
"""Of a JSONL file, at once."""
CHUNK = 8

Sample = Callable[[list[Prompt]], Iterator[list[Completion]]]


def run_generate(args: Namespace) -> None:
    """The command, with the arguments that `commands` declares.

    Raises:
        UserError: arguments that do not go together, a checkpoint, prompt or image that cannot be used.
    """
    if bool(args.prompt) == bool(args.jsonl) or bool(args.jsonl) != bool(args.output) or (args.jsonl and args.image):
        raise UserError("give --prompt TEXT with or without --image FILE, or --jsonl IN with --output OUT")
    if args.think and not args.chat and not args.jsonl:
        raise UserError("--think needs --chat: reasoning stands in an answer")
    if args.output:
        refuse_url(args.output, "--output")
    if args.output and args.output.exists():
        raise UserError(f"{args.output} is there already; give another --output or delete it")
    if args.seed < 0:
        raise UserError(f"--seed {args.seed}; it must not be negative")
    checkpoint = located(args.checkpoint)
    spec, tokenizer = open_checkpoint(checkpoint)
    options = _options(args, tokenizer)
    given = _lines(args.jsonl) if args.jsonl else [*enumerate(args.prompt)]

    def prepared(place: int) -> tuple[dict[str, Any], Prompt]:
        row, document = _row(args.jsonl, *given[place]) if args.jsonl else _prompt(args.prompt[place], args.image)
        chat = args.chat or not isinstance(row.get("prompt"), str) or "messages" in row
        rendered = _render(document, chat, args.think, tokenizer, spec)
        return row, as_prompt(rendered, spec.vision, (args.seed + place) % 2**32)

    rows = _usable(prepared, len(given), args.on_bad_row == "skip")
    prompts = [prompt for _, prompt in rows]
    sample = _sampler(checkpoint, spec, options, args.dtype)
    if args.jsonl:
        _write(args.output, [row for row, _ in rows], prompts, sample, tokenizer)
    else:
        _print(args.prompt, sample(prompts), tokenizer, "[THINK]" if args.think else "")


def open_checkpoint(path: Path) -> tuple[ModelSpec, Tokenizer]:
    """Sizes and tokenizer of a finished stage's directory or of a Hugging Face directory; no weights are read."""
    refuse_export(path)
    if (path / "manifest.json").is_file():
        spec, tokenizer = finished(path).spec, stage_tokenizer(path)
        if tokenizer is None:
            raise UserError(f"{path} is not a finished stage that has a model and the tokenizer of its data")
    elif is_checkpoint(path):
        path = fetched(path)
        spec = read_spec(path)
        if not (path / "tekken.json").is_file():
            raise UserError(f"{path} has no tekken.json, the tokenizer; put the one that belongs to the model there")
        with TemporaryDirectory() as scratch:
            tokenizer = load_tokenizer(TokenizerConfig(file=str(path / "tekken.json")), Path(scratch))
    else:
        refuse_missing(path)
        raise UserError(
            f"{path} is neither a finished stage (manifest.json) nor a model's (config.json or params.json)"
        )
    if tokenizer.vocab > spec.vocab:
        raise UserError(f"{path}: the tokenizer has {tokenizer.vocab} tokens but the model's vocab is {spec.vocab}")
    return spec, tokenizer


def _options(args: Namespace, tokenizer: Tokenizer) -> SamplingOptions:
    values = dict(temperature=args.temperature, top_p=args.top_p, top_k=args.top_k, vocab=tokenizer.vocab)
    try:
        return SamplingOptions(max_completion_length=args.max_tokens, stop_ids=(tokenizer.eos,), chunk=CHUNK, **values)
    except ValidationError as error:
        first = error.errors()[0]
        name, message = str(first["loc"][0]), str(first["msg"])
        flag = "--max-tokens" if name == "max_completion_length" else f"--{name.replace('_', '-')}"
        raise UserError(f"{flag} {first['input']}: {message[0].lower()}{message[1:]}") from None


def _sampler(path: Path, spec: ModelSpec, options: SamplingOptions, dtype: str | None) -> Sample:
    """The checkpoint on all devices, ready to go on from prompts."""
    model, params, placement = placed_checkpoint(path, spec, dtype)
    return lambda prompts: watched(stream(model, params, prompts, options, placement), poll_slow)


def placed_checkpoint(path: Path, spec: ModelSpec, dtype: str | None) -> tuple[VLM, dict[str, Any], Placement]:
    """A checkpoint on all devices, in bfloat16 (float32 on a CPU) where no `dtype` is said. Heads are cut as far as
    there are key-value heads: what fsdp cuts would be gathered again for every token."""
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    mesh = make_mesh(MeshConfig(tensor=gcd(len(jax.devices()), spec.kv_heads)))
    placement = Placement(mesh, Rules())
    return *load(path, dtype, placement), placement


def _lines(path: Path) -> list[tuple[int, bytes]]:
    if not path.is_file():
        raise UserError(f"--jsonl {path} is not a file")
    if not (found := [*lines_of(path)]):
        raise UserError(f"--jsonl {path} has no rows")
    return found


def _row(path: Path, number: int, line: bytes) -> tuple[dict[str, Any], Document]:
    """A row of a JSONL file, and what is to be answered of it."""
    where = f"{path} row {number}"
    (document,) = parse_row(line, path, where, where, prompts=True)
    return json_row(line, where), document


def _prompt(text: str, images: list[Path]) -> tuple[dict[str, Any], Document]:
    where = f"--prompt {text[:40]!r}"
    return {"prompt": text}, Document(where, where, messages=(Message("user", (*images, text)),))


def _usable(
    prepared: Callable[[int], tuple[dict[str, Any], Prompt]], count: int, skip: bool
) -> list[tuple[dict[str, Any], Prompt]]:
    """Rows and their prompts. Raises `UserError`: of the rows that cannot be used, unless they are left out and there
    are others."""
    found, reasons = [], list[str]()
    for place in range(count):
        try:
            found.append(prepared(place))
        except UserError as error:
            reasons.append(str(error))
    if reasons:
        said = first_of(reasons, len(reasons))
        if not skip or not found:
            raise UserError(said if count == 1 else f"{len(reasons)} of {count} rows cannot be used: {said}")
        say(f"{len(reasons)} of {count} rows are left out: {said}")
    return found


def _render(document: Document, chat: bool, think: bool, tokenizer: Tokenizer, spec: ModelSpec) -> Rendered:
    """As a chat, or as a text to go on with; an answer that is to `think` has begun to."""
    where = document.where
    rendered = render(document.messages, tokenizer, spec.vision, where, document.tools)
    tokens = rendered.tokens if chat else np.delete(rendered.tokens, (1, -1))  # without [INST] and [/INST]
    if think and not chat:
        raise UserError(f"{where}: --think needs 'messages' or --chat: reasoning stands in an answer")
    if think:
        tokens = np.append(tokens, np.uint32(tokenizer.special("[THINK]")))
    if len(tokens) >= spec.context:
        raise UserError(f"{where}: has {len(tokens)} tokens; the model's context of {spec.context} leaves no room")
    return Rendered(tokens, rendered.flags, rendered.pictures)


def _print(texts: list[str], steps: Iterator[list[Completion]], tokenizer: Tokenizer, opening: str) -> None:
    """One completion as it comes; several, which come together, one below the other."""
    if len(texts) > 1:
        for text, completion in zip(texts, last(steps), strict=True):
            print(f"== {text}\n{opening}{_text(completion, tokenizer)}")
        return
    add, shown = text_of(tokenizer, (tokenizer.eos,)), 0
    print(opening, end="")
    for (completion,) in steps:
        print(add(completion.tokens[shown:]), end="", flush=True)
        shown = len(completion.tokens)
    print(add((), final=True))


def _text(completion: Completion, tokenizer: Tokenizer) -> str:
    return text_of(tokenizer, (tokenizer.eos,))(completion.tokens, final=True)


def _write(path: Path, rows: list[dict[str, Any]], prompts: list[Prompt], sample: Sample, tokenizer: Tokenizer) -> None:
    """Rows with their completions; the file is there when all of them are."""
    draft = path.with_name(path.name + ".part")
    with draft.open("w", encoding="utf-8") as file:
        for first in range(0, len(rows), ROWS):
            here = slice(first, first + ROWS)
            for row, found in zip(rows[here], last(sample(prompts[here])), strict=True):
                more = {"completion": _text(found, tokenizer), "tokens": found.tokens, "stopped": found.stopped}
                file.write(json.dumps({**row, **more}, ensure_ascii=False) + "\n")
    draft.replace(path)

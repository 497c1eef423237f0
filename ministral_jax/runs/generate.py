"""`ministral-jax generate`: text from a checkpoint, to the terminal as it comes or as rows of JSONL."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from pydantic import ValidationError

from ministral_jax.data.chat import Rendered, render
from ministral_jax.data.config import PIXEL_BOUND, TokenizerConfig
from ministral_jax.data.conversation import Message, Part, image_path, parse_messages, parse_tools
from ministral_jax.data.sources import json_row
from ministral_jax.data.tokenizer import Tokenizer, load_tokenizer, text_of
from ministral_jax.distributed.placement import MeshConfig, Placement, Rules, make_mesh
from ministral_jax.errors import UserError
from ministral_jax.interop.hf import import_hf, read_spec
from ministral_jax.models.block import Compute
from ministral_jax.models.spec import ModelSpec
from ministral_jax.models.vlm import param_shardings
from ministral_jax.sampling.engine import Completion, Prompt, SamplingOptions, as_prompt, stream
from ministral_jax.stages.base import load_stage
from ministral_jax.stages.manifest import read_manifest

ROWS = 16
"""Of a JSONL file, at once."""
CHUNK = 8
_FLAGS = {
    "max_completion_length": "--max-tokens",
    "temperature": "--temperature",
    "top_p": "--top-p",
    "top_k": "--top-k",
}

Tools = tuple[dict[str, Any], ...]
Say = Callable[[list[Prompt]], Any]


def run_generate(args: Namespace) -> None:
    """The command, with the arguments that `cli` declares.

    Raises:
        UserError: arguments that do not go together, a checkpoint, prompt or image that cannot be used.
    """
    if bool(args.prompt) == bool(args.jsonl) or bool(args.jsonl) != bool(args.output) or (args.jsonl and args.image):
        raise UserError("give --prompt TEXT with or without --image FILE, or --jsonl IN with --output OUT")
    if args.think and not args.chat and not args.jsonl:
        raise UserError("--think needs --chat: reasoning stands in an answer")
    if args.output and args.output.exists():
        raise UserError(f"{args.output} is there already; give another --output or delete it")
    if args.seed < 0:
        raise UserError(f"--seed {args.seed}; it must not be negative")
    spec, tokenizer = open_checkpoint(args.checkpoint)
    options = _options(args, tokenizer)

    def prompt(messages: tuple[Message, ...], chat: bool, number: int, where: str, tools: Tools = ()) -> Prompt:
        document = render(messages, tokenizer, spec.vision, where, PIXEL_BOUND, tools)
        tokens = document.tokens if chat else np.delete(document.tokens, (1, -1))  # without [INST] and [/INST]
        if args.think and not chat:
            raise UserError(f"{where}: --think needs 'messages' or --chat: reasoning stands in an answer")
        if args.think:
            tokens = np.append(tokens, np.uint32(tokenizer.special("[THINK]")))
        if len(tokens) >= spec.context:
            raise UserError(f"{where}: has {len(tokens)} tokens; the model's context of {spec.context} leaves no room")
        return as_prompt(Rendered(tokens, document.flags, document.pictures), spec.vision, (args.seed + number) % 2**32)

    if args.jsonl:
        rows = _read(args.jsonl)
        asked = [(where, *_conversation(row, args.jsonl.parent, args.chat, where)) for row, where in rows]
        prompts = [prompt(messages, chat, n, where, tools) for n, (where, messages, chat, tools) in enumerate(asked)]
        _write(args.output, [row for row, _ in rows], prompts, _sampler(args.checkpoint, spec, options), tokenizer)
        return
    messages = [(Message("user", (*args.image, text)),) for text in args.prompt]
    prompts = [prompt(m, args.chat, n, f"--prompt {args.prompt[n][:40]!r}") for n, m in enumerate(messages)]
    _print(args.prompt, prompts, _sampler(args.checkpoint, spec, options), tokenizer, "[THINK]" if args.think else "")


def open_checkpoint(path: Path) -> tuple[ModelSpec, Tokenizer]:
    """Sizes and tokenizer of a finished stage's directory or of a Hugging Face directory; no weights are read."""
    if (path / "manifest.json").is_file():
        manifest = read_manifest(path)
        data = manifest.config.get("data") if manifest else None
        if manifest is None or data is None:
            raise UserError(f"{path} is not a finished stage that has a model and the tokenizer of its data")
        spec = manifest.spec
        tokenizer = load_tokenizer(TokenizerConfig.model_validate(data["tokenizer"]), path.parent / "data")
    elif (path / "config.json").is_file():
        spec = read_spec(path)
        if not (path / "tekken.json").is_file():
            raise UserError(f"{path} has no tekken.json, the tokenizer; put the one that belongs to the model there")
        with TemporaryDirectory() as scratch:
            tokenizer = load_tokenizer(TokenizerConfig(file=str(path / "tekken.json")), Path(scratch))
    else:
        raise UserError(
            f"{path} is neither a finished stage (manifest.json) nor a Hugging Face directory (config.json)"
        )
    if tokenizer.vocab > spec.vocab:
        raise UserError(f"{path}: the tokenizer has {tokenizer.vocab} tokens but the model's vocab is {spec.vocab}")
    return spec, tokenizer


def _options(args: Namespace, tokenizer: Tokenizer) -> SamplingOptions:
    values = dict(temperature=args.temperature, top_p=args.top_p, top_k=args.top_k)
    try:
        return SamplingOptions(max_completion_length=args.max_tokens, stop_ids=(tokenizer.eos,), chunk=CHUNK, **values)
    except ValidationError as error:
        first = error.errors()[0]
        message = str(first["msg"])
        raise UserError(f"{_FLAGS[str(first['loc'][0])]} {first['input']}: {message[0].lower()}{message[1:]}") from None


def _sampler(path: Path, spec: ModelSpec, options: SamplingOptions) -> Say:
    """The checkpoint on all devices, ready to go on from prompts."""
    placement = Placement(make_mesh(MeshConfig()), Rules())
    if (path / "manifest.json").is_file():
        params = load_stage(path, placement=placement)[1]
    else:
        params = import_hf(path, shardings=param_shardings(spec, placement))[1]
    return lambda prompts: stream(spec, params, prompts, options, placement, Compute())


def _print(texts: list[str], prompts: list[Prompt], sample: Say, tokenizer: Tokenizer, opening: str) -> None:
    """One completion as it comes; several, which come together, one below the other."""
    stops, out = (tokenizer.eos,), sys.stdout
    add, shown, latest = text_of(tokenizer, stops), 0, []
    if len(prompts) == 1:
        out.write(opening)
    for latest in sample(prompts):
        if len(prompts) == 1:
            out.write(add(latest[0].tokens[shown:]))
            out.flush()
            shown = len(latest[0].tokens)
    if len(prompts) == 1:
        out.write(add((), final=True) + "\n")
    else:
        for text, completion in zip(texts, latest, strict=True):
            out.write(f"== {text}\n{opening}{text_of(tokenizer, stops)(completion.tokens, final=True)}\n")
    out.flush()


def _read(path: Path) -> list[tuple[dict[str, Any], str]]:
    """Rows of a JSONL file, and where each stands."""
    if not path.is_file():
        raise UserError(f"--jsonl {path} is not a file")
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        where = f"{path} row {number}"
        if not line.strip():
            continue
        row = json_row(line, where)
        if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
            raise UserError(f"{where}: needs 'prompt' or 'messages', got {str(row)[:60]}")
        found.append((row, where))
    if not found:
        raise UserError(f"--jsonl {path} has no rows")
    return found


def _conversation(row: dict[str, Any], base: Path, chat: bool, where: str) -> tuple[tuple[Message, ...], bool, Tools]:
    """A row's messages, whether they are a chat or one text to go on with, and the tools that it offers."""
    if "prompt" in row:
        images = row.get("images", [])
        if not isinstance(images, list):
            raise UserError(f"{where}: 'images' must be a list of paths, got {images!r}")
        if not isinstance(row["prompt"], str):
            raise UserError(f"{where}: 'prompt' must be text, got {row['prompt']!r}")
        parts: tuple[Part, ...] = (*(image_path(image, base, where) for image in images), row["prompt"])
        return (Message("user", parts),), chat, ()
    tools = parse_tools(row.get("tools", []), where)
    return parse_messages(row["messages"], base, where, prompt=True), True, tools


def _write(path: Path, rows: list[dict[str, Any]], prompts: list[Prompt], sample: Say, tokenizer: Tokenizer) -> None:
    """Rows with their completions; the file is there when all of them are."""
    draft = path.with_name(path.name + ".part")
    with draft.open("w", encoding="utf-8") as file:
        for first in range(0, len(rows), ROWS):
            latest: list[Completion] = []
            for latest in sample(prompts[first : first + ROWS]):  # noqa: B007
                pass
            for row, completion in zip(rows[first : first + ROWS], latest, strict=True):
                text = text_of(tokenizer, (tokenizer.eos,))(completion.tokens, final=True)
                more = {"completion": text, "tokens": completion.tokens, "stopped": completion.stopped}
                file.write(json.dumps({**row, **more}, ensure_ascii=False) + "\n")
    draft.replace(path)

"""Text from a model, with the trainer's own parameters, modules and mesh.

Prompts are padded to a few lengths, so that few programs are compiled. Each is read once, its images too, and then goes
on in as many completions as are asked for, all of one batch in step. The host looks at what came every `chunk` tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from pydantic import Field

from ministral_jax.data.batch import Batch, images_of_rows, one_per_row
from ministral_jax.data.bins import place_whole
from ministral_jax.data.chat import Rendered
from ministral_jax.data.images import ImagePatches, to_patches
from ministral_jax.distributed.placement import Placement
from ministral_jax.errors import UserError
from ministral_jax.models.spec import ModelSpec, VisionSpec
from ministral_jax.models.vlm import VLM
from ministral_jax.sampling.decoding import Choice, Params, Rows, programs

SLOTS = 256
"""Tokens of completion for which there is room at first; it doubles when they are used."""


class SamplingOptions(Choice):
    """How completions are drawn and when they end.

    A completion ends with the first of: a token of `stop_ids`, which belongs to it; `max_completion_length` tokens, or
    as many as the model's context leaves.
    """

    completions_per_prompt: int = Field(default=1, ge=1)
    max_completion_length: int = Field(default=256, ge=1)
    stop_ids: tuple[int, ...] = ()
    chunk: int = Field(default=32, ge=1)
    """Tokens between two looks of the host."""
    at_once: int | None = Field(default=None, ge=1)
    """Completions that are drawn together; then come the next. None: all."""


class Prompt(NamedTuple):
    """Tokens, with the images of their `[IMG]` in order.

    Its completions depend on its `seed` (0 to 2³² - 1) and nothing else that stands beside it in a batch.
    """

    tokens: Sequence[int]
    images: ImagePatches | None = None
    seed: int = 0


class Completion(NamedTuple):
    """Sample `sample` of prompt `prompt` (its place in the list): its tokens, and for each the log-probability in the
    model's own distribution and in the one it was drawn from (temperature, top-p, top-k).

    `stopped` says by what: a stop token or the length; None while it goes on.
    """

    prompt: int
    sample: int
    tokens: list[int]
    logprobs: list[float]
    processed_logprobs: list[float]
    stopped: Literal["stop", "length"] | None


def as_prompt(rendered: Rendered, vision: VisionSpec | None, seed: int = 0) -> Prompt:
    """A document that ends where the model is to go on."""
    images = None
    if rendered.pictures:
        assert vision is not None, "rendering has checked it"
        images = to_patches(rendered.pictures, vision)
    return Prompt(rendered.tokens.tolist(), images, seed)


def generate(
    model: VLM,
    params: Params,
    prompts: Sequence[Prompt],
    options: SamplingOptions,
    placement: Placement,
) -> list[Completion]:
    """`completions_per_prompt` completions of every prompt, prompt after prompt.

    `params` lie as `placement` says. All processes call it with the same prompts and get all completions.

    Raises:
        UserError: a prompt is empty, too long, has tokens that are not the model's, or images that do not fit it.
    """
    return last(stream(model, params, prompts, options, placement))


def last(steps: Iterator[list[Completion]]) -> list[Completion]:
    """What a `stream` ends with; nothing where there are no prompts."""
    return next(iter(deque(steps, maxlen=1)), [])


def watched(steps: Iterator[list[Completion]], on_step: Callable[[str], None]) -> Iterator[list[Completion]]:
    """A `stream` that says what comes next before it goes on, so that a job may stop there."""
    on_step("reading prompts")
    for completions in steps:
        yield completions
        on_step(f"sampling token {max(len(completion.tokens) for completion in completions)}")


def stream(
    model: VLM,
    params: Params,
    prompts: Sequence[Prompt],
    options: SamplingOptions,
    placement: Placement,
) -> Iterator[list[Completion]]:
    """`generate`, giving all completions as they stand whenever prompts are read and after every chunk of tokens: who
    drives it may stop in between.

    A prompt is read on all devices whose rows go on from it, so that no cache is sent.
    """
    if not prompts:
        return
    spec = model.spec
    for number, prompt in enumerate(prompts):
        _check(prompt, spec, f"prompt {number}")
    place = by_rows(placement)
    choice = Choice(**options.model_dump(include={*Choice.model_fields}))
    run = programs(spec, model.compute, place, choice, options.stop_ids, options.chunk)
    samples = range(options.completions_per_prompt)
    texts = [Completion(n, sample, [], [], [], None) for n in range(len(prompts)) for sample in samples]
    each = min(options.at_once or len(texts), len(texts))
    waves = [range(first, min(first + each, len(texts))) for first in range(0, len(texts), each)]
    width = max(model.compute.shortest_row, *(len(prompt.tokens) for prompt in prompts))
    for wave in waves:
        rows = _rows(prompts, spec, options, texts[wave.start : wave.stop], place.even(each))
        read, parents = _shared([texts[row].prompt for row in wave], place.even(each), place.row_shards)
        batch = _batch([prompts[n] for n in read], model, width)
        with jax.set_mesh(place.mesh):
            lengths = np.maximum(batch["segments"].sum(axis=1, dtype=np.int32), 1)
            hidden, cache = run.start(params, place_whole(place, batch, spec.vision), lengths)
            hidden, cache = run.fork(hidden, cache, parents, room := min(SLOTS, options.max_completion_length))
        yield list(texts)
        for done in range(0, options.max_completion_length, options.chunk):
            if rows.done.all():
                break
            count = min(options.chunk, options.max_completion_length - done)
            with jax.set_mesh(place.mesh):
                while done + count > room:
                    more = min(room, options.max_completion_length - room)
                    # one after the other, so that only one of them is there twice
                    cache = {k: v for name in [*cache] for k, v in run.grow({name: cache.pop(name)}, more).items()}
                    room += more
                at = np.int32(batch["tokens"].shape[1] + done), np.int32(done), np.int32(count)
                out, hidden, cache = run.chunk(params, hidden, cache, rows, *at)
            out = {name: np.asarray(x) for name, x in out.items()}
            for row, text in enumerate(texts[wave.start : wave.stop]):
                if text.stopped is None:
                    new = {name: x[row, out["tokens"][row] >= 0].tolist() for name, x in out.items()}
                    text = _longer(text, new, options.stop_ids, rows.ends[row] - rows.lengths[row])
                    texts[wave[row]], rows.done[row] = text, text.stopped is not None
            yield list(texts)


def rows_at_once(prompts: int, each: int, at_once: int | None, place: Placement) -> tuple[int, int]:
    """Rows of prompts that are read, and of their `each` answers that are drawn together, in the first of all batches
    or the only one: as `stream` makes them."""
    count = min(at_once or prompts * each, prompts * each)
    total = place.even(count)
    return len(_shared([row // each for row in range(count)], total, place.row_shards)[0]), total


def by_rows(placement: Placement) -> Placement:
    """Rows over the devices that else cut the tokens of a row, which here come one by one."""
    rules = placement.rules
    update = {"batch": (*rules.batch, *rules.length), "length": ()}
    return Placement(placement.mesh, rules.model_copy(update=update))


def _check(prompt: Prompt, spec: ModelSpec, where: str) -> None:
    tokens = np.asarray(prompt.tokens)
    if tokens.size == 0:
        raise UserError(f"{where} is empty; give at least one token")
    if (wrong := tokens[(tokens < 0) | (tokens >= spec.vocab)]).size:
        raise UserError(f"{where} has token {wrong[0]}; the model's are 0 to {spec.vocab - 1}")
    if len(tokens) >= spec.context:
        raise UserError(f"{where} has {len(tokens)} tokens; the model's context of {spec.context} leaves no room")
    if not 0 <= prompt.seed < 2**32:
        raise UserError(f"{where} has seed {prompt.seed}; it must be 0 to {2**32 - 1}")
    places = int((tokens == spec.image_token).sum())
    images = int(prompt.images.grids.prod(axis=1).sum()) if prompt.images else 0
    if spec.vision is None and images:
        raise UserError(f"{where} has images but the model has no vision")
    if spec.vision is not None and places != images:
        raise UserError(f"{where} has {places} [IMG] tokens but images of {images}")


def _batch(prompts: Sequence[Prompt], model: VLM, width: int) -> Batch:
    """A prompt in each row, of `width` tokens at least."""
    spec = model.spec
    rows = one_per_row([prompt.tokens for prompt in prompts], width)
    batch = {name: rows[name] for name in ("tokens", "segments")}
    is_image = (batch["tokens"] == spec.image_token) & (batch["segments"] > 0)
    return batch | images_of_rows([prompt.images for prompt in prompts], is_image)


def _shared(prompts: Sequence[int], total: int, shards: int) -> tuple[list[int], np.ndarray]:
    """Of rows that go on from these prompts, in `shards` equal parts of `total` with what is added to fill them: the
    prompts to be read, equally many by each part, and the place of each row's prompt among its part's."""
    parts = np.pad(np.asarray(prompts), (0, total - len(prompts)), mode="edge").reshape(shards, -1)
    needed = [np.unique(part) for part in parts]
    most = max(len(part) for part in needed)
    read = [int(n) for part in needed for n in np.pad(part, (0, most - len(part)), mode="edge")]
    places = [np.searchsorted(some, part) for some, part in zip(needed, parts, strict=True)]
    return read, np.concatenate(places).astype(np.int32)


def _rows(
    prompts: Sequence[Prompt], spec: ModelSpec, options: SamplingOptions, texts: Sequence[Completion], total: int
) -> Rows:
    """What is known of the row of each completion; rows that are added have stopped from the start."""
    more = [*texts, *[texts[-1]] * (total - len(texts))]
    lengths = np.array([len(prompts[text.prompt].tokens) for text in more], np.int32)
    ends = np.minimum(lengths.astype(np.int64) + options.max_completion_length, spec.context).astype(np.int32)
    seeds = np.array([prompts[text.prompt].seed for text in more], np.uint32)
    samples = np.array([text.sample for text in more], np.int32)
    return Rows(lengths, ends, np.arange(total) >= len(texts), seeds, samples)


def _longer(text: Completion, new: dict[str, list[Any]], stop_ids: tuple[int, ...], limit: int) -> Completion:
    """A completion with what a chunk adds to it."""
    longer = {name: [*getattr(text, name), *added] for name, added in new.items()}
    tokens = longer["tokens"]
    stopped = "stop" if tokens[-1] in stop_ids else "length" if len(tokens) >= limit else None
    return text._replace(**longer, stopped=stopped)

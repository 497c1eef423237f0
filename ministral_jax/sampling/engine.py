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
from pydantic import Field, field_validator

from ministral_jax.data.chat import Rendered
from ministral_jax.data.images import normalise, patch_positions, patchify
from ministral_jax.distributed.placement import Placement
from ministral_jax.distributed.processes import poll
from ministral_jax.errors import UserError
from ministral_jax.models.block import Compute
from ministral_jax.models.spec import ModelSpec, VisionSpec
from ministral_jax.sampling.decoding import Choice, Params, Rows, programs
from ministral_jax.settings import Frozen

SMALLEST = 32
"""Tokens to which the shortest prompt is padded; also the fewest patches."""
SLOTS = 256
"""Tokens of completion for which there is room at first; it doubles when they are used."""


class SamplingOptions(Frozen):
    """How completions are drawn and when they end.

    A completion ends with the first of: a token of `stop_ids`, which belongs to it; the token with which its text
    contains one of `stop_strings`; `max_completion_length` tokens, or as many as the model's context leaves.
    """

    max_completion_length: int = Field(default=256, ge=1)
    temperature: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """0 takes the most probable token, always."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    """0 for all."""
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    chunk: int = Field(default=32, ge=1)
    """Tokens between two looks of the host, which then serves a SIGTERM."""

    @field_validator("stop_strings")
    @classmethod
    def _not_empty(cls, strings: tuple[str, ...]) -> tuple[str, ...]:
        if "" in strings:
            raise ValueError("a stop string must not be empty")
        return strings


class Prompt(NamedTuple):
    """Tokens, and of its images in order the sizes in tokens, `grids` [I, 2], and the uint8 `patches` [P, 3pp].

    Its completions depend on its `seed` (0 to 2³² - 1) and nothing else that stands beside it in a batch.
    """

    tokens: Sequence[int]
    grids: Any = ()
    patches: np.ndarray | None = None
    seed: int = 0


class Completion(NamedTuple):
    """Sample `sample` of prompt `prompt` (its place in the list): its tokens, and for each the log-probability in the
    model's own distribution and in the one it was drawn from (temperature, top-p, top-k).

    `stopped` says by what: a stop token, a stop string, the length; None while it goes on.
    """

    prompt: int
    sample: int
    tokens: list[int]
    logprobs: list[float]
    processed_logprobs: list[float]
    stopped: Literal["stop", "string", "length"] | None


def as_prompt(rendered: Rendered, vision: VisionSpec | None, seed: int = 0) -> Prompt:
    """A document that ends where the model is to go on."""
    if not rendered.pictures:
        return Prompt(rendered.tokens.tolist(), seed=seed)
    assert vision is not None, "rendering has checked it"
    grids = [(p.shape[0] // vision.stride, p.shape[1] // vision.stride) for p in rendered.pictures]
    patches = np.concatenate([patchify(p, vision.patch_size, vision.merge) for p in rendered.pictures])
    return Prompt(rendered.tokens.tolist(), grids, patches, seed)


def generate(
    spec: ModelSpec,
    params: Params,
    prompts: Sequence[Prompt],
    options: SamplingOptions,
    placement: Placement,
    compute: Compute = Compute(),  # noqa: B008
    completions_per_prompt: int = 1,
    decode: Callable[[list[int]], str] | None = None,
) -> list[Completion]:
    """`completions_per_prompt` completions of every prompt, prompt after prompt.

    `params` lie as `placement` says. All processes call it with the same prompts and get all completions. `decode`
    turns tokens into text, which `stop_strings` need.

    Raises:
        UserError: a prompt is empty, too long, has tokens that are not the model's, or images that do not fit it.
        Preempted: the job was asked to stop.
    """
    steps = stream(spec, params, prompts, options, placement, compute, completions_per_prompt, decode)
    return deque(steps, maxlen=1).pop() if prompts else []


def stream(
    spec: ModelSpec,
    params: Params,
    prompts: Sequence[Prompt],
    options: SamplingOptions,
    placement: Placement,
    compute: Compute = Compute(),  # noqa: B008
    completions_per_prompt: int = 1,
    decode: Callable[[list[int]], str] | None = None,
) -> Iterator[list[Completion]]:
    """`generate`, giving all completions as they stand after every chunk of tokens."""
    if not prompts:
        return
    for number, prompt in enumerate(prompts):
        _check(prompt, spec, f"prompt {number}")
    if options.stop_strings and decode is None:
        raise UserError(f"stop strings {list(options.stop_strings)} need a tokenizer, `decode`")
    place = by_rows(placement)
    choice = Choice(temperature=options.temperature, top_p=options.top_p, top_k=options.top_k)
    run = programs(spec, compute, place, choice, options.stop_ids, options.chunk)
    shards = int(np.prod([place.mesh.shape[axis] for axis in place.rules.batch]))
    batch, lengths = _batch(prompts, spec, shards)
    parents, rows = _rows(prompts, completions_per_prompt, spec, options, shards)
    room, width = min(SLOTS, options.max_completion_length), batch["tokens"].shape[1]

    poll("reading prompts", slow=True)
    with jax.set_mesh(place.mesh):
        hidden, cache = run.start(params, place.place_whole(batch), lengths)
        hidden, cache = run.fork(hidden, cache, parents, room)
    texts = [
        Completion(n, sample, [], [], [], None) for n in range(len(prompts)) for sample in range(completions_per_prompt)
    ]
    for done in range(0, options.max_completion_length, options.chunk):
        if rows.done.all():
            return
        poll(f"sampling token {done}", slow=True)
        count = min(options.chunk, options.max_completion_length - done)
        with jax.set_mesh(place.mesh):
            while done + count > room:
                cache, room = run.grow(cache, room), 2 * room
            at = np.int32(width + done), np.int32(done), np.int32(count)
            out, hidden, cache = run.chunk(params, hidden, cache, rows, *at)
        out = {name: np.asarray(x) for name, x in out.items()}
        for row, text in enumerate(texts):
            if text.stopped is None:
                texts[row] = _longer(text, {name: x[row] for name, x in out.items()}, rows, row, options, decode)
                rows.done[row] = texts[row].stopped is not None
        yield list(texts)


def by_rows(placement: Placement) -> Placement:
    """Rows over the devices that else cut the tokens of a row, which here come one by one."""
    rules = placement.rules
    update = {"batch": (*rules.batch, *rules.length), "length": ()}
    return Placement(placement.mesh, rules.model_copy(update=update))


def _check(prompt: Prompt, spec: ModelSpec, where: str) -> None:
    tokens = np.asarray(prompt.tokens)
    if tokens.size == 0:
        raise UserError(f"{where} is empty; give at least one token")
    if tokens.min() < 0 or tokens.max() >= spec.vocab:
        wrong = tokens.min() if tokens.min() < 0 else tokens.max()
        raise UserError(f"{where} has token {wrong}; the model's are 0 to {spec.vocab - 1}")
    if len(tokens) >= spec.context:
        raise UserError(f"{where} has {len(tokens)} tokens; the model's context of {spec.context} leaves no room")
    if not 0 <= prompt.seed < 2**32:
        raise UserError(f"{where} has seed {prompt.seed}; it must be 0 to {2**32 - 1}")
    places, images = int((tokens == spec.image_token).sum()), sum(r * c for r, c in prompt.grids)
    if spec.vision is None and images:
        raise UserError(f"{where} has images but the model has no vision")
    if spec.vision is not None and places != images:
        raise UserError(f"{where} has {places} [IMG] tokens but images of {images}")


def bucket(size: int) -> int:
    """The next of 32, 48, 64, 96, 128, ..: a third is padding at most."""
    power = max(SMALLEST, 1 << (size - 1).bit_length())
    return power * 3 // 4 if power > SMALLEST and size <= power * 3 // 4 else power


def _batch(prompts: Sequence[Prompt], spec: ModelSpec, shards: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The model's arrays [N, ..] and the prompts' lengths [N]; rows are added until the devices share them evenly."""
    count = -(-len(prompts) // shards) * shards
    length = bucket(max(len(prompt.tokens) for prompt in prompts))
    tokens, segments = np.zeros((2, count, length), np.int32)
    lengths = np.ones(count, np.int32)
    for row, prompt in enumerate(prompts):
        lengths[row] = len(prompt.tokens)
        tokens[row, : lengths[row]], segments[row, : lengths[row]] = prompt.tokens, 1
    image = (tokens == spec.image_token) & (segments > 0)
    return {"tokens": tokens, "segments": segments} | image_arrays(prompts, spec.vision, image), lengths


def image_arrays(prompts: Sequence[Prompt], vision: VisionSpec | None, image: np.ndarray) -> dict[str, np.ndarray]:
    """The model's five arrays of images for rows that begin with these prompts, `image` [N, T] being where the merged
    tokens stand; none at all when no prompt has an image. There may be more rows than prompts."""
    most = max(0 if prompt.patches is None else len(prompt.patches) for prompt in prompts)
    if vision is None or not most:
        return {}
    count, width = len(image), bucket(most)
    patches = np.zeros((count, width, vision.patch_width), np.float32)
    number_of, rows, columns = np.zeros((3, count, width), np.int32)
    for n, prompt in enumerate(prompts):
        at = 0
        for number, (height, across) in enumerate(prompt.grids, 1):
            here = slice(at, at + height * across * vision.merge**2)
            number_of[n, here] = number
            rows[n, here], columns[n, here] = patch_positions(height, across, vision.merge)
            at = here.stop
        if prompt.patches is not None:
            patches[n, :at] = normalise(prompt.patches)
    return {
        "image_slot": np.where(image, np.cumsum(image, axis=1) - 1, -1).astype(np.int32),
        "patches": patches,
        "patch_image": number_of,
        "patch_row": rows,
        "patch_col": columns,
    }


def _rows(
    prompts: Sequence[Prompt], each: int, spec: ModelSpec, options: SamplingOptions, shards: int
) -> tuple[np.ndarray, Rows]:
    """Which prompt each row goes on from, and what is known of it; rows that are added have stopped from the start."""
    count = len(prompts) * each
    total = -(-count // shards) * shards
    parents = np.minimum(np.arange(total) // each, len(prompts) - 1).astype(np.int32)
    lengths = np.array([len(prompts[p].tokens) for p in parents], np.int32)
    ends = np.minimum(lengths.astype(np.int64) + options.max_completion_length, spec.context).astype(np.int32)
    seeds = np.array([prompts[p].seed for p in parents], np.uint32)
    samples = (np.arange(total) % each).astype(np.int32)
    return parents, Rows(lengths, ends, np.arange(total) >= count, seeds, samples)


def _longer(
    text: Completion,
    out: dict[str, np.ndarray],
    rows: Rows,
    row: int,
    options: SamplingOptions,
    decode: Callable[[list[int]], str] | None,
) -> Completion:
    """A completion with what a chunk adds to it, ended where it must."""
    tokens, count, stopped = list(text.tokens), 0, None
    new = out["tokens"][out["tokens"] >= 0]
    while stopped is None and count < len(new):
        tokens.append(int(new[count]))
        count += 1
        if tokens[-1] in options.stop_ids:
            stopped = "stop"
        elif decode is not None and _ends(tokens, options.stop_strings, decode):
            stopped = "string"
        elif rows.lengths[row] + len(tokens) >= rows.ends[row]:
            stopped = "length"
    logprobs = [*text.logprobs, *out["logprobs"][:count].tolist()]
    drawn = [*text.processed_logprobs, *out["processed_logprobs"][:count].tolist()]
    return Completion(text.prompt, text.sample, tokens, logprobs, drawn, stopped)


def _ends(tokens: list[int], strings: tuple[str, ...], decode: Callable[[list[int]], str]) -> bool:
    """Whether the text of the last tokens, each of a byte at least, has one of the strings in it."""
    return any(string in decode(tokens[-len(string.encode()) :]) for string in strings)

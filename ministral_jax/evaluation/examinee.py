"""The three requests that benchmarks come down to, answered by a model on its mesh: how probable a text is after
another one, how probable it is by itself, and what is said next.

A request is padded by its own length alone, to one of few widths. What is found therefore does not depend on what
stands beside it, on the number of rows or on the mesh, but for rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from ministral_jax.alignment.answer import split_thinking
from ministral_jax.data.batch import bucket, images_of_rows, one_per_row
from ministral_jax.data.bins import place_whole
from ministral_jax.data.tokenizer import Tokenizer, text_of
from ministral_jax.distributed.placement import Placement
from ministral_jax.errors import UserError
from ministral_jax.losses.evaluation import forward, reading
from ministral_jax.losses.head import LossHead
from ministral_jax.models.vlm import VLM, Params, head_of
from ministral_jax.sampling.engine import Completion, Prompt, SamplingOptions, stream, watched

DEFAULT_BATCH = 16


class Continued(NamedTuple):
    """A prompt, and the tokens after it whose probability is asked for: at least one of each."""

    prompt: Prompt
    tokens: Sequence[int]


class Likelihood(NamedTuple):
    """Of a continuation: the sum of its log-probabilities in nats, in the model's own distribution; whether each of its
    tokens is the most probable one; whether the prompt's beginning was cut off for want of context."""

    logprob: float
    greedy: bool
    truncated: bool


class Manner(NamedTuple):
    """How text is drawn and where it ends: at `</s>`, before the first of the texts `until` in the answer (not in its
    reasoning), or after `max_tokens`. `temperature`, `top_p` and `top_k` are those of `sampling.decoding.Choice`."""

    max_tokens: int = 256
    until: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0


class Said(NamedTuple):
    """What was said after a prompt.

    answer: text without the reasoning before it and up to what ended it; empty where reasoning is never closed.
    thinking: the text of that reasoning; None without any.
    tokens: ids that were drawn.
    stopped: by `</s>`, by a text of `until`, or by the length: only then is the answer cut short.
    truncated: whether the prompt's beginning was cut off, for want of context.
    """

    answer: str
    thinking: str | None
    tokens: tuple[int, ...]
    stopped: Literal["stop", "until", "length"]
    truncated: bool


@dataclass(frozen=True)
class Examinee:
    """A model, its parameters as `placement` says, and its tokenizer. `held_out` is the share of documents that its
    training data held out, 0 where that is not known. `batch` requests are worked on at once; `on_step` is told what
    comes next, where a job may stop. Every process asks the same and is told everything."""

    model: VLM
    params: Params
    placement: Placement
    tokenizer: Tokenizer
    held_out: float = 0.0
    batch: int = DEFAULT_BATCH
    on_step: Callable[[str], None] = lambda _: None

    @property
    def context(self) -> int:
        """Tokens that the model reads at most."""
        return self.model.spec.context

    def likelihoods(self, requests: Sequence[Continued]) -> list[Likelihood]:
        """How probable each continuation is. Of what is longer than the context the beginning is cut off, and a token
        before the context's first position is not counted. Raises `UserError`: that would cut off an image."""
        rows = [_fitted(request, self.context) for request in requests]
        found: dict[int, Likelihood] = {}
        for places in self._batches([len(tokens) - 1 for tokens, _ in rows]):
            self.on_step("reading answers")
            chosen = [rows[n] for n in places]
            sums = self._read(chosen, [requests[n].prompt for n in places])
            for n, (logprob, greedy) in zip(places, sums, strict=True):
                asked = len(requests[n].prompt.tokens) + len(requests[n].tokens)
                found[n] = Likelihood(logprob, greedy, len(rows[n][0]) < asked)
        return [found[n] for n in range(len(requests))]

    def rolling(self, texts: Sequence[Sequence[int]]) -> list[float]:
        """Log-probability in nats of whole texts after a `<s>`, each token counted once; see `windows`."""
        pieces = [(n, one) for n, text in enumerate(texts) for one in windows(text, self.tokenizer.bos, self.context)]
        totals = [0.0] * len(texts)
        for (n, _), found in zip(pieces, self.likelihoods([one for _, one in pieces]), strict=True):
            totals[n] += found.logprob
        return totals

    def say(self, prompts: Sequence[Prompt], manner: Manner) -> list[Said]:
        """What follows each prompt. A prompt that leaves less than `manner.max_tokens`, or half of the context where
        that is less, loses its beginning. Raises `UserError`: that would cut off an image."""
        room = self.context - min(manner.max_tokens, self.context // 2)
        fitted = [_shortened(prompt, room) for prompt in prompts]
        found: dict[int, Said] = {}
        for places in self._batches([len(prompt.tokens) for prompt in fitted]):
            said = self._complete([fitted[n] for n in places], manner)
            for n, one in zip(places, said, strict=True):
                found[n] = one._replace(truncated=len(fitted[n].tokens) < len(prompts[n].tokens))
        return [found[n] for n in range(len(prompts))]

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Places of requests that are worked on together: all of one width."""

        def width(n: int) -> int:
            return bucket(max(self.model.compute.shortest_row, lengths[n]))

        for _, alike in groupby(sorted(range(len(lengths)), key=width), width):
            places = [*alike]
            for first in range(0, len(places), self.batch):
                yield places[first : first + self.batch]

    def _read(self, rows: Sequence[tuple[list[int], int]], prompts: Sequence[Prompt]) -> list[tuple[float, bool]]:
        """Of texts of which the last tokens are counted: their log-probability, and whether they are the most
        probable ones."""
        spec, place = self.model.spec, self.placement
        count = place.even(self.batch)
        batch = one_per_row([tokens[:-1] for tokens, _ in rows], self.model.compute.shortest_row, count)
        counted = np.zeros(batch["tokens"].shape, np.float32)
        in_prompt = np.zeros(counted.shape, bool)
        for n, (tokens, own) in enumerate(rows):
            batch["labels"][n, len(tokens) - 2] = tokens[-1]
            counted[n, len(tokens) - 1 - own : len(tokens) - 1] = 1
            in_prompt[n, : len(tokens) - own] = True
        is_image = (batch["tokens"] == spec.image_token) & in_prompt
        batch |= images_of_rows([prompt.images for prompt in prompts], is_image)
        numbers = np.broadcast_to(np.arange(count, dtype=np.int32)[:, None], counted.shape)
        nothing = np.zeros_like(counted)
        batch |= dict(loss_mask=counted, answer_mask=nothing, text_bytes=nothing, document=numbers)
        with jax.set_mesh(place.mesh):
            placed = place_whole(place, batch, spec.vision)
            states = forward(spec, self.model.compute, place)(self.params, placed)
            read = jax.device_get(reading(LossHead(place, place.rules))(states, head_of(self.params), None, placed))
        return _sums(read, len(rows))

    def _complete(self, prompts: list[Prompt], manner: Manner) -> list[Said]:
        """Until all have ended; rows are added so that few programs are compiled."""
        options = SamplingOptions(
            temperature=manner.temperature,
            top_p=manner.top_p,
            top_k=manner.top_k,
            vocab=self.tokenizer.vocab,
            max_completion_length=manner.max_tokens,
            stop_ids=(self.tokenizer.eos,),
        )
        rows = [*prompts, *[prompts[-1]] * (self.batch - len(prompts))]
        steps = watched(stream(self.model, self.params, rows, options, self.placement), self.on_step)
        said: list[Said | None] = []
        for completions in steps:
            some = zip(prompts, completions, strict=False)
            said = [self._heard(prompt, completion, manner.until) for prompt, completion in some]
            if all(said):
                break
        return [one for one in said if one is not None]

    def _heard(self, prompt: Prompt, completion: Completion, until: Sequence[str]) -> Said | None:
        """A completion as it stands; None while it goes on."""
        if completion.stopped is None and not until:
            return None
        brackets = self.tokenizer.thinking_ids
        begun = brackets is not None and prompt.tokens[-1] == brackets[0]
        inside, rest = split_thinking((*prompt.tokens[-1:][: int(begun)], *completion.tokens), brackets)
        thinking, answer = (None if ids is None else self._text(ids) for ids in (inside, rest))
        assert answer is not None
        ends = [place for text in until if (place := answer.find(text)) >= 0]
        stopped = "until" if ends else completion.stopped
        if stopped is None:
            return None
        return Said(answer[: min(ends)] if ends else answer, thinking, tuple(completion.tokens), stopped, False)

    def _text(self, tokens: Sequence[int]) -> str:
        return text_of(self.tokenizer, (self.tokenizer.eos,))(tokens, final=True)


def windows(tokens: Sequence[int], bos: int, context: int) -> Iterator[Continued]:
    """A text in pieces that a model of this context can read, every token counted in one of them: the first piece after
    `bos`, each other one after as much of what comes before it as there is room for, and at least one token; so
    lm-evaluation-harness cuts them (`get_rolling_token_windows` with a context of one token)."""
    for first in range(0, len(tokens), context):
        last = min(first + context, len(tokens))
        before = [bos] if first == 0 else list(tokens[last - context - 1 : first])
        yield Continued(Prompt(before), tokens[first:last])


def _fitted(request: Continued, context: int) -> tuple[list[int], int]:
    """Tokens of a prompt and its continuation, of which the model reads all but the last, and how many are counted."""
    whole = [*request.prompt.tokens, *request.tokens]
    if len(whole) > context + 1:
        _refuse_images(request.prompt, len(whole), context)
        whole = whole[-context - 1 :]
    return whole, min(len(request.tokens), len(whole) - 1)


def _shortened(prompt: Prompt, room: int) -> Prompt:
    """With its last `room` tokens."""
    tokens = tuple(prompt.tokens)
    if len(tokens) > room:
        _refuse_images(prompt, len(tokens), room)
    return prompt._replace(tokens=tokens[-room:])


def _refuse_images(prompt: Prompt, length: int, room: int) -> None:
    if prompt.images is not None:
        raise UserError(f"a request with images has {length} tokens where {room} can be read; images cannot be cut off")


def _sums(read: dict[str, Any], rows: int) -> list[tuple[float, bool]]:
    """Over the counted positions of each row, whatever their order, in float64."""
    row, counted = read["document"].ravel(), read["loss_mask"].ravel() > 0
    nats = np.bincount(row[counted], read["ce"].ravel()[counted].astype(np.float64), rows)
    wrong = (read["prediction"] != read["labels"]).ravel()[counted]
    misses = np.bincount(row[counted], wrong, rows)
    return [(-float(nats[n]), bool(misses[n] == 0)) for n in range(rows)]

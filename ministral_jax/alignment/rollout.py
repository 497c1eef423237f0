"""From prompts to scored samples and to the rows a policy is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ministral_jax.alignment.loops import is_looping
from ministral_jax.alignment.sample import Sample, split_thinking
from ministral_jax.alignment.tools import ToolBox
from ministral_jax.data.conversation import as_openai
from ministral_jax.data.prompts import PromptRow
from ministral_jax.data.tokenizer import Tokenizer, text_of
from ministral_jax.distributed.placement import Placement
from ministral_jax.models.block import Compute
from ministral_jax.models.spec import ModelSpec
from ministral_jax.sampling.engine import (
    Completion,
    Prompt,
    SamplingOptions,
    as_prompt,
    bucket,
    generate,
    image_arrays,
)

Params = dict[str, Any]
Arrays = dict[str, np.ndarray]


class Episode(NamedTuple):
    """A prompt and what followed: `tokens`, those that the model drew marked in `own`, which alone have the
    log-probabilities they were drawn with."""

    prompt: Prompt
    tokens: list[int]
    own: list[bool]
    logprobs: list[float]
    stopped: str


@dataclass(frozen=True)
class Sampler:
    """A policy's mesh, sizes and tokenizer: all that sampling needs but its parameters."""

    spec: ModelSpec
    compute: Compute
    placement: Placement
    tokenizer: Tokenizer
    temperature: float
    tools: ToolBox | None = None

    def roll_out(
        self, params: Params, rows: Sequence[PromptRow], seeds: Sequence[int], each: int, limit: int
    ) -> list[Episode]:
        """`each` answers of `limit` tokens at most to every prompt, prompt after prompt.

        Where an answer calls tools, what they return is appended and the answer goes on.
        """
        prompts = [as_prompt(row.rendered, self.spec.vision, seed) for row, seed in zip(rows, seeds, strict=True)]
        episodes = [begun(prompts[c.prompt], c) for c in self._generate(params, prompts, each, limit)]
        for _ in range(self.tools.rounds if self.tools else 0):
            assert self.tools is not None
            results = {n: found for n, e in enumerate(episodes) if (found := self._tool_results(e, limit))}
            if not results:
                break
            asked = [_continued(episodes[n], found, n % each) for n, found in results.items()]
            more = self._generate(params, asked, 1, limit)
            for (n, found), completion in zip(results.items(), more, strict=True):
                episodes[n] = _longer(episodes[n], found, completion, limit)
        return episodes

    def sample(self, row: PromptRow, episode: Episode, limit: int) -> Sample:
        """What rewards and judges see."""
        text = text_of(self.tokenizer, (self.tokenizer.eos,))(episode.tokens, final=True)
        thinking, answer = split_thinking(text)
        tokens = tuple(episode.tokens)
        stopped: Any = episode.stopped
        return Sample(
            as_openai(row.messages),
            text,
            thinking,
            answer,
            tokens,
            stopped,
            is_looping(tokens),
            row.columns,
            row.where,
            limit,
        )

    def _generate(self, params: Params, prompts: list[Prompt], each: int, limit: int) -> list[Completion]:
        stops = (self.tokenizer.eos,)
        options = SamplingOptions(max_completion_length=limit, temperature=self.temperature, stop_ids=stops)
        return generate(self.spec, params, prompts, options, self.placement, self.compute, each)

    def _tool_results(self, episode: Episode, limit: int) -> list[int]:
        """Tokens of what the tools return to an answer that ended by calling some; none where it did not, where no room
        is left to go on, or where it wrote an `[IMG]`, which in a prompt would be an image."""
        assert self.tools is not None
        if episode.stopped != "stop" or len(episode.tokens) >= limit or self.spec.image_token in episode.tokens:
            return []
        last = max((n for n, own in enumerate(episode.own) if not own), default=-1) + 1
        text = text_of(self.tokenizer, (self.tokenizer.eos,))(episode.tokens[last:], final=True)
        tokens = self.tools.results(text, self.tokenizer)
        room = min(limit, self.spec.context - len(episode.prompt.tokens)) - len(episode.tokens)
        return tokens if len(tokens) < room else []


def seeds(seed: int, step: int, count: int, salt: int = 0) -> list[int]:
    """Seeds of the prompts of a step: functions of (seed, step, place) alone."""
    return np.random.SeedSequence([seed, step, salt]).generate_state(count).tolist()


def training_rows(episodes: Sequence[Episode], spec: ModelSpec) -> Arrays:
    """A policy's batch, one episode per row, `[N, T]`: `tokens, positions, segments, labels` as in
    `data.pipeline.batches`, `loss_mask` 1 where position t predicts a token that the model drew, `old_logprobs` the
    log-probability that it was drawn with there; and the images' arrays when there are some.

    `[IMG]` that the model wrote is a token like any other: images stand only where the prompt has them.
    """
    count = len(episodes)
    length = bucket(max(len(e.prompt.tokens) + len(e.tokens) for e in episodes))
    tokens, segments = np.zeros((2, count, length), np.int32)
    mask, logprobs = np.zeros((2, count, length), np.float32)
    image = np.zeros((count, length), bool)
    for n, episode in enumerate(episodes):
        prompt = np.asarray(episode.prompt.tokens, np.int32)
        begin, end = len(prompt), len(prompt) + len(episode.tokens)
        tokens[n, :begin], tokens[n, begin:end] = prompt, episode.tokens
        segments[n, :end] = 1
        mask[n, begin - 1 : end - 1] = episode.own
        logprobs[n, begin - 1 : end - 1] = episode.logprobs
        image[n, :begin] = prompt == spec.image_token
    batch = {
        "tokens": tokens,
        "positions": np.where(segments > 0, np.arange(length, dtype=np.int32), 0),
        "segments": segments,
        "labels": np.roll(tokens, -1, axis=1),
        "loss_mask": mask,
        "old_logprobs": logprobs,
    }
    return batch | image_arrays([e.prompt for e in episodes], spec.vision, image)


def begun(prompt: Prompt, completion: Completion) -> Episode:
    """What follows a prompt when that is one finished completion of it."""
    assert completion.stopped is not None
    own = [True] * len(completion.tokens)
    return Episode(prompt, completion.tokens, own, completion.processed_logprobs, completion.stopped)


def _continued(episode: Episode, results: list[int], sample: int) -> Prompt:
    """A prompt for the rest of an answer, with random numbers of its own: not those of another sample of the prompt."""
    prompt, tokens = episode.prompt, [*episode.tokens, *results]
    seed = int(np.random.SeedSequence([prompt.seed, len(tokens), sample]).generate_state(1)[0])
    return prompt._replace(tokens=[*prompt.tokens, *tokens], seed=seed)


def _longer(episode: Episode, results: list[int], completion: Completion, limit: int) -> Episode:
    """An answer with what tools returned and what it said then, `limit` tokens in all."""
    tokens = [*episode.tokens, *results, *completion.tokens][:limit]
    own = [*episode.own, *[False] * len(results), *[True] * len(completion.tokens)][:limit]
    logprobs = [*episode.logprobs, *[0.0] * len(results), *completion.processed_logprobs][:limit]
    assert completion.stopped is not None
    cut = len(episode.tokens) + len(results) + len(completion.tokens) > limit
    return Episode(episode.prompt, tokens, own, logprobs, "length" if cut else completion.stopped)

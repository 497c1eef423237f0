"""From prompts to scored samples and to the rows a policy is trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import chain
from typing import Any, Literal, NamedTuple

import numpy as np

from ministral_jax.alignment.answer import Sample, split_thinking
from ministral_jax.alignment.loops import is_looping
from ministral_jax.alignment.tools import ToolBox
from ministral_jax.data.batch import Batch, images_of_rows, one_per_row
from ministral_jax.data.conversation import as_openai
from ministral_jax.data.prompts import PromptRow
from ministral_jax.data.tokenizer import Tokenizer, text_of
from ministral_jax.distributed.placement import Placement
from ministral_jax.models.spec import ModelSpec
from ministral_jax.models.vlm import VLM, Compute
from ministral_jax.sampling.engine import Completion, Prompt, SamplingOptions, as_prompt, last, stream, watched

Params = dict[str, Any]


class Episode(NamedTuple):
    """A prompt and what followed: `tokens`, those that the model drew marked in `own`, which alone have the
    log-probabilities they were drawn with."""

    prompt: Prompt
    tokens: list[int]
    own: list[bool]
    logprobs: list[float]
    stopped: Literal["stop", "length"]


class Answers(NamedTuple):
    """Answers to prompts, prompt after prompt: of each its row, what was drawn, and what rewards and judges see."""

    rows: list[PromptRow]
    episodes: list[Episode]
    samples: list[Sample]


def joined(parts: Sequence[Answers]) -> Answers:
    """One after the other."""
    rows, episodes, samples = (chain.from_iterable(found) for found in zip(*parts, strict=True))
    return Answers(list(rows), list(episodes), list(samples))


@dataclass(frozen=True)
class Sampler:
    """A policy's mesh, sizes and tokenizer: all that sampling needs but its parameters.

    at_once: see `SamplingOptions`. `on_step` is told what comes next before every piece of work: there a job may stop.
    """

    spec: ModelSpec
    compute: Compute
    placement: Placement
    tokenizer: Tokenizer
    temperature: float
    tools: ToolBox | None = None
    _: KW_ONLY
    at_once: int | None = None
    on_step: Callable[[str], None]

    def answers(
        self, params: Params, rows: Sequence[PromptRow], seeds: Sequence[int], each: int, limit: int
    ) -> Answers:
        """`each` answers of `limit` tokens at most to every prompt."""
        episodes = self.roll_out(params, rows, seeds, each, limit)
        asked = [row for row in rows for _ in range(each)]
        samples = [self.sample(row, episode, limit) for row, episode in zip(asked, episodes, strict=True)]
        return Answers(asked, episodes, samples)

    def roll_out(
        self, params: Params, rows: Sequence[PromptRow], seeds: Sequence[int], each: int, limit: int
    ) -> list[Episode]:
        """See `answers`. Where an answer calls tools, what they return is appended and the answer goes on."""
        prompts = [as_prompt(row.rendered, self.spec.vision, seed) for row, seed in zip(rows, seeds, strict=True)]
        episodes = [begun(prompts[c.prompt], c) for c in self._generate(params, prompts, each, limit)]
        for _ in range(self.tools.rounds if self.tools else 0):
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
        tokens = tuple(episode.tokens)
        inside, rest = split_thinking(tokens, self.tokenizer.thinking_ids)
        thinking = None if inside is None else self._text(inside)
        said = self._text(tokens), thinking, self._text(rest), tokens, episode.stopped, is_looping(tokens)
        return Sample(as_openai(row.messages), *said, row.columns, row.where, limit)

    def _text(self, tokens: Sequence[int]) -> str:
        return text_of(self.tokenizer, (self.tokenizer.eos,))(tokens, final=True)

    def _generate(self, params: Params, prompts: list[Prompt], each: int, limit: int) -> list[Completion]:
        options = SamplingOptions(
            temperature=self.temperature,
            vocab=self.tokenizer.vocab,
            completions_per_prompt=each,
            max_completion_length=limit,
            stop_ids=(self.tokenizer.eos,),
            at_once=self.at_once,
        )
        steps = stream(VLM(self.spec, self.compute), params, prompts, options, self.placement)
        return last(watched(steps, self.on_step))

    def _tool_results(self, episode: Episode, limit: int) -> list[int]:
        """Tokens of what the tools return to an answer that ended by calling some; none where it did not, where no room
        is left to go on, or where it wrote an `[IMG]`, which in a prompt would be an image."""
        assert self.tools is not None
        if episode.stopped != "stop" or len(episode.tokens) >= limit or self.spec.image_token in episode.tokens:
            return []
        last = max((n for n, own in enumerate(episode.own) if not own), default=-1) + 1
        tokens = self.tools.results(episode.tokens[last:], self.tokenizer)
        room = min(limit, self.spec.context - len(episode.prompt.tokens)) - len(episode.tokens)
        return tokens if len(tokens) < room else []


def seeds(seed: int, step: int, count: int, salt: int = 0) -> list[int]:
    """Seeds of the prompts of a step: functions of (seed, step, place) alone."""
    return np.random.SeedSequence([seed, step, salt]).generate_state(count).tolist()


def training_rows(episodes: Sequence[Episode], spec: ModelSpec, shortest: int) -> Batch:
    """A policy's batch, one episode per row, as in `data.batch`: `loss_mask` is 1 where position t predicts a token
    that the model drew, and `old_logprobs` float32 `[N, T]` the log-probability that it was drawn with there. T is at
    least `shortest`.

    `[IMG]` that the model wrote is a token like any other: images stand only where the prompt has them.
    """
    batch = one_per_row([[*e.prompt.tokens, *e.tokens] for e in episodes], shortest)
    mask, logprobs = (np.zeros(batch["tokens"].shape, np.float32) for _ in range(2))
    begins = np.array([len(e.prompt.tokens) for e in episodes])
    for n, (begin, episode) in enumerate(zip(begins, episodes, strict=True)):
        drawn = slice(begin - 1, begin - 1 + len(episode.tokens))
        mask[n, drawn], logprobs[n, drawn] = episode.own, episode.logprobs
    in_prompt = np.arange(batch["tokens"].shape[1]) < begins[:, None]
    is_image = (batch["tokens"] == spec.image_token) & in_prompt
    images = images_of_rows([e.prompt.images for e in episodes], is_image)
    return batch | {"loss_mask": mask, "old_logprobs": logprobs} | images


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
    more = begun(episode.prompt, completion)
    tokens = [*episode.tokens, *results, *more.tokens]
    own = [*episode.own, *[False] * len(results), *more.own]
    logprobs = [*episode.logprobs, *[0.0] * len(results), *more.logprobs]
    stopped = "length" if len(tokens) > limit else more.stopped
    return Episode(episode.prompt, tokens[:limit], own[:limit], logprobs[:limit], stopped)

"""A pairwise reward model at work: how likely it is that one answer is better than another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ministral_jax.alignment.calibration import mean_probability
from ministral_jax.data.batch import Batch, bucket, one_per_row
from ministral_jax.data.chat import render
from ministral_jax.data.conversation import Message
from ministral_jax.data.pairwise import judge_messages
from ministral_jax.data.tokenizer import Tokenizer
from ministral_jax.distributed.placement import Placement
from ministral_jax.losses.evaluation import hidden
from ministral_jax.models.block import Compute
from ministral_jax.models.spec import ModelSpec
from ministral_jax.models.vlm import VLM, head_matrix

Params = dict[str, Any]
ROWS = 64
"""Questions in a batch, or as many more as the devices share evenly."""


@dataclass(frozen=True, eq=False)
class Judge:
    """A pairwise reward model. Its probability that A is better is sigmoid(logit / temperature), the logit that of the
    token A over B after the question `judge_messages` asks. `on_step` is told of every batch of questions before it is
    read: there a job may stop."""

    spec: ModelSpec
    compute: Compute
    placement: Placement
    tokenizer: Tokenizer
    temperature: float = 1.0
    _: KW_ONLY
    on_step: Callable[[str], None]

    def win_probability(
        self, params: Params, conversations: Sequence[tuple[Message, ...]], a: Sequence[str], b: Sequence[str]
    ) -> np.ndarray:
        """float64 `[N]`: that answer a is better than answer b, the mean over both orders, in which a model may prefer
        a place. Exactly 1/2 for equal answers."""
        pairs = list(zip(conversations, a, b, strict=True))
        forth = [self.tokens(judge_messages(c, x, y)) for c, x, y in pairs]
        back = [self.tokens(judge_messages(c, y, x)) for c, x, y in pairs]
        logits = self.logits(params, forth + back)
        found = both_orders(logits[: len(pairs)], logits[len(pairs) :], self.temperature)
        return np.where([x == y for x, y in zip(a, b, strict=True)], 0.5, found)  # not as it was rounded

    def tokens(self, messages: tuple[Message, ...]) -> np.ndarray:
        """A question as the judge reads it; cut in the middle where it is longer than the judge's context."""
        tokens = render(messages, self.tokenizer, None, "a question to the judge").tokens
        if (over := len(tokens) - self.spec.context) > 0:
            half = (len(tokens) - over) // 2
            tokens = np.concatenate([tokens[:half], tokens[half + over :]])
        return tokens.astype(np.int32)

    def logits(self, params: Params, questions: Sequence[np.ndarray]) -> np.ndarray:
        """float64 `[N]`: of A over B after each question."""
        count = self.placement.even(ROWS)
        found = []
        for first in range(0, len(questions), count):
            self.on_step(f"judging pair {first}")
            batch = _batch(questions[first : first + count], self.compute.shortest_row, count)
            read = self._read(params, self.placement.place_whole(batch))
            found.append(np.asarray(read, np.float64)[: len(questions) - first])
        return np.concatenate(found) if found else np.zeros(0)

    @cached_property
    def _read(self) -> Any:
        a, b = (self.tokenizer.encode(letter)[0] for letter in "AB")
        return judge_reader(self.spec, self.compute, self.placement, (a, b))


def question_length(longest: int, spec: ModelSpec, compute: Compute) -> int:
    """Of the rows in which a judge of `spec` reads questions of up to `longest` tokens."""
    return bucket(max(min(longest, spec.context), compute.shortest_row))


def judge_reader(spec: ModelSpec, compute: Compute, placement: Placement, choices: tuple[int, int]) -> Any:
    """Compiled `(params, batch) -> [N]`: the logit of the first choice over the second after each question."""
    model, ids = VLM(spec, compute), np.array(choices)

    def read(params: Params, batch: dict[str, jax.Array]) -> jax.Array:
        states = hidden(model, params, batch)
        last = jnp.einsum("btd,bt->bd", states, batch["loss_mask"].astype(states.dtype))
        columns = head_matrix(params)[:, ids].astype(states.dtype)
        logits = jnp.einsum("bd,dk->bk", last, columns, preferred_element_type=jnp.float32)
        return logits[:, 0] - logits[:, 1]

    return jax.jit(placement.rules.scoped(read), out_shardings=placement.replicated)


def both_orders(forth: np.ndarray, back: np.ndarray, temperature: float) -> np.ndarray:
    """`[N]`: that the first answer is better, from the logits of A over B with it in place A and in place B."""
    return mean_probability(np.stack([forth, -back]), temperature)


def _batch(questions: Sequence[np.ndarray], shortest: int, count: int) -> Batch:
    """Rows `[count, T]` of questions, `loss_mask` a mark at the last token of each."""
    rows = one_per_row(questions, shortest, count)
    mask = np.zeros(rows["tokens"].shape, np.float32)
    mask[np.arange(len(questions)), [len(question) - 1 for question in questions]] = 1
    return {name: rows[name] for name in ("tokens", "positions", "segments")} | {"loss_mask": mask}

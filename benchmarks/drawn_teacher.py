"""Next-token distributions of a teacher that does not exist, as `codecs.pack` is given them.

Nothing of size V is drawn per token. The probability of the r-th most probable id is proportional to r^-a; the exponent
differs by token, so that entropies go from nearly 0 to over 6 nats with a mean near 2. Ids come from a Zipf law over
ids that are ordered by frequency, as a BPE vocabulary's are by merges, and a share of them from anywhere in the
vocabulary. Forced ids come first and are improbable, near -18 nats. Hidden states are normal.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from ministral_jax.teachers.codecs import (
    Arrays,
    Codec,
    HiddenCodec,
    SampledCodec,
    TopKCodec,
    curve_sizes,
    encode_float8,
    uniforms,
)

EXPONENTS = np.linspace(1.1, 6.0, 128)
CANDIDATES = 256
"""Most probable ids that a token's draws are made of; the others among them come from the law of all ids."""


@dataclass(frozen=True)
class Teacher:
    """Its sizes, and the share of ids that come from anywhere."""

    vocab: int
    width: int
    length: int
    forced: int
    anywhere: float = 0.25

    def rows(self, codec: Codec, count: int, seed: int = 0) -> Arrays:
        """Arrays `[count, T, ..]` of as many rows."""
        rng = np.random.default_rng(seed)
        rows = [self._row(codec, rng) for _ in range(count)]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def _row(self, codec: Codec, rng: np.random.Generator) -> Arrays:
        counted = {"counted": np.ones(self.length, np.uint8)}
        match codec:
            case TopKCodec():
                return counted | self._top_k(codec, rng)
            case SampledCodec():
                return counted | self._draws(codec, rng)
            case HiddenCodec(dtype="float8"):
                states, scale = encode_float8(rng.standard_normal((self.length, self.width), np.float32))
                return counted | {"states": states, "scale": scale}
            case HiddenCodec(dtype=dtype):
                return counted | {"states": rng.standard_normal((self.length, self.width), np.float32).astype(dtype)}
        raise ValueError(f"codec {codec.kind} is not drawn")

    def _top_k(self, codec: TopKCodec, rng: np.random.Generator) -> Arrays:
        log_z, mass, entropy = rank_laws(self.vocab, (codec.entries, *curve_sizes(codec, self.vocab)))
        which, ids, log_probs = self._probable(codec.entries, log_z, rng)
        # Ids that were never trained are alike in all tokens, up to a level of the token and some noise.
        usual, level = np.random.default_rng(0).normal(-18, 2, self.forced), rng.normal(0, 1, (self.length, 1))
        forced = np.minimum(usual + level + rng.normal(0, 0.5, (self.length, self.forced)), 0)
        return {
            "ids": ids,
            "logprobs": np.concatenate([log_probs, forced], axis=1).astype(np.float32),
            "tail": np.log(mass[which, 0]).astype(np.float32),
            "tail_entropy": entropy[which, 0].astype(np.float32),
            "curve": mass[which, 1:].sum(axis=0).astype(np.float32),
        }

    def _draws(self, codec: SampledCodec, rng: np.random.Generator) -> Arrays:
        log_z, _, entropy = rank_laws(self.vocab, (0,))
        which, ids, log_probs = self._probable(min(CANDIDATES, self.vocab // 8), log_z, rng)
        u = uniforms(codec, 0, rng.bytes(16), self.length)
        assert u is not None
        ends = np.cumsum(np.exp(log_probs), axis=1)
        place = np.stack([np.searchsorted(of_token, x, "right") for of_token, x in zip(ends, u, strict=True)])
        candidate = place < ids.shape[1]
        draws = np.take_along_axis(ids, np.where(candidate, place, 0), 1)
        draws = np.where(candidate, draws, self._ids(place.shape, rng))
        return {"draws": np.sort(draws, axis=1), "entropy": entropy[which, 0].astype(np.float32)}

    def _probable(self, count: int, log_z: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        """Which exponent each token has; its most probable ids `[T, count]`, ascending; their log-probabilities."""
        which = (rng.beta(0.9, 2.0, self.length) * len(EXPONENTS)).astype(int)
        ids = self._distinct_ids(count, rng)
        order = np.argsort(ids, axis=1)
        log_probs = -EXPONENTS[which, None] * np.log(order + 1) - log_z[which, None]
        return which, np.take_along_axis(ids, order, 1), log_probs

    def _distinct_ids(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """int32 `[T, count]`, distinct within a token."""
        drawn = self._ids((self.length, 3 * count), rng)
        order = np.argsort(drawn, axis=1, kind="stable")
        ascending = np.take_along_axis(drawn, order, 1)
        again = np.zeros(drawn.shape, bool)
        np.put_along_axis(again, order[:, 1:], ascending[:, 1:] == ascending[:, :-1], 1)
        first = np.argsort(again, axis=1, kind="stable")[:, :count]
        assert not np.take_along_axis(again, first, 1).any(), f"a token has fewer than {count} distinct ids"
        return np.take_along_axis(drawn, first, 1)

    def _ids(self, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
        """int32, none of them forced."""
        free = self.vocab - self.forced
        uniform, u = rng.random(shape) < self.anywhere, rng.random(shape)
        zipf = np.exp(u * np.log(free + 1)) - 1
        return self.forced + np.minimum(np.where(uniform, u * free, zipf), free - 1).astype(np.int32)


@cache
def rank_laws(vocab: int, sizes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """p_r proportional to r^-a for r = 1 .. V and each a of `EXPONENTS`: log of the sum `[a]`; the mass beyond the
    first s ranks and the entropy of what is there, `[a, sizes]`."""
    log_ranks = np.log(np.arange(1, vocab + 1))
    log_z, mass, entropy = [], [], []
    for a in EXPONENTS:
        p = np.exp(-a * log_ranks)
        log_z.append(np.log(p.sum()))
        p /= p.sum()
        surprise = p * (a * log_ranks + log_z[-1])
        mass.append([p[s:].sum() for s in sizes])
        entropy.append([surprise[s:].sum() for s in sizes])
    log_z, mass, entropy = np.array(log_z), np.array(mass), np.array(entropy)
    return log_z, mass, entropy / mass + np.log(mass)

"""How a teacher's next-token distributions are kept: settings, what lies on disk for one row, and the way back.

A row has T positions. `encode.py` computes what is kept on the device that holds the teacher; here `pack` brings that
into the form on disk, `unpack` turns what was read into arrays of a batch, still small, and `targets` restores them
inside the training step. Positions that are not counted (loss_mask 0) are zeros throughout and mean nothing.

- `topk`: the S most probable ids outside the forced ones, ascending, as differences; codes of their log-probabilities
  and of the f forced ids' (whose ids are the same everywhere); the mass and the entropy of all other ids.
- `sampled`: S draws from the teacher as ids with counts, and its entropy. An expectation over them is unbiased
  (random-sampling distillation, Anshumann et al. 2025).
- `hidden`: the final hidden states; with the teacher's head they are the whole distribution.
- `dense`: logits, for tests and toy vocabularies.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from pydantic import Field

from ministral_jax.errors import UserError
from ministral_jax.losses.targets import Dense, Hidden, Sampled, Targets, TopK
from ministral_jax.settings import Frozen
from ministral_jax.teachers.quantise import (
    FLOAT8,
    decode_entropy,
    decode_float8,
    decode_log_probs,
    decode_tail,
    encode_entropy,
    encode_log_probs,
    encode_tail,
)

SMALLEST_SIZE = 8
Arrays = dict[str, np.ndarray]


class TopKCodec(Frozen):
    """The `entries` most probable tokens, log-probabilities in `bits` bits, and what the rest weighs."""

    kind: Literal["topk"] = "topk"
    entries: int = Field(default=64, ge=2)
    bits: Literal[8, 16] = 8


class SampledCodec(Frozen):
    """`entries` draws per token: evenly spaced through the distribution from one random start (`systematic`, least
    variance: a token of probability p is drawn S p times, rounded down or up), or `independent`."""

    kind: Literal["sampled"] = "sampled"
    entries: int = Field(default=50, ge=1, le=2**16 - 1)
    draws: Literal["systematic", "independent"] = "systematic"


class HiddenCodec(Frozen):
    """The teacher's final hidden states in `dtype`; float8 is e4m3 with one scale per token."""

    kind: Literal["hidden"] = "hidden"
    dtype: Literal["float32", "bfloat16", "float8"] = "bfloat16"


class DenseCodec(Frozen):
    """All logits in float32."""

    kind: Literal["dense"] = "dense"


Codec = Annotated[TopKCodec | SampledCodec | HiddenCodec | DenseCodec, Field(discriminator="kind")]


class Layout(NamedTuple):
    """One row of an array on disk."""

    shape: tuple[int, ...]
    dtype: str


def check(codec: Codec, vocab: int, forced: tuple[int, ...]) -> None:
    """Check that a codec fits a vocabulary.

    Raises:
        UserError: there are fewer ids than entries and forced ids, or forced ids are not ascending ids of it.
    """
    if any(a >= b for a, b in zip((-1, *forced), (*forced, vocab), strict=True)):
        raise UserError(f"forced ids {list(forced)} must be distinct and ascending, each below the vocabulary {vocab}")
    if isinstance(codec, TopKCodec):
        if codec.entries + len(forced) > vocab:
            raise UserError(
                f"codec.entries = {codec.entries} and {len(forced)} forced ids exceed the vocabulary of {vocab}; "
                f"entries can be at most {vocab - len(forced)}"
            )
        if vocab < SMALLEST_SIZE:
            raise UserError(f"codec topk needs a vocabulary of at least {SMALLEST_SIZE} tokens, not {vocab}")


def curve_sizes(codec: TopKCodec, vocab: int) -> tuple[int, ...]:
    """Numbers of entries whose tail mass is recorded, powers of two from 8 to min(4 S, V)."""
    limit = min(4 * codec.entries, vocab)
    return tuple(2**i for i in range(SMALLEST_SIZE.bit_length() - 1, limit.bit_length()))


def layout(codec: Codec, length: int, width: int, vocab: int, forced: tuple[int, ...]) -> dict[str, Layout]:
    """Arrays on disk, one row each.

    Args:
        length: T.
        width: D' of the teacher.
        vocab: V.
        forced: ids that are always kept (`topk`), ascending.
    """
    counted = {"counted": Layout((length,), "uint8")}
    match codec:
        case TopKCodec(entries=entries, bits=bits):
            return counted | {
                "ids": Layout((length, entries), "uint32"),
                "logprobs": Layout((length, entries), f"uint{bits}"),
                **({"forced": Layout((length, len(forced)), f"uint{bits}")} if forced else {}),
                "tail": Layout((length,), "uint16"),
                "tail_entropy": Layout((length,), "uint16"),
                "curve": Layout((len(curve_sizes(codec, vocab)),), "float32"),
            }
        case SampledCodec(entries=entries):
            return counted | {
                "ids": Layout((length, entries), "uint32"),
                "counts": Layout((length, entries), _count_dtype(entries)),
                "entropy": Layout((length,), "uint16"),
            }
        case HiddenCodec(dtype="float8"):
            return counted | {"states": Layout((length, width), FLOAT8), "scale": Layout((length,), "float32")}
        case HiddenCodec(dtype=dtype):
            return counted | {"states": Layout((length, width), dtype)}
        case DenseCodec():
            return counted | {"logits": Layout((length, vocab), "float32")}


def uniforms(codec: Codec, seed: int, row_hash: bytes, length: int) -> np.ndarray | None:
    """Random numbers float32 `[T, S]` in [0, 1), ascending along S; None for codecs that draw nothing.

    They depend on the seed and on the row's content alone, so that any mesh, in any order, draws the same. Their
    resolution is 2^-24, by which the probability that an id is drawn may be off.

    Args:
        seed: from 0 to 2^64 - 1.
        row_hash: 16 bytes.
    """
    if not isinstance(codec, SampledCodec):
        return None
    independent, count = codec.draws == "independent", codec.entries
    # Raw bits: NumPy promises the same ones in every version, of its distributions it does not.
    source = np.random.Philox(key=int.from_bytes(row_hash, "little"), counter=[0, 0, 0, seed])
    raw = source.random_raw((length, count if independent else 1)) >> np.uint64(40)
    u = raw.astype(np.float64) / 2**24
    u = np.sort(u, axis=-1) if independent else (np.arange(count) + u) / count
    return np.minimum(u.astype(np.float32), np.float32(1 - 2**-24))


def pack(codec: Codec, arrays: Arrays) -> Arrays:
    """What `encode.encoder` computed of n rows, as it lies on disk (`layout`).

    Args:
        arrays: `[n, T, ..]` or `[n, ..]`, tokens in the row's order, zeros where not counted.
    """
    counted = arrays["counted"]
    match codec:
        case TopKCodec(entries=entries, bits=bits):
            codes = encode_log_probs(arrays["logprobs"], bits)
            # Those of the forced ids are alike and compress better by themselves.
            forced = {"forced": codes[..., entries:]} if codes.shape[-1] > entries else {}
            return {
                "counted": counted,
                "ids": _differences(arrays["ids"]),
                "logprobs": codes[..., :entries],
                **forced,
                "tail": encode_tail(arrays["tail"]),
                "tail_entropy": encode_entropy(arrays["tail_entropy"]),
                "curve": arrays["curve"].astype(np.float32),
            }
        case SampledCodec():
            ids, counts = _run_lengths(arrays["draws"])
            return {
                "counted": counted,
                "ids": _differences(ids),
                "counts": counts * counted[..., None],
                "entropy": encode_entropy(arrays["entropy"]),
            }
    return arrays


def unpack(codec: Codec, arrays: Arrays) -> Arrays:
    """Arrays of a batch from those of n rows on disk: what `targets` needs, `[n, T, ..]`, names led by `teacher_`.

    Ids are whole again (int32); log-probabilities and entropies are still codes, so that little goes to the device.
    """
    kept = {name: arrays[name] for name in _NEEDED[codec.kind] if name in arrays}
    if "ids" in kept:
        kept["ids"] = np.cumsum(kept["ids"], axis=-1, dtype=np.int32)
    if "counts" in kept:
        kept["ids"] = np.where(kept["counts"] > 0, kept["ids"], np.int32(0))
    return {f"teacher_{name}": array for name, array in kept.items()}


def targets(codec: Codec, batch: dict[str, Any], head: Array | None, forced: tuple[int, ...]) -> Targets:
    """The teacher of a batch that `unpack`'s arrays are part of, on the device, for `distillation.targets`.

    Quantised distributions do not sum to one exactly (the loss normalises them).

    Args:
        head: the teacher's output matrix `[D', V]` for `hidden`, whose states are cast to its dtype; else unused.
        forced: as when it was encoded.
    """
    kept = {name: batch[f"teacher_{name}"] for name in _NEEDED[codec.kind] if f"teacher_{name}" in batch}
    dtype = jnp.result_type(float)
    match codec:
        case TopKCodec(bits=bits):
            own = kept["ids"]
            always = jnp.broadcast_to(jnp.asarray(forced, own.dtype), (*own.shape[:-1], len(forced)))
            codes = jnp.concatenate([kept[name] for name in ("logprobs", "forced") if name in kept], axis=-1)
            log_probs, tail = decode_log_probs(codes, bits, dtype), decode_tail(kept["tail"], dtype)
            return TopK(jnp.concatenate([own, always], axis=-1), log_probs, tail)
        case SampledCodec():
            return Sampled(kept["ids"], kept["counts"], decode_entropy(kept["entropy"], dtype))
        case HiddenCodec():
            assert head is not None
            states = kept["states"]
            if "scale" in kept:
                states = decode_float8(states, kept["scale"])
            return Hidden(states.astype(head.dtype), head)
        case DenseCodec():
            return Dense(kept["logits"])


_NEEDED = {
    "topk": ("ids", "logprobs", "forced", "tail"),
    "sampled": ("ids", "counts", "entropy"),
    "hidden": ("states", "scale"),
    "dense": ("logits",),
}


def _count_dtype(draws: int) -> str:
    """All draws of a token may be of one id."""
    return "uint8" if draws < 2**8 else "uint16"


def _differences(ids: np.ndarray) -> np.ndarray:
    """Ascending ids as the first and the steps to the next, uint32: small numbers compress. Padding stays zero."""
    steps = ids.astype(np.uint32)
    steps[..., 1:] -= ids[..., :-1].astype(np.uint32)
    return np.where(ids == 0, np.uint32(0), steps)


def _run_lengths(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct ids of ascending draws `[.., S]` and how often each was drawn, zeros after the last."""
    size = draws.shape[-1]
    flat = draws.reshape(-1, size)
    first = np.ones(flat.shape, bool)
    first[:, 1:] = flat[:, 1:] != flat[:, :-1]
    row, start = np.nonzero(first)
    slot = (np.cumsum(first, axis=1) - 1)[first]
    stop = np.append(start[1:], 0)
    stop[np.append(row[1:] != row[:-1], True)] = size
    ids, counts = np.zeros_like(flat), np.zeros(flat.shape, _count_dtype(size))
    ids[row, slot] = flat[first]
    counts[row, slot] = stop - start
    return ids.reshape(draws.shape), counts.reshape(draws.shape)

"""How a teacher's next-token distributions are kept: settings, what lies on disk for one row, and the way back.

A row has T positions. `encode.py` computes what is kept on the device that holds the teacher; here `pack` brings that
into the form on disk, `unpack` turns what was read into arrays of a batch, still small, and `targets` restores them
inside the training step. Positions that are not counted (loss_mask 0) are zeros throughout and mean nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float
from pydantic import Field

from ministral_jax.errors import UserError
from ministral_jax.losses.targets import Dense, Hidden, Sampled, Targets, TopK
from ministral_jax.settings import Frozen
from ministral_jax.teachers.store_format import Arrays, ArraySpec

SMALLEST_SIZE = 8
FLOOR = 32.0  # nats; e^-32 = 1.3e-14
ENTROPY_LIMIT = 16.0  # nats; ln V = 11.8 for V = 131072
FLOAT8, FLOAT8_MAX = "float8_e4m3fn", 448.0
_NOT_LEARNT = ("counted", "tail_entropy", "curve")


class TopKCodec(Frozen):
    """The `entries` (S) most probable ids outside the f forced ones, ascending, as differences; log-probabilities of
    all S + f in `bits` bits; the mass and the entropy of all other ids."""

    kind: Literal["topk"] = "topk"
    entries: int = Field(default=64, ge=2)
    bits: Literal[8, 16] = 8


class SampledCodec(Frozen):
    """`entries` (S) draws per token as ids with counts, and the teacher's entropy. An expectation over them is unbiased
    (random-sampling distillation, Anshumann et al. 2025). They are evenly spaced through the distribution from one
    random start (`systematic`, least variance: an id of probability p is drawn S p times, rounded down or up), or
    `independent`."""

    kind: Literal["sampled"] = "sampled"
    entries: int = Field(default=50, ge=1, le=2**16 - 1)
    draws: Literal["systematic", "independent"] = "systematic"


class HiddenCodec(Frozen):
    """The teacher's final hidden states in `dtype`; float8 is e4m3 with one scale per token. With the teacher's head
    they are the whole distribution."""

    kind: Literal["hidden"] = "hidden"
    dtype: Literal["float32", "bfloat16", "float8"] = "bfloat16"


class DenseCodec(Frozen):
    """All logits in float32, for tests and toy vocabularies."""

    kind: Literal["dense"] = "dense"


Codec = Annotated[TopKCodec | SampledCodec | HiddenCodec | DenseCodec, Field(discriminator="kind")]


def exact(dtype: str) -> HiddenCodec:
    """Nothing left out of a teacher that computed in `dtype`."""
    return HiddenCodec.model_validate({"dtype": dtype})


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


def layout(codec: Codec, length: int, width: int, vocab: int, forced: tuple[int, ...]) -> dict[str, ArraySpec]:
    """Arrays on disk, one row each, of T = `length` positions; `width` D' is the teacher's, `forced` as in `check`."""

    def per_token(dtype: str, *shape: int) -> ArraySpec:
        return ArraySpec(shape=(length, *shape), dtype=dtype)

    counted = {"counted": per_token("uint8")}
    match codec:
        case TopKCodec(entries=entries, bits=bits):
            return counted | {
                "ids": per_token("uint32", entries),
                "logprobs": per_token(f"uint{bits}", entries),
                **({"forced": per_token(f"uint{bits}", len(forced))} if forced else {}),
                "tail": per_token("uint16"),
                "tail_entropy": per_token("uint16"),
                "curve": ArraySpec(shape=(len(curve_sizes(codec, vocab)),), dtype="float32"),
            }
        case SampledCodec(entries=entries):
            counts = per_token(_count_dtype(entries), entries)
            return counted | {"ids": per_token("uint32", entries), "counts": counts, "entropy": per_token("uint16")}
        case HiddenCodec(dtype="float8"):
            return counted | {"states": per_token(FLOAT8, width), "scale": per_token("float32")}
        case HiddenCodec(dtype=dtype):
            return counted | {"states": per_token(dtype, width)}
        case DenseCodec():
            return counted | {"logits": per_token("float32", vocab)}


def uniforms(codec: Codec, seed: int, row_hash: bytes, length: int) -> Float[np.ndarray, "T S"] | None:
    """Random float32 numbers in [0, 1), ascending along S; None for codecs that draw nothing.

    They depend on the seed (below 2^64) and on the row's content hash (16 bytes) alone, so that any mesh, in any order,
    draws the same. Their resolution is 2^-24, by which the probability that an id is drawn may be off.
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
    """What `encode.encoder` computed of n rows (tokens in the row's order), as it lies on disk (`layout`)."""
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
                "tail": encode_log_probs(arrays["tail"], 16),
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


def unpack(arrays: Arrays) -> Arrays:
    """Arrays of a batch from those of n rows on disk: what `targets` needs, `[n, T, ..]`, names led by `teacher_`.

    Ids are whole again (int32); log-probabilities and entropies are still codes, so that little goes to the device.
    """
    kept = {f"teacher_{name}": array for name, array in arrays.items() if name not in _NOT_LEARNT}
    if "ids" in arrays:
        ids = np.cumsum(arrays["ids"], axis=-1, dtype=np.int32)
        kept["teacher_ids"] = np.where(arrays["counts"] > 0, ids, np.int32(0)) if "counts" in arrays else ids
    return kept


def targets(codec: Codec, batch: dict[str, Any], head: Array | None, forced: tuple[int, ...]) -> Targets:
    """The teacher of a batch that `unpack`'s arrays are part of, on the device. Quantised distributions do not sum to
    one exactly (the loss normalises them).

    Args:
        head: the teacher's output matrix `[D', V]` for `hidden`, whose states are cast to its dtype; else unused.
        forced: as when it was encoded.
    """
    kept = {name.removeprefix("teacher_"): x for name, x in batch.items() if name.startswith("teacher_")}
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
    slot = np.cumsum(np.diff(flat, axis=1, prepend=flat[:, :1]) != 0, axis=1) + size * np.arange(len(flat))[:, None]
    ids = np.zeros_like(draws)
    ids.flat[slot] = flat
    counts = np.bincount(slot.ravel(), minlength=draws.size).astype(_count_dtype(size))
    return ids, counts.reshape(draws.shape)


# ---- numbers in 8 or 16 bits, of NumPy and JAX arrays alike ---------------------------------------------------------


def encode_log_probs(log_probs: Any, bits: int) -> Any:
    """Log-probabilities (nats; -inf is e^-32) as uint8 or uint16, c = round((2^b - 1) √(-log p / 32)): what a rounding
    error costs in KL is weighted by p, so steps are fine near p = 1 and coarse where p is nothing."""
    xp = log_probs.__array_namespace__()
    scaled = xp.sqrt(xp.clip(-log_probs, 0, FLOOR) / FLOOR)
    return xp.round(scaled * _largest(bits)).astype(f"uint{bits}")


def decode_log_probs(codes: Any, bits: int, dtype: Any) -> Any:
    """The log-probabilities that codes stand for. √(-log p / 32) is off by at most h = 1 / (2 (2^b - 1)), so these are
    by at most 64 h √(-log p / 32) + 32 h²: at log p = -1 by 0.022 for 8 bits, by 8.6e-5 for 16."""
    return -FLOOR * (codes.astype(dtype) / _largest(bits)) ** 2


def decode_tail(codes: Any, dtype: Any) -> Any:
    """Log of the tail's mass, from 16 bits. The largest code, that of anything below -31.9995, is -inf: no tail."""
    xp = codes.__array_namespace__()
    return xp.where(codes == _largest(16), -xp.inf, decode_log_probs(codes, 16, dtype))


def encode_entropy(entropy: Any) -> Any:
    """Entropy in nats as uint16, linear over [0, 16]: off by at most 16 / 65535 / 2 = 1.3e-4."""
    xp = entropy.__array_namespace__()
    return xp.round(xp.clip(entropy, 0, ENTROPY_LIMIT) * (_largest(16) / ENTROPY_LIMIT)).astype(np.uint16)


def decode_entropy(codes: Any, dtype: Any) -> Any:
    return codes.astype(dtype) * (ENTROPY_LIMIT / _largest(16))


def encode_float8(x: Any) -> tuple[Any, Any]:
    """`[.., D]` as float8 (e4m3) and one float32 scale `[..]`, by which the largest |x| becomes 448.

    |decoded - x| is at most the larger of |x| / 16 (three bits of mantissa) and scale / 1024 (below the smallest normal
    number, 2^-6), plus the float32 rounding of the scale.
    """
    xp = x.__array_namespace__()
    top = xp.max(xp.abs(x), axis=-1).astype(np.float32)
    scale = xp.where(top > 0, top / FLOAT8_MAX, 1).astype(np.float32)
    return (x.astype(np.float32) / scale[..., None]).astype(FLOAT8), scale


def decode_float8(codes: Any, scale: Any) -> Any:
    """float32 `[.., D]`."""
    return codes.astype(np.float32) * scale[..., None]


def _largest(bits: int) -> int:
    return 2**bits - 1

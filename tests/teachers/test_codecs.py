"""What is kept of a teacher: against fp64 NumPy, on disk and back, and on meshes that cut the vocabulary."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import log_softmax
from scipy.stats import chi2, ncx2

from ministral_jax.distributed.placement import MeshConfig, Placement, Rules, make_mesh
from ministral_jax.errors import UserError
from ministral_jax.teachers import codecs
from ministral_jax.teachers.codecs import DenseCodec, HiddenCodec, SampledCodec, TopKCodec
from ministral_jax.teachers.encode import encoder, inverse_cdf
from ministral_jax.teachers.statistics import EDGES, statistics, summarise
from ministral_jax.teachers.store_format import ShardRecord

B, T, V = 4, 16, 96
FORCED = (0, 2, 50, 95)
ONE = MeshConfig()
MESHES = {
    "one device": ONE,
    "tensor 4": MeshConfig(fsdp=2, tensor=4),
    "fsdp x tensor x context": MeshConfig(fsdp=2, tensor=2, context=2),
}
CUT = MESHES["fsdp x tensor x context"]
# Logits up to 20 and their logsumexp are off by some ulp, 2^-24 * 20 = 1.2e-6, each.
FLOAT32 = 8e-6


def encode(codec, states, head, mask, uniforms=None, mesh=ONE, forced=FORCED, chunk=8, rules=None):
    """Arrays of the encoder on a mesh, as NumPy's."""
    place = Placement(make_mesh(mesh, jax.devices()[: 1 if mesh == ONE else 8]), rules or Rules())
    with jax.set_mesh(place.mesh):
        return jax.device_get(jax.jit(encoder(codec, place, forced, chunk))(states, head, mask, uniforms))


def from_logits(codec, logits, mask=None, **kwargs):
    """As `encode`, of given logits: through the identity they come out as they are, on any mesh."""
    mask = np.ones(logits.shape[:2], np.float32) if mask is None else mask
    return encode(codec, logits, np.eye(logits.shape[-1], dtype=logits.dtype), mask, **kwargs)


@pytest.fixture(scope="module")
def teacher():
    """States and a head in quarters, so that float32 logits are exact and many of them equal; NaN where masked."""
    rng = np.random.default_rng(0)
    states, head = (rng.integers(-6, 7, shape).astype(np.float32) / 4 for shape in ((B, T, 8), (8, V)))
    mask = (rng.random((B, T)) > 0.2).astype(np.float32)
    mask[0] = 0
    logits = states.astype(np.float64) @ head
    assert len(np.unique(logits[1, 0])) < V - 10, "there must be ties"
    return np.where(mask[..., None] > 0, states, np.nan), head, mask, logits


# ---- oracle ---------------------------------------------------------------------------------------------------------


def entropy_of(p):
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


def top_k_of(logits, entries, sizes, forced):
    """The fp64 reading of one token [V]."""
    log_p = log_softmax(logits)
    free = sorted(set(range(len(logits))) - set(forced), key=lambda i: (-logits[i], i))
    ids = sorted(free[:entries])
    rest = np.exp(log_p[free[entries:]])
    with np.errstate(divide="ignore"):
        tail = np.log(rest.sum())
    return dict(
        ids=np.array(ids),
        logprobs=log_p[ids + list(forced)],
        tail=tail,
        tail_entropy=entropy_of(rest / rest.sum()) if len(rest) else 0.0,
        curve=np.array([np.exp(log_p[free[s:]]).sum() for s in sizes]),
    )


def check_top_k(found, logits, mask, entries, forced, tolerance=FLOAT32):
    sizes = codecs.curve_sizes(TopKCodec(entries=entries), logits.shape[-1])
    curve = np.zeros((len(logits), len(sizes)))
    for b, t in np.ndindex(logits.shape[:2]):
        if mask is not None and mask[b, t] == 0:
            assert not any(np.any(found[name][b, t]) for name in found if name != "curve")
            continue
        wanted = top_k_of(logits[b, t], entries, sizes, forced)
        np.testing.assert_array_equal(found["ids"][b, t], wanted["ids"])
        for name in ("logprobs", "tail", "tail_entropy"):
            np.testing.assert_allclose(found[name][b, t], wanted[name], rtol=0, atol=tolerance, err_msg=name)
        curve[b] += wanted["curve"]
    np.testing.assert_allclose(found["curve"], curve, rtol=logits.shape[1] * tolerance)
    np.testing.assert_array_equal(found["counted"], 1 if mask is None else mask > 0)


# ---- topk -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mesh", "rules"),
    [
        *((mesh, None) for mesh in MESHES.values()),
        (MeshConfig(data=2, fsdp=2, tensor=2), Rules(batch=("data",), length=(), embed=(), vocab=("fsdp", "tensor"))),
    ],
    ids=[*MESHES, "a vocabulary cut over two axes"],
)
def test_top_k_is_the_oracles_on_any_mesh(teacher, mesh, rules):
    states, head, mask, logits = teacher
    found = encode(TopKCodec(entries=12), states, head, mask, mesh=mesh, rules=rules)
    check_top_k(found, logits, mask, 12, FORCED)


def test_top_k_in_float64_is_exact(teacher):
    states, head, mask, logits = teacher
    with jax.enable_x64(True):
        found = encode(TopKCodec(entries=5), states.astype(np.float64), head.astype(np.float64), mask, chunk=20)
    check_top_k(found, logits, mask, 5, FORCED, 1e-13)


@pytest.mark.parametrize("mesh", ["one device", "tensor 4"])
def test_a_tail_of_1e_7_keeps_its_digits_and_none_survives_to_the_loss(mesh):
    """1 - sum(p) would have no digits left in float32, whose next number below 1 is 6e-8 away."""
    logits = np.random.default_rng(1).normal(size=(B, T, V)).astype(np.float32)
    logits[..., 20:90] -= 17
    found = from_logits(TopKCodec(entries=26), logits, mesh=MESHES[mesh], forced=())
    assert 1e-8 < np.exp(found["tail"]).max() < 3e-7
    check_top_k(found, logits, None, 26, ())

    codec, forced = TopKCodec(entries=14), (3, 4)
    found = from_logits(codec, logits[..., :16], mesh=MESHES[mesh], forced=forced)
    check_top_k(found, logits[..., :16], None, 14, forced)
    assert np.all(found["tail"] == -np.inf) and np.all(taught(codec, codecs.pack(codec, found)).tail == -np.inf)


# ---- draws ----------------------------------------------------------------------------------------------------------

# A cumulative sum in two levels of 8 and 12 float32 numbers, scaled by u: some 2^-24 each.
BOUNDARY = 1e-6


def draws_of(codec, rows, length, seed=0):
    return np.stack([codecs.uniforms(codec, seed, bytes([i]) * 16, length) for i in range(rows)])


def one_token(rng, scale, vocab, times):
    """Logits [1, times, vocab] of one token, again and again, and its distribution."""
    logits = (scale * rng.normal(size=(1, 1, vocab))).astype(np.float32).repeat(times, axis=1)
    return logits, np.exp(log_softmax(logits[0, 0]))


@pytest.mark.parametrize("draws", ["systematic", "independent"])
def test_draws_are_where_the_cumulative_distribution_says_on_any_mesh(draws):
    """Each draw lies in its id's interval of the fp64 distribution to float32 rounding; so meshes agree but there."""
    rng = np.random.default_rng(3)
    logits = (3 * rng.normal(size=(B, T, V))).astype(np.float32)
    logits[..., [0, 7, 40, V - 1]] = -200  # probability 0 in float32, at both ends too
    mask = (rng.random((B, T)) > 0.2).astype(np.float32)
    codec = SampledCodec(entries=40, draws=draws)
    uniforms = draws_of(codec, B, T)
    uniforms[0, 0] = np.linspace(0, 1 - 2**-24, 40)
    counted, p = mask > 0, np.exp(log_softmax(logits))
    ends, entropies = np.cumsum(p, -1), [entropy_of(one) for one in p[counted]]
    clear = np.abs(ends[:, :, None] - uniforms[..., None]).min(-1)[counted] > BOUNDARY
    assert np.mean(~clear) < 0.05
    ids = {}
    for name, mesh in MESHES.items():
        found = from_logits(codec, np.where(counted[..., None], logits, np.nan), mask, uniforms=uniforms, mesh=mesh)
        drawn = ids[name] = found["draws"]
        assert np.all(drawn[~counted] == 0) and np.all(found["entropy"][~counted] == 0)
        stop = np.take_along_axis(ends, drawn, -1)
        start = stop - np.take_along_axis(p, drawn, -1)
        assert np.all(((start - BOUNDARY <= uniforms) & (uniforms <= stop + BOUNDARY))[counted])
        assert np.all((np.take_along_axis(logits, drawn, -1) > -200)[counted]) and np.all(np.diff(drawn) >= 0)
        np.testing.assert_allclose(found["entropy"][counted], entropies, atol=FLOAT32)
        np.testing.assert_array_equal(drawn[counted][clear], ids["one device"][counted][clear])


def test_a_draw_never_lands_on_an_id_without_probability():
    """Nor past the end, which a place within a block may reach by rounding."""
    weights = jnp.asarray([0, 3, 0, 1, 0], jnp.float32)[None]
    index, within = inverse_cdf(weights, jnp.asarray([0, 0.375, 0.75, 0.875, 1]))
    np.testing.assert_array_equal(index, [1, 1, 3, 3, 3])
    np.testing.assert_array_equal(within, [0, 0.5, 0, 0.5, 1])


def test_systematic_counts_are_the_expected_ones_rounded_down_or_up():
    """Floor or ceiling of S p, with p off by the rounding of two ends (where S p is next to an integer, one more)."""
    logits, p = one_token(np.random.default_rng(4), 2, V, 256)
    codec, mask = SampledCodec(entries=50), np.ones((1, 256), np.float32)
    mask[0, ::7] = 0
    found = from_logits(codec, logits, mask, uniforms=draws_of(codec, 1, 256), chunk=64)
    ids, counts, _ = (np.asarray(part)[0] for part in taught(codec, codecs.pack(codec, found)))
    np.testing.assert_array_equal(counts.sum(-1), np.where(mask[0] > 0, 50, 0))
    assert np.all(ids[counts == 0] == 0)
    dense = np.zeros((256, V))
    np.add.at(dense, (np.arange(256)[:, None], ids), counts)
    dense = dense[mask[0] > 0]
    slack = 50 * 2 * BOUNDARY
    assert np.all((dense >= np.floor(50 * p - slack)) & (dense <= np.ceil(50 * p + slack)))
    assert np.any(dense != np.round(50 * p))
    # Unbiased: a count is floor or ceiling, so its variance is at most 1/4.
    assert np.all(np.abs(dense.mean(0) - 50 * p) < 5 * 0.5 / math.sqrt(len(dense)))


def test_independent_draws_follow_the_teacher():
    """Pearson's χ² of 51200 draws, at level 1e-4; errors of 5 % in the probabilities would be seen with 99 %."""
    logits, p = one_token(np.random.default_rng(5), 1, 64, 1024)
    codec = SampledCodec(entries=50, draws="independent")
    found = from_logits(codec, logits, uniforms=draws_of(codec, 1, 1024), chunk=256)
    observed = np.bincount(found["draws"].ravel(), minlength=64)
    critical = chi2.isf(1e-4, 63)
    assert ncx2.sf(critical, 63, observed.sum() * 0.05**2) > 0.99
    statistic = lambda p: float(((observed - observed.sum() * p) ** 2 / (observed.sum() * p)).sum())
    assert statistic(p) < critical
    wrong = p * (1 + 0.05 * (-1) ** np.arange(64))
    assert statistic(wrong / wrong.sum()) > critical


@pytest.mark.parametrize("draws", ["systematic", "independent"])
def test_uniforms_depend_on_seed_and_row_alone(draws):
    codec = SampledCodec(entries=7, draws=draws)
    draw = lambda seed=3, row=b"a" * 16, length=500: codecs.uniforms(codec, seed, row, length)
    u = draw()
    assert u.dtype == np.float32 and u.shape == (500, 7)
    assert np.all((u >= 0) & (u < 1)) and np.all(np.diff(u) >= 0) and abs(u.mean() - 0.5) < 0.02
    np.testing.assert_array_equal(u, draw())
    np.testing.assert_array_equal(u[:9], draw(length=9))
    assert np.mean(u == draw(seed=4)) < 0.01 and np.mean(u == draw(row=b"a" * 15 + b"b")) < 0.01
    assert codecs.uniforms(TopKCodec(), 0, b"a" * 16, 5) is None


# ---- on disk and back -----------------------------------------------------------------------------------------------


def on_disk(codec, found, vocab, forced, width=8):
    """The arrays as they lie on disk, in the layout that is announced."""
    disk = codecs.pack(codec, found)
    expected = codecs.layout(codec, disk["counted"].shape[1], width, vocab, forced)
    assert {n: (a.shape[1:], str(a.dtype)) for n, a in disk.items()} == {
        n: (one.shape, one.dtype) for n, one in expected.items()
    }
    return disk


def taught(codec, disk, head=None, forced=()):
    return codecs.targets(codec, codecs.unpack(disk), head, forced)


@settings(max_examples=30, deadline=None)
@given(st.data(), st.sampled_from([8, 300, 131072]), st.integers(2, 6), st.integers(0, 2))
def test_ids_survive_the_disk(data, vocab, entries, count):
    forced = tuple(range(count))
    distinct = st.lists(st.integers(count, vocab - 1), min_size=entries, max_size=entries, unique=True).map(sorted)
    ids = np.array([[data.draw(distinct) for _ in range(3)]], np.int32)
    codec = TopKCodec(entries=entries, bits=data.draw(st.sampled_from([8, 16])))
    zeros = np.zeros((1, 3), np.float32)
    curve = np.zeros((1, len(codecs.curve_sizes(codec, vocab))), np.float32)
    log_probs = -np.arange(3 * (entries + count), dtype=np.float32).reshape(1, 3, -1)
    arrays = dict(ids=ids, logprobs=log_probs, tail=zeros, tail_entropy=zeros, curve=curve, counted=np.uint8([[1] * 3]))
    kept = taught(codec, on_disk(codec, arrays, vocab, forced), forced=forced)
    assert kept.ids.shape == kept.logprobs.shape == log_probs.shape
    np.testing.assert_array_equal(kept.ids[..., :entries], ids)
    np.testing.assert_array_equal(kept.ids[0, :, entries:], np.tile(forced, (3, 1)))
    assert np.all(np.abs(kept.logprobs - log_probs) <= log_prob_error(log_probs, codec.bits) + 1e-5)

    drawn = st.lists(st.integers(0, vocab - 1), min_size=entries, max_size=entries).map(sorted)
    draws = np.array([[data.draw(drawn), [0] * entries, data.draw(drawn)]], np.int32)
    codec, counted = SampledCodec(entries=entries), np.array([[1, 0, 1]], np.uint8)
    disk = on_disk(codec, dict(draws=draws, entropy=zeros, counted=counted), vocab, forced)
    found, counts, _ = (np.asarray(part)[0] for part in taught(codec, disk))
    for t in (0, 2):
        np.testing.assert_array_equal(np.repeat(found[t], counts[t]), draws[0, t])
        assert np.all(np.diff(found[t][counts[t] > 0]) > 0) and not np.any(found[t][counts[t] == 0])
    assert not np.any(found[1]) and not np.any(counts[1])


def log_prob_error(log_probs, bits):
    """Bound on |decoded - log p|, as `decode_log_probs` states it, without what floating point adds."""
    h = 0.5 / (2**bits - 1)
    return 64 * h * (-log_probs / 32) ** 0.5 + 32 * h**2


@pytest.mark.parametrize(("bits", "at_one"), [(8, 0.0224), (16, 8.7e-5)])
def test_log_probabilities_are_as_close_as_stated(bits, at_one):
    log_probs = -np.concatenate([np.linspace(0, 32, 40001), np.geomspace(1e-12, 32, 40001)])
    codes = codecs.encode_log_probs(log_probs, bits)
    assert codes.dtype == f"uint{bits}"
    error = np.abs(codecs.decode_log_probs(codes, bits, np.float64) - log_probs)
    bound = log_prob_error(log_probs, bits)
    assert np.all(error <= bound * (1 + 1e-9)) and np.max(error / bound) > 0.95
    assert log_prob_error(np.float64(-1), bits) < at_one
    assert codecs.decode_log_probs(codecs.encode_log_probs(np.float32([-99, -np.inf]), bits), bits, float)[1] == -32
    on_device = codecs.encode_log_probs(jnp.asarray(log_probs, jnp.float32), bits)
    assert np.max(np.abs(np.asarray(on_device, int) - codes.astype(int))) <= 1


def test_tails_entropies_and_float8_are_as_close_as_stated():
    tails = -np.linspace(0, 31.99, 10001)
    decoded = codecs.decode_tail(codecs.encode_log_probs(tails, 16), np.float64)
    assert np.all(np.abs(decoded - tails) <= log_prob_error(tails, 16) * (1 + 1e-9))
    nothing = codecs.encode_log_probs(np.array([-np.inf, -32, -50]), 16)
    assert np.all(codecs.decode_tail(nothing, float) == -np.inf)
    entropies = np.linspace(0, 16, 10001)
    error = np.abs(codecs.decode_entropy(codecs.encode_entropy(entropies), np.float64) - entropies)
    assert np.all(error <= 16 / 65535 / 2 * (1 + 1e-9))

    rng = np.random.default_rng(6)
    x = (rng.normal(size=(64, 256)) * np.exp(3 * rng.normal(size=(64, 1)))).astype(np.float32)
    x[0], x[1, ::2] = 0, 1e-6
    for array in (x, jnp.asarray(x)):
        codes, scale = (np.asarray(part) for part in codecs.encode_float8(array))
        assert str(codes.dtype) == codecs.FLOAT8 and scale.dtype == np.float32
        error = np.abs(codecs.decode_float8(codes, scale).astype(np.float64) - x)
        bound = np.maximum(np.abs(x) / 16, scale[:, None] / 1024) * (1 + 1e-6)
        assert np.all(error <= bound) and np.max(error / np.maximum(bound, 1e-30)) > 0.9


@pytest.mark.parametrize(
    ("codec", "relative"),
    [(DenseCodec(), 0), *((HiddenCodec(dtype=d), r) for d, r in dict(float32=0, bfloat16=2**-9, float8=2**-4).items())],
)
def test_whole_distributions_come_back(teacher, codec, relative):
    states, head, mask, logits = teacher
    kept = taught(codec, on_disk(codec, encode(codec, states, head, mask, mesh=CUT), V, ()), jnp.asarray(head))
    exact, found = (logits, kept.logits) if codec.kind == "dense" else (states, kept.hidden)
    assert found.dtype == head.dtype and (codec.kind == "dense" or kept.head.shape == head.shape)
    wanted = np.where(mask[..., None] > 0, exact, 0)
    absolute = 1.5 / 448 / 1024 if codec == HiddenCodec(dtype="float8") else 0
    assert np.all(np.abs(found - wanted) <= np.maximum(relative * np.abs(wanted), absolute) * (1 + 1e-6))


@pytest.mark.parametrize(("bits", "divergence"), [(8, 1e-3), (16, 1e-7)])
def test_targets_are_the_teachers_distribution_to_the_quantisers_error(teacher, bits, divergence):
    """Normalising shifts all by the p-weighted error at most: |log p' - log p| <= its own bound + the largest."""
    states, head, mask, logits = teacher
    codec = TopKCodec(entries=12, bits=bits)
    kept = taught(codec, on_disk(codec, encode(codec, states, head, mask), V, FORCED), forced=FORCED)
    found = np.concatenate([kept.logprobs, kept.tail[..., None]], -1)[mask > 0].astype(np.float64)
    found -= np.log(np.exp(found).sum(-1, keepdims=True))
    tokens = [top_k_of(z, 12, (), FORCED) for z in logits[mask > 0]]
    for ids, token in zip(np.asarray(kept.ids)[mask > 0], tokens, strict=True):
        assert sorted(set(ids)) == sorted([*token["ids"], *FORCED])
    wanted = np.array([np.append(token["logprobs"], token["tail"]) for token in tokens])
    assert np.allclose(np.exp(wanted).sum(-1), 1)
    error = log_prob_error(wanted, bits)
    assert np.all(np.abs(found - wanted) <= error + error.max(-1, keepdims=True) + FLOAT32)
    assert np.sum(np.exp(wanted) * (wanted - found), -1).max() < divergence


# ---- statistics -----------------------------------------------------------------------------------------------------


def summary_of(codec, *parts):
    """Of a split whose shards hold these arrays."""
    record = lambda part: dict(rows=len(part["counted"]), bytes={}, sha256={}, statistics=statistics(codec, part))
    return summarise(codec, [ShardRecord(**record(part)) for part in parts])


def test_statistics_are_those_of_the_tokens(teacher):
    states, head, mask, logits = teacher
    codec = TopKCodec(entries=12, bits=16)
    disk = codecs.pack(codec, encode(codec, states, head, mask))
    parts = [{name: array[i : i + 1] for name, array in disk.items()} for i in range(B)]
    whole, summary = summary_of(codec, disk), summary_of(codec, *parts)
    assert (whole.shards, summary.shards) == (1, B) and whole.rows == summary.rows == B
    assert statistics(codec, parts[0])["tokens"] == 0 and summary.tail_histogram == whole.tail_histogram
    assert summary.figures() == pytest.approx(whole.figures(), rel=1e-12)
    counted = logits[mask > 0]
    assert summary.tokens == sum(summary.tail_histogram.tokens) == len(counted)

    tokens = [top_k_of(z, 12, (8, 16, 32), FORCED) for z in counted]
    masses = np.exp([token["tail"] for token in tokens])
    wanted = {
        "teacher_entropy": np.mean([entropy_of(np.exp(log_softmax(z))) for z in counted]),
        "tail_mass": masses.mean(),
        "gradient_error_bound": 2 * masses.mean(),
        "tail_entropy": np.mean([token["tail_entropy"] for token in tokens]),
    }
    # 16 bits are 64 h √(-log p / 32) <= 5e-4 nats for what has any weight here
    assert summary.figures() == pytest.approx(wanted | {"bytes_per_token": 0}, rel=5e-4)
    curve = dict(zip((8, 16, 32), np.mean([token["curve"] for token in tokens], 0), strict=True))
    assert summary.curve == pytest.approx(curve, rel=1e-5)
    for q, found in ((0.5, "p50"), (0.9, "p90"), (0.99, "p99"), (1, "max")):
        exact = np.quantile(masses, q, method="inverted_cdf")
        assert exact * (1 - 5e-4) <= getattr(summary.tail_mass, found) <= exact * 1.123
    assert summary.gradient_error_bound["p99"] == 2 * summary.tail_mass.p99
    assert len(summary.tail_by_shard["mean"]) == len(summary.tail_by_shard["p99"]) == B
    assert len(EDGES) == 181 and EDGES[-1] == 1


def test_statistics_of_draws_and_of_nothing():
    codec = SampledCodec(entries=4)
    draws = np.array([[[1, 1, 2, 3], [0, 0, 0, 0], [5, 5, 5, 5]]], np.int32)
    arrays = dict(draws=draws, entropy=np.float32([[2, 0, 1]]), counted=np.uint8([[1, 0, 1]]))
    summary = summary_of(codec, codecs.pack(codec, arrays))
    assert summary.tokens == 2 and summary.unique_ids == 2
    assert summary.teacher_entropy == pytest.approx(1.5, abs=1.3e-4)
    assert summary_of(codec).tokens == 0
    layout = codecs.layout(TopKCodec(), 4, 8, V, (1,))
    empty = {name: np.zeros((1, *one.shape), one.dtype) for name, one in layout.items()}
    assert summary_of(TopKCodec(), empty).tail_mass.mean == 0


@pytest.mark.parametrize(
    ("codec", "vocab", "forced", "says"),
    [
        (TopKCodec(entries=30), 32, (1, 2, 3), "= 30 and 3 forced ids exceed the vocabulary of 32; .* at most 29"),
        (SampledCodec(), 32, (4, 4), r"forced ids \[4, 4\] must be distinct and ascending"),
        (TopKCodec(entries=4), 32, (31, 32), "below the vocabulary 32"),
        (TopKCodec(entries=2), 7, (), "at least 8 tokens, not 7"),
    ],
)
def test_a_codec_that_does_not_fit_is_refused(codec, vocab, forced, says):
    with pytest.raises(UserError, match=says):
        codecs.check(codec, vocab, forced)
    codecs.check(TopKCodec(entries=29), 32, (1, 2, 3))

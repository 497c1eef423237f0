"""The loss head against sparse targets: fp64 NumPy oracle, bounds on what is left out, unbiasedness, masking."""

import functools

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_cases import abstract, close, log_softmax, loss_and_gradients, matrix_products, single, softmax

from ministral_jax.errors import UserError
from ministral_jax.losses.chunked import cross_entropy, distillation_loss, evaluate_positions
from ministral_jax.losses.targets import Dense, LossOptions, Sampled, TopK, check_options

B, T, D, V, W, S = 3, 7, 6, 11, 5, 4
FORCED = (1, 8)
EPS32, EPS64 = 2.0**-24, 2.0**-53  # unit roundoffs


def keep(logits, width, forced=()) -> TopK:
    """The `forced` ids and the most probable others, `width` in all, in an order that means nothing."""
    logprobs = log_softmax(logits)
    ranked = logprobs.copy()
    ranked[..., list(forced)] = np.inf
    ids = np.sort(np.argsort(-ranked, axis=-1)[..., :width], axis=-1).astype(np.int32)
    rest = np.exp(logprobs)
    np.put_along_axis(rest, ids, 0, axis=-1)
    with np.errstate(divide="ignore"):
        return TopK(ids, np.take_along_axis(logprobs, ids, axis=-1), np.log(rest.sum(-1)))


def draw(logits, draws, rng, systematic=True) -> Sampled:
    """`draws` ids of each token by inverse cumulation, in slots that end in unused ones."""
    logprobs = log_softmax(logits)
    u = rng.random((*logits.shape[:-1], 1 if systematic else draws))
    u = (np.arange(draws) + u) / draws if systematic else u
    cumulated = np.cumsum(np.exp(logprobs), axis=-1)
    drawn = (u[..., None] * cumulated[..., None, -1:] > cumulated[..., None, :]).sum(-1)
    counts = (drawn[..., None] == np.arange(logits.shape[-1])).sum(-2)
    ids = np.argsort(counts == 0, axis=-1, kind="stable")[..., :draws]
    counts = np.take_along_axis(counts, ids, axis=-1)
    assert (counts.sum(-1) == draws).all()
    entropy = -(np.exp(logprobs) * logprobs).sum(-1)
    return Sampled(np.where(counts > 0, ids, 0).astype(np.int32), counts.astype(np.uint8), entropy)


def case(kind, seed=0):
    """As in test_chunked.py, with targets that are not normalised; NaN and ids out of range where the mask is zero."""
    rng = np.random.default_rng(seed)
    mask = rng.choice([0.0, 1.0, 0.5], size=(B, T), p=[0.3, 0.5, 0.2])
    mask[1] = 0
    teacher = 2 * rng.normal(size=(B, T, V))
    if kind == "topk":
        ids, logprobs, tail = keep(teacher, W, FORCED)
        targets = TopK(ids, logprobs + 0.1 * rng.normal(size=logprobs.shape), tail + 0.1 * rng.normal(size=tail.shape))
    else:
        targets = draw(teacher, S, rng, systematic=False)
    hidden, labels, masked = rng.normal(size=(B, T, D)), rng.integers(V, size=(B, T)), mask == 0
    hidden[masked] = np.nan
    ids, values, per_token = targets
    ids[masked] = rng.choice([0, -1, V + 7], size=ids[masked].shape)
    per_token[masked] = np.nan
    values[masked] = np.nan if kind == "topk" else 0
    return dict(hidden=hidden, head=rng.normal(size=(D, V)), targets=targets, labels=labels, mask=mask)


def oracle(hidden, head, targets, labels, mask, options):
    """(loss sum, {reading: [B, T]}, d_hidden, d_head): slopes in q [V], taken as free, and softmax's Jacobian."""
    counted = mask > 0
    hidden, (ids, values, per_token) = np.where(counted[..., None], hidden, 0), targets
    s, shape = hidden @ head, (*mask.shape, head.shape[1])
    q, one_hot = softmax(s), np.eye(shape[-1])[labels]
    value, slope, agreement, tail = np.zeros(mask.shape), np.zeros(shape), np.zeros(mask.shape), np.zeros(mask.shape)
    for at in zip(*np.nonzero(counted), strict=True):
        if isinstance(targets, TopK):
            p = np.exp(np.append(values[at], per_token[at]))
            p /= p.sum()
            outside = np.setdiff1d(np.arange(shape[-1]), ids[at])
            buckets = np.append(q[at][ids[at]], q[at][outside].sum())
            value[at] = (p * np.log(p / buckets))[p > 0].sum()
            slope[at][ids[at]] = -p[:-1] / buckets[:-1]
            slope[at][outside] = -p[-1] / buckets[-1] if len(outside) else 0
            agreement[at], tail[at] = s[at].argmax() == ids[at][p[:-1].argmax()], p[-1]
        else:
            shares = values[at] / values[at].sum()
            value[at] = -(shares * np.log(q[at][ids[at]])).sum() - per_token[at]
            np.add.at(slope[at], ids[at], -shares / q[at][ids[at]])
    a = options.ce_weight
    readings = dict(kl=value, ce=-np.log((q * one_hot).sum(-1)), agreement=agreement, tail=tail, confidence=q.max(-1))
    loss = (1 - a) * value + a * readings["ce"]
    through = q * (slope - (q * slope).sum(-1, keepdims=True))
    d_logits = mask[..., None] * ((1 - a) * through + a * (q - one_hot))
    return (mask * loss).sum(), readings, d_logits @ head.T, np.einsum("btd,btv->dv", hidden, d_logits)


def of_logits(student, targets, **options):
    """Readings [B, T] and the gradient [B, T, V] in the student's logits, in the precision of these."""

    @jax.jit
    def run(student, targets):
        labels, mask = jnp.zeros(student.shape[:2], jnp.int32), jnp.ones(student.shape[:2], student.dtype)
        one = jnp.eye(student.shape[-1], dtype=student.dtype)
        loss = lambda s: distillation_loss(s, one, targets, labels, mask, LossOptions(**options))[0]
        return evaluate_positions(student, one, targets, labels) | {"gradient": jax.grad(loss)(student)}

    return jax.device_get(run(student, targets))


# ---- algebra --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["topk", "sampled"])
@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
def test_loss_metrics_and_both_gradients_equal_the_fp64_oracle(kind, ce_weight):
    """Masked positions hold NaN and ids that do not exist: what they add would show in every number."""
    options, inputs = LossOptions(ce_weight=ce_weight, chunk=9), case(kind)
    want, readings, d_hidden, d_head = oracle(**inputs, options=options)
    with jax.enable_x64(True):
        (loss, metrics), gradients = loss_and_gradients(**inputs, options=options)
        positions = evaluate_positions(*(jax.tree.map(jnp.asarray, inputs[n]) for n in inputs if n != "mask"), 9)
    assert loss.dtype == gradients[0].dtype == gradients[1].dtype == np.float64
    close(loss, want)
    close(gradients[0], d_hidden)
    close(gradients[1], d_head)
    assert set(metrics) == {"kl", "ce"} | ({"agreement", "tail"} if kind == "topk" else set())
    counted = inputs["mask"] > 0
    for name, (total, count) in metrics.items():
        close(total, (inputs["mask"] * readings[name]).sum())
        assert count == inputs["mask"].sum()
    assert set(positions) == {"kl", "ce", "correct", "prediction", "confidence"}
    for name in ("kl", "ce", "confidence"):
        close(np.asarray(positions[name])[counted], readings[name][counted])
    assert (gradients[0][~counted] == 0).all() and (~counted).sum() > T


@pytest.mark.parametrize("kind", ["topk", "sampled"])
def test_masked_tokens_add_exactly_nothing_whatever_they_hold(kind):
    inputs = single(case(kind, 1))
    masked = inputs["mask"] == 0
    want = loss_and_gradients(**inputs, options=LossOptions(chunk=9))
    assert np.isfinite(want[0][0]) and all(np.isfinite(g).all() for g in want[1])
    for ids, other in ((0, 0), (2, 1e30), (V, np.inf)):
        blank = lambda x, fill: np.where(masked.reshape(masked.shape + (1,) * (x.ndim - 2)), fill, x)
        spoilt = type(inputs["targets"])(
            *(blank(x, ids if x.dtype.kind in "iu" else other).astype(x.dtype) for x in inputs["targets"])
        )
        hidden = blank(inputs["hidden"], other).astype(np.float32)
        got = loss_and_gradients(**inputs | {"targets": spoilt, "hidden": hidden}, options=LossOptions(chunk=9))
        jax.tree.map(np.testing.assert_array_equal, got, want)
    # targets of uncounted positions are stored as zeros, and readings there may be multiplied by zero
    zeros = jax.tree.map(np.zeros_like, inputs["targets"])
    assert np.isfinite(evaluate_positions(np.zeros((B, T, D)), inputs["head"], zeros, inputs["labels"])["kl"]).all()


def test_unused_slots_have_no_effect_whatever_their_id():
    rng, student = np.random.default_rng(2), np.random.default_rng(3).normal(size=(1, 64, V)).astype(np.float32)
    targets = draw(rng.normal(size=(1, 64, V)) * 3, 6, rng)
    unused = targets.counts == 0
    assert 100 < unused.sum() < unused.size and (targets.ids[unused] == 0).all()
    want = of_logits(student, targets)
    for ids in (rng.integers(V, size=unused.shape), np.full(unused.shape, -1), np.full(unused.shape, V)):
        got = of_logits(student, targets._replace(ids=np.where(unused, ids, targets.ids).astype(np.int32)))
        jax.tree.map(np.testing.assert_array_equal, got, want)
    parts = Sampled(*(np.concatenate([x, x], axis=-1) for x in targets[:2]), targets.entropy)  # ids that repeat add up
    jax.tree.map(functools.partial(close, tolerance=1e-6), of_logits(student, parts), want)


@pytest.mark.parametrize("tail", [-np.inf, -32.0])
def test_entries_for_the_whole_vocabulary_equal_dense_targets(tail):
    """With ids in any order. Without ids outside, a tail mass that a code of finite range stores is none."""
    rng = np.random.default_rng(4)
    student, teacher = 3 * rng.normal(size=(2, B, T, V))
    ids = rng.permuted(np.tile(np.arange(V, dtype=np.int32), (B, T, 1)), axis=-1)
    whole = TopK(ids, np.take_along_axis(teacher, ids, -1) + 5, np.full((B, T), tail))
    with jax.enable_x64(True):
        for ce_weight in (0.0, 0.3):
            got, want = (of_logits(student, x, ce_weight=ce_weight) for x in (whole, Dense(teacher)))
            jax.tree.map(functools.partial(close, tolerance=1e-14), got, want)
        metrics, of_dense = (
            loss_and_gradients(student, np.eye(V), x, ids[..., 0], np.ones((B, T)), LossOptions())[0][1]
            for x in (whole, Dense(teacher))
        )
    assert metrics["tail"][0] == 0 and metrics["agreement"][0] == of_dense["agreement"][0] > 0


def test_agreement_counts_a_tie_on_either_side():
    student = np.float32([[[3, 3, 0, 0], [0, 3, 0, 0], [0, 0, 0, 3], [0, 1, 2, 0]]])
    ids = np.int32([[[0, 2], [0, 1], [0, 1], [0, 1]]])
    logprobs = np.log(np.float32([[[0.6, 0.1], [0.4, 0.4], [0.6, 0.2], [0.4, 0.4]]]))
    targets = TopK(ids, logprobs, np.log(np.float32([[0.3, 0.2, 0.2, 0.2]])))
    one, labels = np.eye(4, dtype=np.float32), np.zeros((1, 4), np.int32)
    mask = jax.device_put(np.eye(4, dtype=np.float32)[:, None])
    agree = lambda m: distillation_loss(student, one, targets, labels, m, LossOptions())[1]["agreement"][0]
    assert jax.vmap(agree)(mask).tolist() == [1, 1, 0, 0]


# ---- rounding -------------------------------------------------------------------------------------------------------

ELEMENTS = st.floats(-50, 50, width=32)
LOGITS = hnp.arrays(np.float32, (1, 2, 8), elements=ELEMENTS)
CODES = hnp.arrays(np.uint8, (1, 2, 3), elements=st.integers(0, 255))


@jax.jit
def kl_and_gradient(student, targets):
    labels, one = jnp.zeros((1, 2), jnp.int32), jnp.eye(8, dtype=student.dtype)
    loss = lambda s: distillation_loss(s, one, targets, labels, jnp.ones((1, 2)), LossOptions())[0]
    return evaluate_positions(student, one, targets, labels)["kl"], jax.grad(loss)(student)


@hypothesis.settings(deadline=None, max_examples=300)
@hypothesis.given(LOGITS, st.one_of(LOGITS, st.just(None)), CODES, st.floats(-32, 0, width=32), st.integers(0, 5))
def test_kl_of_buckets_is_never_negative_and_vanishes_between_equals(s, t, codes, tail, first):
    """In fp32, of log-probs as a code of 8 bits leaves them, and of exact ones, those of the student's own included.

    A bucket's term p log(p/q) - p + q has slope 1 - q/p in log p and log(p/q) in log q; where they agree to within the
    rounding of logits and their sums, delta = 8 * 2^-24 * (50 + log 8), it is below p delta² plus, for expm1, some
    2^-24 p delta.
    """
    ids = np.int32([[[first, first + 1, first + 2]] * 2])
    quantised = TopK(ids, -32 * (codes / np.float32(255)) ** 2, np.full((1, 2), tail, np.float32))
    for targets in (quantised, single(keep(s if t is None else t, 3))):
        kl, gradient = jax.device_get(kl_and_gradient(s, targets))
        assert (kl >= 0).all() and np.isfinite(kl).all() and np.isfinite(gradient).all()
        assert np.abs(gradient).sum(-1).max() <= 2 * (1 + 1e-5)
    if t is None:
        delta = 8 * EPS32 * (50 + np.log(8))
        assert kl.max() <= delta**2 + 8 * EPS32 * delta


def test_a_tail_that_the_student_has_left_still_has_a_gradient():
    """Rows: the tail's mass underflows in fp32; in any precision; equal distributions; a teacher without a tail.

    The tail's gradient q_t - p_t is shared out by the student's softmax over it; that softmax errs by the rounding of
    its logsumexp, which is 2^-24 of the logits' size.
    """
    student = np.float32([[[0, 0, -200, -201], [0, 0, -1e4, -1e4], [1, 0, 1, 0], [0, 0, 5, 5]]])
    logprobs = np.log(np.full((1, 4, 2), 0.4, np.float32))
    logprobs[0, 2] = log_softmax(student[0, 2])[:2]
    tail = np.float32([[np.log(0.2), np.log(0.2), np.log(0.5), -np.inf]])
    got = of_logits(student, TopK(np.int32([[[0, 1]] * 4]), logprobs, tail))
    share, kept = 1 / (1 + np.exp(-1)), 1 / (2 + 2 * np.exp(5))
    for row, (size, want) in enumerate(
        (
            (200, [0.1, 0.1, -0.2 * share, -0.2 * (1 - share)]),
            (1e4, [0.1, 0.1, -0.1, -0.1]),
            (4, [0, 0, 0, 0]),
            (8, [kept - 0.5, kept - 0.5, 0.5 - kept, 0.5 - kept]),
        )
    ):
        close(got["gradient"][0, row], want, size * EPS32)
    buckets = 0.8 * np.log(0.4 / 0.5) + 0.2 * np.log(0.2)
    want = [buckets + 0.2 * (200 + np.log(2 * share)), buckets + 0.2 * 1e4, 0, -np.log(2 * kept)]
    np.testing.assert_allclose(got["kl"][0], want, rtol=4 * EPS32, atol=1e-12)


# ---- what the tail leaves out ---------------------------------------------------------------------------------------


def random_logits():
    """Teacher and student [1, 64, 32]: unrelated, with temperatures from almost uniform to almost certain."""
    rng = np.random.default_rng(5)
    scale = np.geomspace(0.1, 10, 64)[:, None]
    return scale * rng.normal(size=(1, 64, 32)), scale * rng.normal(size=(1, 64, 32))


def trained_logits():
    """Teacher and student [1, 64, 32] after training: log-bilinear next-token models (an embedding and a head of width
    16 and 6) on a Markov source of 32 tokens, whose successors are mostly certain, by 300 steps of gradient descent on
    all 4,096 of its transitions; the student learns from 60 of these steps only."""
    rng = np.random.default_rng(6)
    source = softmax(5 * rng.normal(size=(32, 32)))
    before = rng.integers(32, size=(1, 4096))
    after = (rng.random((4096, 1)) > np.cumsum(source[before[0]], -1)).sum(-1).clip(max=31)[None]

    @functools.partial(jax.jit, static_argnums=1)
    def train(params, steps):
        loss = lambda p: cross_entropy(p[0][before], p[1], after, jnp.ones((1, 4096)), chunk=4096)[0] / 4096
        step = lambda _, p: jax.tree.map(lambda x, g: x - 20 * g, p, jax.grad(loss)(p))
        return jax.lax.fori_loop(0, steps, step, params)

    def logits(width, steps):
        embed, head = train(tuple(0.3 * rng.normal(size=s) for s in ((32, width), (width, 32))), steps)
        return np.asarray(embed @ head)[before[:, :64]]

    teacher, student = logits(16, 300), logits(6, 60)
    top = softmax(teacher).max(-1)
    assert np.median(top) > 0.5 and top.max() > 0.95 and softmax(student).max(-1).mean() > 0.3  # it is a peaked model
    return teacher, student


@pytest.mark.parametrize("logits", [random_logits, trained_logits])
def test_chain_rule_and_bound_of_the_gradients_error_on_every_token(logits):
    """KL = KL_K + p_t KL(p(.|tail)‖q(.|tail)), and the L1 norm of the gradients' difference is 2 p_t TV <= 2 p_t."""
    forced, looseness = (0, 17, 31), []
    with jax.enable_x64(True):
        teacher, student = logits()
        p, q = softmax(teacher), softmax(student)
        full = of_logits(student, Dense(teacher))
        for width in (4, 8, 16):
            targets = keep(teacher, width, forced)
            assert all((targets.ids == i).any(-1).all() for i in forced)
            got = of_logits(student, targets)
            in_tail = np.ones(p.shape, bool)
            np.put_along_axis(in_tail, targets.ids, False, axis=-1)
            p_tail, q_tail = ((x * in_tail) / (x * in_tail).sum(-1, keepdims=True) for x in (p, q))
            mass, inside = (p * in_tail).sum(-1), np.where(in_tail, p_tail, 1)
            kl_tail = (p_tail * np.log(inside / np.where(in_tail, q_tail, 1))).sum(-1)
            close(got["kl"] + mass * kl_tail, full["kl"], 1e-13)
            error = np.abs(got["gradient"] - full["gradient"]).sum(-1)
            close(error, mass * np.abs(p_tail - q_tail).sum(-1), 1e-14)
            assert (error <= 2 * mass + 32 * EPS64).all()
            looseness.append((error / (2 * mass)).mean())
    assert all(0.05 < x < 1 for x in looseness), looseness  # neither zero nor a bound that says nothing


# ---- what draws leave out -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("systematic", [True, False], ids=["systematic", "independent"])
def test_sampled_targets_are_unbiased_in_value_and_gradient(systematic):
    """z-tests of the mean over 20,000 independent tokens of one teacher and student, 8 draws each: of the value, and of
    the gradient along 5 random unit vectors and along the student's logits.

    Seven two-sided tests at |z| < 4.5 raise a false alarm for 5e-5 of the seeds. A bias of 4.5 + 2.33 = 6.83 standard
    errors is found with power 0.99; the test asserts that this is below 1.5 % of the KL and, in the gradient, below
    1.5 % of its norm. Counting each drawn id once, or renormalising the top 8, are biases that it must and does find.
    """
    rng, tokens, draws, vocab = np.random.default_rng(7), 20_000, 8, 24
    teacher, student = 2 * rng.normal(size=vocab), 2 * rng.normal(size=vocab)
    p, q = softmax(teacher), softmax(student)
    gradient, kl = q - p, (p * np.log(p / q)).sum()
    directions = rng.normal(size=(6, vocab))
    directions[0] = student
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    wide = np.broadcast_to(teacher, (1, tokens, vocab))
    sampled = draw(wide, draws, rng, systematic)

    def scores(targets):
        with jax.enable_x64(True):
            got = of_logits(np.broadcast_to(student, wide.shape), targets)
        found = np.concatenate([got["kl"][0][None], directions @ got["gradient"][0].T])
        error = found.std(-1, ddof=1) / np.sqrt(tokens)
        return (found.mean(-1) - [kl, *directions @ gradient]) / error, error

    z, error = scores(sampled)
    assert np.abs(z).max() < 4.5, z
    assert 6.83 * error[0] < 0.015 * kl and 6.83 * error[1:].max() < 0.015 * np.linalg.norm(gradient), error
    assert np.abs(scores(sampled._replace(counts=np.minimum(sampled.counts, 1)))[0]).max() > 6.83
    most = keep(wide, draws)
    jitter = np.exp(most.logprobs) * np.exp(0.01 * rng.normal(size=(1, tokens, 1)))
    truncated = Sampled(most.ids, jitter, sampled.entropy + 1e-3 * rng.normal(size=(1, tokens)))
    assert np.abs(scores(truncated)[0]).max() > 6.83


# ---- memory and errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [TopK, Sampled])
def test_no_array_of_tokens_by_vocabulary_and_one_matrix_product_less_than_with_the_teachers_states(kind):
    hidden, head, _, labels, mask = abstract(8_192, 131_072, 16)
    ids = jax.ShapeDtypeStruct((*labels.shape, 64), jnp.int32)
    values = jax.ShapeDtypeStruct(ids.shape, jnp.float32 if kind is TopK else jnp.uint8)
    loss = lambda *arguments: distillation_loss(*arguments, LossOptions(chunk=256))
    evaluate = lambda *arguments: evaluate_positions(*arguments[:4], chunk=256)
    arguments = hidden, head, kind(ids, values, mask), labels, mask
    count = lambda function: matrix_products(function, *arguments, largest=256 * 131_072)
    assert [count(f) for f in (loss, jax.grad(loss, (0, 1), has_aux=True), evaluate)] == [1, 3, 1]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda t, _: t._replace(logprobs=t.logprobs[..., 1:]), r"\(3, 7, 5\), logprobs \(3, 7, 4\) and tail \(3, 7\)"),
        (lambda t, _: t._replace(tail=t.tail[..., None]), r"must be \[B, T, W\], \[B, T, W\] and \[B, T\]"),
        (lambda _, s: s._replace(counts=s.counts[:, 1:]), r"ids \(3, 7, 4\), counts \(3, 6, 4\) and entropy \(3, 7\)"),
        (lambda t, _: TopK(*(x[:, 1:] for x in t)), r"targets cover \[B, T\] = \(3, 6\), the student \(3, 7\)"),
        (lambda t, _: t._replace(ids=t.ids * 1.0), "ids of dtype float32 must be int32"),
        (lambda t, _: TopK(*(jnp.repeat(x, 3, -1) for x in t[:2]), t.tail), "15 distinct teacher ids .* at most .* 11"),
    ],
)
def test_targets_that_do_not_fit_are_refused(wrong, said):
    inputs, other = (jax.tree.map(jnp.asarray, case(kind)) for kind in ("topk", "sampled"))
    targets = wrong(inputs["targets"], other["targets"])
    with pytest.raises(UserError, match=said):
        distillation_loss(**inputs | {"targets": targets}, options=LossOptions())


def test_objectives_that_need_the_whole_teacher_are_refused_with_and_without_arrays():
    for kind in ("topk", "sampled"):
        for wrong, said in (
            (dict(objective="jsd"), f"objective 'jsd' does not go with .* codec '{kind}', .* only 'forward_kl'"),
            (dict(temperature=2), f"temperature 2.0 does not go with .* codec '{kind}', .* only 1.0"),
        ):
            with pytest.raises(UserError, match=said):
                check_options(LossOptions(**wrong), kind)
            with pytest.raises(UserError, match=said):
                distillation_loss(**jax.tree.map(jnp.asarray, case(kind)), options=LossOptions(**wrong))
        check_options(LossOptions(ce_weight=0.3, chunk=1), kind)
    for kind in ("hidden", "dense"):
        check_options(LossOptions(objective="jsd", temperature=2), kind)

"""The step, the optimiser, the loop and the summary's arithmetic."""

import json
import math
import re
import sys
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ministral_jax.training.train as training
from ministral_jax.distributed.processes import Preempted
from ministral_jax.errors import UserError
from ministral_jax.files import read_jsonl
from ministral_jax.losses.chunked import cross_entropy
from ministral_jax.losses.evaluation import hidden
from ministral_jax.models.spec import ModelSpec
from ministral_jax.models.vlm import VLM, abstract_params, head_matrix, init_params
from ministral_jax.stages.online import added
from ministral_jax.training.checkpoint import CheckpointConfig, ResumeStore, load_params, save_params
from ministral_jax.training.goodput import Clock, goodput
from ministral_jax.training.hooks import BadStep, Guard, GuardConfig, ProfileConfig
from ministral_jax.training.log import check_tracker, mean
from ministral_jax.training.optimizer import OptimizerConfig, learning_rate, make_optimizer
from ministral_jax.training.state import abstract_state, init_state, make_step, split_frozen
from ministral_jax.training.train import Diverged, Schedule, Steps, train

SPEC = ModelSpec(layers=2, width=12, mlp_width=16, heads=2, kv_heads=1, head_width=4, vocab=32, context=16, vision=None)
MODEL = VLM(SPEC)
CONFIG = OptimizerConfig(lr=1e-2, warmup=2)


def batch(n: int, rows: int = 4) -> dict:
    rng = np.random.default_rng(n)
    tokens = rng.integers(0, SPEC.vocab, (rows, 8)).astype(np.int32)
    mask = (rng.random((rows, 8)) < 0.6).astype(np.float32)
    mask[:, -1] = 0
    positions = np.broadcast_to(np.arange(8, dtype=np.int32), tokens.shape)
    return {
        "tokens": tokens,
        "positions": positions,
        "segments": np.ones_like(tokens),
        "loss_mask": mask,
        "labels": np.roll(tokens, -1, 1),
    }


def loss(params, frozen, batch):
    states = hidden(MODEL, params, batch)
    total, metrics = cross_entropy(states, head_matrix(params), batch["labels"], batch["loss_mask"])
    return total, {**metrics, "loss": metrics["ce"]}


@pytest.fixture(scope="module")
def params():
    return jax.jit(init_params, static_argnums=0)(SPEC, jax.random.key(0))


def fresh(params):
    return init_state(jax.tree.map(jnp.copy, params), make_optimizer(CONFIG, 10))


def step_fn(microbatches: int = 1):
    return make_step(loss, make_optimizer(CONFIG, 10), learning_rate(CONFIG, 10), microbatches)


def test_microbatches_change_nothing_but_rounding(params):
    whole, _ = step_fn(1)(fresh(params), {}, batch(0))
    split, metrics = step_fn(4)(fresh(params), {}, batch(0))
    assert float(metrics["loss"][1]) == batch(0)["loss_mask"].sum()
    # Adam's first update is lr * sign(g) where |g| is not tiny: compare the moments, which are linear in g
    for a, b in zip(jax.tree.leaves(whole["optimizer"]), jax.tree.leaves(split["optimizer"]), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-7)


def test_the_gradient_is_of_the_mean_over_counted_positions(params):
    def mean_loss(p):
        logits = MODEL.apply({"params": p}, batch(0)["tokens"])
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.roll(batch(0)["tokens"], -1, 1)[..., None], -1)
        return -(picked[..., 0] * batch(0)["loss_mask"]).sum() / batch(0)["loss_mask"].sum()

    _, metrics = step_fn()(fresh(params), {}, batch(0))
    grads = jax.grad(mean_loss)(params)
    norm = math.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(grads)))
    assert float(metrics["gradient_norm"][0]) == pytest.approx(norm, rel=1e-5)


def test_what_is_frozen_has_no_gradient_and_no_moments():
    trainable, frozen = split_frozen({"decoder": 1, "projector": 2, "vision": 3}, ("vision",))
    assert trainable == {"decoder": 1, "projector": 2} and frozen == {"vision": 3}


def test_learning_rate_follows_its_schedule():
    rate = learning_rate(OptimizerConfig(lr=1.0, warmup=4, schedule="cosine", final_fraction=0.1), 104)
    assert [float(rate(n)) for n in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert float(rate(4)) == pytest.approx(1.0)
    assert float(rate(54)) == pytest.approx(0.1 + 0.9 * 0.5)
    assert float(rate(104)) == pytest.approx(0.1)
    stable = learning_rate(OptimizerConfig(lr=1.0, warmup=0, schedule="wsd", final_fraction=0.0), 100)
    assert [float(stable(n)) for n in (0, 50, 79, 90, 100)] == pytest.approx([1, 1, 1, 0.5, 0])


def test_gains_do_not_decay_and_matrices_do(params):
    config = OptimizerConfig(lr=0.1, warmup=0, weight_decay=0.5, schedule="constant")
    optimizer = make_optimizer(config, 10)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    assert not np.any(updates["decoder"]["norm"]) and not np.any(updates["decoder"]["layers"]["mlp_norm"])
    gate = params["decoder"]["layers"]["mlp"]["gate"]
    np.testing.assert_allclose(updates["decoder"]["layers"]["mlp"]["gate"], -0.1 * 0.5 * gate, rtol=1e-5)


def test_moments_in_bfloat16_are_rounded_between_updates_that_compute_in_float32(params):
    """Rounding moves a moment by 2^-9 of itself at most, and a step, their quotient, by some of these."""
    kinds = ("float32", "bfloat16")
    wide, narrow = (make_optimizer(CONFIG.model_copy(update={"moments": kind}), 10) for kind in kinds)
    grads = jax.tree.map(lambda p: jax.random.normal(jax.random.key(1), p.shape), params)
    states, seen = [wide.init(params), narrow.init(params)], []
    for _ in range(3):
        found = [o.update(grads, state, params) for o, state in zip((wide, narrow), states, strict=True)]
        states = [state for _, state in found]
        seen.append([jax.tree.leaves(updates) for updates, _ in found])
    first, *_, last = seen
    for a, b in zip(*first, strict=True):
        np.testing.assert_array_equal(a, b)
    steps = [np.concatenate([np.ravel(leaf) for leaf in leaves]) for leaves in last]
    assert 0 < np.abs(steps[0] - steps[1]).max() < 2**-7 * np.abs(steps[0]).max()
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(state) if leaf.ndim) for state in states]
    assert sizes[0] == 2 * sizes[1] == 8 * sum(leaf.size for leaf in jax.tree.leaves(params))


def test_a_second_moment_that_bfloat16_cannot_move_is_refused():
    with pytest.raises(ValueError, match=r"beta2 = 0.999 lets the second moment change .* it is at most 0.99"):
        OptimizerConfig(moments="bfloat16", beta2=0.999)


class Learner:
    """A model of two layers on random batches."""

    schedule = Schedule(evaluate_every=4, updates=10, tokens_per_step=32, flops_per_step=1.0)

    def __init__(self, batches=None, evaluate=None):
        self._update = step_fn()
        self.batches = batches or (lambda start: (batch(n) for n in range(start, 100)))
        self.evaluate = evaluate or (lambda state: {"kl": float(jnp.sum(state["params"]["decoder"]["norm"]))})

    def step(self, state, batch):
        return self._update(state, {}, batch)

    def told(self, figures):
        return [f"{len(figures)} figures"]


def run(tmp_path, params, batches=None, evaluate=None, **settings):
    directory = tmp_path / "stage"
    directory.mkdir(parents=True, exist_ok=True)
    config = Steps(steps=6, optimizer=CONFIG, checkpoint=CheckpointConfig(every=2), **settings)
    return train(Learner(batches, evaluate), jax.tree.map(jnp.copy, params), config, directory, Clock())


@pytest.mark.parametrize(("early", "at"), [(True, [0, 1, 2, 4, 6, 12, 14]), (False, [0, 6, 12, 14])])
def test_evaluations_are_dense_in_the_first_steps_unless_asked_not_to(early, at):
    schedule = Schedule(evaluate_every=6, updates=14, evaluate_early=early)
    assert [step for step in range(15) if schedule.evaluates_at(step, 14)] == at


def same(ours, theirs) -> bool:
    return jax.tree.all(jax.tree.map(np.array_equal, ours.state, theirs.state))


def steps(tmp_path, kind: str) -> list[int]:
    return [r["step"] for r in read_jsonl(tmp_path / "stage" / "metrics.jsonl") if r["kind"] == kind]


def test_every_step_and_evaluation_is_logged_once(tmp_path, params):
    outcome = run(tmp_path, params)
    assert (steps(tmp_path, "train"), steps(tmp_path, "eval")) == ([1, 2, 3, 4, 5, 6], [0, 1, 2, 4, 6])
    *_, last = (r for r in read_jsonl(tmp_path / "stage" / "metrics.jsonl") if r["kind"] == "eval")
    assert last["tokens"] == 6 * 32
    assert outcome.metrics == {"kl": last["kl"]} and int(outcome.state["step"]) == 6


def test_a_batch_of_new_shapes_is_compiled_as_the_first_is(tmp_path, params, monkeypatch):
    """It is given time, and its seconds are no step's: the speed is measured anew."""
    told, switched = [], []
    monkeypatch.setattr(training, "poll", lambda doing, slow=False: told.append(doing))
    monkeypatch.setattr(training, "compiles", lambda: told.append("compiles"))
    monkeypatch.setattr(Clock, "switch", lambda clock, what: switched.append(what))
    run(tmp_path, params, lambda start: (batch(n, 8 if n in (2, 4) else 4) for n in range(start, 9)))
    assert [told[n - 1] for n, what in enumerate(told) if what == "compiles"] == ["step 1", "step 3"]
    assert switched.count("compile") == 2
    records = [r for r in read_jsonl(tmp_path / "stage" / "metrics.jsonl") if r["kind"] == "train"]
    assert "tokens_per_second" not in records[2]


class Stop(Exception):
    pass


def test_an_exception_in_the_data_loses_at_most_what_was_not_saved(tmp_path, params):
    def failing(start):
        for n in range(start, 100):
            if n == 5:
                raise Stop
            yield batch(n)

    with pytest.raises(Stop):
        run(tmp_path, params, batches=failing)
    assert same(run(tmp_path, params), run(tmp_path / "unbroken", params))


def poisoned(first: int, last: int | None = None):
    """Batches of which those from `first` to `last` (to the end when None) have no finite loss."""

    def batches(start):
        for n in range(start, 100):
            bad = first <= n <= (99 if last is None else last)
            yield {**batch(n), "loss_mask": batch(n)["loss_mask"] * np.float32(np.nan if bad else 1)}

    return batches


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_state(tmp_path, params):
    with pytest.raises(Diverged, match=r"loss is nan at step 5; the state of step 4 is kept in .*state"):
        run(tmp_path, params, batches=poisoned(4, 4))
    store = ResumeStore(tmp_path / "stage" / "state", 2)
    state, _ = store.restore(abstract_state(params, make_optimizer(CONFIG, 10)))
    store.close()
    assert int(state["step"]) == 4
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(state["params"]))


def test_a_checkpoint_of_another_shape_is_named(tmp_path, params):
    save_params(tmp_path / "params", params)
    wide = SPEC.model_copy(update={"width": 16})
    with pytest.raises(UserError, match=r"decoder/embed has shape \(32, 12\), the spec needs \(32, 16\)"):
        load_params(tmp_path / "params", abstract_params(wide))
    tied = SPEC.model_copy(update={"tied": True})
    with pytest.raises(UserError, match="decoder/head is not part of the model"):
        load_params(tmp_path / "params", abstract_params(tied))
    with pytest.raises(UserError, match="no such directory"):
        load_params(tmp_path / "nothing", abstract_params(SPEC))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="not a readable checkpoint"):
        load_params(tmp_path / "empty", abstract_params(SPEC))


def test_torn_lines_are_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1}) + "\n" + '{"step": 2, "lo')
    assert read_jsonl(path) == [{"step": 1}]


def test_rolling_back_leaves_out_the_batches_since_the_saved_state(tmp_path, params):
    outcome = run(tmp_path, params, batches=poisoned(5, 5), guard=GuardConfig(action="rollback"))

    def without(start):  # what is left: the state of step 4, then batches 6, 7, ..
        return (batch(n if n < 4 else n + 2) for n in range(start, 100))

    assert same(outcome, run(tmp_path / "other", params, batches=without))
    records = read_jsonl(tmp_path / "stage" / "metrics.jsonl")
    assert [(r["step"], r["from"], r["skipped"]) for r in records if r["kind"] == "rollback"] == [(4, 6, 2)]
    assert steps(tmp_path, "train") == [1, 2, 3, 4, 5, 6]


def test_rolling_back_ends_when_there_is_nothing_to_go_back_to_or_it_was_done_often(tmp_path, params):
    with pytest.raises(Diverged, match=r"after 2 rollbacks; the state of step 2 is kept"):
        run(tmp_path, params, batches=poisoned(3), guard=GuardConfig(action="rollback", rollbacks=2))
    with pytest.raises(Diverged, match="no state was saved yet"):
        run(tmp_path / "b", params, batches=poisoned(0, 0), guard=GuardConfig(action="rollback"))


def checked(losses, **settings) -> tuple[int | None, str]:
    """The step at which a guard calls it off, and its words; None where it lets all pass."""
    guard = Guard(GuardConfig(**settings))
    for step, loss in enumerate(losses, 1):
        try:
            guard.check(step, loss)
        except BadStep as bad:
            return bad.step, str(bad)
    return None, ""


def test_a_loss_that_stays_far_above_the_usual_one_is_bad():
    usual = [2.0, 2.2, 1.8, 2.1, 1.9] * 20
    step, words = checked([*usual, 9.0, 9.1, 9.2, 2.0, 9.0, 9.1, 9.2, 9.3, 9.4, 2.0])
    assert step == 109  # alone, or in a row too short, it is none
    assert words == (
        "the loss is 9.4 at step 109, where 2 is usual and guard.spike = 3 allows 8, as in the 5 steps up to it "
        "(null allows any)"
    )
    assert checked([*usual, *[9.0] * 50], spike=None) == (None, "")
    assert checked([*usual, *[9.0] * 50], spike=4) == (None, "")
    assert checked([*usual, 2.0, 9.0], patience=1)[0] == 102


def test_what_is_usual_is_the_lowest_level_so_a_slow_ascent_is_bad_too():
    assert checked([2 + 0.02 * n for n in range(1000)])[0] == 404, "the fifth above 4 * 2.49"
    assert checked([6.0, 6.5, 7.0, 12.0, 30.0, *[2000.0] * 10])[0] == 9, "from the first step on"


@pytest.mark.parametrize(
    "losses",
    [
        np.random.default_rng(0).normal(0.0, 0.3, 500),  # advantages are normalised: the policy loss is about 0
        np.random.default_rng(1).normal(-0.02, 2.0, 500),
        0.69 + np.abs(np.random.default_rng(2).standard_cauchy(500)) * 0.05,  # a preference loss, heavy tails
        np.geomspace(1e-6, 0.5, 500),  # of a student that was its teacher
        np.concatenate([np.linspace(11, 2, 100), np.full(100, 2.0), np.full(100, 5.0)]),  # other, harder data
        np.full(200, 0.0),
        np.full(200, -7.0) + np.random.default_rng(3).normal(0, 3, 200),
        np.random.default_rng(4).lognormal(0, 1, 500),  # rows of very different kinds
    ],
    ids=["grpo", "grpo-noisy", "odpo", "kl-from-0", "harder", "zero", "negative", "mixed"],
)
def test_losses_of_healthy_runs_are_never_bad(losses):
    assert checked([float(loss) for loss in losses]) == (None, "")


def test_what_is_usual_is_known_to_a_run_that_goes_on():
    losses = [2.0, 3.0, 2.5, 60.0]
    guard = Guard(GuardConfig())
    for step, loss in enumerate(losses, 1):
        guard.check(step, loss)
    assert not guard.calm
    note = json.loads(json.dumps(guard.note()))
    assert note == {"recent": [2.0, 3.0, 2.5], "usual": 2.5}
    again = Guard(GuardConfig(patience=1), **note)
    assert again.calm
    with pytest.raises(BadStep, match=r"2.5 is usual and guard.spike = 3 allows 10 \(null"):
        again.check(5, 61.0)


def diverging(tmp_path, params, count=40, **settings):
    """The learner at a rate of 30."""
    config = OptimizerConfig(lr=30.0, warmup=0, schedule="constant")
    update = make_step(loss, make_optimizer(config, 40), learning_rate(config, 40))
    learner = Learner()
    learner.step = lambda state, data: update(state, {}, data)
    (tmp_path / "stage").mkdir(parents=True)
    steps = Steps(steps=count, optimizer=config, checkpoint=CheckpointConfig(every=2), **settings)
    return train(learner, jax.tree.map(jnp.copy, params), steps, tmp_path / "stage", Clock())


def test_a_rate_of_30_stops_the_run(tmp_path, params):
    with pytest.raises(Diverged) as stopped:
        diverging(tmp_path, params)
    said = str(stopped.value)
    assert re.fullmatch(
        r"the loss is \d+\.?\d* at step 6, where 4\.\d+ is usual and guard\.spike = 3 allows 1\d\.\d+, as in the 5 "
        r"steps up to it \(null allows any\); no state was saved yet; a lower optimizer\.lr or optimizer\.clip may .*",
        said,
    ), said
    assert not [*(tmp_path / "stage" / "state").glob("[0-9]*")], "a state of a loss that was far already"
    outcome = diverging(tmp_path / "regardless", params, 10, guard=GuardConfig(spike=None))
    assert int(outcome.state["step"]) == 10  # until it is no number at all


def test_a_save_that_fell_on_a_spike_is_made_up_for_after_it(tmp_path, params, monkeypatch):
    saved, save = [], ResumeStore.save
    monkeypatch.setattr(ResumeStore, "save", lambda self, step, *rest: (saved.append(step), save(self, step, *rest))[1])
    learner, told = Learner(), iter([3.0, 900.0, 900.0, 3.0, 3.0, 3.0])

    def step(state, data, ours=learner.step):
        state, metrics = ours(state, data)
        return state, {**metrics, "loss": (next(told), 1.0)}

    learner.step = step
    (tmp_path / "stage").mkdir()
    config = Steps(steps=6, optimizer=CONFIG, checkpoint=CheckpointConfig(every=3))
    train(learner, jax.tree.map(jnp.copy, params), config, tmp_path / "stage", Clock())
    assert saved == [4]


class Spoiling(Learner):
    """A finite loss whose gradient is not: from the given batches on the parameters are NaN."""

    def __init__(self, *bad: int):
        super().__init__(lambda start: ((n, batch(n)) for n in range(start, 100)))
        self.bad = bad

    def step(self, state, numbered):
        number, data = numbered
        state, metrics = super().step(state, data)
        if number in self.bad:
            state = {**state, "params": jax.tree.map(lambda x: x * jnp.nan, state["params"])}
            metrics = {**metrics, "gradient_norm": (jnp.nan, 1.0)}
        return state, metrics


def spoilt(tmp_path, params, *bad, every=3, **settings):
    (tmp_path / "stage").mkdir(exist_ok=True, parents=True)
    config = Steps(steps=6, optimizer=CONFIG, checkpoint=CheckpointConfig(every=every), **settings)
    return train(Spoiling(*bad), jax.tree.map(jnp.copy, params), config, tmp_path / "stage", Clock())


def test_a_gradient_that_is_no_number_is_a_bad_step(tmp_path, params):
    outcome = spoilt(tmp_path, params, 4, guard=GuardConfig(action="rollback"))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(outcome.state["params"]))
    records = read_jsonl(tmp_path / "stage" / "metrics.jsonl")
    assert [(r["step"], r["from"]) for r in records if r["kind"] == "rollback"] == [(3, 5)]


def test_the_gradient_of_one_microbatch_that_is_no_number_is_that_of_the_step(tmp_path, params):
    """Beside a loss that is one: the derivative of a root at 0."""

    def steep(params, frozen, batch):
        total, metrics = loss(params, frozen, batch)
        gain = params["decoder"]["norm"][0]
        return total + jnp.sum(jnp.sqrt(batch["zero"] * (gain - gain))), metrics

    step = make_step(steep, make_optimizer(CONFIG, 10), learning_rate(CONFIG, 10), 2)
    _, found = step(fresh(params), {}, {**batch(0), "zero": np.array([1.0, 0, 0, 0], np.float32)})
    values = mean(found)
    assert math.isfinite(values["loss"])
    with pytest.raises(BadStep, match="the norm of the gradient is nan at step 7"):
        Guard(GuardConfig()).check(7, values["loss"], values["gradient_norm"])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_gradient_of_one_update_of_several_is_that_of_the_step(bad):
    """As in GRPO, whose step has several updates."""
    updates = [{"loss": (1.0, 2.0), "gradient_norm": (norm, 1.0)} for norm in (0.5, bad, 0.25)]
    values = mean(added(updates))
    with pytest.raises(BadStep, match=f"the norm of the gradient is {bad} at step 1"):
        Guard(GuardConfig()).check(1, values["loss"], values["gradient_norm"])


@pytest.mark.parametrize("bad", [2, 5])  # of a step that would be saved, and of the last one
def test_nothing_of_a_step_whose_gradient_is_no_number_is_saved(tmp_path, params, bad):
    kept = "no state was saved yet" if bad == 2 else "the state of step 3 is kept"
    with pytest.raises(Diverged, match=rf"the norm of the gradient is nan at step {bad + 1}; {kept}"):
        spoilt(tmp_path, params, bad)
    assert not (tmp_path / "stage" / "state" / str(bad + 1)).exists()
    outcome = spoilt(tmp_path, params)  # and what is kept is good
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(outcome.state["params"]))


def test_a_stop_after_such_a_step_saves_nothing_of_it(tmp_path, params, monkeypatch):
    def poll(what, **_):
        if what == "step 4":
            raise Preempted("stopped")

    monkeypatch.setattr("ministral_jax.training.train.poll", poll)
    with pytest.raises(Preempted) as stop:
        spoilt(tmp_path, params, 2, every=5)
    assert stop.value.then == "no state was saved, the same command begins stage again"
    assert not [*(tmp_path / "stage" / "state").glob("[0-9]*")]


def test_a_loop_asked_to_stop_saves_there_and_goes_on_to_the_same_end(tmp_path, params, monkeypatch):
    unbroken = run(tmp_path, params)
    for number, what in enumerate(("step 4", "step 6", "saving step 2", "evaluating")):
        directory = tmp_path / str(number)

        def evaluate(state, what=what):
            ask(what if what == "evaluating" and int(state["step"]) == 4 else "")
            return {"kl": float(jnp.sum(state["params"]["decoder"]["norm"]))}

        def ask(doing, slow=False, what=what):
            if doing == what:
                raise Preempted(doing)

        monkeypatch.setattr(training, "poll", ask)
        with pytest.raises(Preempted) as stop:
            run(directory, params, evaluate=evaluate)
        step = {"step 4": 3, "step 6": 5, "saving step 2": 2, "evaluating": 4}[what]
        assert stop.value.then == f"the same command goes on from step {step} of stage"
        monkeypatch.setattr(training, "poll", lambda doing, slow=False: None)
        assert same(run(directory, params), unbroken), what
        assert (steps(directory, "train"), steps(directory, "eval")) == ([1, 2, 3, 4, 5, 6], [0, 1, 2, 4, 6]), what


def test_goodput_counts_what_was_done_again_as_lost():
    def record(attempt, begun, done, at, **seconds):
        return {"kind": "time", "attempt": attempt, "from": begun, "step": done, "at": at, "seconds": seconds}

    records = [
        record(1, 0, 0, 110.0, start=10.0),
        record(1, 0, 4, 120.0, step=9.0, data=1.0),
        record(1, 0, 7, 126.0, step=6.0),
        record(2, 4, 4, 140.0, start=4.0),
        record(2, 4, 8, 150.0, step=10.0),
    ]
    assert goodput(records) == {"start": 14.0, "data": 1.0, "step": 19.0, "lost": 6.0, "down": 10.0}
    assert goodput([]) == {}


def test_a_profile_tells_where_the_time_of_the_steps_that_were_asked_for_went(tmp_path, params, capsys):
    run(tmp_path, params, profile=ProfileConfig(start=2, steps=2))
    assert list((tmp_path / "stage" / "profile").rglob("*.xplane.pb"))
    table = json.loads((tmp_path / "stage" / "profile" / "scopes.json").read_text())
    assert (table["steps"], table["devices"]) == (2, 1)
    found = {(row["scope"], row["part"]) for row in table["rows"]}
    assert found >= {("attend", "forward"), ("mlp", "backward"), ("loss head", "forward"), ("optimizer", "")}
    assert "profile: 2 steps of " in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"profile.start = 5 comes after the last of 4 steps"):
        Steps(steps=4, profile=ProfileConfig())


class Service:
    """Stands in for wandb and trackio."""

    calls: ClassVar[list] = []

    @classmethod
    def init(cls, **settings):
        cls.calls.append(("init", settings))

    @classmethod
    def log(cls, values, step):
        cls.calls.append(("log", step, values))

    @classmethod
    def finish(cls):
        cls.calls.append(("finish",))


@pytest.mark.parametrize("track", ["wandb", "trackio"])
def test_figures_are_shown_by_a_service_where_it_is_installed(tmp_path, params, monkeypatch, track):
    monkeypatch.setitem(sys.modules, track, Service)
    Service.calls.clear()
    run(tmp_path, params, track=track)
    (_, settings), *logged, finish = Service.calls
    assert (settings["project"], settings["name"], settings["resume"]) == (tmp_path.name, "stage", "allow")
    assert [step for _, step, values in logged if "train/loss" in values] == [1, 2, 3, 4, 5, 6]
    assert [step for _, step, values in logged if "eval/kl" in values] == [0, 1, 2, 4, 6] and finish == ("finish",)
    assert not (tmp_path / "stage" / "events").exists()


def test_a_tracker_that_is_not_installed_is_refused():
    with pytest.raises(UserError, match=r"stages\.a\.track = wandb is not installed; pip install wandb"):
        check_tracker("wandb", "stages.a")

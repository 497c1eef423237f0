"""What a policy is trained on is what it sampled: ratios are 1 and gradients are the formula's, on every mesh."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import by_row, random_params
from sampling_cases import PROMPTS, SPEC, parameters, placed

from ministral_jax.alignment.rollout import Episode, begun, seeds, training_rows
from ministral_jax.data.bins import place_whole
from ministral_jax.losses.evaluation import model_inputs
from ministral_jax.losses.head import LossHead
from ministral_jax.losses.policy import PolicyOptions
from ministral_jax.models.vlm import VLM, Compute
from ministral_jax.sampling.engine import SamplingOptions, generate
from ministral_jax.stages.grpo import minibatches, objective
from ministral_jax.stages.odpo import answer_logprobs, pairs, win_rate
from ministral_jax.stages.online import Answers
from ministral_jax.training.state import split_frozen

EACH, TEMPERATURE, LIMIT = 2, 0.8, 24
MESHES = {
    "one device": (dict(fsdp=1), 1),
    "tensor 2": (dict(fsdp=1, tensor=2), 2),
    "fsdp 2 x tensor 2": (dict(fsdp=2, tensor=2), 4),
    "context 2": (dict(fsdp=1, context=2), 2),
}
FP32, BF16 = 1e-5, 0.06
"""Log-probability of a token, sampler against trainer. In bfloat16 a logit is a sum that was rounded to 8 bits at every
layer, in another order by the one and by the other."""
REWARDS = np.array([[1.0, 0.0], [0.5, 0.5], [0.0, 2.0], [1.0, 0.25]])
STAGE = SimpleNamespace(
    num_generations=EACH,
    steps_per_generation=1,
    mask_truncated_completions=False,
    loss=PolicyOptions(),
    compute=Compute(),
)


def rolled_out(place, compute=Compute()) -> list[Episode]:  # noqa: B008
    """Two answers to each of the prompts: of several lengths, with images, some beyond the original context."""
    options = SamplingOptions(
        completions_per_prompt=EACH, max_completion_length=LIMIT, temperature=TEMPERATURE, stop_ids=(2,)
    )
    completions = generate(VLM(SPEC, compute), parameters(place), PROMPTS, options, place)
    return [begun(PROMPTS[c.prompt], c) for c in completions]


def answers(episodes) -> Answers:
    samples = [SimpleNamespace(stopped=e.stopped, limit=LIMIT, looping=False, tokens=e.tokens) for e in episodes]
    return Answers([], episodes, samples)  # type: ignore[arg-type]


def placed_batch(place, batch):
    return place_whole(place, batch, SPEC.vision)


def with_gradient(place, batch, compute=Compute()):  # noqa: B008
    trainable, fixed = split_frozen(parameters(place), ("vision",))
    loss = objective(SPEC, compute, PolicyOptions(), TEMPERATURE, LossHead(place))
    with jax.set_mesh(place.mesh):
        run = jax.jit(place.rules.scoped(jax.value_and_grad(loss, has_aux=True)))
        (total, metrics), gradient = run(trainable, fixed, placed_batch(place, batch))
    return float(total), {k: float(a) / float(b) for k, (a, b) in metrics.items()}, jax.device_get(gradient)


@pytest.fixture(scope="module")
def plain():
    """Episodes, the batch, and loss and gradient from all logits of one plain forward pass."""
    episodes = rolled_out(placed(*MESHES["one device"]))
    (batch,) = minibatches(STAGE, SPEC, answers(episodes), REWARDS)

    def formula(trainable, fixed):
        params = {"params": {**trainable, **fixed}}
        inputs = model_inputs(by_row(batch, SPEC.vision))
        logits = VLM(SPEC, Compute()).apply(params, batch["tokens"], **inputs)
        logprobs = jax.nn.log_softmax(logits / TEMPERATURE)
        taken = jnp.take_along_axis(logprobs, batch["labels"][..., None], axis=-1)[..., 0]
        return -jnp.sum(batch["weights"] * batch["advantages"] * taken), taken

    (_, taken), gradient = jax.value_and_grad(formula, has_aux=True)(*split_frozen(random_params(SPEC), ("vision",)))
    return episodes, batch, np.asarray(taken), jax.device_get(gradient)


def test_log_probabilities_of_the_batch_are_those_it_was_drawn_with(plain):
    episodes, batch, taken, _ = plain
    drawn = batch["loss_mask"] > 0
    assert drawn.sum() == sum(len(e.tokens) for e in episodes)
    np.testing.assert_allclose(batch["old_logprobs"][drawn], taken[drawn], rtol=0, atol=FP32)
    for n, episode in enumerate(episodes):
        assert batch["labels"][n, drawn[n]].tolist() == episode.tokens
    # an image stands in the prompt alone, whatever the model wrote
    inside = np.arange(batch["tokens"].shape[1]) < np.array([len(e.prompt.tokens) for e in episodes])[:, None]
    assert not (batch["image_slot"] >= 0)[~inside].any()


@pytest.mark.parametrize("name", MESHES)
def test_before_an_update_the_ratio_is_1_and_the_gradient_the_formulas(plain, name):
    _, batch, _, gradient = plain
    place = placed(*MESHES[name])
    _, metrics, ours = with_gradient(place, batch)
    assert abs(metrics["ratio"] - 1) < FP32
    assert metrics["clipped_low"] == metrics["clipped_high"] == 0
    scale = max(np.abs(g).max() for g in jax.tree.leaves(gradient))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5 * scale)


def test_in_bfloat16_sampler_and_trainer_differ_by_rounding():
    place, compute = placed(*MESHES["one device"]), Compute(dtype="bfloat16")
    episodes = rolled_out(place, compute)
    batch = training_rows(episodes, SPEC, 32)
    read = jax.jit(
        lambda p, b: LossHead(place).label_logprobs(
            VLM(SPEC, compute).apply({"params": p}, b["tokens"], **model_inputs(b), method="hidden"),
            p["decoder"]["head"],
            b["labels"],
            TEMPERATURE,
        )["logprob"]
    )
    gap = np.abs(np.asarray(read(parameters(place), placed_batch(place, batch))) - batch["old_logprobs"])[
        batch["loss_mask"] > 0
    ]
    print(f"bfloat16: {gap.max():.1e} at most, {gap.mean():.1e} in the mean")
    assert 0 < gap.max() < BF16


def test_groups_without_a_signal_and_what_is_left_out_have_no_weight(plain):
    episodes, batch, *_ = plain
    per_row = batch["weights"].sum(axis=1)
    np.testing.assert_allclose(per_row.reshape(4, 2).sum(axis=1), [1 / 3, 0, 1 / 3, 1 / 3], rtol=1e-6)
    rewards = REWARDS.copy()
    rewards[2, 0] = np.nan
    (left,) = minibatches(STAGE, SPEC, answers(episodes), rewards)
    assert not left["weights"][4:6].any() and not left["advantages"][4].any()


def test_updates_split_the_groups_and_truncated_answers_can_be_left_out(plain):
    episodes, *_ = plain
    split = SimpleNamespace(**{**vars(STAGE), "steps_per_generation": 2, "mask_truncated_completions": True})
    cut = [e._replace(stopped="length" if n == 5 else "stop") for n, e in enumerate(episodes)]
    parts = minibatches(split, SPEC, answers(cut), REWARDS)
    assert [len(part["tokens"]) for part in parts] == [4, 4]
    assert parts[1]["weights"][0].any() and not parts[1]["weights"][1].any()
    for part in parts:
        advantages = part["advantages"][:, 0][part["advantages"][:, 0] != 0]
        np.testing.assert_allclose(advantages.mean(), 0, atol=1e-6)
        np.testing.assert_allclose(part["weights"].sum(), 1, rtol=1e-6)


def test_pairs_stay_together_in_a_microbatch(plain):
    """Rows of a pair are P apart, and a microbatch takes every m-th row."""
    episodes, *_ = plain
    found = answers(episodes)
    found.samples[0].looping = True
    batch, kept = pairs(found, np.array([0.9, 0.5, 0.2, np.nan]), SPEC, 32)
    assert kept == (3.0, 4.0)
    np.testing.assert_allclose(batch["probability"][:3], [0, 0.5, 0.2], rtol=1e-6)
    np.testing.assert_array_equal(batch["probability"][:4], batch["probability"][4:])
    assert batch["weights"].tolist() == [1, 1, 1, 0] * 2
    for n in range(4):
        a, b = (batch["labels"][n + k][batch["loss_mask"][n + k] > 0].tolist() for k in (0, 4))
        assert (a, b) == (episodes[2 * n].tokens, episodes[2 * n + 1].tokens)
    one = placed(*MESHES["one device"])
    read = answer_logprobs(SPEC, Compute(), LossHead(one))
    total = jax.jit(read)(random_params(SPEC), placed_batch(one, batch))
    place = placed(*MESHES["fsdp 2 x tensor 2"])
    with jax.set_mesh(place.mesh):
        on_mesh = jax.jit(place.rules.scoped(answer_logprobs(SPEC, Compute(), LossHead(place))))
        np.testing.assert_allclose(on_mesh(parameters(place), placed_batch(place, batch)), total, rtol=1e-5)


def test_seeds_depend_on_step_and_place_alone():
    assert seeds(0, 3, 4)[:2] == seeds(0, 3, 2)
    assert len({*seeds(0, 3, 4), *seeds(0, 4, 4), *seeds(1, 3, 4), *seeds(0, 3, 4, salt=1)}) == 16


def test_win_rate_counts_ties_as_half():
    assert win_rate(np.array([1.0, 0.0, 0.5, 0.5]), np.array([0.0, 1.0, 0.5, 0.0])) == 0.625

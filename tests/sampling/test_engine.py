"""The sampler against the trainer's own forward pass and the distribution it says it draws from; when a text ends."""

import math
import re

import jax
import numpy as np
import pytest
from sampling_cases import LONG, OPTIONS, PROMPTS, SPEC, parameters, placed, reference

import ministral_jax.sampling.engine as sampling
from ministral_jax.distributed import processes
from ministral_jax.errors import UserError
from ministral_jax.models.cache import logical_axes
from ministral_jax.models.vlm import VLM, Compute
from ministral_jax.sampling.decoding import Choice, Rows, draw, processed
from ministral_jax.sampling.engine import Prompt, SamplingOptions, generate, stream, watched

pytestmark = pytest.mark.usefixtures("quickly")
ONE = dict(fsdp=1)
MESHES = {
    "tensor 2": (dict(fsdp=1, tensor=2), 2),
    "fsdp 2 x tensor 2": (dict(fsdp=2, tensor=2), 4),
    "data 4": (dict(data=4, fsdp=1), 4),
    "context 2": (dict(fsdp=1, context=2), 2),
}
EQUAL = 1e-5
"""Log-probabilities in float32: the same sums in another order, some 1e-6 here."""


def sample(mesh=ONE, devices=1, prompts=PROMPTS, each=2, compute=Compute(), options=OPTIONS):  # noqa: B008
    place, options = placed(mesh, devices), options.model_copy(update={"completions_per_prompt": each})
    return generate(VLM(SPEC, compute), parameters(place), prompts, options, place)


@pytest.fixture(scope="module")
def drawn():
    """Two samples of each of the prompts, all of them in one batch on one device."""
    return sample()


def numpy_processed(logprobs: np.ndarray, choice: Choice) -> np.ndarray:
    """Probabilities [V], in float64 and by sorting."""
    z = logprobs.astype(np.float64) / choice.temperature
    order = np.argsort(-z)
    p = np.exp(z - z.max())
    if choice.top_k:
        p[order[choice.top_k :]] = 0
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= choice.top_p]] = 0
    return p / p.sum()


def picked(logprobs, completions):
    return [x[np.arange(len(c.tokens)), c.tokens] for x, c in zip(logprobs, completions, strict=True)]


def worst(ours, theirs) -> float:
    return max(np.abs(np.array(a) - b).max() for a, b in zip(ours, theirs, strict=True))


def test_log_probabilities_are_the_trainers(drawn):
    """Padded prompts of several lengths, images of several sizes, positions beyond the original context."""
    theirs = reference(drawn)
    assert [len(c.tokens) for c in drawn] == [LONG] * 8 and {c.stopped for c in drawn} == {"length"}
    assert worst([c.logprobs for c in drawn], picked(theirs, drawn)) < EQUAL
    choice = Choice(temperature=OPTIONS.temperature, top_p=OPTIONS.top_p, top_k=OPTIONS.top_k)
    for completion, logprobs in zip(drawn, theirs, strict=True):
        p = np.array([numpy_processed(x, choice)[t] for x, t in zip(logprobs, completion.tokens, strict=True)])
        assert (p > 0).all()
        np.testing.assert_allclose(completion.processed_logprobs, np.log(p), rtol=0, atol=EQUAL)


def test_another_seed_or_sample_is_another_text_and_the_same_is_the_same(drawn):
    again = sample()
    assert again == drawn
    assert drawn[0].tokens != drawn[1].tokens
    moved = [PROMPTS[0]._replace(seed=9), *PROMPTS[1:]]
    other = sample(prompts=moved)
    assert other[0].tokens != drawn[0].tokens and other[2:] == drawn[2:]


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_a_mesh_and_a_chunk_change_nothing_but_rounding(mesh, drawn):
    ours = sample(*mesh, options=OPTIONS.model_copy(update={"chunk": 7}))
    assert [c.tokens for c in ours] == [c.tokens for c in drawn]
    assert worst([c.logprobs for c in ours], [c.logprobs for c in drawn]) < EQUAL
    assert worst([c.processed_logprobs for c in ours], [c.processed_logprobs for c in drawn]) < EQUAL


def test_a_row_does_not_depend_on_its_batch(drawn, monkeypatch):
    """Alone, in its own bucket, another chunk, and a cache that has to grow."""
    monkeypatch.setattr(sampling, "SLOTS", 20)
    (alone,) = sample(prompts=PROMPTS[2:3], each=1, options=OPTIONS.model_copy(update={"chunk": 5}))
    assert alone.tokens == drawn[4].tokens
    assert worst([alone.logprobs], [drawn[4].logprobs]) < EQUAL


@pytest.mark.parametrize("mesh", [(ONE, 1), MESHES["fsdp 2 x tensor 2"]], ids=["one", "four"])
def test_in_waves_answers_are_the_same(mesh, drawn, monkeypatch):
    """Three at once, so that a prompt's answers fall into two waves; room is made for no more than the longest."""
    monkeypatch.setattr(sampling, "SLOTS", 16)
    sizes, compiled = [], sampling.programs

    def watched(*args):
        run = compiled(*args)

        def chunk(params, hidden, cache, *rest):
            sizes.append((len(hidden), cache["k"].shape[3] - 64))
            return run.chunk(params, hidden, cache, *rest)

        return run._replace(chunk=chunk)

    monkeypatch.setattr(sampling, "programs", watched)
    ours = sample(*mesh, options=OPTIONS.model_copy(update={"at_once": 3}))
    assert [c.tokens for c in ours] == [c.tokens for c in drawn]
    assert worst([c.logprobs for c in ours], [c.logprobs for c in drawn]) < EQUAL
    assert sizes == [(placed(*mesh).even(3), room) for room in (16, 32, LONG)] * 3


def test_prompts_are_read_where_their_answers_are():
    """Two devices, six answers of each of two and a half prompts: the second prompt is read on both."""
    read, places = sampling._shared([0, 0, 0, 0, 1, 1, 1, 1, 2, 2], 12, 2)
    assert read == [0, 1, 1, 2] and places.tolist() == [0, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 1]
    assert sampling.rows_at_once(2, 2, None, placed(dict(data=4, fsdp=1), 4)) == (4, 4)


def test_answers_begin_without_a_word_between_devices():
    place = placed(dict(data=2, fsdp=2, tensor=2), 8)
    run = sampling.programs(SPEC, Compute(), place, Choice(), (), 16)

    def array(*shape: int, dtype=np.float32):
        sharding = place.sharding(shape, logical_axes(len(shape))) if len(shape) > 1 else None
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    keys = array(SPEC.layers, 8, SPEC.kv_heads, 64, SPEC.head_width)
    cache = {"k": keys, "v": keys, "segments": array(8, 64, dtype=np.int32)}
    with jax.set_mesh(place.mesh):
        forked = run.fork.lower(array(8, SPEC.width), cache, array(16, dtype=np.int32), 16).compile()
    assert not re.findall(r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter", forked.as_text())


def test_bfloat16_agrees_with_the_trainer_in_bfloat16():
    """A log-probability is of size 4 here, that is 2⁻⁷ of it to a unit in the last place of bfloat16; the two passes
    round at the same points but for the order of sums, which moves some of the roundings by one unit."""
    compute = Compute(dtype="bfloat16")
    ours = sample(each=1, compute=compute)
    theirs = picked(reference(ours, compute), ours)
    difference = np.concatenate([np.abs(np.array(c.logprobs) - x) for c, x in zip(ours, theirs, strict=True)])
    assert difference.max() < 0.1 and difference.mean() < 0.015, (difference.max(), difference.mean())


CHOICES = {
    "temperature": Choice(temperature=0.7, top_p=1, top_k=0),
    "top-p": Choice(temperature=1, top_p=0.6, top_k=0),
    "top-k": Choice(temperature=1.3, top_p=1, top_k=5),
    "all": Choice(temperature=1.5, top_p=0.8, top_k=9),
}
DRAWS = 20_000


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_frequencies_are_those_of_the_processed_distribution(choice):
    """χ² of 20,000 draws with seeds 0, 1, .. against NumPy, at the 1e-4 quantile (Wilson-Hilferty). A shift of 0.02 in
    one of two halves of the mass would give a non-centrality of 20,000 · 0.04² = 32, found with a power above 0.8."""
    logits = np.random.RandomState(0).standard_normal(16).astype(np.float32) * 2
    rows = Rows(*np.zeros((3, DRAWS), np.int32), np.arange(DRAWS, dtype=np.uint32), np.zeros(DRAWS, np.int32))
    tokens, logprobs = jax.jit(draw, static_argnums=3)(np.tile(logits, (DRAWS, 1)), rows, np.full(DRAWS, 7), choice)
    p = numpy_processed(logits, choice)
    counts = np.bincount(tokens, minlength=16)
    assert not counts[p == 0].any()
    np.testing.assert_allclose(logprobs, np.log(p[tokens]), atol=2e-6)
    expected = DRAWS * p[p > 0]
    chi, free = ((counts[p > 0] - expected) ** 2 / expected).sum(), (p > 0).sum() - 1
    assert chi < free * (1 - 2 / (9 * free) + 3.72 * math.sqrt(2 / (9 * free))) ** 3, (chi, free)


def test_equally_probable_tokens_are_kept_together():
    logits = np.array([[2.0, 1.0, 1.0, 0.0]], np.float32)
    for choice in (Choice(temperature=1, top_p=1, top_k=2), Choice(temperature=1, top_p=0.6, top_k=0)):
        kept = np.isfinite(jax.device_get(processed(logits, choice)))
        assert kept.tolist() == [[True, True, True, False]]


def test_a_text_ends_at_a_stop_token_and_the_loop_ends_with_the_last(drawn, monkeypatch):
    """The loop on the devices too: slots of the cache beyond the last token of any row stay empty."""
    row = drawn[4].tokens
    stop = next(t for t in row[4:] if row.index(t) >= 4)  # first seen at the fifth token or later
    filled, compiled = [], sampling.programs

    def watched(*args):
        run = compiled(*args)

        def chunk(*args):
            out = run.chunk(*args)
            filled.append(int(np.asarray(out[2]["segments"])[0].sum()) - len(PROMPTS[2].tokens))
            return out

        return run._replace(chunk=chunk)

    monkeypatch.setattr(sampling, "programs", watched)
    options = OPTIONS.model_copy(update={"stop_ids": (stop,)})
    (ours,) = sample(prompts=PROMPTS[2:3], each=1, options=options)
    length = row.index(stop) + 1
    assert (ours.tokens, ours.stopped) == (row[:length], "stop")
    assert len(ours.logprobs) == len(ours.processed_logprobs) == length
    assert len(filled) == -(-length // OPTIONS.chunk) and filled[-1] == length < OPTIONS.chunk * len(filled)


def test_a_text_ends_with_the_context(drawn):
    spec = SPEC.model_copy(update={"context": len(PROMPTS[2].tokens) + 9})
    place = placed(ONE)
    (short,) = generate(VLM(spec), parameters(place), PROMPTS[2:3], OPTIONS, place)
    assert (short.tokens, short.stopped) == (drawn[4].tokens[:9], "length")


def test_asked_to_stop_it_stops_between_chunks(drawn, monkeypatch):
    place, options = placed(ONE), OPTIONS.model_copy(update={"completions_per_prompt": 2})
    steps = watched(stream(VLM(SPEC), parameters(place), PROMPTS, options, place), processes.poll_slow)
    for seen in (0, 16):
        assert [c.tokens for c in next(steps)] == [c.tokens[:seen] for c in drawn]
    monkeypatch.setattr(processes._job, "asked", True)
    with pytest.raises(processes.Preempted, match="sampling token 16"):
        next(steps)


BAD = {
    "prompt 0 is empty": Prompt([]),
    "prompt 0 has token 48; the model's are 0 to 47": Prompt([1, 48]),
    "prompt 0 has 256 tokens; the model's context of 256": Prompt([20] * 256),
    r"prompt 0 has 1 \[IMG\] tokens but images of 0": Prompt([1, 10]),
    "prompt 0 has seed -1": Prompt([1], seed=-1),
}


@pytest.mark.parametrize("message", BAD)
def test_prompts_that_cannot_be_read(message):
    with pytest.raises(UserError, match=message):
        generate(VLM(SPEC), {}, [BAD[message]], OPTIONS, placed(ONE))


def test_settings_that_cannot_be():
    for wrong in (dict(temperature=-1), dict(top_p=0), dict(top_k=-1), dict(max_completion_length=0), dict(chunk=0)):
        with pytest.raises(ValueError):
            SamplingOptions(**wrong)
    assert generate(VLM(SPEC), {}, [], OPTIONS, placed(ONE)) == []


@pytest.mark.parametrize("temperature", [0, 1, 5])
def test_ids_that_the_tokenizer_does_not_have_are_never_drawn(temperature):
    options = OPTIONS.model_copy(update={"vocab": 40, "temperature": temperature})
    found = sample(options=options)
    assert found and max(max(c.tokens) for c in found) < 40
    free = sample(options=OPTIONS.model_copy(update={"temperature": temperature}))
    assert max(max(c.tokens) for c in free) >= 40

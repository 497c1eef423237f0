"""Offline preference optimisation: packed pairs are their answers one at a time, on every mesh; what the policy began
with is the reference to the bit; and killed anywhere, pairs, reference and policy come out as they would have."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import records
from model_cases import random_params
from paths import TESTS
from PIL import Image
from sampling_cases import placed
from test_resume import finish, kill_when, same
from test_sft_packing import LENGTH, SPEC, STAGE, cut, each, one
from test_sft_packing import packed as alone

from ministral_jax.alignment.answer import Sample
from ministral_jax.alignment.rollout import Answers
from ministral_jax.data.bins import place as place_rows
from ministral_jax.data.conversation import Message, spell
from ministral_jax.data.jsonl import parse_row
from ministral_jax.data.pipeline import Order, batches, row_hashes
from ministral_jax.data.prepare import prepare
from ministral_jax.data.prompts import PromptRow
from ministral_jax.data.rows import pairs_per_row
from ministral_jax.errors import UserError
from ministral_jax.losses.evaluation import model_inputs
from ministral_jax.losses.head import LossHead
from ministral_jax.models.vlm import VLM, Compute, param_shardings
from ministral_jax.stages import reference
from ministral_jax.stages.base import load_stage
from ministral_jax.stages.dpo import OfflineOptions, objective, pair_logprobs
from ministral_jax.stages.manifest import finished
from ministral_jax.stages.pairs import FILE, _pairs, _said, _written, pairs_of
from ministral_jax.stages.reference import reference_logprobs
from ministral_jax.training.state import split_frozen

ROWS, BETA = 4, 0.3
MESHES = {
    "one device": (dict(fsdp=1), 1),
    "tensor 2": (dict(fsdp=1, tensor=2), 2),
    "fsdp 2 x tensor 2": (dict(fsdp=2, tensor=2), 4),
    "context 2": (dict(fsdp=1, context=2), 2),
}


@pytest.fixture(scope="module")
def batch(tmp_path_factory) -> dict[str, np.ndarray]:
    """Rows that all hold several answers, some of them to a picture, with a reference that is not the policy."""
    root = tmp_path_factory.mktemp("pairs")
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(root / "a.png")
    rows = [{"prompt": f"{n}+1=?", "chosen": str(n + 1), "rejected": "x y", "probability": 0.7} for n in range(12)]
    rows += [
        {"prompt": f"{n}?", "image": "a.png", "chosen": "red", "rejected": "no", "probability": 0.9} for n in range(8)
    ]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source: dict[str, Any] = {"kind": "jsonl", "path": str(root / "rows.jsonl")}
    config = type(STAGE.data).model_validate({**STAGE.data.model_dump(), "sources": {"rows": source}, "held_out": 0})
    found = next(batches(prepare(config, LENGTH, SPEC.vision, root / "data", pairs=True), ROWS, Order(0)))
    assert (found["segments"].max(axis=1) >= 2).all() and any(found["images"])
    random = np.random.default_rng(0)
    found["reference"] = random.normal(-20, 5, (ROWS, 2 * pairs_per_row(LENGTH))).astype(np.float32)
    return found


def job(options: OfflineOptions) -> Any:
    return SimpleNamespace(spec=SPEC, stage=SimpleNamespace(compute=Compute(), reward_temperature=1.0, loss=options))


@pytest.fixture(scope="module")
def answers(batch) -> dict[tuple[int, int], tuple[float, Any]]:
    """Log-probability of every answer, from all logits of it in a row of its own, and its gradient."""

    def logprob(trainable, fixed, piece):
        params = {"params": {**trainable, **fixed}}
        logprobs = jax.nn.log_softmax(VLM(SPEC, Compute()).apply(params, piece["tokens"], **model_inputs(piece)))
        taken = jnp.take_along_axis(logprobs, piece["labels"][..., None], axis=-1)[..., 0]
        return jnp.sum(taken * piece["loss_mask"])

    run, found = jax.jit(jax.value_and_grad(logprob)), {}
    for n, row in enumerate(each(batch)):
        for segment in range(1, row["segments"].max() + 1):
            piece = one(alone([cut(row, segment)]))
            value, gradient = jax.device_get(run(*split_frozen(random_params(SPEC), ("vision",)), piece))
            found[n, segment - 1] = float(value), gradient
    return found


def by_formula(batch, answers, loss_type: str) -> tuple[float, Any]:
    """Loss of the batch, and its gradient by the chain rule."""
    total, parts, sigmoid = 0.0, [], lambda x: 1 / (1 + math.exp(-x))
    for n, answer in (place for place in answers if place[1] % 2 == 0):
        ratios = [answers[n, answer + k][0] - float(batch["reference"][n, answer + k]) for k in (0, 1)]
        delta, reward = ratios[0] - ratios[1], float(batch["margin"][n, answer // 2])
        if loss_type == "ipo":
            loss, slope = (delta - 1 / (2 * BETA)) ** 2, 2 * (delta - 1 / (2 * BETA))
        else:
            p = sigmoid(reward) if loss_type == "odpo" else 1
            x = BETA * delta - (reward if loss_type == "offset" else 0)
            loss, slope = -p * math.log(sigmoid(x)) - (1 - p) * math.log(sigmoid(-x)), BETA * (sigmoid(x) - p)
        total += loss
        parts += [(slope, answers[n, answer][1]), (-slope, answers[n, answer + 1][1])]
    weighed = (jax.tree.map(lambda g, s=slope: s * np.float64(g), gradient) for slope, gradient in parts)
    return total, jax.tree.map(lambda *leaves: sum(leaves), *weighed)


@pytest.mark.parametrize(
    ("name", "loss_type"),
    [(name, "sigmoid") for name in MESHES] + [("one device", loss) for loss in ("ipo", "odpo", "offset")],
)
def test_a_packed_batch_is_its_pairs_one_at_a_time_on_every_mesh(answers, batch, name, loss_type):
    want, gradient = by_formula(batch, answers, loss_type)
    place = placed(*MESHES[name])
    heads, asked = LossHead(place), job(OfflineOptions(beta=BETA, loss_type=loss_type))
    params = jax.device_put(random_params(SPEC), param_shardings(SPEC, place))
    there = place_rows(place, batch, ROWS, SPEC.vision)
    with jax.set_mesh(place.mesh):
        read = jax.jit(place.rules.scoped(pair_logprobs(SPEC, Compute(), heads)))(params, there)
        run = jax.jit(place.rules.scoped(jax.value_and_grad(objective(asked, heads), has_aux=True)))
        (total, metrics), ours = jax.device_get(run(*split_frozen(params, ("vision",)), there))
    ours_read = np.asarray(read)
    for (row, answer), (value, _) in answers.items():
        np.testing.assert_allclose(ours_read[row, answer], value, rtol=1e-5)
    assert np.count_nonzero(ours_read) == len(answers) == 2 * metrics["loss"][1]
    np.testing.assert_allclose(total, want, rtol=2e-5)
    scale = max(np.abs(g).max() for g in jax.tree.leaves(gradient))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5 * scale)


@pytest.fixture
def asked(tmp_path) -> tuple[Any, Any]:
    """A stage that is about to read pairs, and its data; its model is a file that stands for one."""
    rows = [{"prompt": f"{n}+1=?", "chosen": str(n + 1), "rejected": "x y"} for n in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source: dict[str, Any] = {"kind": "jsonl", "path": str(tmp_path / "rows.jsonl")}
    config = type(STAGE.data).model_validate({**STAGE.data.model_dump(), "sources": {"rows": source}, "patches": 0})
    for name in ("model", "offline"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(name)
    batch, guard = SimpleNamespace(sequences=ROWS), SimpleNamespace(action="stop")
    stage = SimpleNamespace(
        compute=Compute(), seed=0, steps=3, batch=batch, guard=guard, evaluate=SimpleNamespace(rows=5)
    )
    place: dict[str, Any] = {"source": tmp_path / "model", "directory": tmp_path / "offline", "name": "offline"}
    place["graph"] = SimpleNamespace(stages={})
    return SimpleNamespace(stage=stage, placement=placed(dict(fsdp=1)), **place), prepare(
        config, LENGTH, None, tmp_path / "data", pairs=True
    )


def test_the_reference_is_computed_once_and_again_where_it_was_harmed(asked, monkeypatch):
    job, data = asked
    read, size = [], 2 * pairs_per_row(LENGTH)

    def sums(params, batch):
        """Minus the sum of every answer's tokens, less a third."""
        read.append(batch)
        tokens, segments = (np.asarray(batch[name]) for name in ("tokens", "segments"))
        each = [np.bincount(s, t, size + 1)[1:] for t, s in zip(tokens, segments, strict=True)]
        return -np.array(each, np.float32) / 3

    def rows(steps: int, first: int = 0) -> list[np.ndarray]:
        join, job.stage.steps = reference_logprobs(job, data, sums, {}), steps
        assert join([])["reference"].shape == (0, size)  # of a host that holds the empty end of a batch
        return [batch["reference"] for batch in batches(data, ROWS, Order(0, first), range(steps), join=join)]

    job.stage.steps = 3
    first, held_out = rows(3), -(-min(5, data.counts["held_out"]["rows"]) // ROWS)
    assert len(read) == 3 + held_out
    for batch, expected in zip(batches(data, ROWS, Order(), range(3)), first, strict=True):
        np.testing.assert_array_equal(sums({}, batch), expected)
    path, count = job.directory / "reference.jsonl", len(read)
    whole = path.read_text()
    np.testing.assert_array_equal(rows(3), first)
    assert len(read) == count, "what is there was computed again"
    lines = whole.splitlines(keepends=True)
    lines[0] = lines[0].replace("-", "-1", 1)  # a number is another one
    path.write_text("".join(lines)[:-20])  # and the last line is cut
    np.testing.assert_array_equal(rows(3), first)
    assert len(read) == count + 2 and sorted(path.read_text().splitlines()) == sorted(whole.splitlines())
    job.stage.steps = 4  # more steps need more rows, and no others anew
    assert len(rows(4)) == 4 and len(read) == count + 3
    (job.source / "manifest.json").write_text("another model")
    rows(4)
    assert len(read) == count + 3 + 4 + held_out
    whole_epoch = data.counts["train"]["rows"]
    for first in (ROWS + 1, whole_epoch - 2, whole_epoch + 3):  # other rows than were read, of the next epoch too
        monkeypatch.setattr(reference, "order_of", lambda job, first=first: Order(0, first))
        for batch, ours in zip(batches(data, ROWS, Order(0, first), range(4)), rows(4, first), strict=True):
            np.testing.assert_array_equal(sums({}, batch), ours)
    (job.source / "manifest.json").write_text("a third model")
    for count in (2, 3):  # the held-out batch that was not whole is another one with more rows
        job.stage.evaluate.rows = count
        reference_logprobs(job, data, sums, {})(row_hashes(data, "held_out", range(count)))


def answer(text: str, *, thinking: str | None = None, looping: bool = False, stopped: Any = "stop") -> Sample:
    return Sample((), text, thinking, text, (*text.encode(), 2), stopped, looping, {}, "here", 64)


def test_a_pair_is_written_as_it_was_judged(tmp_path):
    """The loop loses whatever the judge says; what is equal, empty, unknown or loops twice is left out."""
    picture = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    asked = PromptRow((Message("user", (picture, "Sum?")),), None, {}, "", "s", "here", ({"type": "function"},))  # type: ignore[arg-type]
    said = [("7", "8"), ("a a", "8"), ("7", "7"), ("", "8"), ("7", "8"), ("a a", "b b"), ("7", "8"), ("7", "7")]
    loops = {(1, 0), (5, 0), (5, 1)}
    samples = [answer(text, looping=(n, k) in loops) for n, two in enumerate(said) for k, text in enumerate(two)]
    judged = np.array([0.8, 0.9, 0.5, 0.9, np.nan, 0.9, 0.25, 0.7])
    rows, figures = _pairs(Answers([asked] * 16, [], samples), judged, {"judge_confidence": (1.0, 2.0)})
    found = [(chosen.text, rejected.text, p) for _, chosen, rejected, p in rows]
    assert found == [("7", "8", 0.8), ("8", "a a", 1.0), ("8", "7", 0.75)]
    assert (figures["pairs_kept"], figures["tokens_drawn"][0]) == ((3.0, 8.0), sum(len(s.tokens) for s in samples))
    tokenizer = SimpleNamespace(digest="t")
    row = json.loads(json.dumps(_written(rows[0], tokenizer, tmp_path)))  # type: ignore[arg-type]
    (pair,) = parse_row(json.dumps(row | {"tools": None}).encode(), tmp_path / FILE, "row", "row", False, True)
    assert [spell(message) for message in (*pair.messages, pair.rejected[-1])] == ["[image]Sum?", "7", "8"]
    assert pair.margin == pytest.approx(math.log(4)) and row["tools"] == [{"type": "function"}]
    assert row["tokens"] == {"tokenizer": "t", "chosen": [ord("7"), 2], "rejected": [ord("8"), 2]}
    with Image.open(pair.messages[0].parts[0]) as shown:
        np.testing.assert_array_equal(np.asarray(shown), np.asarray(picture))
    thought = _said(answer("7", thinking="3+4"))["content"]
    assert [chunk["type"] for chunk in thought] == ["thinking", "text"]


# ---- in a run --------------------------------------------------------------------------------------------------------

# judged by a reward that differs between almost any two answers; tests/chaos kills those that a judge reads
OFFLINE = (
    *(str(TESTS / "micro_post.yaml"), "offline", "stages.offline.from=parent", "stages.pairs.from=parent"),
    *("stages.pairs.judge=null", "stages.pairs.rewards={wordy: {kind: user, function: 'post_cases:spread'}}"),
)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("offline") / "unbroken"
    finish(run_dir, OFFLINE)
    return run_dir


def test_pairs_are_what_the_judge_says_and_can_be_read_again(unbroken):
    lines = (unbroken / "pairs" / FILE).read_bytes().splitlines()
    metrics = finished(unbroken / "pairs").metrics
    assert 4 < len(lines) == metrics["pairs"] and metrics["pairs_kept"] == len(lines) / 16
    for line in lines:
        (pair,) = parse_row(line, unbroken / "pairs" / FILE, "row", "row", False, True)
        assert spell(pair.messages[-1]) != spell(pair.rejected[-1])
        assert 0.5 < json.loads(line)["probability"] <= 1
        drawn = json.loads(line)["tokens"]
        assert (
            all(0 < len(drawn[name]) <= 24 for name in ("chosen", "rejected")) and drawn["chosen"] != drawn["rejected"]
        )
    shown = [part for line in lines for part in json.loads(line)["messages"][0]["content"] if isinstance(part, dict)]
    pictures = {part["image"] for part in shown if part["type"] == "image"}
    assert pictures == {f"images/{path.name}" for path in (unbroken / "pairs" / "images").iterdir()} != set()


def test_before_an_update_the_policy_is_the_reference_to_the_bit(unbroken):
    first = records(unbroken, "offline", "eval")[0]
    assert first["step"] == 0 and first["loss"] == pytest.approx(math.log(2), rel=1e-7)
    assert (first["rewards/margins"], first["rewards/chosen"], first["rewards/rejected"]) == (0, 0, 0)
    assert first["rewards/accuracies"] == first["win_rate"] == 0.5
    train = records(unbroken, "offline", "train")
    assert train[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)  # by another program
    assert train[-1]["rewards/margins"] > 1e-3 and train[-1]["loss"] < math.log(2)
    last = finished(unbroken / "offline").metrics
    assert {"loss", "win_rate", "reward_accuracy", "rewards/accuracies", "rewards/margins"} <= last.keys()


def test_pairs_that_are_not_as_they_were_written_are_refused(unbroken, tmp_path):
    shutil.copytree(unbroken / "pairs", tmp_path / "pairs")
    assert pairs_of(tmp_path / "pairs").is_file()
    (tmp_path / "pairs" / FILE).write_text("{}\n")
    with pytest.raises(UserError, match="is gone or not as it was written"):
        pairs_of(tmp_path / "pairs")


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def test_killed_it_ends_in_the_same_bits(unbroken, tmp_path):
    """While it samples, while it computes the reference (whose last line is then also cut, and one damaged), and while
    it trains."""
    run_dir = tmp_path / "broken"
    shutil.copytree(unbroken, run_dir, symlinks=True, ignore=shutil.ignore_patterns("pairs", "offline", "recipe.json"))
    pairs, reference = run_dir / "pairs", run_dir / "offline" / "reference.jsonl"
    kill_when(run_dir, lambda: (pairs / "parts" / "1.json").is_file(), OFFLINE)
    assert not (pairs / FILE).exists()
    kept = (pairs / "parts" / "0.json").stat().st_mtime_ns
    kill_when(run_dir, lambda: lines(reference) >= 2, OFFLINE)
    assert (pairs / "parts" / "0.json").stat().st_mtime_ns == kept, "a round was done again"
    text = reference.read_text()
    first, rest = text.split("\n", 1)
    damaged = first.replace('logprobs": [[-', 'logprobs": [[-1', 1)
    assert damaged != first
    reference.write_text(damaged + "\n" + rest[: len(rest) * 2 // 3])
    kill_when(run_dir, lambda: (run_dir / "offline" / "state" / "2").is_dir(), OFFLINE)
    finish(run_dir, OFFLINE)
    assert (pairs / FILE).read_bytes() == (unbroken / "pairs" / FILE).read_bytes()
    assert finished(pairs).metrics == finished(unbroken / "pairs").metrics
    files = (reference, unbroken / "offline" / "reference.jsonl")
    ours, theirs = ({line.partition("digest")[0] for line in file.read_text().splitlines()} for file in files)
    assert ours == theirs
    assert same(load_stage(run_dir / "offline")[1], load_stage(unbroken / "offline")[1])
    for kind in ("train", "eval"):
        assert records(run_dir, "offline", kind) == records(unbroken, "offline", kind)

"""A score that falls while the loss falls ends a stage; one that only fluctuates does not."""

import re
from itertools import count

import jax.numpy as jnp
import numpy as np
import pytest

from ministral_jax.files import read_jsonl
from ministral_jax.training.checkpoint import CheckpointConfig
from ministral_jax.training.goodput import Clock
from ministral_jax.training.optimizer import OptimizerConfig
from ministral_jax.training.scores import Overoptimised, Scores, Tasks, fallen
from ministral_jax.training.train import Schedule, Steps, train

QUESTIONS = 40
OPTIMIZER = OptimizerConfig(warmup=0)


def right(number: int) -> list[bool]:
    return [n < number for n in range(QUESTIONS)]


def judged(evaluations, patience: int | None = 2, aim: str = "ce") -> str | None:
    """What is said after the evaluations, each how many questions are answered right and the figure `aim`."""
    scores = Scores()
    for step, (number, value) in enumerate(evaluations):
        scores.add(step, {aim: value, "aside": 0.0}, {"digits": right(number), "needle": right(5)})
    return Scores(**scores.note()).fallen(Tasks(lambda _: {}, patience, "stages.a.evaluate"))


def test_a_fall_counts_by_the_questions_whose_answers_changed():
    assert fallen("1111110", "0000001") == pytest.approx(8 / 2**7)  # 6 or 7 of 7
    assert fallen("1" * 6 + "0" * 9, "0" * 6 + "0" * 9) == 2**-6
    assert fallen("0101", "0101") == 1 and fallen("01", "10") == 0.75


def test_a_score_has_fallen_where_the_loss_fell_and_for_long_enough():
    fall = [(30, 3.0), (35, 2.0), (20, 1.9), (21, 1.8)]
    said = judged(fall)
    assert said is not None and said.startswith(
        "at step 3 21 of 40 questions of digits are answered right, at step 1 it was 35, while the held-out ce fell "
        "from 2 to 1.8; stages.a.evaluate.patience = 2 stops there, null goes on"
    )
    assert judged(fall[:3]) is None and judged(fall[:3], 1) is not None and judged(fall, 3) is None
    assert judged(fall, None) is None
    assert judged([*fall[:3], (34, 1.85), (20, 1.8)]) is None  # not in a row
    assert judged([(35, 2.0), (20, 2.1), (20, 2.2)]) is None  # it learns nothing: that is no over-optimisation
    assert judged([(35, 0.2), (20, 0.3), (20, 0.4)], aim="reward") is not None
    assert judged([(35, 2.0), (20, 1.0), (20, 0.5)], aim="entropy") is None
    assert judged([(35, 2.0), (30, 1.0), (30, 0.5)]) is None  # 5 of 5 answers: by chance in one of 32


def test_what_only_fluctuates_stops_few_stages():
    """Of models that are right about half of 200 questions, a fifth of them answered anew in each of 30 evaluations,
    one in twenty; if falls were not held against the number of evaluations, it would be eight."""
    draws, stopped, tasks = np.random.default_rng(0), 0, Tasks(lambda _: {}, 2, "")
    for _ in range(100):
        scores, answers = Scores(), draws.random(200) < 0.5
        for step in range(30):
            answers = np.where(draws.random(200) < 0.2, draws.random(200) < 0.5, answers)
            scores.add(step, {"loss": -step}, {"digits": answers.tolist()})
            if scores.fallen(tasks):
                stopped += 1
                break
    assert stopped <= 12


class Learner:
    """Two numbers, and a loss that falls."""

    schedule = Schedule(evaluate_every=2, updates=12)

    def batches(self, first):
        return count(first)

    def step(self, state, batch):
        return {**state, "step": state["step"] + 1}, {"loss": (1.0 / (batch + 1), 1.0)}

    def evaluate(self, state):
        return {"ce": 1.0 / (int(state["step"]) + 1)}

    def told(self, figures):
        return []


ANSWERED = {0: 30, 2: 35, 4: 34, 6: 20, 8: 20, 10: 20, 12: 35}


def run(directory, patience=2, die_at=None):
    asked = []

    def ask(state):
        if (step := int(state["step"])) == die_at:
            raise KeyboardInterrupt
        asked.append(step)
        return {"digits": right(ANSWERED[step])}

    (directory / "stage").mkdir(parents=True, exist_ok=True)
    config = Steps(steps=12, optimizer=OPTIMIZER, checkpoint=CheckpointConfig(every=6))
    tasks = Tasks(ask, patience, "stages.stage.evaluate")
    try:
        return train(Learner(), {"w": jnp.zeros(2)}, config, directory / "stage", Clock(), tasks).metrics
    finally:
        records = [r for r in read_jsonl(directory / "stage" / "metrics.jsonl") if r["kind"] == "eval"]
        assert all(("task_digits" in r) == (r["step"] != 1) for r in records)
        run.asked = asked


def test_a_stage_stops_where_it_would_have_without_a_kill_and_goes_on_when_told(tmp_path):
    said = r"at step 8 20 of 40 questions of digits .* at step 2 it was 35, .* the state of step 8 is kept in "
    with pytest.raises(Overoptimised, match=said) as stop:
        run(tmp_path)
    assert run.asked == [0, 2, 4, 6, 8]
    with pytest.raises(Overoptimised, match=re.escape(str(stop.value))):
        run(tmp_path)
    assert run.asked == []
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", die_at=8)
    with pytest.raises(Overoptimised) as again:
        run(tmp_path / "killed")
    assert run.asked == [8] and str(again.value).replace("killed/", "") == str(stop.value)
    metrics = run(tmp_path, patience=None)
    assert run.asked == [10, 12] and metrics == {"ce": 1 / 13, "task_digits": 35 / 40, "count_digits": 40.0}

"""Groups without a signal are replaced by those of further prompts, up to a bound; prompts that are too hard or too
easy are left out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from paths import TESTS

from ministral_jax.alignment.difficulty import DifficultyConfig, pass_rates
from ministral_jax.alignment.scoring import Scores
from ministral_jax.stages.grpo import _Learner, of_groups
from ministral_jax.stages.online import Answers

RECIPE = str(TESTS / "micro_post.yaml")
PROMPTS, EACH = 8, 4


class Silent(_Learner):
    """Draws prompts that are numbers. Of those that `teaches` says, one answer of four is right."""

    def __init__(self, teaches: Any, generations: int):
        stage: Any = SimpleNamespace(
            prompts=PROMPTS, num_generations=EACH, max_num_gen_batches=generations, seed=3, answers_per_prompt=EACH
        )
        self.stage, self.teaches, self.asked = stage, teaches, []
        self.prompts: Any = SimpleNamespace(drawn=lambda seed, first, count: [*range(first, first + count)])

    def answers(self, params: Any, step: int, prompts: Any, salt: int = 0) -> Answers:
        self.asked.append((step, salt, list(prompts)))
        each = [prompt for prompt in prompts for _ in range(EACH)]
        return Answers(each, list(each), [(prompt, n % EACH) for n, prompt in enumerate(each)])  # type: ignore[arg-type]

    def scores(self, samples: Any, few: bool = False) -> Scores:
        worth = np.array([float(n == 0 and self.teaches(prompt)) for prompt, n in samples])
        return Scores(worth, {"accuracy": worth}, [])

    def filled(self, step: int) -> tuple[Answers, np.ndarray]:
        first = self.answers(None, step, [1000 + n for n in range(PROMPTS)])
        answers, scores, chosen = self._filled(None, step, first)  # type: ignore[arg-type]
        assert len(scores.total) == len(answers.samples)
        return of_groups(answers, chosen, len(scores.total) // EACH), chosen


def test_groups_without_a_signal_are_replaced_in_their_places():
    """Five of eight prompts teach nothing; of the first eight further ones those that are even teach, of others all."""
    teaches = lambda prompt: prompt in (1000, 1003, 1006) or (prompt < 1000 and (prompt % 2 == 0 or prompt >= 8))
    learner = Silent(teaches, 3)
    answers, chosen = learner.filled(0)
    assert [count for _, _, found in learner.asked for count in [len(found)]] == [8, 8, 1]
    assert answers.rows[::EACH] == [1000, 0, 2, 1003, 4, 6, 1006, 8]
    assert answers.samples[4 * EACH] == (4, 0) and answers.episodes[1] == 1000
    assert chosen.tolist() == [0, 8, 10, 3, 12, 14, 6, 16]


def test_there_are_so_many_generations_at_most_and_one_leaves_all_as_it_is():
    never = Silent(lambda prompt: prompt == 1002, 3)
    answers, chosen = never.filled(0)
    assert len(never.asked) == 3 and answers.rows[::EACH] == [1000 + n for n in range(PROMPTS)]
    assert chosen.tolist() == list(range(PROMPTS))
    alone = Silent(lambda prompt: False, 1)
    alone.filled(0)
    assert len(alone.asked) == 1


def test_further_prompts_and_their_random_numbers_depend_on_the_step_alone():
    """No two generations of any steps share a prompt or a salt; a step that is done again asks the same."""
    learner = Silent(lambda prompt: prompt % 3 == 0, 3)
    for step in (0, 1, 2, 1):
        learner.filled(step)
    further = [(step, salt, tuple(found)) for step, salt, found in learner.asked if salt]
    assert further[2:4] == further[6:] and len(set(further)) == 6
    prompts = [prompt for _, _, found in further[:6] for prompt in found]
    assert len(set(prompts)) == len(prompts) > 20


# ---- difficulty -----------------------------------------------------------------------------------------------------


def measured(path: Any, identity: str, stop_at: int = 99) -> tuple[list[float], list[int]]:
    """Rates of ten prompts, three at a time, and the places at which some were measured; it dies at one of them."""
    asked: list[int] = []

    def rate(first: int, rows: list[int]) -> np.ndarray:
        if first >= stop_at:
            raise KeyboardInterrupt
        asked.append(first)
        return np.array(rows) / 10

    prompts: Any = SimpleNamespace(places=list(range(10)), rows=lambda places: places)
    try:
        return pass_rates(prompts, rate, path, identity, 3), asked  # type: ignore[arg-type]
    except KeyboardInterrupt:
        return [], asked


def test_difficulty_is_measured_once_and_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "difficulty.json"
    assert measured(path, "a", stop_at=6)[1] == [0, 3]
    rates, asked = measured(path, "a")
    assert asked == [6, 9] and rates == [n / 10 for n in range(10)]
    assert measured(path, "a") == (rates, [])
    assert measured(path, "b") == (rates, [0, 3, 6, 9])  # of another model, or of other prompts


def test_a_band_that_is_none_and_rewards_that_say_nothing_are_refused(refused, tmp_path):
    band = "stages.rl.difficulty={min_pass_rate: 0.9, max_pass_rate: 0.1}"
    assert "min_pass_rate = 0.9 is above max_pass_rate = 0.1" in refused(RECIPE, tmp_path / "run", band)
    said = refused(RECIPE, tmp_path / "run", "stages.rl.difficulty={}")
    assert "difficulty needs a reward that says right or wrong: accuracy, constraints, code" in said
    assert not (tmp_path / "run").exists() and DifficultyConfig().completions == 16

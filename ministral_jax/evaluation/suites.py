"""The benchmarks of the paper (arXiv 2601.08584, tables 2 to 5) by their names in lm-evaluation-harness 0.4.13."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ministral_jax.errors import UserError
from ministral_jax.evaluation.tasks import TASKS


class Benchmark(NamedTuple):
    """A column of the paper. `task`: the harness's name, None where it has none. `shots`: examples before a question,
    the paper's; None where it does not say, which leaves them to the task."""

    name: str
    task: str | None = None
    shots: int | None = None


BASE = (
    Benchmark("MMLU", "mmlu", 5),
    Benchmark("MMLU-Redux", "mmlu_redux_generative", 5),
    Benchmark("ARC-Challenge", "arc_challenge"),
    Benchmark("RACE High", "race"),
    Benchmark("TriviaQA", "triviaqa", 5),
    Benchmark("NaturalQS", "nq_open"),
    Benchmark("AGIEval", "agieval_en", 5),
    Benchmark("MATH", "minerva_math", 2),
    Benchmark("GPQA Diamond", "gpqa_diamond_zeroshot", 0),
    Benchmark("MBPP", "mbpp", 3),
    *(
        Benchmark(f"Multilingual MMLU, {language}", f"mmmlu_{locale}", 5)
        for language, locale in {
            "German": "de_de",
            "Spanish": "es_la",
            "French": "fr_fr",
            "Italian": "it_it",
            "Portuguese": "pt_br",
            "Chinese": "zh_cn",
            "Japanese": "ja_jp",
            "Korean": "ko_kr",
        }.items()
    ),
    Benchmark("MMMU", "mmmu_val"),  # of two shots in the paper; the harness shows no images in examples
    Benchmark("MathVista"),
)
INSTRUCT = (
    Benchmark("MATH (instruct)", "minerva_math500", 0),
    Benchmark("Arena Hard"),
    Benchmark("WildBench"),
    Benchmark("MM-MT-Bench"),
)
REASONING = (
    Benchmark("AIME 2024", "aime24", 0),
    Benchmark("AIME 2025", "aime25", 0),
    Benchmark("GPQA Diamond (reasoning)", "gpqa_diamond_cot_zeroshot", 0),
    Benchmark("HMMT 2025"),
    Benchmark("PhyBench"),
    Benchmark("LiveCodeBench v6"),
)
SUITES: dict[str, tuple[Benchmark, ...]] = {
    "paper": (*BASE, *INSTRUCT, *REASONING),
    "paper-base": BASE,
    "paper-instruct": INSTRUCT,
    "paper-reasoning": REASONING,
}


class Asked(NamedTuple):
    """A task and how many examples stand before a question; None: as the task has it."""

    task: str
    shots: int | None = None

    def __str__(self) -> str:
        return self.task if self.shots is None else f"{self.task}@{self.shots}"


class Setting(NamedTuple):
    """Where tasks were named and where code that a model wrote is allowed, in the words of an error."""

    names: str = "--tasks"
    unsafe_code: str = "add --unsafe-code"

    @staticmethod
    def of(where: str) -> Setting:
        """A recipe's `tasks` at that place."""
        return Setting(f"{where}.names:", f"set {where}.unsafe_code: true")


COMMAND = Setting()


def asked_for(words: Sequence[str], setting: Setting = COMMAND) -> tuple[list[Asked], list[str]]:
    """Tasks that `NAME`, `NAME@SHOTS` and names of suites stand for, each once, and what suites have that the harness
    lacks. Raises `UserError`: shots that are no number, or of a task that is made here."""
    found, lacking = dict[Asked, None](), list[str]()
    for word in words:
        if word in SUITES:
            found |= dict.fromkeys(Asked(one.task, one.shots) for one in SUITES[word] if one.task is not None)
            lacking += [one.name for one in SUITES[word] if one.task is None]
            continue
        name, at, shots = word.partition("@")
        if at and not shots.isdecimal():
            raise UserError(f"{setting.names} {word}: after @ stands the number of examples, such as {name}@5")
        if at and name in TASKS:
            raise UserError(f"{setting.names} {word}: a task that is made here has no examples before its questions")
        found[Asked(name, int(shots) if at else None)] = None
    return [*found], lacking

"""Pairs for offline preference optimisation: answers that a model gives, judged once and written down."""

from __future__ import annotations

import json
from contextlib import ExitStack
from hashlib import sha256
from io import BytesIO
from pathlib import Path, PurePath
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
import numpy as np
from PIL import Image
from pydantic import Field, field_validator

from ministral_jax.alignment.answer import Sample
from ministral_jax.alignment.rollout import Answers, seeds
from ministral_jax.alignment.scoring import Scorer
from ministral_jax.data.conversation import as_openai
from ministral_jax.data.prompts import PromptRow
from ministral_jax.data.tokenizer import Tokenizer, check_vocab
from ministral_jax.distributed.collectives import first_then_all, from_first, is_first
from ministral_jax.distributed.processes import saving
from ministral_jax.errors import UserError
from ministral_jax.files import digest_of, file_digest, write_json, write_text
from ministral_jax.losses.preference import decide
from ministral_jax.stages import online
from ministral_jax.stages.base import Job, Program, Result, load_stage
from ministral_jax.stages.figures import LOOP_RATE, Figure
from ministral_jax.stages.judged import JudgedStage, open_judge, win_probability
from ministral_jax.stages.manifest import digest, finished
from ministral_jax.stages.prompts import open_sampler, open_stage_prompts, sampler_programs
from ministral_jax.stages.rows import Packing
from ministral_jax.training.progress import ProgressLine

FILE = "pairs.jsonl"


class Pairs(JudgedStage):
    """Answer the training prompts, judge the answers two by two, and write them as preferences with the probability
    that the chosen one is better.

    What both have said, pairs that cannot be judged, and those of which both loop or one is empty are left out.
    """

    figures: ClassVar = (
        Figure("pairs", "pairs written"),
        Figure("pairs_kept", "pairs that could be judged", "share", "higher"),
        Figure("judge_confidence", "how sure the judge is", "share"),
        LOOP_RATE,
    )
    makes_model: ClassVar = False

    do: Literal["pairs"]
    rounds: int = Field(default=1, ge=1)
    """Of `prompts` new prompts each."""
    num_generations: int = Field(default=2, ge=2)
    """Answers to each prompt, an even number: the first and the second are a pair, the third and the fourth, .."""

    @field_validator("num_generations")
    @classmethod
    def _even(cls, value: int) -> int:
        if value % 2:
            raise ValueError("must be even")
        return value

    @property
    def answers_per_prompt(self) -> int:
        return self.num_generations

    def prepare(self, job: Job[Any], packing: Packing) -> None:
        check_vocab(open_stage_prompts(job, packing.progress).tokenizer, job.spec)

    def programs(self, job: Job[Pairs]) -> dict[str, Program]:
        each = self.num_generations
        sampling = sampler_programs(
            job, self.temperature, self.prompts, each, self.max_prompt_length, self.answers_at_once
        )
        return sampling | self.judge_programs(job)

    def run(self, job: Job[Pairs]) -> Result:
        prompts, parts = open_stage_prompts(job), job.directory / "parts"
        job, made_of = job.with_tokens(prompts.tokenizer), _made_of(job)
        done = from_first([_read(parts / f"{n}.json", made_of) is not None for n in range(self.rounds)])
        params = load_stage(job.source, jnp.dtype(self.compute.dtype), job.placement)[1]
        sampler = open_sampler(job, prompts, self.temperature, at_once=self.answers_at_once)
        judge = open_judge(job, prompts.tokenizer)
        line = ProgressLine(job.name, self.rounds, sum(done))
        with ExitStack() as stack:
            stack.callback(line.close)
            scorer = Scorer(self.rewards or {}, self.workers, self.reward_seconds, self.on_error)
            stack.enter_context(scorer)
            for n in (n for n in range(self.rounds) if not done[n]):
                asked, numbers = prompts.batch(self.seed, n, self.prompts), seeds(self.seed, n, self.prompts)
                answers = sampler.answers(params, asked, numbers, self.num_generations, self.limit(n))
                found = win_probability(self, judge, answers, lambda samples: online.scored(job, scorer, samples))
                rows, figures = _pairs(answers, *found)
                saving()
                if is_first():
                    parts.mkdir(exist_ok=True)
                    written = [_written(row, prompts.tokenizer, job.directory) for row in rows]
                    write_json(parts / f"{n}.json", {"made_of": made_of, "rows": written, "figures": figures})
                line.update(n + 1, f"{len(rows)} pairs")
        first_then_all(lambda: _join(job, made_of))
        figures = from_first(_figures(job, made_of))
        details = {"data": {"tokenizer_digest": prompts.tokenizer.digest}}
        return Result(figures, details=details | {"pairs": {"digest": file_digest(job.directory / FILE)}})


def pairs_of(directory: Path) -> Path:
    """The file of a finished stage. Raises `UserError`: it is not as it was written."""
    path, manifest = directory / FILE, finished(directory)
    if not path.is_file() or file_digest(path) != (manifest.model_extra or {})["pairs"]["digest"]:
        raise UserError(f"{path} is gone or not as it was written; delete {directory} to have the pairs made again")
    return path


def _made_of(job: Job[Pairs]) -> str:
    """Of all that decides on the pairs of a round: what was begun with other settings, data or inputs is not used."""
    inputs = {role: digest(job.run_dir / name) for role, name in job.stage.inputs().items()}
    settings = job.stage.making({"rounds"}, anywhere=True)
    return digest_of([settings, job.stage.contents(job.data_root), inputs])


def _read(path: Path, made_of: str) -> dict[str, Any] | None:
    """What was found in a round; None where it was not, or of something else."""
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found if found.get("made_of") == made_of else None


def _rounds(job: Job[Pairs], made_of: str) -> list[dict[str, Any]]:
    parts = (_read(job.directory / "parts" / f"{n}.json", made_of) for n in range(job.stage.rounds))
    return [part for part in parts if part is not None]


def _join(job: Job[Pairs], made_of: str) -> None:
    """The rows of all rounds in one file. Raises `UserError`: there is none."""
    if not is_first():
        return
    rows = [row for part in _rounds(job, made_of) for row in part["rows"]]
    if not rows:
        raise UserError(
            f"{job.where}: no two of the answers could be told apart; raise temperature, or take other prompts"
        )
    write_text(job.directory / FILE, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _figures(job: Job[Pairs], made_of: str) -> dict[str, float]:
    if not is_first():
        return {}
    sums = online.added([part["figures"] for part in _rounds(job, made_of)])
    totals = ("pairs", "tokens_drawn")
    return {name: total if name in totals else total / max(count, 1) for name, (total, count) in sums.items()}


Row = tuple[PromptRow, Sample, Sample, float]
"""A prompt, the chosen and the rejected answer, and the probability that it is better."""


def _pairs(answers: Answers, probability: np.ndarray, host: online.HostMetrics) -> tuple[list[Row], online.HostMetrics]:
    """Those that teach, and figures of all."""
    samples, rows = answers.samples, list[Row]()
    loops = np.array([sample.looping for sample in samples])
    decided, kept = decide(probability, loops[0::2], loops[1::2])
    for n, p in enumerate(decided):
        a, b = samples[2 * n : 2 * n + 2]
        if kept[n] and p != 0.5 and _says(a) and _says(b) and _said(a) != _said(b):
            rows.append((answers.rows[2 * n], *((a, b) if p > 0.5 else (b, a)), float(max(p, 1 - p))))
    counts = {"pairs": (float(len(rows)), 1.0), "pairs_kept": (float(len(rows)), float(len(decided)))}
    return rows, counts | host | online.conduct_metrics(samples)


def _written(row: Row, tokenizer: Tokenizer, directory: Path) -> dict[str, Any]:
    """A row of JSONL, its answers as text and as they were drawn; pictures that are no files are written beside it."""
    prompt, chosen, rejected, probability = row
    answers = {"chosen": chosen, "rejected": rejected}
    parts = [part for message in prompt.messages for part in message.parts]
    images = iter([part for part in parts if isinstance(part, (PurePath, Image.Image))])
    shown = as_openai(prompt.messages)
    for chunk in (chunk for message in shown if isinstance(message["content"], list) for chunk in message["content"]):
        if chunk["type"] == "image":
            chunk["image"] = _place(next(images), directory)
    said: dict[str, Any] = {name: [_said(answer)] for name, answer in answers.items()}
    drawn = {"tokenizer": tokenizer.digest} | {name: answer.tokens for name, answer in answers.items()}
    tools = {"tools": prompt.tools} if prompt.tools else {}
    return {"messages": shown, **tools, **said, "probability": probability, "tokens": drawn}


def _place(image: Path | Image.Image, directory: Path) -> str:
    if isinstance(image, PurePath):
        return str(image.absolute())
    name = f"images/{sha256(image.tobytes() + str(image.size).encode()).hexdigest()[:32]}.png"
    (directory / "images").mkdir(exist_ok=True)
    content = BytesIO()
    image.save(content, "PNG")
    (directory / name).write_bytes(content.getvalue())
    return name


def _says(sample: Sample) -> bool:
    """Whether there is anything in it, be it reasoning: brackets alone are nothing that a row could hold."""
    return bool((sample.thinking or "").strip() or sample.answer.strip())


def _said(sample: Sample) -> dict[str, Any]:
    """An answer as the assistant's message."""
    content: Any = sample.answer
    if sample.thinking is not None:
        text = [{"type": "text", "text": sample.answer}] if sample.answer else []
        content = [{"type": "thinking", "thinking": sample.thinking}, *text]
    return {"role": "assistant", "content": content}

"""Post-training: what the stages that learn to answer changed in held-out answers, and some of these answers."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ministral_jax.report import post_plots
from ministral_jax.report.collect import POST_TRAINING, Run, Stage, mapping, number
from ministral_jax.report.markup import Child, Html, el, figure, model_name, paragraph, row, section, table
from ministral_jax.report.post_plots import Line
from ministral_jax.report.style import accent
from ministral_jax.report.units import MISSING, count, decimal, duration, listing, percent

_ACCURACY = "reward_accuracy"
_ARROW = " \u2192 "
_MOST_PROMPTS = 6
_MOST_CHARACTERS = 600
_CONTROL = re.compile(r"(\[/?[A-Z][A-Z_]*\]|<SPECIAL_\d+>|</?(?:s|unk|pad)>)")


@dataclass(frozen=True)
class Lineage:
    """A stage that begins post-training, and what goes on from it, each source before what is made from it."""

    stages: list[Stage]

    @property
    def begun(self) -> bool:
        return any(stage.state != "waiting" for stage in self.stages)

    @property
    def title(self) -> str:
        """`From 14b-base: 14b-sft -> 14b-reward and 14b-instruct`."""
        root = self.stages[0]
        return f"From {root.source or MISSING}: {self._from(root, {root.name})}"

    def _from(self, stage: Stage, seen: set[str]) -> str:
        after = [s for s in self.stages if s.source == stage.name and s.name not in seen]
        seen |= {s.name for s in after}
        return stage.name + (_ARROW + listing([self._from(s, seen) for s in after]) if after else "")


def lineages(run: Run) -> list[Lineage]:
    """Those of which anything has begun."""
    stages = [stage for stage in run.stages if stage.do in POST_TRAINING]
    names, left = {stage.name for stage in stages}, {stage.name: stage for stage in stages}

    def follow(stage: Stage) -> Iterator[Stage]:
        if left.pop(stage.name, None) is not None:
            yield stage
            for other in stages:
                if other.source == stage.name:
                    yield from follow(other)

    roots = [stage for stage in stages if stage.source not in names]
    found = [Lineage(made) for root in [*roots, *stages] if (made := list(follow(root)))]
    return [lineage for lineage in found if lineage.begun]


def post_training(run: Run) -> Html | None:
    found = lineages(run)
    if not found:
        return None
    sources = dict.fromkeys(source for lineage in found for stage in lineage.stages for source in _sources(stage))
    colours = {source: accent(1 + i) for i, source in enumerate(sources)}
    lead = (
        "Held-out prompts are the same at every evaluation, and answered with the same random numbers. An arrow leads "
        "from the evaluation before a stage\u2019s training to its last one."
    )
    parts = [_lineage(run, lineage, colours) for lineage in found]
    return section("post", "Post-training", _finding(found), lead, parts)


def _finding(found: list[Lineage]) -> str:
    def best(key: str) -> tuple[float, Stage, Lineage] | None:
        made = [(x, s, f) for f in found for s in f.stages if (x := s.last(key)) is not None and math.isfinite(x)]
        return max(made, key=lambda one: one[0], default=None)

    if top := best(_ACCURACY):
        value, stage, lineage = top
        begin = lineage.stages[0].first(_ACCURACY)
        before = f", {percent(begin)} before post-training" if begin is not None else ""
        return f"{stage.name} answers {percent(value)} of its held-out prompts right{before}"
    if top := best("judge_accuracy"):
        return f"{top[1].name} judges {percent(top[0])} of held-out pairs right"
    return "Stages that learn to answer"


def _sources(stage: Stage) -> list[str]:
    """Names of the data that prompts come from, where there are several."""
    prefix = f"{_ACCURACY}_"
    keys = dict.fromkeys(key for evaluation in stage.evals for key in evaluation if key.startswith(prefix))
    return [key.removeprefix(prefix) for key in keys]


def _lineage(run: Run, lineage: Lineage, colours: dict[str, str]) -> Child:
    own = [source for stage in lineage.stages for source in _sources(stage)]
    shown = {source: colour for source, colour in colours.items() if source in own}
    figures = [made for stage in lineage.stages for made in _figures(run, stage, shown)]
    names = [model_name("all prompts", "ink"), *(model_name(source, colour) for source, colour in shown.items())]
    return [
        el("h3", lineage.title, class_="group"),
        _table(lineage),
        el("ul", [el("li", name) for name in names], class_="key") if shown and figures else None,
        el("div", figures, class_="grid") if figures else None,
        _answers(run, lineage),
    ]


def _does(stage: Stage) -> str:
    """In words, from the recipe."""
    judge, teacher = stage.settings.get("judge"), stage.settings.get("teacher")
    rewards = listing([str(name) for name in mapping(stage.settings.get("rewards"))])
    if stage.do == "sft":
        teacher = mapping(teacher).get("store", teacher)
        return "learns given answers" + (f", and what {teacher} would say" if teacher else "")
    if stage.do == "reward":
        return "learns to judge pairs of answers"
    if stage.do == "grpo":
        return f"is rewarded for {rewards}" if rewards else "is rewarded"
    return f"learns what {judge} prefers" if judge else f"learns what rewards prefer: {rewards}"


def _change(stage: Stage, key: str, write: Callable[[float | None], str]) -> str | None:
    """A held-out metric before and after; what there is of it; None when it was never measured."""
    before, after = stage.first(key), stage.last(key)
    if after is None:
        return None
    return f"{write(before)}{_ARROW}{write(after)}" if before is not None else write(after)


def _cell(main: str | None, *small: str) -> Html | None:
    return el("td", main, [el("small", text) for text in small]) if main is not None else None


def _accuracy(stage: Stage) -> Html | None:
    by_source = [(source, _change(stage, f"{_ACCURACY}_{source}", percent)) for source in _sources(stage)]
    return _cell(_change(stage, _ACCURACY, percent), *(f"{source} {change}" for source, change in by_source))


def _reward(stage: Stage) -> Html | None:
    given = mapping(stage.settings.get("generate")) or mapping(stage.settings.get("evaluate"))
    parts = [(str(name), _change(stage, f"reward_{name}", decimal)) for name in mapping(given.get("rewards"))]
    small = [f"{name} {change}" for name, change in parts if change and name != "accuracy"]
    return _cell(_change(stage, "reward", decimal), *small)


def _judge(stage: Stage) -> Html | None:
    before, after, temperature = (stage.last(f"judge_{key}") for key in ("ece_before", "ece", "temperature"))
    small = (
        []
        if after is None
        else [f"ECE {decimal(before)}{_ARROW}{decimal(after)}", f"at temperature {decimal(temperature)}"]
    )
    return _cell(_change(stage, "judge_accuracy", percent), *small)


def _conduct(stage: Stage) -> Html | None:
    length = _change(stage, "completion_length", decimal)
    return _cell(_change(stage, "loop_rate", percent), *([f"length {length}"] if length else []))


def _wins(stage: Stage) -> Html | None:
    return _cell(percent(stage.last("win_rate"))) if stage.last("win_rate") is not None else None


def _time(stage: Stage) -> Html | None:
    seconds = number(stage.manifest.get("seconds")) or sum(stage.time.values())
    small = [f"{count(stage.steps)} steps"] if stage.steps else []
    if stage.time.get("generate"):
        small.append(f"{percent(stage.share_of_time('generate'))} generating")
    return _cell(duration(seconds) if seconds else MISSING, *small) if seconds or small else None


_COLUMNS: tuple[tuple[str, str | None, Callable[[Stage], Html | None]], ...] = (
    ("answered right", None, _accuracy),
    ("reward", None, _reward),
    ("loop rate", "mean length, tokens", _conduct),
    ("win rate", "over its start", _wins),
    ("judged right", "ECE raw \u2192 calibrated", _judge),
    ("time", None, _time),
)


def _table(lineage: Lineage) -> Html:
    columns = [(name, small, [cell(stage) for stage in lineage.stages]) for name, small, cell in _COLUMNS]
    columns = [column for column in columns if any(column[2])]
    heads: list[Child] = [[el("span", name), el("small", small) if small else None] for name, small, _ in columns]
    rows = []
    for i, stage in enumerate(lineage.stages):
        begun = "" if stage.state == "finished" else f", {stage.state}"
        about = [f"{stage.do}, from {stage.source or MISSING}{begun}", _does(stage)]
        head = [stage.name, [el("small", line, class_="wrap") for line in about]]
        rows.append(row(head, [cells[i] or MISSING for _, _, cells in columns]))
    return table(_caption(lineage), ["stage", *heads], rows)


def _caption(lineage: Lineage) -> str:
    given = [mapping(stage.settings.get("generate") or stage.settings.get("evaluate")) for stage in lineage.stages]
    prompts = sorted({int(n) for g in given if "rewards" in g and (n := number(g.get("prompts"))) and math.isfinite(n)})
    asked = f"Held-out figures, of {listing([str(n) for n in prompts])} prompts" if prompts else "Held-out figures"
    wins = "; a tie is half a win" if any(stage.last("win_rate") is not None for stage in lineage.stages) else ""
    return f"{asked}{wins}."


def _figures(run: Run, stage: Stage, colours: dict[str, str]) -> Iterator[Html]:
    made = {
        "sft": (_right,),
        "reward": (_judging,),
        "grpo": (_rewards, _right, _sampling),
        "odpo": (_wins_over, _right),
    }
    for paint in made[stage.do]:
        title, picture, caption = paint(stage, run.colours.get(stage.name, "model-0"), colours)
        if picture is not None:
            yield figure(title, picture, caption)


Painted = tuple[str, Html | None, str]


def _title(stage: Stage, key: str, what: str, write: Callable[[float | None], str] = percent) -> str:
    before, after = stage.first(key), stage.last(key)
    if before is None or after is None or before == after:
        return f"{what} of {stage.name}"
    way = "rises" if after > before else "falls" if after < before else "goes"
    return f"{what} of {stage.name} {way} from {write(before)} to {write(after)}"


def _right(stage: Stage, _: str, colours: dict[str, str]) -> Painted:
    title = _title(stage, _ACCURACY, "Accuracy")
    shown = [Line(f"{_ACCURACY}_{source}", colour) for source, colour in colours.items()]
    shown.append(Line(_ACCURACY, "ink", thick=True))
    picture = post_plots.lines(stage.evals, shown, "held-out prompts answered right", f"{title}, against steps.")
    return title, picture, "Share of held-out prompts answered right, by source." if colours else "Held-out prompts."


def _rewards(stage: Stage, colour: str, _: dict[str, str]) -> Painted:
    title = _title(stage, "reward", "Held-out reward", decimal)
    picture = post_plots.rewards(colour, stage.train, stage.evals, f"{title}, and that of training, against steps.")
    greedy = mapping(stage.settings.get("evaluate")).get("temperature") == 0
    caption = "Held-out answers are the most probable ones, those of training drawn." if greedy else "Mean of answers."
    return title, picture, caption


def _sampling(stage: Stage, colour: str, _: dict[str, str]) -> Painted:
    title = f"Entropy and clipping of {stage.name}"
    entropy = post_plots.training(
        stage.train, [Line("entropy", colour)], "entropy", f"Entropy of {stage.name} against steps."
    )
    shown = [Line("clipped_low", colour, "below", "--"), Line("clipped_high", colour, "above")]
    clipped = post_plots.training(stage.train, shown, "clipped", f"Clipped tokens of {stage.name} against steps.")
    both = el("div", [picture for picture in (entropy, clipped) if picture]) if entropy or clipped else None
    return (
        title,
        both,
        "Entropy of next tokens in sampled answers, in nats, and the share of tokens whose ratio was clipped.",
    )


def _wins_over(stage: Stage, colour: str, _: dict[str, str]) -> Painted:
    title = _title(stage, "win_rate", "Win rate")
    shown = [Line("win_rate", colour, "win rate", thick=True), Line("loop_rate", "wrong", "loop rate", "--")]
    picture = post_plots.lines(stage.evals, shown, "held-out answers", f"{title}, and its loop rate, against steps.")
    return (
        title,
        picture,
        f"Wins over the answers of {stage.source}, by the rewards of the evaluation; loops repeat themselves.",
    )


def _judging(stage: Stage, colour: str, _: dict[str, str]) -> Painted:
    title = _title(stage, "judge_accuracy", "Accuracy")
    shown = [
        Line("judge_accuracy", colour, "judged right", thick=True),
        Line("judge_ece_before", "wrong", "ECE, raw", ":"),
        Line("judge_ece", "wrong", "calibrated", "--"),
    ]
    picture = post_plots.lines(stage.evals, shown, "held-out pairs", f"{title} and calibration error, against steps.")
    return title, picture, "Both orders of a pair are averaged; the temperature is fitted on other pairs."


def _answers(run: Run, lineage: Lineage) -> Child:
    """The same prompts, answered by the stages."""
    said: dict[str, dict[str, dict[str, Any]]] = {}
    for stage in lineage.stages:
        for answer in stage.answers:
            if isinstance(answer.get("answer"), str):
                said.setdefault(_prompt(answer.get("prompt")), {}).setdefault(stage.name, answer)
    chosen = sorted(said, key=lambda prompt: -len(said[prompt]))[:_MOST_PROMPTS]
    if not chosen:
        return None
    colours = run.colours
    parts = [
        [
            el("dt", _marked(prompt)),
            [_told(name, colours.get(name, "model-0"), answer) for name, answer in said[prompt].items()],
        ]
        for prompt in chosen
    ]
    note = (
        "Held-out prompts, answered at the last evaluation of each stage. Reasoning is grey, control tokens are framed."
    )
    return [
        el("h3", "What it answers", class_="group"),
        paragraph(note, "note caption"),
        el("dl", parts, class_="continuations told"),
    ]


def _prompt(content: Any) -> str:
    """The last message, as text in which an image is `[IMG]`."""
    try:
        content = json.loads(content) if isinstance(content, str) else content
    except (ValueError, RecursionError):
        return str(content)
    if not isinstance(content, list):
        return str(content)
    chunks = [mapping(chunk) for chunk in content]
    return " ".join(str(c.get("text", "")) if c.get("type") == "text" else "[IMG]" for c in chunks)


def _told(name: str, colour: str, answer: dict[str, Any]) -> Html:
    accuracy, reward = number(mapping(answer.get("parts")).get("accuracy")), number(answer.get("reward"))
    verdict: tuple[str, str] | None = None
    if accuracy is not None and not math.isnan(accuracy):
        verdict = ("right", "\u2713") if accuracy >= 1 else ("wrong", "\u2717")
    mark = el("span", verdict[1], class_=verdict[0], role="img", aria_label=verdict[0]) if verdict else None
    told = f"reward {decimal(reward)}" if reward is not None else "not judged"
    said = el("span", _marked(answer["answer"]), class_=f"said {verdict[0]}" if verdict else "said")
    return el("dd", model_name(name, colour), said, el("span", mark, " ", el("small", told), class_="verdict"))


def _marked(text: str) -> list[Child]:
    """Text with its control tokens framed and what lies between [THINK] and [/THINK] in grey."""
    cut = text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}\u2026"
    made: list[Child] = []
    thinking = False
    for i, piece in enumerate(_CONTROL.split(cut)):
        if i % 2:
            thinking = piece == "[THINK]" or (thinking and piece != "[/THINK]")
            made.append(el("code", piece, class_="control"))
        elif piece:
            made.append(el("span", piece, class_="thinking") if thinking else piece)
    return made

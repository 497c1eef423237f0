"""lm-evaluation-harness (extra `eval`) around a model on its mesh. Importing this module imports the harness.

The harness passes prompts as text. A chat goes through it as JSON behind a mark that no text has, so that control
tokens are put where the template has them and those that a user's text spells out stay text.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from itertools import islice, zip_longest
from typing import Any

from PIL import Image

from ministral_jax.data.chat import Rendered, render, render_interleaved
from ministral_jax.data.conversation import Message
from ministral_jax.errors import UserError
from ministral_jax.evaluation.examinee import Continued, Examinee, Manner
from ministral_jax.evaluation.suites import COMMAND, Asked, Setting
from ministral_jax.evaluation.tasks import Asking
from ministral_jax.lazy import Lazy
from ministral_jax.sampling.engine import Prompt, as_prompt

LM: Any = Lazy("lm_eval.api.model").LM
evaluator: Any = Lazy("lm_eval.evaluator")
tasks: Any = Lazy("lm_eval.tasks")
MARK = "\ue000chat"
"""Before the JSON of a chat's messages; what follows that begins the answer."""
IMAGE = "<image>"
"""How tasks of the harness write the place of an image."""
DEFAULT_TOKENS = 256
"""Of an answer, where a task does not say."""


class HarnessModel(LM):
    """`lm_eval.api.model.LM` of an examinee. `think`: chats are answered with reasoning, which is not part of the
    answer. `counts`: requests that were `truncated` and answers that were `unfinished`, cut short by their length."""

    MULTIMODAL = True
    tokenizer_name = "tekken"

    def __init__(self, examinee: Examinee, think: bool = False):
        super().__init__()
        self.examinee, self.think, self.counts = examinee, think, Counter[str]()

    def apply_chat_template(self, chat_history: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        """The messages, of which the last is the beginning of an answer when no new one is to begin."""
        begun = "" if add_generation_prompt else chat_history[-1]["content"]
        messages = chat_history if add_generation_prompt else chat_history[:-1]
        return MARK + json.dumps([[m["role"], m["content"]] for m in messages], ensure_ascii=False) + begun

    def chat_template(self, chat_template: bool | str = False) -> str:
        return "" if chat_template is False else "tekken v13"

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Log-probability in nats of each continuation, and whether it is what would be said greedily."""
        found = self.examinee.likelihoods([self._continued(*request.args) for request in requests])
        self.counts["truncated"] += sum(one.truncated for one in found)
        return [(one.logprob, one.greedy) for one in found]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Log-probability in nats of each text by itself."""
        return self.examinee.rolling([self.examinee.tokenizer.encode(request.args[0]) for request in requests])

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers, reasoning left out, up to the texts at which a task says that they end."""
        answers: dict[int, str] = {}
        manners = [_manner(request.args[1]) for request in requests]
        for manner in dict.fromkeys(manners):
            places = [n for n, one in enumerate(manners) if one == manner]
            prompts = []
            for n in places:
                context, _, *more = requests[n].args
                # its place, so that answers to a question that is asked several times differ
                prompts.append(self._prompt(context, more, self.think)._replace(seed=n))
            said = self.examinee.say(prompts, manner)
            self.counts["truncated"] += sum(one.truncated for one in said)
            self.counts["unfinished"] += sum(one.stopped == "length" for one in said)
            answers |= {n: one.answer for n, one in zip(places, said, strict=True)}
        return [answers[n] for n in range(len(requests))]

    def _continued(self, context: str, continuation: str, *more: Any) -> Continued:
        """Of a plain text, the tokens of both together, so that no token is one that the model would not see there; a
        blank at the context's end belongs to the continuation."""
        encode = self.examinee.tokenizer.encode
        if context.startswith(MARK):
            return Continued(self._prompt(context, more), encode(continuation))
        blanks = context[len(context.rstrip()) :]
        context, continuation = context[: len(context) - len(blanks)], blanks + continuation
        after = context.rpartition(IMAGE)[2]
        return Continued(self._prompt(context, more), encode(after + continuation)[len(encode(after)) :])

    def _prompt(self, context: str, more: Sequence[Any], think: bool = False) -> Prompt:
        """Tokens of a context up to where the model is to go on."""
        tokenizer, vision = self.examinee.tokenizer, self.examinee.model.spec.vision
        images = _images(more)
        if images and context.count(IMAGE) not in (0, len(images)):
            raise UserError(f"a request of the harness has {len(images)} images for {context.count(IMAGE)} {IMAGE}")
        if not context.startswith(MARK):
            whole = render_interleaved(_interleaved(context, images), tokenizer, vision, "a request of the harness")
            return as_prompt(Rendered(whole.tokens[:-1], whole.flags[:-1], whole.pictures), vision)
        said, end = json.JSONDecoder().raw_decode(context, len(MARK))
        places = [text.count(IMAGE) for _, text in said]
        if images and not sum(places):  # what is asked is about them
            places[-1] = len(images)
        shown = iter(images)
        turns = [
            (role, text, [*islice(shown, count if images else 0)])
            for (role, text), count in zip(said, places, strict=True)
        ]
        messages = tuple(Message(role, _interleaved(text, some)) for role, text, some in turns)
        rendered = render(messages, tokenizer, vision, "a request of the harness")
        begun = context[end:]
        added = [tokenizer.special("[THINK]")] if think and not begun else tokenizer.encode(begun)
        prompt = as_prompt(rendered, vision)
        return prompt._replace(tokens=[*prompt.tokens, *added])


def known_tasks(asked: Sequence[Asked], include: str | None, setting: Setting = COMMAND) -> Any:
    """The harness's `TaskManager`. Raises `UserError`: it does not have one of the tasks."""
    manager = tasks.TaskManager(include_path=include)
    for task in asked:
        if task.task not in manager.all_tasks:
            raise UserError(f"{setting.names} {task}: neither a task of this program nor one of lm-evaluation-harness")
    return manager


def run_harness(task: Asked, examinee: Examinee, asking: Asking, setting: Setting = COMMAND) -> dict[str, Any]:
    """Results of a task or group of the harness, as JSON: its own `results`, `groups`, `versions`, `n-shot`,
    `n-samples` and `configs`, and how many requests were `truncated` and answers `unfinished`.

    Every process runs the whole harness on the same requests, and the mesh shares the work.

    Raises:
        UserError: the harness has no such task, cannot read its data, or may not run code.
    """
    manager = known_tasks([task], asking.include, setting)
    model = HarnessModel(examinee, asking.think)
    try:
        found = evaluator.simple_evaluate(
            model=model,
            tasks=[task.task],
            num_fewshot=task.shots,
            limit=asking.limit,
            apply_chat_template=asking.chat,
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=1000,
            confirm_run_unsafe_code=asking.unsafe_code,
        )
    except ValueError as error:
        if "unsafe" not in str(error):
            raise
        raise UserError(
            f"{setting.names} {task}: runs code that the model wrote, in no sandbox; {setting.unsafe_code}"
        ) from None
    except OSError as error:
        raise UserError(
            f"{setting.names} {task}: its data cannot be read ({' '.join(str(error).split())[:200]})"
        ) from None
    kept = {key: found[key] for key in _KEPT if key in found}
    return json.loads(json.dumps({**kept, **model.counts}, default=str))


_KEPT = ("results", "groups", "versions", "n-shot", "n-samples", "configs")


def _interleaved(text: str, images: Sequence[Image.Image]) -> tuple[Any, ...]:
    """Text and the images that stand in it; all before a text that has no place for any."""
    pieces = text.split(IMAGE) if images else [text]
    shown = [image.convert("RGB") for image in images]
    if len(pieces) == 1:
        parts: list[Any] = [*shown, text]
    else:
        parts = [part for pair in zip_longest(pieces, shown, fillvalue="") for part in pair]
    return tuple(part for part in parts if part != "")


def _images(more: Sequence[Any]) -> list[Image.Image]:
    """Of what the harness gives beside a text."""
    visual = more[0].get("visual", []) if more else []
    return [image for one in visual for image in (one if isinstance(one, list) else [one])]


def _manner(settings: dict[str, Any]) -> Manner:
    """What a task says of how answers are drawn, in the words of transformers; greedily unless it says otherwise."""
    until = settings.get("until") or ()
    tokens = next((settings[key] for key in ("max_gen_toks", "max_new_tokens", "max_tokens") if key in settings), None)
    drawn = settings.get("do_sample", settings.get("temperature", 0) > 0)
    return Manner(
        DEFAULT_TOKENS if tokens is None else int(tokens),
        (until,) if isinstance(until, str) else tuple(until),
        float(settings.get("temperature", 1.0)) if drawn else 0.0,
        float(settings.get("top_p", 1.0)),
        int(settings.get("top_k", 0)),
    )

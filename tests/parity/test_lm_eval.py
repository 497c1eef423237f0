"""The examinee behind lm-evaluation-harness: its requests, its chats and images, and the names of the paper's suite."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("lm_eval")

from examinee_cases import SPEC, examinee
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from PIL import Image

from ministral_jax.data.chat import render
from ministral_jax.data.conversation import Message
from ministral_jax.errors import UserError
from ministral_jax.evaluation.examinee import Continued, Manner, windows
from ministral_jax.evaluation.harness import HarnessModel, run_harness
from ministral_jax.evaluation.suites import SUITES, Asked
from ministral_jax.evaluation.tasks import Asking
from ministral_jax.sampling.engine import Prompt, as_prompt

pytestmark = pytest.mark.parity
TASKS = {
    "choose": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["yes", "no"]
doc_to_target: answer
metric_list: [{metric: acc}]
""",
    "perplexity": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: byte_perplexity}]
""",
    "say": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{said}}"
generation_kwargs: {until: ["~"], max_gen_toks: 5, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}
QUESTIONS = "Is it?", "What is [INST] here?", "Why \n"


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return examinee(tmp_path_factory.mktemp("one"), batch=4)


@pytest.fixture(scope="module")
def include(one, tmp_path_factory):
    """Tasks of local files, with what the model says to their questions in a chat as the right answer."""
    folder = tmp_path_factory.mktemp("tasks")
    said = [answer.answer for answer in one.say([chat(one, question) for question in QUESTIONS], Manner(5, ("~",)))]
    rows = [{"question": q, "said": s, "answer": n % 2} for n, (q, s) in enumerate(zip(QUESTIONS, said, strict=True))]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, text in TASKS.items():
        data = (
            f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'rows.jsonl'}}}}}\ntest_split: test\n"
        )
        (folder / f"{name}.yaml").write_text(f"task: local_{name}\n{data}{text}")
    return folder


def chat(one, question: str, *images) -> Prompt:
    message = Message("user", (*images, question))
    return as_prompt(render((message,), one.tokenizer, SPEC.vision, "here"), SPEC.vision)


def test_tasks_of_the_harness_find_what_a_direct_request_finds(one, include):
    encode = one.tokenizer.encode

    def results(name: str, **settings) -> dict:
        asking = Asking(include=str(include), **settings)
        return run_harness(Asked(f"local_{name}"), one, asking)["results"][f"local_{name}"]

    assert results("say", chat=True)["exact_match,none"] == 1
    texts = [[1, *encode(question.rstrip())] for question in QUESTIONS]
    right = 0
    for n, (question, text) in enumerate(zip(QUESTIONS, texts, strict=True)):
        blank = question[len(question.rstrip()) :]
        whole = [encode(f"{question.rstrip()}{blank} {choice}")[len(text) - 1 :] for choice in ("yes", "no")]
        yes, no = one.likelihoods([Continued(Prompt(text), tokens) for tokens in whole])
        right += (yes.logprob < no.logprob) == n % 2
    assert results("choose")["acc,none"] == pytest.approx(right / 3)
    nats = -sum(one.rolling([encode(question) for question in QUESTIONS]))
    size = sum(len(question.encode()) for question in QUESTIONS)
    assert results("perplexity")["byte_perplexity,none"] == pytest.approx(2.718281828 ** (nats / size), rel=1e-5)


def test_requests_of_the_harness(one):
    model = HarnessModel(one)
    image = Image.new("RGB", (20, 12), "red")
    turns = [{"role": "user", "content": "What? <image>"}]
    asked = model.apply_chat_template(turns)
    begun = model.apply_chat_template([*turns, {"role": "assistant", "content": "It is"}], add_generation_prompt=False)
    settings = {"until": ["~"], "max_gen_toks": 5}

    def said(*arguments) -> list[str]:
        requests = [Instance("generate_until", {}, (text, settings, *more), 0, ("", 0, 1)) for text, *more in arguments]
        return model.generate_until(requests)

    shown = {"visual": [image]}
    plain = chat(one, "What? <image>")
    answers = one.say(
        [chat(one, "What? ", image), plain, plain._replace(tokens=[*plain.tokens, *one.tokenizer.encode("It is")])],
        Manner(5, ("~",)),
    )
    found = said((asked, shown), (asked,), (begun,))
    assert found == [answer.answer for answer in answers] and len(set(found)) == 3
    assert model.counts["unfinished"] == sum(answer.stopped == "length" for answer in answers)
    with pytest.raises(UserError, match="has 2 images for 1 <image>"):
        said((asked, {"visual": [image, image]}))
    with pytest.raises(UserError, match="--tasks nothing: neither a task of this program nor one of lm-evaluation"):
        run_harness(Asked("nothing"), one, Asking())


def test_windows_are_those_of_the_harness():
    for length in (1, 7, 8, 9, 21):
        tokens = [*range(100, 100 + length)]
        theirs = [make_disjoint_window(pair) for pair in get_rolling_token_windows(tokens, 1, 8, 1)]
        assert [(list(one.prompt.tokens), list(one.tokens)) for one in windows(tokens, 1, 8)] == theirs


def test_the_harness_has_every_task_of_the_suite():
    names = {one.task for one in SUITES["paper"] if one.task is not None}
    assert names <= set(TaskManager().all_tasks)

"""Rewards as functions, as settings of a recipe, and under failures."""

import math
import re
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from ministral_jax.alignment import reward_functions as cheap
from ministral_jax.alignment import rewards, scoring
from ministral_jax.alignment.answer import Sample
from ministral_jax.alignment.mathematics import accuracy, check_gold, quick_accuracy
from ministral_jax.alignment.rewards import AccuracyReward, FormatReward, LengthReward
from ministral_jax.errors import UserError

FUNCTIONS = """
    import os, signal, sys, time

    NUMBER = 3

    def first_number(sample, scale=1.0):
        return scale * float(sample.answer)

    def without_jax(sample):
        return not any(name == "jax" or name.startswith("jax.") for name in sys.modules)

    def by_order(sample):
        match sample.answer:
            case "raise": raise KeyError("no such\\nthing")
            case "nan": return float("nan")
            case "text": return "good"
            case "none": return None
            case "exit": sys.exit(3)
            case "die": os._exit(7)
            case "term": os.kill(os.getpid(), signal.SIGTERM)
            case "hang": time.sleep(600)
        return 1.0

    class Odd(Exception):
        def __init__(self, a, b): super().__init__(a); self.handle = open(os.devnull)

    def unpicklable(sample):
        raise Odd("odd", 2)

    def judge(sample, rubric):
        return {"half": 0.5, "beyond": 1.5}.get(rubric, rubric in sample.answer)
"""


def sample(text="42", prompt="What is 4 + 2?", stopped="stop", tokens=(5,), limit=64, where="rows.jsonl:1", **columns):
    found = re.match(r"(?s)\[THINK\](.*?)\[/THINK\](.*)", text)  # control tokens, spelled out
    thinking, answer = found.groups() if found else (None, text)
    messages = ({"role": "user", "content": prompt},)
    return Sample(messages, text, thinking, answer, tuple(tokens), stopped, False, columns, where, limit)


def validate(given):
    return TypeAdapter(rewards.RewardsConfig).validate_python(given)


def settings(**given):
    return validate(given)


@pytest.fixture(scope="module", autouse=True)
def functions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("functions")
    (folder / "reward_functions_of_a_user.py").write_text(textwrap.dedent(FUNCTIONS))
    (folder / "broken_module_of_a_user.py").write_text("1 / 0\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield "reward_functions_of_a_user"


@pytest.fixture(scope="module")
def by_order(functions):
    orders = settings(orders={"kind": "user", "function": f"{functions}:by_order"})
    with scoring.Scorer(orders, workers=2, seconds=1.0, on_error="drop") as scorer:
        scorer.score([sample("warm")])
        yield scorer


def test_settings_of_a_recipe():
    found = settings(accuracy={"weight": 0.9}, format=None, brevity={"kind": "length", "cache": 16})
    assert found == dict(accuracy=AccuracyReward(weight=0.9), format=FormatReward(), brevity=LengthReward(cache=16))


@pytest.mark.parametrize(
    ("given", "at", "said"),
    [
        ({"accuracy": {"wieght": 1}}, ("accuracy", "accuracy", "wieght"), "Extra inputs"),
        ({"accuracy": {"weight": math.nan}}, ("accuracy", "accuracy", "weight"), "finite"),
        ({"brevity": {"cache": 16}}, ("brevity",), "brevity"),
        ({"length": {"cache": 0}}, ("length", "length", "cache"), "greater than or equal to 1"),
        ({"mine": {"kind": "user", "function": "no colon"}}, ("mine", "user", "function"), "pattern"),
        ({"accuracy": 3}, ("accuracy",), "valid dictionary"),
        ({}, (), "at least 1 item"),
        (["accuracy"], (), "valid dictionary"),
    ],
)
def test_settings_that_are_refused(given, at, said):
    with pytest.raises(ValidationError) as refused:
        validate(given)
    (error,) = refused.value.errors()
    assert error["loc"] == at and said in error["msg"]


def test_jax_is_not_imported():
    code = "import sys; from ministral_jax.alignment import rewards, scoring; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("gold", "answer", "expected"),
    [
        ("42", "42", 1),
        (42, " 42\n", 1),
        ("42", "43", 0),
        ("42", "042", 1),
        ("42", "", 0),
        ("42", "forty-two", 0),
        ("42", "The answer is $42$.", 1),
        ("42", "41, so 42", 1),
        ("42", "42, so 41", 0),
        ("42", "12 + 30 = 42", 1),
        ("42", "12 + 30", 0),
        ("42", r"$6 \times 7$", 0),
        ("42", "84/2", 1),
        ("32", "2^5", 1),
        ("1500", r"$1.5 \times 10^3$", 1),
        ("1,000", "1000", 1),
        (0.5, r"\frac{1}{2}", 1),
        (r"\frac{1}{2}", "0.5", 1),
        ("x + 1", "$1 + x$", 1),
        ("x^2 - 1", r"so \boxed{(x-1)(x+1)}", 1),
        ("sin(x)", r"$\sin x$", 1),
        ("3", r"\boxed{4}, no, \boxed{3}", 1),
        ("3", r"\boxed{3}, no, \boxed{4}", 0),
        ("3", r"\boxed{3} is what I say, and not 4", 1),
        ("3", r"\boxed{3", 0),
        ("3", "$3$ or $4$", 0),
        (r"\frac{1}{2}", r"\boxed{\frac{1}{2}}", 1),
        ("72", "72 (not 70)", 1),
        ("70", "72 (not 70)", 0),
        ("70", "It is not 70", 0),
        ("72", "It's 72, not 70.", 1),
        ("72", "72 (that is, six dozen)", 1),
        ("72", "72!", 1),
        ("6", "3!", 0),
        ("6", "3! = 6", 1),
        ("7", "f (3) = 7", 1),
        ("72", "A: 72", 1),
        ("72", "\u201c72\u201d", 1),
        ("3.14", "\u03c0 \u2248 3.14", 1),
        ("5", r"\boxed{\ 5\ }", 1),
        (r"\{1,2\}", "1 and 2", 1),
        (r"\{1,2\}", "x = 2 or x = 1", 1),
        (r"\{1,2\}", "1 and 3", 0),
        ("1 and 2", "1, 2", 1),
        ("1 or 2", "2", 0),
        ("1, 2, and 3", "3, 2, 1", 1),
        (r"\sqrt{2}", r"\sqrt 2", 1),
        ("2", r"\sqrt 2", 0),
        (r"x \ge 2", r"[2, \infty)", 1),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"It is \begin{pmatrix} 1 \\ 2 \end{pmatrix}.", 1),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\boxed{\begin{pmatrix}1\\3\end{pmatrix}}", 0),
        ("B", "B. Paris", 1),
        ("B", "**(B)** Paris", 1),
        ("B", "I choose B", 1),
        ("B", "B is the correct answer", 1),
        ("B", "A. 1\nB. 2\nC. 3", 0),
        ("B", "A. 1\nB. 2\nThe answer is A", 0),
        ("B)", "(B)", 1),
        ("B.", "The answer is A", 0),
    ],
)
def test_accuracy(gold, answer, expected):
    assert accuracy(sample(answer, answer=gold), AccuracyReward()) == expected


def test_accuracy_of_text():
    exact = AccuracyReward(exact=True)
    assert [accuracy(sample(text, answer="cat dog"), exact) for text in ("cat dog ", "dog cat", "cat")] == [1, 0, 0]
    assert accuracy(sample("It is $7$", answer="7"), exact) == 1


def test_accuracy_needs_no_alarm():
    """An alarm in a thread fails, and math_verify then finds that nothing equals anything."""
    found = []
    judged = sample(r"$\frac{2}{4}$", answer=r"\frac{1}{2}")
    thread = threading.Thread(target=lambda: found.append(accuracy(judged, AccuracyReward())))
    thread.start()
    thread.join()
    assert found == [1.0]


@pytest.mark.parametrize("gold", ["cat", "Yes", "???", r"\frac{", "", "  ", None, True, math.inf, ["4"]])
def test_gold_that_cannot_be_parsed_is_an_error_and_no_reward(gold):
    with pytest.raises(UserError, match=r"rows\.jsonl:1: answer is") as refused:
        check_gold({"answer": gold}, AccuracyReward(), "rows.jsonl:1")
    assert "\n" not in str(refused.value)
    with pytest.raises(UserError):
        accuracy(sample(str(gold), answer=gold), AccuracyReward())
    with (
        scoring.Scorer(settings(accuracy={}), 1) as scorer,
        pytest.raises(UserError, match="there is no column answer"),
    ):
        scorer.check({"anser": "4"}, "rows.jsonl:1")


@pytest.mark.parametrize(
    ("text", "stopped", "with_thinking", "without"),
    [
        ("[THINK]so[/THINK]42", "stop", 1, 0),
        ("42", "stop", 0, 1),
        ("[THINK]so[/THINK]42", "length", 0, 0),
        ("42", "length", 0, 0),
        ("[THINK] [/THINK]42", "stop", 0, 0),
        ("[THINK]so[/THINK] \n", "stop", 0, 0),
        ("[THINK]so", "stop", 0, 0),
        ("42[THINK]so[/THINK]", "stop", 0, 0),
        ("[THINK]so[/THINK]4[THINK]2", "stop", 0, 0),
        ("[THINK]so[/THINK]42[/THINK]", "stop", 0, 0),
        ("[THINK]s[THINK]o[/THINK]42", "stop", 0, 0),
        ("", "stop", 0, 0),
    ],
)
def test_format(text, stopped, with_thinking, without):
    judged = sample(text, stopped=stopped)
    assert cheap.format_reward(judged, FormatReward()) == with_thinking
    assert cheap.format_reward(judged, FormatReward(thinking=False)) == without


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("Yes SIR\n\nOF COURSE", 4 / 7), ("YES\nNO", 6 / 7), ("yes or\nno", 3 / 7), ("", 0), ("cat " * 9, 1 / 7)],
)
def test_constraints(answer, expected):
    values = dict(max_words=4, starts_with="Y", ends_with="O", contains="O", lines=2, uppercase=None, lowercase=True)
    constraints = [{"kind": kind, "value": value} for kind, value in values.items()]
    judged = sample(f"[THINK]hm[/THINK]{answer}", constraints=constraints)
    assert cheap.constraints_reward(judged, rewards.ConstraintsReward()) == pytest.approx(expected, abs=1e-15)
    assert cheap.constraints_reward(judged._replace(columns={"constraints": []}), rewards.ConstraintsReward()) == 1


@pytest.mark.parametrize("constraints", [None, {"kind": "uppercase"}, ["uppercase"], [{"kind": "rhymes"}]])
def test_constraints_that_are_no_list_of_known_ones_are_refused(constraints):
    with pytest.raises(UserError, match=r"^rows\.jsonl:7: "):
        cheap.check_constraints(constraints, "rows.jsonl:7")


@pytest.mark.parametrize(
    ("kind", "value"), [("max_words", None), ("max_words", True), ("lines", 0), ("contains", ""), ("uppercase", False)]
)
def test_values_of_constraints_that_are_refused(kind, value):
    with pytest.raises(UserError, match=rf"^rows\.jsonl:7: constraint {kind} has the value {value!r}"):
        cheap.check_constraints([{"kind": kind, "value": value}], "rows.jsonl:7")


@pytest.mark.parametrize(
    ("prompt", "text", "expected"),
    [
        ("What is it?", "[THINK]A cat.[/THINK]A cat", 1),
        ("What is it?", "[THINK]Это кот.[/THINK]A cat", 0),
        ("What is it?", "[THINK]A cat.[/THINK]кот", 0),
        ("Что это?", "[THINK]Это кот, `return x`, $x+y$ и \\frac[/THINK]Кот", 1),
        ("Was ist das?", "Une Émeute", 1),
        ("What is 40 + 2?", "42", 1),
        ("40 + 2", "сорок два", 1),
        ("これは何ですか", "猫です、ネコ", 1),
        ("What is the Russian for cat?", "The word that you are looking for is кот", 1),
        ("What is it?", "A кот", 0),
        ("What is it?", "Hello кот", 0),
    ],
)
def test_language(prompt, text, expected):
    assert cheap.language_reward(sample(text, prompt=prompt), rewards.LanguageReward()) == expected
    parts = [{"type": "image"}, {"type": "text", "text": prompt}]
    messages = ({"role": "user", "content": "Привет"}, {"role": "assistant", "content": "你好"})
    judged = sample(text)._replace(prompt=(*messages, {"role": "user", "content": parts}))
    assert cheap.language_reward(judged, rewards.LanguageReward()) == expected


def test_length():
    def of(n, stopped="stop"):
        return cheap.length_reward(sample(tokens=range(n), limit=10, stopped=stopped), LengthReward(cache=4))

    assert [of(n) for n in (0, 5, 6, 7, 8, 9, 10)] == [0, 0, 0, -0.25, -0.5, -0.75, -1]
    assert of(10, "length") == -1
    with pytest.raises(UserError, match="more than the 10 tokens"):
        cheap.length_reward(sample(limit=10), LengthReward(cache=11))


def test_cheap_rewards_and_plain_numbers_start_no_process(monkeypatch):
    monkeypatch.setattr(scoring, "_start_pool", lambda *_: pytest.fail("a pool was started"))
    given = dict(accuracy={"weight": 0.5}, format={"weight": 2, "thinking": False}, language={})
    wanted = settings(**given, length={"cache": 8, "weight": 0.25})
    samples = [sample("42", answer="42"), sample("41", answer=42, tokens=range(60)), sample("", answer="42")]
    with scoring.Scorer(wanted, workers=1) as scorer:
        scores = scorer.score(samples)
        empty = scorer.score([])
    np.testing.assert_array_equal(scores.total, [0.5 + 2 + 1, 2 + 1 - 0.125, 0])  # the last is stopped by its format
    assert scores.parts.keys() == wanted.keys() and scores.problems == [] and scores.total.dtype == np.float64
    np.testing.assert_array_equal(scores.parts["length"], [0, -0.5, 0])
    assert empty.total.shape == (0,)


def test_workers_and_order_change_nothing(functions):
    wanted = settings(
        accuracy={},
        scaled={"kind": "user", "function": f"{functions}:first_number", "options": {"scale": 0.1}, "weight": -0.3},
        clean={"kind": "user", "function": f"{functions}:without_jax"},
        rubric={"judge": f"{functions}:judge"},
    )
    answers = [f"{n}.50" for n in range(24)]
    samples = [sample(a, answer=f"{n}\\frac12", rubrics=["half", "1", ".5"]) for n, a in enumerate(answers)]
    by_hand = [1 - 0.3 * (0.1 * float(a)) + 1 + (0.5 + ("1" in a) + 1) / 3 for a in answers]
    order = np.random.default_rng(0).permutation(24)
    with scoring.Scorer(wanted, workers=2) as two, scoring.Scorer(wanted, workers=1) as one:
        first, again = two.score(samples), one.score([samples[n] for n in order])
    np.testing.assert_allclose(first.total, by_hand, rtol=1e-14)
    np.testing.assert_array_equal(first.total[order], again.total)
    assert all((first.parts["clean"] == 1).tolist()) and first.parts["accuracy"].sum() == 24


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("raise", "raised KeyError: 'no such\\nthing'"),
        ("nan", "is nan, not a finite number"),
        ("text", "is 'good', not a finite number"),
        ("none", "is None, not a finite number"),
        ("exit", "raised SystemExit: 3"),
        ("die", "ended its process (exit code 7)"),
        ("hang", "took longer than 1 s"),
    ],
)
def test_a_failure_is_said_and_its_sample_left_out(by_order, answer, said):
    samples = [sample("fine"), sample(answer, where="rows.jsonl:9"), sample("fine")]
    scores = by_order.score(samples)
    assert scores.problems == [f"the reward orders of rows.jsonl:9 {said}"]
    np.testing.assert_array_equal(scores.total, [1, math.nan, 1])
    np.testing.assert_array_equal(scores.parts["orders"], [1, math.nan, 1])


def test_a_signal_to_all_processes_of_a_job_does_not_spoil_its_batch(by_order):
    assert by_order.score([sample("term"), sample("fine")]).total.tolist() == [1, 1]


def test_more_than_half_failing_stops_even_so(by_order):
    assert len(by_order.score([sample("fine"), sample("nan")]).problems) == 1
    with pytest.raises(UserError, match=r"^2 of 3 samples could not be scored; the first: the reward orders of rows"):
        by_order.score([sample("nan"), sample("fine"), sample("raise")])


def test_a_failure_stops_unless_asked_otherwise(functions):
    odd = settings(odd={"kind": "user", "function": f"{functions}:unpicklable"})
    with (
        scoring.Scorer(odd, workers=1) as scorer,
        pytest.raises(UserError, match=r"^the reward odd of rows\.jsonl:1 raised Odd: odd$"),
    ):
        scorer.score([sample()])
    brevity = scoring.Scorer(settings(length={"cache": 4}), workers=1)
    with pytest.raises(UserError, match=r"^the reward length of rows\.jsonl:1 raised UserError: length\.cache is 4"):
        brevity.score([sample(limit=2)])


def test_rows_that_cannot_be_judged_are_no_zeros(functions):
    good = dict(answer="x", rubrics=["4"])
    bad = [
        sample("4", answer="x", rubrics=["beyond"]),
        sample("4", answer="x"),
        sample("cat", answer="cat", rubrics=["4"]),
        sample("cat", rubrics=["4"]),
    ]
    said = [
        "rubric of rows.jsonl:1 raised ValueError: the judge says 1.5 to 'beyond'",
        "rubric of rows.jsonl:1 raised UserError: rows.jsonl:1: column rubrics is None",
        "accuracy of rows.jsonl:1 raised UserError: rows.jsonl:1: answer is 'cat', which is no mathematical",
        "accuracy of rows.jsonl:1 raised UserError: rows.jsonl:1: there is no column answer",
    ]
    wanted = settings(rubric={"judge": f"{functions}:judge"}, accuracy={})
    with scoring.Scorer(wanted, workers=1, on_error="drop") as scorer:
        scores = scorer.score([sample("4", **good)] * 4 + bad)
        for problem, start in zip(scores.problems, said, strict=True):
            assert problem.startswith(f"the reward {start}")
        np.testing.assert_array_equal(np.isnan(scores.total), [False] * 4 + [True] * 4)
        np.testing.assert_array_equal(scores.total[:4], 1)
        scorer.check(good, "rows.jsonl:1")
        with pytest.raises(UserError, match=r"rows\.jsonl:1: column rubrics is \[\]"):
            scorer.check({"answer": "x", "rubrics": []}, "rows.jsonl:1")


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("no_such_package.module:f", "cannot be imported (ModuleNotFoundError: No module named 'no_such_package')"),
        ("broken_module_of_a_user:f", "cannot be imported (ZeroDivisionError: division by zero)"),
        ("{functions}:missing", "cannot be imported (AttributeError: module"),
        ("{functions}:NUMBER", "is a int, not a function"),
    ],
)
@pytest.mark.parametrize("kind", [("user", "function"), ("rubric", "judge")])
def test_functions_that_are_not_there(functions, kind, path, said):
    path = path.format(functions=functions)
    with pytest.raises(UserError) as refused:
        scoring.Scorer(settings(mine={"kind": kind[0], kind[1]: path}), workers=1)
    assert str(refused.value).startswith(f"rewards.mine: {path} {said}")


RIGHT = {
    "72": ("**72**", "The answer is **72**.", "Answer: **72**", "**Answer: 72**", "= **72**", "`72`", "__72__", "(72)",
           "***72***", "So **24** clips in May, **72** in total.", "**72** km", "72 km/h", "$72", "€72", "72%", "# 72",
           "**Total:** $72.00", "7.2e1", "**x = 72**", "<answer>72</answer>", "<b>72</b>", "72,0", r"\boxed{72,0}",
           r"\boxed{72 \text{ km}}", r"\boxed{\$72}", r"$72^\circ$", r"\boxed{\mathbf{72}}", "#### 72", "> 72", "72 m²",
           "```\n72\n```", "72 km^2", "７２"),
    "1/2": ("**1/2**", "½", "**0.5**", "1\N{FRACTION SLASH}2"),
    "0.5": ("**0.5**", ".5", "**1/2**", "5e-1"),
    "-5": ("\N{MINUS SIGN}5", "**-5**", "-5°C", "**\N{MINUS SIGN}5**"),
    "1000": ("1,000", "**1,000**", "1e3", "10^3", "1 000", "1\u202f000", "1\u00a0000", "1'000", r"1\,000",
             "$1{,}000$", "1_000"),
    "1234567": ("1.234.567", "1,234,567", "1 234 567", r"1\,234\,567"),
    "3.5": ("3,5", "3 1/2", "3½", "7/2", r"3\frac{1}{2}", r"\boxed{3,5}", "x = 3,5 m"),
    "B": ("B", "B.", "(B)", "B)", "**B**", r"\boxed{B}", r"\boxed{\text{B}}", "The answer is B.", "Answer: (B)",
          "A is wrong. The answer is **B**"),
    r"\text{B}": (r"\boxed{\text{B}}", "B"),
    "(1, 2)": ("(1,2)", r"$\left(1,2\right)$", r"\boxed{(1, 2)}"),
    "[0, 1)": ("[0,1)", r"\boxed{[0,1)}"),
    r"(-\infty, 2]": ("(-oo, 2]", r"$(-\infty,2]$", "(-∞, 2]"),
    r"\{1, 2\}": ("{2,1}", r"\boxed{\{2, 1\}}"),
    r"2\sqrt{3}": ("2√3", "√12", "2*sqrt(3)", "√(12)"),
    r"\pi": ("pi", "π", r"$\pi$"),
    "x^2+1": ("1+x²", "x**2 + 1", "$x^{2}+1$"),
    "0.001": ("1 × 10⁻³", r"10^{-3}", r"1\cdot 10^{-3}"),
    "25%": ("25%", "0.25", r"\boxed{25\%}", "1/4"),
    "2**3": ("8", "2**3", "**8**"),
    "**72**": ("72", "**72**"),
}  # fmt: skip
WRONG = {
    "B": ("C", "AB", "A", "The answer is C.", "The answer is B or C.", "B is wrong. The answer is C"),
    "3.5": ("3", "5", "35", "3,6", "3 1/4", "31/2"),
    "1000": ("1.000", "10.00", "1,0001", "1,00"),
    "1.2": ("(1,2)", "1,200"),
    "[0, 1)": ("[0, 1]", "(0, 1)"),
    r"(-\infty, 2]": ("(-oo, 2)", "(oo, 2]"),
    "(1, 2)": ("(2, 1)", "(1, 3)"),
    r"2\sqrt{3}": ("√3", "2√2", "√(13)"),
    "x^2+1": ("x*2+1", "x^2"),
    r"\{1, 2\}": ("{1}", "{1, 2, 3}"),
    "72": ("**24**", "**7**2", "**72** or **73**", "1e72", "**-72**"),
    "1/2": ("1½", "2/1"),
    "6": ("2**3", "*2*3"),
}


@pytest.mark.parametrize("right", [True, False])
def test_wrappings_of_an_answer_change_nothing(right):
    for gold, answers in (RIGHT if right else WRONG).items():
        check_gold({"answer": gold}, settings(accuracy={})["accuracy"], "row 1")
        for answer in answers:
            assert accuracy(sample(answer, answer=gold), settings(accuracy={})["accuracy"]) == right, (gold, answer)
    if right:
        exact = settings(accuracy={"exact": True})["accuracy"]
        assert (
            quick_accuracy(sample("**yes**", answer="yes"), exact)
            == 1
            == quick_accuracy(sample("`a`", answer="`a`"), exact)
        )

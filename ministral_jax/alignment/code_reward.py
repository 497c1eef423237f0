"""Whether a program passes the tests of its row. It is run by `sandbox.run`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ministral_jax.alignment.answer import Sample
from ministral_jax.alignment.rewards import CodeReward
from ministral_jax.alignment.sandbox import refusal, run
from ministral_jax.errors import UserError

MAX_TESTS = 20

_FENCED = re.compile(r"^[ \t]*```[^\n]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)


def check_code(columns: Mapping[str, Any], settings: CodeReward, where: str) -> None:
    """Raises `UserError` as the two that follow."""
    check_sandbox(settings)
    check_tests(columns, where)


def check_sandbox(settings: CodeReward) -> None:
    """Raises `UserError`: not enabled, or no sandbox on this machine."""
    if not settings.enabled:
        raise UserError(
            "the reward code runs programs that the model wrote, in a sandbox that is no proof against all of them; "
            "`enabled: true` says that you want that"
        )
    if (reason := refusal(settings.isolation)) is not None:
        needs = {
            "bubblewrap": "the package bubblewrap, 0.8 or later, and a kernel that lets any user make namespaces; "
            "inside a sandbox of your own say `isolation: none`",
            "none": "Linux with util-linux",
        }
        raise UserError(
            f"the reward code cannot run programs with isolation {settings.isolation!r} on this machine ({reason}); "
            f"it needs {needs[settings.isolation]}"
        )


def check_tests(columns: Mapping[str, Any], where: str) -> list[dict[str, str]]:
    """The row's tests. Raises `UserError`: none, too many, or one that is neither input and output nor an assertion."""
    tests = columns.get("tests")
    if not isinstance(tests, list) or not 1 <= len(tests) <= MAX_TESTS:
        found = f"{len(tests)} tests" if isinstance(tests, list) else repr(tests)
        raise UserError(f"{where}: tests is {found}; the reward code needs a list of 1 to {MAX_TESTS} tests")
    for test in tests:
        if (
            not isinstance(test, dict)
            or set(test) not in ({"input", "output"}, {"assert"})
            or not all(isinstance(text, str) for text in test.values())
        ):
            raise UserError(
                f"{where}: test {test!r} is neither {{'input': text, 'output': text}} nor {{'assert': python}}"
            )
        try:
            compile(test.get("assert", ""), "<test>", "exec")
        except (SyntaxError, ValueError) as error:
            raise UserError(f"{where}: test {test['assert']!r} is not python: {error}") from None
    return tests


def program_of(answer: str) -> str:
    """The last fenced block of code; all of the answer where there is none."""
    blocks = _FENCED.findall(answer)
    return blocks[-1] if blocks else answer


def code_reward(sample: Sample, settings: CodeReward) -> float:
    """1 when the program passes all tests, each in a process of its own, else 0.

    Input and output: it ends with exit code 0 and prints the output, spaces at the end of lines and empty lines at the
    end aside. Assertion: it is run as a module and the assertion in its namespace.

    Raises:
        UserError: not enabled, or a row without proper tests.
        sandbox.SandboxError: nothing is known about the program.
    """
    if not settings.enabled:
        check_sandbox(settings)
    tests = check_tests(sample.columns, sample.where)
    program, limits = program_of(sample.answer), settings.model_dump(include={"seconds", "memory_mb", "isolation"})

    def passes(test: dict[str, str]) -> bool:
        outcome = run(program, stdin=test.get("input", ""), check=test.get("assert"), **limits)
        if "assert" in test:
            return outcome.checked
        return (outcome.ended, outcome.code) == ("exit", 0) and _lines(outcome.output) == _lines(test["output"])

    return float(bool(program.strip()) and all(map(passes, tests)))


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]

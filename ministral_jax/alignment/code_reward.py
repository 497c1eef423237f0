"""Whether a program passes the tests of its row. It is run by `sandbox.run`."""

from __future__ import annotations

import re
from typing import Any

from ministral_jax.alignment.rewards import CodeReward
from ministral_jax.alignment.sample import Sample
from ministral_jax.alignment.sandbox import refusal, run
from ministral_jax.errors import UserError

MAX_TESTS = 20

_FENCED = re.compile(r"^[ \t]*```[^\n]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)


def check_code(settings: CodeReward) -> None:
    """
    Raises:
        UserError: not enabled, or no sandbox on this machine.
    """
    if not settings.enabled:
        raise UserError(
            "the reward code runs programs that the model wrote, in a sandbox that is no proof against all of them; "
            "`enabled: true` says that you want that"
        )
    reason = refusal(settings.isolation)
    if reason is not None:
        needs = "Linux 5.12 with unprivileged user namespaces; inside a sandbox of your own say `isolation: none`"
        raise UserError(
            f"the reward code cannot run programs with isolation {settings.isolation!r} on this machine ({reason}); "
            + (f"it needs {needs}" if settings.isolation == "namespaces" else "it needs Linux")
        )


def check_tests(columns: dict[str, Any], settings: CodeReward, where: str) -> list[dict[str, str]]:
    """The row's tests.

    Raises:
        UserError: none, too many, or one that is neither input and output nor an assertion.
    """
    tests = columns.get(settings.column)
    if not isinstance(tests, list) or not 1 <= len(tests) <= MAX_TESTS:
        found = f"{len(tests)} tests" if isinstance(tests, list) else repr(tests)
        raise UserError(
            f"{where}: {settings.column} is {found}; the reward code needs a list of 1 to {MAX_TESTS} tests"
        )
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


def code_seconds(settings: CodeReward) -> float:
    """The most that `code_reward` takes, what it takes to start processes included."""
    return settings.compile_seconds + MAX_TESTS * settings.seconds + 30


def code_reward(sample: Sample, settings: CodeReward) -> float:
    """1 when the program passes all tests, each in a process of its own, else 0.

    Input and output: it ends with exit code 0 and prints the output, spaces at the end of lines and empty lines at the
    end aside. Assertion: it is run as a module and the assertion in its namespace.

    Raises:
        UserError: not enabled, or a row without proper tests.
        sandbox.SandboxError: nothing is known about the program.
    """
    if not settings.enabled:
        check_code(settings)
    tests = check_tests(sample.columns, settings, sample.where)
    program = program_of(sample.answer)
    memory, isolation = settings.memory_mb, settings.isolation
    compiles = f"compile({program!r}, '<program>', 'exec')"
    if not program.strip() or not _encodable(program):
        return 0.0
    outcome = run(compiles, check="", seconds=settings.compile_seconds, memory_mb=memory, isolation=isolation)
    if not outcome.checked:
        return 0.0
    for test in tests:
        stdin, check = test.get("input", ""), test.get("assert")
        outcome = run(
            program, stdin=stdin, check=check, seconds=settings.seconds, memory_mb=memory, isolation=isolation
        )
        if check is not None:
            passed = outcome.checked
        else:
            ended_well = (outcome.ended, outcome.code) == ("exit", 0)
            passed = ended_well and _lines(outcome.output) == _lines(test["output"])
        if not passed:
            return 0.0
    return 1.0


def _encodable(text: str) -> bool:
    try:
        return bool(text.encode())
    except UnicodeEncodeError:
        return False


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]

"""Functions of the standard library to be continued from their first line, so that a small model has to ramble."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from ministral_jax.data.conversation import Document, Message
from ministral_jax.data.files import stable_key
from ministral_jax.data.tasks import DEFAULT_LIMIT, exchange

CHARACTERS = 60, 140
"""Of an answer, at least and at most: some 30 to 60 tokens of the tiny recipe's vocabulary."""
_LONGEST_LINE = 72
_OF_A_FILE = 12
"""Functions of one file, so that a few documents come from many."""


def read_continuations(
    files: Iterable[tuple[str, Path]], limit: int | None, prompts: bool = False
) -> Iterator[Document]:
    """The first `limit` functions of the files, a few of each, with what follows their first line as the answer.

    Docstrings and blank lines are left out, and answers end with a line. As `prompts` they end with the question.
    """
    every = (document for name, path in files for document in _of_file(name, path, prompts))
    yield from islice(every, limit or DEFAULT_LIMIT)


def _of_file(name: str, path: Path, prompts: bool) -> Iterator[Document]:
    text = path.read_text("utf-8")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a file's own string escapes
            tree = ast.parse(text)
    except SyntaxError:  # of another version of Python, kept for tools
        return
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lines, found = text.split("\n"), 0
    for node in sorted(functions, key=lambda node: stable_key(f"{name} {node.lineno}")):
        if found < _OF_A_FILE and (pair := _parts(node, lines)) is not None:
            found += 1
            (first, answer), where = pair, f"{name}:{node.lineno}"
            question = f"Continue: {first}"
            messages: tuple[Message, ...] = exchange((question,), answer)
            yield Document(
                where,
                where,
                messages=messages[:-1] if prompts else messages,
                columns={"answer": answer},
                key=f"continue {question}",
            )


def _parts(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> tuple[str, str] | None:
    """The first line of a function and those that follow, or None where it is too short or its first line too long."""
    first = lines[node.lineno - 1].strip()
    if not first.endswith(":") or len(first) > _LONGEST_LINE or node.body[0].lineno == node.lineno:
        return None
    skipped = range(0)
    if ast.get_docstring(node, clean=False) is not None:
        skipped = range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)
    answer = ""
    for number in range(node.lineno + 1, (node.end_lineno or 0) + 1):
        line = lines[number - 1][node.col_offset :].rstrip()
        if not line or number in skipped:
            continue
        longer = f"{answer}\n{line}" if answer else line
        if len(longer) > CHARACTERS[1]:
            break
        answer = longer
    return (first, answer) if len(answer) >= CHARACTERS[0] else None

"""All examinations of a checkpoint, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from ministral_jax.doctor import configuration, weights, words
from ministral_jax.doctor.source import Finding, Source
from ministral_jax.interop.hub import refuse_missing


def examine(directory: Path) -> list[Finding]:
    """What there is to say of a directory. Raises `UserError`: it is none."""
    refuse_missing(directory)
    source = Source(directory)
    spec, found = configuration.sizes(source)
    whole = weights.whole(source)
    parts: list[Callable[[], Iterator[Finding]]] = [
        lambda: weights.files(source),
        lambda: iter(found),
        lambda: weights.tensors(source, spec) if spec and whole and source.any_weights else iter(()),
        lambda: weights.scales(source) if whole else iter(()),
        lambda: configuration.two_formats(source),
        lambda: configuration.code(source),
        lambda: configuration.tying(source) if whole else iter(()),
        lambda: configuration.positions(source, spec),
        lambda: configuration.vision(source),
        lambda: words.tokenizer(source, spec),
        lambda: words.beginning(source),
        lambda: words.templates(source),
    ]
    said = [finding for part in parts for finding in _heard(part)]
    if source.any_weights and not any(finding.level == "red" for finding in [*source.faults, *said]):
        said += _heard(lambda: weights.importable(source))
    return [*source.faults, *said]


def _heard(part: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """A file may say anything where a number or an object belongs; that is a fault of it, not of the examination."""
    found: list[Finding] = []
    try:
        found.extend(part())
    except (TypeError, AttributeError, KeyError, ValueError) as error:
        found.append(Finding("red", "files", f"a value is of a form that nothing reads: {error}"))
    return found

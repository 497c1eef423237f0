"""What record stages kept of their teachers, what that takes and what it leaves out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ministral_jax.report import stored_plots
from ministral_jax.report.collect import Run, Stage, mapping, number, numbers
from ministral_jax.report.markup import Child, Html, el, figure, row, section, table
from ministral_jax.report.units import MISSING, THIN, count, decimal

_PER_ENTRY = ("ids", "logprobs")
"""Arrays that grow with the number of entries."""
_ARRAYS = {
    "ids": "ids of the entries",
    "logprobs": "their log-probabilities",
    "forced": "log-probabilities of control tokens",
    "tail": "probability of all others",
    "tail_entropy": "entropy among all others",
    "curve": "what other sizes leave out",
    "counts": "how often each was drawn",
    "entropy": "the teacher\u2019s entropy",
    "states": "hidden states",
    "scale": "their scales",
    "logits": "logits",
    "counted": "which positions count",
    "hash": "content hashes",
}
_LEADS = {
    "topk": "The most probable next tokens and the control tokens are kept; to the student all others are one sum. "
    "So the L1 error of the loss\u2019s gradient in the student\u2019s logits is, token by token, at most twice the "
    "probability left out; the L1 norm of the whole gradient is at most 2. What rounding adds is not in this bound.",
    "sampled": "Draws from the teacher leave nothing out on average: they add noise to the gradient, and no bias.",
    "hidden": "Hidden states with the teacher\u2019s head are its whole distribution, up to rounding.",
    "dense": "Logits are the teacher\u2019s whole distribution.",
}
_QUANTILES = {"mean": "mean", "p50": "median", "p90": "90th percentile", "p99": "99th percentile", "max": "largest"}


@dataclass(frozen=True)
class Size:
    """A number of entries per token: the mean probability that it leaves out and the bytes that it takes."""

    entries: int
    left_out: float | None
    bytes_per_token: float | None
    stored: bool = False


@dataclass(frozen=True)
class Kept:
    """A split of a logit store, by the manifest of its record stage."""

    split: str
    found: dict[str, Any]

    @property
    def codec(self) -> dict[str, Any]:
        return mapping(self.found.get("codec"))

    @property
    def kind(self) -> str:
        return str(self.codec.get("kind", MISSING))

    @property
    def entries(self) -> float | None:
        return number(self.codec.get("entries"))

    @property
    def tokens(self) -> float:
        """That count in the loss; at least one."""
        tokens = number(self.found.get("tokens")) or 1.0
        return tokens if tokens >= 1 else 1.0

    @cached_property
    def bytes(self) -> dict[str, float]:
        """By array."""
        sizes = mapping(self.found.get("bytes"))
        return {str(name): size for name, value in sizes.items() if (size := number(value)) is not None}

    @property
    def left_out(self) -> dict[str, float]:
        """Mean and percentiles over tokens of the probability left out; empty where nothing is or it is unknown."""
        tail = mapping(self.found.get("tail_mass"))
        return {name: share for name in _QUANTILES if (share := number(tail.get(name))) is not None}

    @cached_property
    def sizes(self) -> list[Size]:
        """Other numbers of entries and the stored one, by number.

        Bytes of the others are estimated from those measured for an entry. Ascending ids lie as differences on disk:
        of half as many, each is about twice as large, a bit longer.
        """
        curve = {
            int(s): number(v) for s, v in mapping(self.found.get("curve")).items() if s.isdecimal() and len(s) < 10
        }
        curve.pop(0, None)
        now = self.entries
        if not curve or now is None or not 1 <= now < 1e9:
            return [Size(s, curve[s], None) for s in sorted(curve)]
        whole, (ids, logprobs) = self.takes, (self.bytes.get(name, 0.0) / self.tokens / now for name in _PER_ENTRY)
        found = {int(now): Size(int(now), self.left_out.get("mean", curve.get(int(now))), whole, stored=True)}
        for s, share in curve.items():
            other = s * (max(ids + math.log2(now / s) / 8, 0.0) + logprobs) - now * (ids + logprobs)
            found.setdefault(s, Size(s, share, whole + other if whole is not None and ids else None))
        return [found[s] for s in sorted(found)]

    @property
    def total(self) -> float | None:
        """Bytes of all arrays."""
        return sum(self.bytes.values()) if self.bytes else None

    @property
    def takes(self) -> float | None:
        """Bytes per token."""
        return self.total / self.tokens if self.total is not None else None


def stored(run: Run) -> Html | None:
    found = {stage.name: kept for stage in run.stages if stage.do == "record" and (kept := _splits(stage))}
    if not found:
        return None
    colours = {stage.name: model.colour for model in run.models for stage in model.stages.values()}
    source = {stage.name: stage.source for stage in run.stages}
    parts = []
    for name, kept in found.items():
        heading = f"{name}: what {source[name]} says" if source[name] else name
        parts += [el("h3", heading, class_="group") if len(found) > 1 else None]
        parts += _store(name, kept, colours.get(source[name] or "", "model-0"))
    trained = [kept[0] for kept in found.values()]
    leads = [_LEADS[kind] for kind in dict.fromkeys(k.kind for k in trained) if kind in _LEADS]
    return section("stored", "Stored teacher", _finding(trained), " ".join(leads), *parts)


def _splits(stage: Stage) -> list[Kept]:
    """What students train on first."""
    store = mapping(stage.manifest.get("store"))
    return [
        Kept(str(name), found) for name in sorted(store, key=lambda s: s != "train") if (found := mapping(store[name]))
    ]


def _finding(trained: list[Kept]) -> str:
    if len(trained) > 1:
        return "What the stored teachers leave out"
    kept = trained[0]
    if "mean" in kept.left_out:
        share = _share(kept.left_out["mean"])
        return f"{count(kept.entries)} entries per token leave out {share} of the teacher\u2019s probability"
    if kept.takes is not None:
        return f"The stored teacher takes {decimal(kept.takes)} bytes per token"
    return "What the stored teacher leaves out"


def _store(name: str, kept: list[Kept], colour: str) -> list[Html | None]:
    """Tables and figures of one store."""
    train = kept[0]
    pictures = [made for make in (_distribution, _shards, _trade) if (made := make(name, train, colour))]
    return [
        _split_table(name, kept),
        _left_out_table(name, train) if train.left_out else None,
        el("div", pictures, class_="grid") if pictures else None,
        _size_table(name, train) if len(train.sizes) > 1 else None,
        _array_table(name, kept) if any(k.bytes for k in kept) else None,
    ]


def _distribution(name: str, kept: Kept, colour: str) -> Html | None:
    histogram = mapping(kept.found.get("tail_histogram"))
    at_most, tokens = (numbers(histogram.get(key)) for key in ("at_most", "tokens"))
    left = kept.left_out
    marks = {words: left[key] for key, words in (("mean", "mean"), ("p99", "99th percentile")) if key in left}
    half, most = _share(left.get("p50")), _share(left.get("p99"))
    title = f"Half of the tokens miss less than {half}, one in a hundred more than {most}"
    picture = stored_plots.distribution(colour, at_most, tokens, marks, f"Tokens by what {name} leaves out. {title}")
    caption = f"Tokens of stage {name} by the probability that is left out of them."
    return figure(title, picture, caption) if picture else None


def _shards(name: str, kept: Kept, colour: str) -> Html | None:
    found = mapping(kept.found.get("tail_by_shard"))
    lines = {words: numbers(found.get(key)) for key, words in (("mean", "mean"), ("p99", "99th percentile"))}
    picture = stored_plots.by_shard(colour, lines, f"What {name} leaves out, shard by shard.")
    if picture is None:
        return None
    mean, high = lines.values()
    title = f"Shard to shard the mean is {_span(mean)}"
    return figure(title, picture, f"{count(len(mean))} shards; the 99th percentile is {_span(high)}.")


def _span(values: list[float]) -> str:
    finite = [value for value in values if math.isfinite(value)]
    return f"{_share(min(finite))} to {_share(max(finite))}" if finite else MISSING


def _trade(name: str, kept: Kept, colour: str) -> Html | None:
    points = [
        (size.entries, size.bytes_per_token, size.left_out, size.stored)
        for size in kept.sizes
        if size.bytes_per_token is not None and size.left_out is not None
    ]
    picture = stored_plots.against_bytes(colour, points, f"What other sizes than that of {name} leave out and take.")
    title = "What another number of entries would have left out and taken"
    return (
        figure(title, picture, "By entries per token; filled: stored. Bytes of the others are estimates.")
        if picture
        else None
    )


def _share(fraction: float | None) -> str:
    """A percentage with the digits that small ones need."""
    return MISSING if fraction is None else f"{decimal(100 * fraction)}{THIN}%"


def _per_token(size: float | None, kept: Kept) -> str:
    return decimal(size / kept.tokens if size is not None else None)


def _codec(kept: Kept) -> str:
    entries = count(kept.entries)
    words = {
        "topk": f"{entries} most probable, in {count(number(kept.codec.get('bits')))} bits",
        "sampled": f"{entries} draws, {kept.codec.get('draws', MISSING)}",
        "hidden": f"hidden states, {kept.codec.get('dtype', MISSING)}",
        "dense": "all logits",
    }
    return words.get(kept.kind, kept.kind)


def _split_table(name: str, kept: list[Kept]) -> Html:
    optional = {
        "teacher_entropy": ["teacher\u2019s entropy", el("small", "nats")],
        "unique_ids": "distinct ids per token",
    }
    shown = {key: head for key, head in optional.items() if any(key in k.found for k in kept)}
    rows = []
    for k in kept:
        sizes = [count(number(k.found.get(key))) for key in ("rows", "tokens", "shards")]
        takes = [count(k.total, "B", "si"), decimal(k.takes)]
        rest = [decimal(number(k.found.get(key))) for key in shown]
        rows.append(row(k.split.replace("_", " "), [el("td", _codec(k), class_="text"), *sizes, *takes, *rest]))
    heads: list[Child] = ["split", el("th", "kept of a token", scope="col", class_="text"), "rows", "tokens", "shards"]
    caption = f"What stage {name} wrote. Tokens are those that count in the loss; bytes are on disk, compressed."
    return table(caption, [*heads, "size", "bytes per token", *shown.values()], rows)


def _left_out_table(name: str, kept: Kept) -> Html:
    shown = {key: words for key, words in _QUANTILES.items() if key in kept.left_out}
    values = [kept.left_out[key] for key in shown]
    rows = [
        row("probability left out", [_share(share) for share in values]),
        row("gradient error, at most", [decimal(2 * share) for share in values]),
    ]
    caption = (
        f"Left out of a token by stage {name}, and the bound of the L1 error of the gradient in the student\u2019s "
        "logits. Percentiles are upper edges of narrow bins."
    )
    return table(caption, ["", *shown.values()], rows)


def _size_table(name: str, kept: Kept) -> Html:
    now = next((size for size in kept.sizes if size.stored), None)
    rows = []
    for size in kept.sizes:
        about = "" if size.stored or size.bytes_per_token is None else f"\u2248{THIN}"
        total = size.bytes_per_token * kept.tokens if size.bytes_per_token is not None else None
        bound = decimal(2 * size.left_out if size.left_out is not None else None)
        takes = [about + decimal(size.bytes_per_token), about + count(total, "B", "si"), _against(size, now)]
        head: Child = [str(size.entries), el("small", "stored") if size.stored else None]
        rows.append(row(head, [_share(size.left_out), bound, *takes], "total" if size.stored else None))
    caption = (
        f"What other sizes than that of stage {name} would have left out, on average over tokens, and taken. Bytes of "
        "sizes that were not stored are estimates from those measured for an entry: of half as many ids each lies "
        "about twice as far from the last and takes one bit more, of twice as many one bit less."
    )
    heads: list[Child] = ["entries per token", "probability left out", "gradient error, at most", "bytes per token"]
    return table(caption, [*heads, "size", "against stored"], rows)


def _against(size: Size, now: Size | None) -> str:
    if size.stored or now is None or not now.bytes_per_token or size.bytes_per_token is None:
        return MISSING
    change = size.bytes_per_token / now.bytes_per_token - 1
    if not math.isfinite(change):
        return MISSING
    return f"{'+' if change > 0 else chr(0x2212)}{abs(100 * change):.0f}{THIN}%"


def _array_table(name: str, kept: list[Kept]) -> Html:
    recorded = {array for k in kept for array in k.bytes}
    arrays = [array for array in _ARRAYS if array in recorded] + sorted(recorded - set(_ARRAYS))
    sizes = {_ARRAYS.get(array, array): [k.bytes.get(array) for k in kept] for array in arrays}
    sizes["together"] = [k.total for k in kept]
    rows = []
    for words, values in sizes.items():
        pairs = [(count(v, "B", "si"), _per_token(v, k)) for k, v in zip(kept, values, strict=True)]
        rows.append(row(words, [text for pair in pairs for text in pair], "total" if words == "together" else None))
    heads: list[Child] = [
        f"{k.split.replace('_', ' ')}, {words}" for k in kept for words in ("size", "bytes per token")
    ]
    return table(f"What stage {name} wrote, by array.", ["array", *heads], rows)

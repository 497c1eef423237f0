"""What the run achieved: the family, its figures, recovery after pruning, and answers to held-out images."""

from __future__ import annotations

import base64
import binascii
import io
from typing import Any

import numpy as np
from PIL import Image

from ministral_jax.report import plots
from ministral_jax.report.collect import Model, Run, mapping
from ministral_jax.report.family import family_figure
from ministral_jax.report.markup import Child, Html, el, figure, model_name, paragraph, row, section, table
from ministral_jax.report.units import MISSING, THIN, count, decimal, factor, listing, percent, plural

_MOST_IMAGES = 48
_LARGEST_PNG = 20_000
"""Bytes; together they keep a page below 2 MB of images."""


def headline(run: Run) -> str:
    """The run in one sentence."""
    size = count(run.parent.figures["parameters"]) if run.parent and run.parent.figures["parameters"] else None
    made = [child for child in run.children if child.made]
    speeds = [child.speedup for child in made if child.speedup is not None]
    if size and made and len(speeds) == len(made) and min(speeds) > 1.05:
        each = "which reaches" if len(made) == 1 else "each reaching"
        least = factor(min(speeds))
        saved = f"{each} its from-scratch KL with at least {least} fewer tokens"
        return f"From one {size} parent, {plural(len(made), 'smaller model')}, {saved}"
    if size and made:
        return f"From one {size} parent, {plural(len(made), 'smaller model')}"
    if size:
        return f"A parent of {size} parameters, and no child yet"
    return "No model has been made yet"


def family(run: Run) -> Html | None:
    if not any(model.made for model in run.models):
        return None
    summary = run.summary
    views = [
        el("div", Html(family_figure(summary, portrait)), class_=("landscape", "portrait")[portrait])
        for portrait in (False, True)
    ]
    caption = (
        "Towers are to scale: area is parameters, a row is a layer; an arrow is one step of pruning and distilling."
    )
    return el("figure", views, el("figcaption", caption), class_="hero", id="family")


def numbers(run: Run) -> Html | None:
    if not any(model.made for model in run.models):
        return None
    headers: list[Child] = [
        "model",
        "parameters",
        [el("span", "tokens"), el("small", "whole lineage")],
        [el("span", "KL after surgery"), el("small", "nats, held out")],
        "KL distilled",
        "KL from scratch",
        "fewer tokens than scratch",
        "bits per byte",
        "images read right",
    ]
    rows = [row(model_name(m.name, m.colour), _figures(m)) for m in run.models if m.made]
    finding = _numbers_finding(run)
    caption = (
        "Held-out figures of every model at its end. KL is from the parent\u2019s next-token distribution to the "
        "model\u2019s; the whole lineage counts the distillation of the models it was cut from too."
    )
    return section("numbers", "The family in numbers", finding, None, table(caption, headers, rows))


def _figures(model: Model) -> list[Child]:
    f = model.figures
    tokens = [count(f["tokens"]), el("small", count(f["tokens_lineage"])) if f["tokens_lineage"] is not None else None]
    lead = "best" if (f["kl_final"] or 0) < (f["kl_scratch"] or 0) else None
    scores: list[Child] = [decimal(f["bits_per_byte"], 3), percent(f["digit_accuracy"])]
    decoder = el("small", f"{count(f['decoder_parameters'])} decoder") if f["decoder_parameters"] is not None else None
    recovery: list[Child] = [
        decimal(f["kl_after_surgery"]),
        el("td", decimal(f["kl_final"]), class_=lead),
        decimal(f["kl_scratch"]),
        f">{THIN}{factor(model.speedup)}" if model.crossing and model.crossing.tokens == 0 else factor(model.speedup),
    ]
    return [[count(f["parameters"]), decoder], tokens, *recovery, *scores]


def _numbers_finding(run: Run) -> str:
    parent = run.parent.figures["bits_per_byte"] if run.parent else None
    last = next((c for c in reversed(run.children) if c.figures["bits_per_byte"] is not None), None)
    size = run.parent.figures["parameters"] if run.parent else None
    if parent is None or last is None or not size or not last.figures["parameters"]:
        return "Size, tokens and held-out quality"
    share, bits = percent(last.figures["parameters"] / size), decimal(last.figures["bits_per_byte"], 3)
    has = f"{last.name} has {share} of the parent\u2019s parameters"
    return f"{has} and needs {bits} bits per byte, the parent {decimal(parent, 3)}"


def recovery(run: Run) -> Html | None:
    """One plot for each child: the pruned start against the same shape drawn at random."""
    figures = [made for child in run.children if (made := _recovery_figure(child))]
    if not figures:
        return None
    speeds = [c.speedup for c in run.children if c.speedup is not None]
    finding = "How each child recovers from surgery"
    if speeds and min(speeds) > 1.05:
        low, high = factor(min(speeds)), factor(max(speeds))
        finding = f"A pruned start needs {low if low == high else f'{low} to {high}'} fewer tokens than starting over"
    lead = (
        "Pruned and random start see the same teacher, data and number of tokens. The ring is where the pruned start "
        "reaches the KL at which the random start ends its short-context stage."
    )
    compared = any(child.crossing for child in run.children)
    return section("recovery", "Distillation", finding, lead if compared else None, el("div", figures, class_="grid"))


def _recovery_figure(child: Model) -> Html | None:
    pruned, scratch = (
        [child.stages[role].evals for role in roles if role in child.stages]
        for roles in (("short", "base"), ("scratch_short", "scratch_base"))
    )
    title = _recovery_title(child)
    picture = plots.kl_curves(child.colour, pruned, scratch, child.crossing, f"Held-out KL against tokens. {title}")
    return figure(title, picture, _recovery_caption(child)) if picture else None


def _recovery_title(child: Model) -> str:
    found, speed = child.crossing, child.speedup
    if found and found.tokens is None:
        return f"{child.name} has not reached its scratch baseline\u2019s KL of {decimal(found.kl)}"
    if found and found.tokens == 0:
        return f"{child.name} is ahead of its trained scratch baseline before any training"
    if speed is not None and speed > 1.05:
        return f"{child.name} reaches its scratch baseline\u2019s KL with {factor(speed)} fewer tokens"
    if speed is not None:
        return f"{child.name} reaches its scratch baseline\u2019s KL, but not sooner"
    before, after = child.figures["kl_after_surgery"], child.figures["kl_final"]
    verb = "recovers to" if before is not None and after is not None and after < before else "is at"
    return f"{child.name} {verb} a KL of {decimal(after)}"


def _recovery_caption(child: Model) -> str:
    f, parts = child.figures, []
    if f["kl_after_surgery"] is not None:
        parts.append(f"{decimal(f['kl_after_surgery'])} right after surgery")
    if f["kl_final"] is not None:
        parts.append(f"{decimal(f['kl_final'])} at the end")
    if (found := child.crossing) is not None:
        reached = f", which the pruned start reaches after {count(found.tokens)}" if found.tokens else ""
        parts.append(
            f"the random start ends at {decimal(found.kl)} after {count(found.scratch_tokens)} tokens{reached}"
        )
    running = [s.name for s in child.stages.values() if s.state == "unfinished"]
    return "; ".join(parts) + (f" ({listing(running)} not finished)." if running else ".")


def images(run: Run) -> Html | None:
    shown = [(item, png) for raw in _list(run.samples.get("images")) if (png := _png(item := mapping(raw)))]
    if not shown:
        return None
    questions = {str(item.get("question", "")) for item, _ in shown}
    cards = [_card(item, png, run, alone=len(questions) > 1) for item, png in shown[:_MOST_IMAGES]]
    total = len(shown)
    right = {m.name: sum(_is_right(item, m.name) for item, _ in shown) for m in run.models if _answered(shown, m.name)}
    scores = ", ".join(f"{name} {n}" for name, n in right.items())
    finding = f"Read right of {total} held-out images: {scores}" if right else f"{total} held-out images"
    if right and set(right.values()) == {total}:
        finding = (
            f"{'Every model reads' if len(right) > 1 else 'The model reads'} all {total} of these held-out images right"
        )
    asked = questions.pop() if len(questions) == 1 else None
    lead = f"Asked: \u201c{asked}\u201d" if asked else None
    more = f"The first {_MOST_IMAGES} of {total} are shown." if total > _MOST_IMAGES else None
    return section("images", "Held-out images", finding, lead, el("ul", cards, class_="cards"), paragraph(more, "note"))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _answered(shown: list[tuple[dict[str, Any], str]], name: str) -> bool:
    return any(name in mapping(item.get("answers")) for item, _ in shown)


def _is_right(item: dict[str, Any], name: str) -> bool:
    answer = mapping(item.get("answers")).get(name)
    return answer is not None and str(answer).strip() == str(item.get("label")).strip()


def _card(item: dict[str, Any], png: str, run: Run, alone: bool) -> Html:
    label = str(item.get("label", MISSING))
    rows = []
    for model in run.models:
        if (answer := mapping(item.get("answers")).get(model.name)) is None:
            continue
        verdict = ("right", "\u2713") if _is_right(item, model.name) else ("wrong", "\u2717")
        said = el("span", str(answer).strip()[:40] or MISSING, class_=f"said {verdict[0]}")
        mark = el("span", verdict[1], class_=verdict[0], role="img", aria_label=verdict[0])
        rows.append([el("dt", model_name(model.name, model.colour)), el("dd", said, mark)])
    picture = el("img", src=f"data:image/png;base64,{png}", alt=f"held-out image, label {label}", loading="lazy")
    question = [str(item.get("question", "")), el("br")] if alone else None
    return el("li", picture, el("p", question, "label: ", el("strong", label)), el("dl", rows, class_="answers"))


def _png(item: dict[str, Any]) -> str | None:
    """The image as base64 PNG; None when it is neither a small PNG nor pixels [H, W, 3] of 0 to 255."""
    try:
        if isinstance(item.get("png"), str):
            raw = base64.b64decode(item["png"], validate=True)
        else:
            pixels = np.asarray(item.get("pixels"), np.float64)
            if pixels.ndim != 3 or pixels.shape[-1] != 3 or max(pixels.shape) > 512:
                return None
            buffer = io.BytesIO()
            Image.fromarray(np.nan_to_num(pixels).clip(0, 255).astype(np.uint8)).save(buffer, "PNG", optimize=True)
            raw = buffer.getvalue()
    except (binascii.Error, ValueError, TypeError):
        return None
    return base64.b64encode(raw).decode() if raw.startswith(b"\x89PNG\r\n") and len(raw) <= _LARGEST_PNG else None


def texts(run: Run) -> Html | None:
    entries = [mapping(item) for item in _list(run.samples.get("text"))[:12]]
    parts = []
    for entry in entries:
        said = mapping(entry.get("continuations"))
        lines = [
            el("dd", model_name(m.name, m.colour), el("span", str(said[m.name]))) for m in run.models if m.name in said
        ]
        parts.append([el("dt", str(entry.get("prompt", ""))), lines])
    if not parts:
        return None
    return section(
        "text", "Text", "The same beginnings, continued by each model", None, el("dl", parts, class_="continuations")
    )

"""How the run got there: the parent, the surgery, size and cost, the stages and their curves."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

from ministral_jax.models.spec import ModelSpec
from ministral_jax.report import plots
from ministral_jax.report.collect import Model, Run, Stage, mapping, number, numbers
from ministral_jax.report.markup import Child, Html, el, figure, model_name, paragraph, row, section, table
from ministral_jax.report.units import MISSING, count, decimal, duration, factor, percent, ranges

Figures = list[Html]


def parent(run: Run) -> Html | None:
    stage = run.parent.stages.get("base") if run.parent else None
    if run.parent is None or stage is None:
        return None
    alt = f"Training loss and held-out cross-entropy of {stage.name} against tokens."
    picture = plots.loss_curve(
        run.parent.colour, stage.train, stage.evals, "ce", "cross-entropy, nats per token", alt, (10, 3.6)
    )
    if picture is None:
        return None
    bits, seen = stage.last("bits_per_byte"), count(stage.tokens)
    finding = f"The parent has seen {seen} tokens"
    if bits is not None:
        finding = f"The parent reaches {decimal(bits, 3)} bits per byte after {seen} tokens"
    caption = "Next-token loss of each step with its moving average; rings are held-out data."
    return section("parent", "The parent", finding, None, figure("Loss against tokens", picture, caption, "wide"))


def surgery(run: Run) -> Html | None:
    cut = [child for child in run.children if "pruned" in child.stages and child.stages["pruned"].manifest.get("prune")]
    if not cut:
        return None
    groups = (
        ("Layers: the score of each, and which went", _layer_figure),
        ("Width: energy along the principal directions", _width_figure),
        ("Feed-forward: scores of the neurons in each layer", _mlp_figure),
    )
    parts = [_cut_table(cut, run)]
    for title, make in groups:
        if figures := [made for child in cut if (made := make(child, child.stages["pruned"]))]:
            parts += [el("h3", title, class_="group"), el("div", figures, class_="grid")]
    return section("surgery", "Surgery", _surgery_finding(cut), None, parts)


def _surgery_finding(cut: list[Model]) -> str:
    dearest = [
        (kl, step, child.name) for child in cut for step, kl in _increments(child.stages["pruned"]) if math.isfinite(kl)
    ]
    if not dearest:
        return "What was cut"
    kl, step, name = max(dearest)
    return f"The dearest cut is {_STEPS.get(step, step)} in {name}: it adds {decimal(kl)} nats of KL"


_STEPS = {
    "layers": "dropping layers",
    "width": "narrowing the width",
    "mlp": "thinning the feed-forward",
    "tie": "tying the head",
}
_AFTER = {
    "layers": "layers",
    "width": "width",
    "mlp": "feed-forward",
    "tie": "tying",
    "projector": "projector",
    "rope": "RoPE",
}


def _increments(stage: Stage) -> list[tuple[str, float]]:
    before, steps = 0.0, []
    for step, kl in stage.surgery_kl.items():
        steps.append((step, kl - before))
        before = kl
    return steps


def _cut_table(cut: list[Model], run: Run) -> Html:
    sources = {stage.name: stage for stage in run.stages}
    recorded = list(dict.fromkeys(step for child in cut for step in child.stages["pruned"].surgery_kl))
    steps = sorted(recorded, key=lambda step: list(_AFTER).index(step) if step in _AFTER else len(_AFTER))
    after = [f"KL after {_AFTER.get(step, step)}" for step in steps]
    rows = []
    for child in cut:
        stage = child.stages["pruned"]
        source = sources.get(stage.source or "")
        kl = [decimal(stage.surgery_kl.get(step)) for step in steps]
        rows.append(row(_from(child, stage), [*_cuts(stage, source.spec if source else None), *kl]))
    headers: list[Child] = ["child", "layers", "width", "feed-forward", "head", *after]
    return table(
        "What each child lost against the model it was cut from, and its held-out KL to that model after every step.",
        headers,
        rows,
    )


def _from(child: Model, stage: Stage) -> Child:
    return [model_name(child.name, child.colour), el("small", f"from {stage.source}") if stage.source else None]


def _cuts(stage: Stage, before: ModelSpec | None) -> list[Child]:
    after = stage.spec
    if before is None or after is None:
        return [MISSING] * 4
    dropped = _dropped(stage)
    shares = _kept_shares(stage)
    retained = number(stage.surgery("width").get("retained_energy"))
    notes = (
        f"without {ranges(dropped)}" if dropped else None,
        f"{percent(retained)} of the energy" if retained is not None else None,
        f"{percent(statistics.fmean(shares))} of the score" if shares else None,
    )
    sizes = ((before.layers, after.layers), (before.width, after.width), (before.mlp_width, after.mlp_width))
    cells: list[Child] = [
        el("td", f"{old} \u2192 {new}" if old != new else f"{new}", el("small", note) if note and old != new else None)
        for (old, new), note in zip(sizes, notes, strict=True)
    ]
    return [*cells, ("tied" if before.tied else "now tied") if after.tied else "its own"]


def _mlp_layers(stage: Stage) -> list[dict[str, Any]]:
    layers = stage.surgery("mlp").get("layers")
    return [mapping(layer) for layer in layers] if isinstance(layers, list) else []


def _kept_shares(stage: Stage) -> list[float]:
    """Share of the neurons' score that was kept, per layer."""
    shares = [number(layer.get("kept_share")) for layer in _mlp_layers(stage)]
    return [share for share in shares if share is not None and math.isfinite(share)]


def _dropped(stage: Stage) -> list[int]:
    step = stage.surgery("layers")
    kept = set(_indices(step.get("kept")))
    return [i for i in range(len(numbers(step.get("scores")))) if i not in kept]


def _indices(values: object) -> list[int]:
    return [int(v) for v in numbers(values) if math.isfinite(v) and abs(v) < 1e9]


def _layer_figure(child: Model, stage: Stage) -> Html | None:
    step = stage.surgery("layers")
    scores, dropped = numbers(step.get("scores")), _dropped(stage)
    title = f"{child.name} drops {len(dropped)} of {len(scores)} layers: {ranges(dropped)}"
    picture = plots.layer_scores(child.colour, scores, _indices(step.get("kept")), f"Score of every layer. {title}")
    kind = str(step.get("score"))
    return figure(title, picture, f"Score: {_LAYER_SCORES.get(kind, kind)}; layers count from 0.") if picture else None


_LAYER_SCORES = {
    "norm_ratio": "mean norm of the layer\u2019s output over that of its input",
    "norm_ratio_inverse": "inverse of the mean norm of the layer\u2019s output over that of its input",
    "block_influence": "one minus the mean cosine of the layer\u2019s input and output",
}


def _width_figure(child: Model, stage: Stage) -> Html | None:
    step = stage.surgery("width")
    curve = mapping(step.get("spectrum"))
    if not curve or stage.spec is None:
        return None
    index, energy, retained = (
        numbers(curve.get("index")),
        numbers(curve.get("energy")),
        number(step.get("retained_energy")),
    )
    kept, before = stage.spec.width, int(max([i for i in index if math.isfinite(i)], default=0)) + 1
    title = f"{child.name} keeps {kept} of {before} directions and {percent(retained)} of the energy"
    picture = plots.spectrum(child.colour, index, energy, kept, retained, f"Energy spectrum. {title}")
    basis = {"pca": "one PCA over all norm inputs"}.get(str(step.get("basis")), f"basis: {step.get('basis')}")
    return (
        figure(title, picture, f"Mean square of the residual stream, {basis}; the dotted line is the cut.")
        if picture
        else None
    )


def _mlp_figure(child: Model, stage: Stage) -> Html | None:
    step = stage.surgery("mlp")
    layers, shares = [], _kept_shares(stage)
    for layer in _mlp_layers(stage):
        kept = numbers(layer.get("kept"))
        layers.append((numbers(layer.get("all")), kept[0] if kept else math.nan))
    keeps = f"{child.name} keeps {count(number(step.get('kept')))} neurons per layer"
    title = f"{keeps} and {percent(statistics.fmean(shares))} of their score" if shares else keeps
    picture = plots.mlp_scores(child.colour, layers, f"Neuron scores by layer. {title}")
    caption = "Line: all neurons; thick: middle half; gap: median; above the dark tick: kept."
    return figure(title, picture, caption) if picture else None


def parameters_of(spec: ModelSpec) -> dict[str, int]:
    """Parameters by component; they add up to `spec.parameters`."""
    attention = spec.width * spec.head_width * 2 * (spec.heads + spec.kv_heads)
    vision = spec.vision
    projector = 0
    if vision is not None:
        projector = vision.width + vision.merge**2 * vision.width**2 + vision.width * spec.width + spec.width**2
    return {
        "embedding": spec.vocab * spec.width,
        "attention": spec.layers * attention,
        "feed-forward": spec.layers * 3 * spec.width * spec.mlp_width,
        "norms": (2 * spec.layers + 1) * spec.width,
        "head": 0 if spec.tied else spec.vocab * spec.width,
        "vision tower": spec.vision_parameters - projector,
        "projector": projector,
    }


def flops_of(spec: ModelSpec, length: int) -> dict[str, int]:
    """Forward FLOPs of one token by component at context `length`; they add up to `spec.flops_per_token(length)`."""
    sizes = parameters_of(spec)
    return {
        "attention, weights": 2 * sizes["attention"],
        "attention, scores": spec.layers * 2 * spec.heads * spec.head_width * length,
        "feed-forward": 2 * sizes["feed-forward"],
        "head": 2 * spec.vocab * spec.width,
    }


def cost(run: Run) -> Html | None:
    models = [(model, model.spec) for model in run.models if model.spec]
    if not models:
        return None
    length = min(spec.context for _, spec in models)
    flops = [spec.flops_per_token(length) for _, spec in models]
    largest, smallest = models[0][0].name, models[-1][0].name
    finding = f"A token through {largest} takes {count(flops[0], 'FLOP', 'si')}"
    if len(models) > 1:
        finding = f"A token through {smallest} takes {factor(flops[0] / flops[-1])} fewer FLOPs than through {largest}"
    tables = (
        _component_table("Parameters", models, parameters_of, lambda n: count(n)),
        _component_table(
            f"Forward FLOPs of the decoder for one token, at a context of {count(length)} tokens",
            models,
            lambda spec: flops_of(spec, length),
            lambda n: count(n, kind="si"),
        ),
    )
    return section("cost", "Size and cost", finding, None, *tables)


def _component_table(
    caption: str,
    models: list[tuple[Model, ModelSpec]],
    parts_of: Callable[[ModelSpec], dict[str, int]],
    write: Callable[[int], str],
) -> Html:
    columns = [(model, parts_of(spec)) for model, spec in models]
    largest = max(max(parts.values()) for _, parts in columns) or 1
    rows = []
    for name in columns[0][1]:
        cells: list[Child] = [
            el("td", write(parts[name]) if parts[name] else MISSING, _bar(parts[name] / largest, model), class_="text")
            for model, parts in columns
        ]
        rows.append(row(name, cells))
    totals: list[Child] = [el("td", write(sum(parts.values())), class_="text") for _, parts in columns]
    rows.append(row("together", totals, "total"))
    heads: list[Child] = [el("th", model_name(m.name, m.colour), scope="col", class_="text") for m, _ in columns]
    return table(f"{caption}.", ["component", *heads], rows)


def _bar(share: float, model: Model) -> Html:
    return el(
        "span",
        el("i", style=f"width:{100 * share:.2f}%"),
        class_="bar",
        style=f"--accent:var(--{model.colour})",
        aria_hidden="true",
    )


def stages(run: Run) -> Html:
    done = sum(stage.state == "finished" for stage in run.stages)
    finding = f"{done} of {len(run.stages)} stages finished"
    if run.wall_seconds is not None:
        finding += f" in {duration(run.wall_seconds)}"
    words: list[Child] = [el("th", word, scope="col", class_="text") for word in ("does", "from", "state")]
    headers: list[Child] = ["stage", *words, "tokens", "steps", "time", "tokens/s", "digest"]
    digests = {stage.name: stage.digest for stage in run.stages}
    body = [row(stage.name, _stage_cells(stage, digests)) for stage in run.stages]
    lead = "A digest is the SHA-256 of a stage\u2019s manifest; a stage records that of the one it was made from."
    notes = [el("p", note, class_="note") for note in [*_broken(run.stages, digests), *run.notes]]
    return section("stages", "Stages", finding, lead, table("Stages in the order of the recipe.", headers, body), notes)


_OTHERS = {"teacher": "taught by", "judge": "judged by"}


def _stage_cells(stage: Stage, digests: dict[str, str | None]) -> list[Child]:
    recorded = el("small", stage.parent_digest[:10], class_="mono") if stage.parent_digest else None
    tokens = stage.tokens if stage.do in ("train", "distill", "record", "sft", "reward") else None
    others = [
        f"{word} {stage.settings[key]}" for key, word in _OTHERS.items() if isinstance(stage.settings.get(key), str)
    ]
    return [
        el("td", stage.do, class_="text"),
        el(
            "td",
            stage.source or ("random start" if stage.do in ("train", "distill") else MISSING),
            recorded,
            [el("small", other) for other in others],
            class_="text",
        ),
        el("td", stage.state, class_="text"),
        count(tokens),
        count(stage.steps or None),
        duration(number(stage.manifest.get("seconds"))),
        count(_speed(stage)),
        el("td", el("code", (digests[stage.name] or MISSING)[:10])),
    ]


def _speed(stage: Stage) -> float | None:
    speeds = [row["tokens_per_second"] for row in stage.train if math.isfinite(row.get("tokens_per_second", math.nan))]
    return statistics.median(speeds) if speeds else None


def _broken(stages: list[Stage], digests: dict[str, str | None]) -> list[str]:
    """Stages that were made from something else than what is there now."""
    return [
        f"{stage.name} was made from another {stage.source} than the one that is here now."
        for stage in stages
        if stage.parent_digest and stage.source in digests and digests[stage.source] != stage.parent_digest
    ]


def versions(run: Run) -> Html:
    """Packages and commits that made the finished stages; several values where stages differ."""
    found: dict[str, list[str]] = {}
    for stage in run.stages:
        git = stage.manifest.get("git")
        pairs = {**mapping(stage.manifest.get("versions")), **({"commit": str(git)[:10]} if git else {})}
        for package, version in pairs.items():
            known = found.setdefault(str(package), [])
            if str(version) not in known:
                known.append(str(version))
    text = " \u00b7 ".join(f"{package} {' / '.join(values)}" for package, values in found.items())
    return paragraph(text, "")

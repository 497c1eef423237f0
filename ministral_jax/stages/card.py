"""The model card of an export, `README.md`: what the model is, what it comes from, how good it is, how it is loaded."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError, field_validator

import ministral_jax
from ministral_jax.errors import UserError
from ministral_jax.explain import explain
from ministral_jax.interop.hub import hub_name
from ministral_jax.losses.held_out import HeldOut
from ministral_jax.models.spec import ModelSpec
from ministral_jax.settings import Frozen
from ministral_jax.stages.figures import share_of
from ministral_jax.stages.manifest import Manifest, ancestry, finished

NAME = "README.md"


class CardConfig(Frozen):
    """What the model card says that no manifest knows."""

    license: str | None = None
    """Of the parent, as a hub calls it, such as `apache-2.0`; it is inherited. None: unknown."""
    base_model: str | None = None
    """The parent's name on a hub; None: that of the import, where it has one."""
    languages: tuple[str, ...] = ()
    """Of the data, by their codes, such as `en`."""

    @field_validator("license")
    @classmethod
    def _is_an_id(cls, value: str | None) -> str | None:
        return _matching(r"[a-z0-9][a-z0-9.+-]*", value, "a hub knows licences by ids such as apache-2.0, mit or other")

    @field_validator("base_model")
    @classmethod
    def _is_a_name(cls, value: str | None) -> str | None:
        return _matching(r"[\w.-]+/[\w.-]+", value, "a model on a hub is OWNER/NAME")

    @field_validator("languages")
    @classmethod
    def _are_codes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for code in value:
            _matching(r"[a-z]{2,3}(-\w+)*", code, "languages go by codes such as en or pt-BR")
        return value


def _matching(pattern: str, value: str | None, said: str) -> str | None:
    if value is not None and not re.fullmatch(pattern, value):
        raise ValueError(said)
    return value


FLAGS = {"license": "--license", "base_model": "--base-model", "languages": "--language"}


def read_card(values: dict[str, Any]) -> CardConfig:
    """From the command line. Raises `UserError`: a value that a hub would not take, by its flag."""
    try:
        return CardConfig.model_validate(values)
    except ValidationError as error:
        problems = [problem | {"loc": (FLAGS[str(problem["loc"][0])],)} for problem in error.errors()]
        raise UserError("; ".join(explain(problem, CardConfig) for problem in problems)) from None


@dataclass(frozen=True)
class Made:
    """A finished stage of a lineage."""

    manifest: Manifest

    @property
    def name(self) -> str:
        return self.manifest.stage

    @property
    def inputs(self) -> str:
        return ", ".join(f"{role} {given.stage}" for role, given in self.manifest.inputs.items() if role != "parent")


def lineage(stage_directory: Path) -> list[Made]:
    """A finished stage and the parents that are still beside it, the oldest first."""
    finished(stage_directory)
    return [Made(manifest) for manifest in ancestry(stage_directory)][::-1]


def write_card(stage_directory: Path, path: Path, layout: str, dtype: str, config: CardConfig) -> Path:
    """Write the card of a finished stage's export in the numbers `dtype` of a layout."""
    made, weights = lineage(stage_directory), f"FP8, else {dtype}" if layout == "fp8" else dtype
    path.write_text(_front(made, layout, config) + "\n" + _body(made, layout, weights, config), encoding="utf-8")
    return path


def _front(made: Sequence[Made], layout: str, config: CardConfig) -> str:
    """YAML between dashes, as hubs read it; JSON's scalars and lists are YAML's."""
    sees = made[-1].manifest.spec.vision is not None
    values: dict[str, Any] = {
        "license": config.license or "unknown",
        "library_name": {"native": "mistral-common", "gguf": "gguf"}.get(layout, "transformers"),
        "pipeline_tag": "image-text-to-text" if sees else "text-generation",
        "base_model": config.base_model or _hub_name(made[0].manifest),
        "language": list(config.languages) or None,
        "tags": ["mistral3", "ministral_jax", *(tag for verb, tag in _TAGS.items() if _has(made, verb))],
    }
    lines = (f"{key}: {json.dumps(value)}\n" for key, value in values.items() if value is not None)
    return f"---\n{''.join(lines)}---\n"


_TAGS = {"prune": "pruning", "distill": "distillation"}
_CHATS = ("sft", "dpo", "grpo", "odpo")
"""Verbs of which a model has learnt to answer."""


def _has(made: Sequence[Made], *verbs: str) -> bool:
    return any(stage.manifest.do in verbs for stage in made)


def _hub_name(manifest: Manifest) -> str | None:
    """Of the import that a lineage begins with, where it is one from a hub."""
    name = hub_name(str(manifest.config.get("path", "")))
    return None if name is None else name.partition("@")[0]


def _body(made: Sequence[Made], layout: str, weights: str, config: CardConfig) -> str:
    last = made[-1]
    spec = last.manifest.spec
    parts = [
        f"# {last.name}\n\n{_summary(made, spec)}",
        f"## Use it\n\n{_use(made, layout)}",
        f"## Lineage\n\n{_table(('stage', 'made by', 'parameters', 'tokens', 'steps', 'with'), map(_step, made))}",
        *_figures(made),
        f"## Sizes\n\n{_table(('', ''), [('weights', weights), *_sizes(spec)])}",
        f"## Licence\n\n{_licence(config)}",
    ]
    return "\n\n".join(parts) + "\n"


def _summary(made: Sequence[Made], spec: ModelSpec) -> str:
    first, sees = made[0], "images and text" if spec.vision is not None else "text"
    trained = sum(stage.manifest.tokens for stage in made)
    begin = {"import": "an imported model", "train": "a model trained from scratch"}.get(first.manifest.do, "a model")
    count = len(made) - 1
    way = f"from `{first.name}`, {begin}, in {count} stage{'s' * (count > 1)}"
    if not count:  # it is the first, or its parents are gone
        way = f"in one stage (`{first.manifest.do}`)"
    return (
        f"A model of {_count(spec.parameters)} parameters that reads {sees}, made with ministral_jax "
        f"{ministral_jax.__version__} {way}{f' and {_count(trained)} tokens' if trained else ''}. "
        f"Its context is {spec.context:,} tokens."
    )


def _step(stage: Made) -> tuple[str, ...]:
    m = stage.manifest
    steps = f"{m.steps:,}" if m.steps else ""
    return stage.name, m.do, _count(m.spec.parameters), _count(m.tokens), steps, stage.inputs


def _figures(made: Sequence[Made]) -> Iterator[str]:
    """Held-out figures: all of the model itself, and of each stage before it the most telling one."""
    rows = [row for stage in made[:-1] for row in itertools.islice(_figures_of(stage), 1)]
    if rows := [*rows, *_figures_of(made[-1])]:
        said = "On held-out documents and prompts; the interval holds 95 % of what others of their kind would give."
        yield f"## Figures\n\n{said}\n\n{_table(('stage', 'figure', 'value', '95 %', 'of'), rows)}"


def _figures_of(stage: Made) -> Iterator[tuple[str, ...]]:
    from ministral_jax.stages import verbs  # which import this module

    metrics, held_out = stage.manifest.metrics, stage.manifest.held_out or HeldOut()
    for figure in verbs()[stage.manifest.do].figures if stage.manifest.do in verbs() else ():
        if (value := metrics.get(figure.name)) is None:
            continue
        form = (lambda x: f"{x:.1%}") if figure.unit == "share" else lambda x: f"{x:.4g}"
        ends, count = held_out.intervals.get(figure.name), f"{held_out.documents} documents"
        if share := share_of(metrics, figure):
            ends, count = (share.low, share.high), f"{share.count} prompts"
        between = f"{form(ends[0])} to {form(ends[1])}" if ends else ""
        unit = "" if figure.unit in ("", "share") or figure.unit in figure.label else f", {figure.unit}"
        yield stage.name, figure.label + unit, form(value), between, count if ends else ""


def _sizes(spec: ModelSpec) -> Iterator[tuple[str, ...]]:
    yield "layers, width, feed-forward", f"{spec.layers}, {spec.width}, {spec.mlp_width}"
    yield "heads (key-value) × width", f"{spec.heads} ({spec.kv_heads}) × {spec.head_width}"
    yield "vocabulary", f"{spec.vocab:,}, {'tied' if spec.tied else 'untied'}"
    rope = f"θ {spec.rope.theta:g}"
    if spec.rope.yarn_factor > 1:
        rope += f", YaRN × {spec.rope.yarn_factor:g} of {spec.rope.original_context:,}"
    if spec.rope.temperature_beta:
        rope += f", position temperature {spec.rope.temperature_beta:g}"
    yield "positions", rope


def _licence(config: CardConfig) -> str:
    if config.license is None:
        return "Unknown. A pruned or distilled model inherits its parent's; nobody has said which that is."
    return f"`{config.license}`, that of the parent."


def _use(made: Sequence[Made], layout: str) -> str:
    sees, inputs = made[-1].manifest.spec.vision is not None, _CHAT if _has(made, *_CHATS) else _TEXT
    auto = "AutoModelForImageTextToText" if sees else "AutoModelForCausalLM"
    said = _USES.get(layout, _USES["hf"])
    return said.format(auto=auto, inputs=inputs, tower=_TOWER * sees, images=_IMAGES * sees)


_TEXT = 'inputs = tokenizer("Once upon a time", return_tensors="pt")'
_CHAT = """messages = [{"role": "user", "content": "What is two and two?"}]
inputs = tokenizer.apply_chat_template(messages, return_dict=True, return_tensors="pt")"""
_TOWER = " --mmproj mmproj.gguf"
_IMAGES = " `AutoProcessor` takes images beside the text."
_USES = {
    "hf": """```python
from transformers import {auto}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = {auto}.from_pretrained(".")
{inputs}
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0]))
```

Here `.` is this directory or its name on a hub; `vllm serve .` takes it as it is.{images}""",
    "native": """```bash
vllm serve . --config-format mistral --load-format mistral --tokenizer-mode mistral
```

Here `.` is this directory or its name on a hub.""",
    "gguf": """```bash
llama-server --model model.gguf{tower}
```""",
}


def _table(head: Sequence[str], rows: Any) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _count(count: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count) if count else ""

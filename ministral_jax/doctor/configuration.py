"""What `config.json` says: sizes, tying, RoPE, vision; and the ways in which loaders are known to read it wrongly."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

from ministral_jax.doctor.source import Finding, Json, Source, section, some
from ministral_jax.doctor.weights import held, native_held
from ministral_jax.errors import UserError
from ministral_jax.interop.hf_config import from_config
from ministral_jax.interop.native_config import from_params
from ministral_jax.models.spec import PRESETS, ModelSpec, RopeSpec

_CLASS_THETA = 1e6
"""Of `Ministral3Config`, where nothing is said."""


def sizes(source: Source) -> tuple[ModelSpec | None, list[Finding]]:
    """The model's sizes; where its positions alone are at fault, with plain ones."""
    config, where = source.config, str(source.directory / "config.json")
    if not config:
        return _native_sizes(source)
    try:
        spec = from_config(config, where, "lm_head.weight" in held(source))
    except UserError as error:
        fault = Finding("red", "configuration", str(error))
        return _without_positions(config, where, source), [fault]
    return spec, [_preset(spec)]


def _native_sizes(source: Source) -> tuple[ModelSpec | None, list[Finding]]:
    params, where = source.json("params.json"), str(source.directory / "params.json")
    if not params:
        return None, []
    try:
        spec = from_params(params, where, "output.weight" in native_held(source))
    except UserError as error:
        return None, [Finding("red", "configuration", str(error))]
    rope = spec.rope
    far = f"YaRN × {rope.yarn_factor:g} of {rope.original_context}" if rope.yarn_factor > 1 else "plain"
    said = f"θ {rope.theta:g}, {far}, temperature {rope.temperature_beta or 'off'}, context {spec.context}"
    return spec, [_preset(spec), Finding("green", "RoPE", said)]


def _without_positions(config: Json, where: str, source: Source) -> ModelSpec | None:
    plain = {key: value for key, value in source.decoder.items() if key not in ("rope_scaling", "rope_parameters")}
    plain |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_theta": None}
    try:
        changed = {**config, "text_config": plain} if "text_config" in config else plain
        return from_config(changed, where, "lm_head.weight" in held(source))
    except UserError:
        return None


def _like(spec: ModelSpec) -> str | None:
    """The preset of the same shape."""
    free = {"rope", "context", "tied", "vision", "norm_eps", "image_token"}
    shape = spec.model_dump(exclude=free)
    return next((name for name, preset in PRESETS.items() if preset.model_dump(exclude=free) == shape), None)


def _preset(spec: ModelSpec) -> Finding:
    name = _like(spec)
    millions = (
        f"{spec.parameters / 1e6:,.1f} M parameters" if spec.parameters < 1e9 else f"{spec.parameters / 1e9:.2f} B"
    )
    said = f"{millions}, {spec.layers} layers of {spec.width}, {'sees' if spec.vision else 'text alone'}"
    if name is None:
        return Finding("green", "sizes", f"{said}; of no preset")
    mine, theirs = spec.model_dump(), PRESETS[name].model_dump()
    other = [key for key in mine if mine[key] != theirs[key] and key != "rope"]
    return Finding("green", "sizes", f"{said}; preset {name}" + (f" with another {', '.join(other)}" if other else ""))


def tying(source: Source) -> Iterator[Finding]:
    """Two flags and a tensor decide whether the head is the embedding, and loaders weigh them differently."""
    if not source.config or not source.weights:
        return
    top = source.config.get("tie_word_embeddings")
    text = source.decoder.get("tie_word_embeddings") if "text_config" in source.config else top
    head = "lm_head.weight" in held(source)
    flags = f"top level {_flag(top)}, text_config {_flag(text)}" if "text_config" in source.config else _flag(top)
    said = f"tie_word_embeddings: {flags}; lm_head.weight is {'' if head else 'not '}in the file"
    tied = text if text is not None else top
    if not head and not tied:
        yield Finding("red", "tying", f"{said}: untied and without a head, which transformers draws at random (#43429)")
    elif head and text:
        yield Finding("amber", "tying", f"{said}: the head is used here, transformers drops it")
    elif head and top:
        said += (
            ": as transformers re-saves untied models; loaders that believe the top level lose the head (vLLM#51063)"
        )
        yield Finding("amber", "tying", said)
    elif "text_config" in source.config and top is None and not text:
        yield Finding("amber", "tying", f"{said}: the wrapper class of transformers takes true where nothing is said")
    else:
        yield Finding("green", "tying", said)


def _flag(value: object) -> str:
    return "absent" if value is None else json.dumps(value)


def positions(source: Source, spec: ModelSpec | None) -> Iterator[Finding]:
    """RoPE: θ, YaRN, the position temperature."""
    if not source.config:
        return
    text = source.decoder
    rope = section(text, "rope_parameters") or section(text, "rope_scaling")
    theta = rope.get("rope_theta", text.get("rope_theta"))
    form = rope.get("rope_type", rope.get("type", "default"))
    beta, original = rope.get("llama_4_scaling_beta"), rope.get("original_max_position_embeddings")
    said = f"θ {theta}, {form}"
    if form == "yarn":
        said += f" × {rope.get('factor')} of {original}"
    yield Finding(
        "green", "RoPE", f"{said}, temperature {beta or 'off'}, context {text.get('max_position_embeddings')}"
    )
    name = _like(spec) if spec else None
    if name and form == "yarn" and PRESETS[name].rope.yarn_factor == 1:
        name = None  # Devstral Small 2 has the shape of Mistral Small 3.1 and positions of its own
    like = PRESETS[name].rope if name else RopeSpec()
    if form == "yarn" and spec is not None:
        yield from _yarn(rope, spec.rope.attention_factor, like.attention_factor)
    if text.get("model_type") == "ministral3" and not beta and (name is None or like.temperature_beta):
        absent = "llama_4_scaling_beta is absent: the position temperature is off"
        have = "which Ministral 3 and Devstral Small 2 have"
        yield Finding("amber", "RoPE", f"{absent}, {have}; some converters drop it (vLLM#48621)")
    if name and isinstance(theta, int | float) and theta != like.theta:
        said = f"θ is {theta:g}, {name} has {like.theta:g}"
        dropped = theta == _CLASS_THETA and not name.startswith("tiny")
        why = ": the default of transformers' class, so a save has lost it" if dropped else ""
        yield Finding("red" if dropped else "amber", "RoPE", said + why)


def _yarn(rope: Json, grown: float, usual: float) -> Iterator[Finding]:
    if not math.isclose(grown, usual, rel_tol=1e-6):
        both = f"mscale is {rope.get('mscale')}, mscale_all_dim {rope.get('mscale_all_dim')}"
        said = f"{both}: cos and sin grow by {grown:.4f}, those of the models of this size by {usual:.4f}"
        yield Finding("amber", "RoPE", f"{said} (vLLM#48621, llama.cpp#17945)")
    if rope.get("truncate") is False:
        yield Finding(
            "red", "RoPE", "truncate is false: other frequencies than the family's, as Megatron-Bridge writes"
        )


def vision(source: Source) -> Iterator[Finding]:
    """The tower and what prepares its pictures."""
    tower = section(source.config, "vision_config")
    if not tower:
        return
    act = tower.get("hidden_act")
    if act != "silu":
        said = f"vision_config.hidden_act is {act!r}; the towers are trained with silu, and gelu is the class's default"
        yield Finding("red", "vision", said)
    merge, patch = source.config.get("spatial_merge_size", 2), tower.get("patch_size")
    processor = source.json("processor_config.json")
    told = {"spatial_merge_size": merge, "patch_size": patch}
    wrong = {k: v for k, v in told.items() if processor.get(k) not in (None, v)}
    for key, value in wrong.items():
        said = f"processor_config.json says {key} {processor[key]}, config.json {value}: pictures get another grid"
        yield Finding("red", "vision", f"{said} (mlx-vlm#741, transformers#37019)")
    named = next((n for n in ("processor_config.json", "preprocessor_config.json") if source.has(n)), None)
    if named is None:
        yield Finding("amber", "vision", "no processor_config.json: transformers cannot prepare pictures")
    elif not wrong:
        side = tower.get("image_size")
        yield Finding("green", "vision", f"patches of {patch}, merged {merge} × {merge}, pictures up to {side} pixels")


def two_formats(source: Source) -> Iterator[Finding]:
    """Where `params.json` lies beside `config.json`, both describe one model."""
    params, text = source.json("params.json"), source.decoder
    if not params or not source.config:
        return
    rope = section(text, "rope_parameters") or section(text, "rope_scaling")
    pairs = {
        "dim": text.get("hidden_size"),
        "n_layers": text.get("num_hidden_layers"),
        "hidden_dim": text.get("intermediate_size"),
        "n_heads": text.get("num_attention_heads"),
        "n_kv_heads": text.get("num_key_value_heads"),
        "vocab_size": text.get("vocab_size"),
        "rope_theta": rope.get("rope_theta", text.get("rope_theta")),
    }
    for key, value in pairs.items():
        if value is not None and params.get(key) not in (None, value):
            said = f"params.json says {key} {params[key]}, config.json {value}: two models in one directory"
            yield Finding("red", "format", said)


def code(source: Source) -> Iterator[Finding]:
    """Python of the repository's own, which `trust_remote_code` lets transformers run; here nothing of it is read."""
    for name in ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        if named := source.json(name).get("auto_map"):
            classes = [f"{k} {v}" for k, v in named.items()] if isinstance(named, dict) else [str(named)]
            said = f"{name} names code of its own in auto_map, {some(classes)}"
            why = "it is never run here, so what it does otherwise than the class's own code is lost"
            yield Finding("amber", "code", f"{said}: transformers runs it with trust_remote_code; {why}")

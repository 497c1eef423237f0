"""The tokenizer's files and the chat templates: whether they fit the model and each other."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ministral_jax.doctor.source import Finding, Json, Source, section, some
from ministral_jax.interop.hf_config import BOS, EOS
from ministral_jax.models.spec import ModelSpec

_IMAGE = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")


def special_ids(tekken: Json) -> dict[str, int]:
    """Ids of control tokens by what they are called; where a file lists none, those that mistral-common fills in."""
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    listed = tekken.get("special_tokens") or Tekkenizer.DEPRECATED_SPECIAL_TOKENS
    return {str(token["token_str"]): token["rank"] for token in listed}


def tokenizer(source: Source, spec: ModelSpec | None) -> Iterator[Finding]:
    """Version, size and special ids, against the model's."""
    tekken = source.json("tekken.json")
    if not tekken:
        if not source.has("tekken.json"):
            other = "tokenizer.json alone" if source.has("tokenizer.json") else "no tokenizer"
            yield Finding("amber", "tokenizer", f"{other}: the project reads tekken.json; put the model's own there")
        return
    config = section(tekken, "config")
    version, vocab = str(config.get("version")), config.get("default_vocab_size")
    yield Finding(
        "green", "tokenizer", f"Tekken {version}, {vocab} ids, {config.get('default_num_special_tokens')} special"
    )
    yield from _version(version)
    if spec and isinstance(vocab, int) and vocab > spec.vocab:
        said = f"the tokenizer has {vocab} ids, the embedding {spec.vocab} rows: ids beyond it cannot be embedded"
        yield Finding("red", "vocabulary", said)
    elif spec and isinstance(vocab, int) and vocab < spec.vocab:
        said = f"padded: {spec.vocab} rows for {vocab} ids; the last {spec.vocab - vocab} stand for nothing"
        yield Finding("amber", "vocabulary", said)
    yield from _ids(source, special_ids(tekken), spec)
    yield from _pattern(source, config)


def _version(version: str) -> Iterator[Finding]:
    from mistral_common.tokens.tokenizers.base import TokenizerVersion

    known = [known.value for known in TokenizerVersion]
    if version not in known:
        yield Finding("red", "tokenizer", f"mistral-common knows no {version}, but {', '.join(known)}; update it")
    elif known.index(version) < known.index("v13"):
        said = f"{version}: chats without tools and reasoning are rendered as its models read them, others are refused"
        yield Finding("amber", "tokenizer", said)


def _ids(source: Source, special: dict[str, int], spec: ModelSpec | None) -> Iterator[Finding]:
    text, generation = source.decoder, source.json("generation_config.json")
    wrong = []
    for piece, key, usual in (("<s>", "bos_token_id", BOS), ("</s>", "eos_token_id", EOS)):
        for name, said in (("config.json", text), ("generation_config.json", generation)):
            told = said.get(key)
            if told is not None and special.get(piece, usual) not in (told if isinstance(told, list) else [told]):
                wrong.append(f"{name} says {key} {told}, {piece} is {special.get(piece)}")
    if spec and spec.vision and (found := special.get("[IMG]")) != spec.image_token:
        wrong.append(f"image_token_index is {spec.image_token}, [IMG] is {found}")
    if spec and spec.vision and (missing := [piece for piece in _IMAGE if piece not in special]):
        wrong.append(f"the model sees, the tokenizer lacks {', '.join(missing)}")
    for said in wrong:
        yield Finding("red", "special ids", said)
    if not wrong:
        named = [p for p in ("<s>", "</s>", "[IMG]", "[ARGS]", "[THINK]") if p in special]
        yield Finding("green", "special ids", ", ".join(f"{piece} {special[piece]}" for piece in named))


def _pattern(source: Source, config: Json) -> Iterator[Finding]:
    """`tokenizer.json` splits text by the same rule (transformers#42299, whose `fix_mistral_regex` puts it right)."""
    steps = source.json("tokenizer.json").get("pre_tokenizer") or {}
    patterns = [section(step, "pattern").get("Regex") for step in steps.get("pretokenizers", [steps])]
    told = [pattern for pattern in patterns if pattern]
    if told and config.get("pattern") and config["pattern"] not in told:
        said = "tokenizer.json splits text by another rule than tekken.json: load it with fix_mistral_regex=True"
        yield Finding("amber", "tokenizer", f"{said} (transformers#42299)")


def beginning(source: Source) -> Iterator[Finding]:
    """Whether a text begins with <s> once, twice or not at all, by the ways in which it is tokenised."""
    config, found = source.json("tokenizer_config.json"), list(_templates(source).values())
    if not config and not found:
        if source.has("tekken.json"):
            yield Finding("green", "BOS", "mistral-common puts one <s> before every text")
        return
    begins = [bool(re.search(r"bos_token|<s>", text)) for text in found]
    adds = config.get("add_bos_token")
    if begins and not all(begins) and not adds:
        said = "no <s>: the chat template has none, and the tokenizer adds none; the model has never seen such text"
        yield Finding("red", "BOS", said)
    elif any(begins) and adds:
        said = "the chat template and the tokenizer both put <s>: a rendered chat that is tokenised has two"
        yield Finding("amber", "BOS", f"{said}; tokenise it with add_special_tokens=False")
    else:
        yield Finding("green", "BOS", "the chat template puts it" if any(begins) else "the tokenizer puts it")


def templates(source: Source) -> Iterator[Finding]:
    """Chat templates, which stand in up to four files."""
    found = _templates(source)
    if not found:
        return
    if len({text.strip() for text in found.values()}) > 1:
        said = f"{' and '.join(found)} differ: which one is used depends on the loader"
        yield Finding("red", "template", said)
    else:
        yield Finding("green", "template", " and ".join(found))
    if "chat_template.jinja" not in found:
        yield Finding(
            "amber", "template", "not in chat_template.jinja, its present place; newer loaders may pass it over"
        )
    tekken = source.json("tekken.json")
    control = {p for text in found.values() for p in re.findall(r"\[/?(?:[A-Z]+_)*[A-Z]{3,}\]", text)}
    if tekken and (unknown := control - special_ids(tekken).keys()):
        said = f"{some(unknown)} in the template is no token of tekken.json: the model would read it as letters"
        yield Finding("red", "template", said)


def _templates(source: Source) -> dict[str, str]:
    told: dict[str, Any] = {"chat_template.jinja": source.text("chat_template.jinja")}
    for name in ("chat_template.json", "tokenizer_config.json", "processor_config.json"):
        told[name] = source.json(name).get("chat_template")
    return {name: text for name, text in told.items() if isinstance(text, str) and text}

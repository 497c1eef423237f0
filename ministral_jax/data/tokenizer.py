"""Tekken, the family's byte-pair encoding, whole or cut to its first merges for tiny models."""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ministral_jax.data.config import TokenizerConfig
from ministral_jax.errors import UserError
from ministral_jax.files import refuse_pointer, unique_keys, write_json, write_text
from ministral_jax.lazy import Lazy
from ministral_jax.models.spec import ModelSpec, VisionSpec
from ministral_jax.places import new_directory, on_disk, place

if TYPE_CHECKING:
    from mistral_common.integrations.chat_templates import chat_templates as templates
    from mistral_common.tokens.tokenizers import base
    from mistral_common.tokens.tokenizers import tekken as tekken_file
else:
    base = Lazy("mistral_common.tokens.tokenizers.base")
    tekken_file = Lazy("mistral_common.tokens.tokenizers.tekken")
    templates = Lazy("mistral_common.integrations.chat_templates.chat_templates")

_MOST_SPECIAL = 2**16
# The bundled file predates these; they stand where the family's later files have them.
_LATER_SPECIAL = {32: "[ARGS]", 33: "[CALL_ID]", 34: "[THINK]", 35: "[/THINK]"}


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A loaded `tekken.json`. `path` is the file to copy on export, `digest` the SHA-256 of its content."""

    path: Path
    digest: str
    tekken: tekken_file.Tekkenizer = field(repr=False)

    @property
    def vocab(self) -> int:
        """Number of ids V, special tokens included."""
        return self.tekken.n_words

    def special(self, piece: str) -> int:
        """Id of a control token such as `[INST]`. Raises `UserError`: the file has no such token."""
        try:
            return self.tekken.get_special_token(piece)
        except ValueError:
            raise UserError(f"{self.path} has no special token {piece!r}; use a tekken.json that does") from None

    @cached_property
    def bos(self) -> int:
        return self.special("<s>")

    @cached_property
    def eos(self) -> int:
        return self.special("</s>")

    @cached_property
    def image_ids(self) -> tuple[int, int, int]:
        """Ids of [IMG], [IMG_BREAK] and [IMG_END]."""
        return self.special("[IMG]"), self.special("[IMG_BREAK]"), self.special("[IMG_END]")

    @cached_property
    def thinking_ids(self) -> tuple[int, int] | None:
        """Ids of [THINK] and [/THINK]; None where the file has none."""
        found = {self.tekken.id_to_piece(i): i for i in self.control_ids}
        return (found["[THINK]"], found["[/THINK]"]) if {"[THINK]", "[/THINK]"} <= found.keys() else None

    @cached_property
    def control_ids(self) -> tuple[int, ...]:
        """Ids of the special tokens that have a meaning, ascending: all but the fillers between them."""
        pieces = ((i, self.tekken.id_to_piece(i)) for i in range(self.tekken.num_special_tokens))
        return tuple(i for i, piece in pieces if piece != tekken_file.Tekkenizer.SPECIAL_TOKEN_TEMPLATE.format(id=i))

    @cached_property
    def byte_lengths(self) -> np.ndarray:
        """UTF-8 bytes of each token, `[V]` int32; 0 for special tokens."""
        return np.array([len(self.tekken.id_to_byte_piece(i)) for i in range(self.vocab)], np.int32)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`. Control tokens spelled out in it stay text. Raises `ValueError`: the file's pattern, by
        which texts are split, fails."""
        try:
            return self.tekken.encode(text, bos=False, eos=False)
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # of tiktoken, where a pattern matches nothing
                raise
            raise ValueError(f"its pattern cannot split texts ({error})") from None

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`, special tokens left out."""
        return self.tekken.decode([int(i) for i in ids])


def _bundled() -> Path:
    """The file that mistral-common brings along."""
    package = find_spec("mistral_common")
    assert package is not None and package.origin is not None
    return Path(package.origin).parent / "data" / "tekken_240911.json"


def load_tokenizer(config: TokenizerConfig, cache_dir: Path) -> Tokenizer:
    """Load the tokenizer a config asks for, keeping its file in `cache_dir/tokenizer-<request>-<digest>/tekken.json`.
    Raises `UserError`: the file is missing or not a Tekken file, or has fewer entries than asked for."""
    try:
        return read_tokenizer(_kept_file(config, cache_dir))
    except UserError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError, RecursionError) as error:
        raise _no_tekken(config, error) from error


def read_tokenizer(path: Path) -> Tokenizer:
    """A file that `load_tokenizer` kept."""
    path = on_disk(path.parent) / path.name
    tokenizer = Tokenizer(path, _sha256(path.read_bytes()), tekken_file.Tekkenizer.from_file(path))
    tokenizer.encode("Où, 1\n  x?")
    return tokenizer


def tokenizer_digest(config: TokenizerConfig, cache_dir: Path) -> str | None:
    """`load_tokenizer(..).digest`, of the content alone; None where the file is gone or cannot be read."""
    with suppress(UserError, OSError):
        return _sha256(_kept_file(config, cache_dir).read_bytes())
    return None


def _kept_file(config: TokenizerConfig, cache_dir: Path) -> Path:
    source = _bundled() if config.file == "bundled" else place(config.file, "data.tokenizer.file =").expanduser()
    if not source.is_file():
        raise UserError(
            f"data.tokenizer.file = {config.file!r} is not a file; give the path of a tekken.json or 'bundled'"
        )
    refuse_pointer(source, f"data.tokenizer.file = {config.file!r}")
    content = source.read_bytes().removeprefix(codecs.BOM_UTF8)
    request = _sha256(content + config.model_dump_json(include={"vocab", "special"}).encode())[:16]
    path = next(cache_dir.glob(f"tokenizer-{request}-*/tekken.json"), None)
    if path is None:
        cut = _cut(content, config)
        final = cache_dir / f"tokenizer-{request}-{_sha256(cut)[:16]}"
        with new_directory(final, "tekken.json") as draft:
            (draft / "tekken.json").write_bytes(cut)
        path = final / "tekken.json"
    return path


def export_tokenizer(tokenizer: Tokenizer, directory: Path, vision: VisionSpec | None) -> Path:
    """Write `directory/tekken.json`, the tokenizer file of an exported checkpoint.

    A file that says nothing of images gets the model's patch size, so that mistral-common lays out images as in
    training; any other file is copied byte for byte.
    """
    content = tokenizer.path.read_bytes()
    if vision is not None and tokenizer.tekken.image is None:
        image = dict(
            image_patch_size=vision.patch_size, max_image_size=vision.max_image_size, spatial_merge_size=vision.merge
        )
        content = _dump({**json.loads(content), "image": image})
    path = directory / "tekken.json"
    path.write_bytes(content)
    return path


def export_template(tekken: Path, directory: Path) -> list[Path]:
    """Write what others render chats with where they do not use mistral-common: `directory/chat_template.jinja`, which
    mistral-common makes for the version of the file `tekken`, and `tokenizer_config.json`, by which transformers knows
    the tokens that begin and end a text. Nothing is written for a version that has no template."""
    try:
        # of v11 it cannot know whether a model thinks in plain letters; such chats are not rendered here
        template = templates.convert_tokenizer_to_chat_template(
            tekken, use_special_token_variables=False, plain_thinking_support=False
        )
    except ValueError:
        return []
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    write_json(directory / "tokenizer_config.json", {"tokenizer_class": "TokenizersBackend", **named})
    write_text(directory / "chat_template.jinja", template)
    return [directory / "chat_template.jinja", directory / "tokenizer_config.json"]


def check_vocab(tokenizer: Tokenizer, spec: ModelSpec) -> None:
    """Check that a model can embed every id of a tokenizer, and that both mean the same token by an image. Raises
    `UserError`: naming both numbers."""
    if tokenizer.vocab > spec.vocab:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab} tokens but the model's vocab is {spec.vocab}; "
            f"set data.tokenizer.vocab to at most {spec.vocab} or use a model with a larger vocab"
        )
    if spec.vision is not None and tokenizer.image_ids[0] != spec.image_token:
        raise UserError(
            f"the tokenizer's [IMG] is id {tokenizer.image_ids[0]} but the model's image_token is {spec.image_token}; "
            "they must be equal"
        )


def _cut(content: bytes, config: TokenizerConfig) -> bytes:
    """A file's content, cut as the config says. Raises what its JSON makes Python raise, see `load_tokenizer`."""
    raw: dict[str, Any] = json.loads(content.decode(), object_pairs_hook=unique_keys)
    sizes, merges = raw["config"], raw["vocab"]
    _check_sizes(sizes, merges, raw.get("special_tokens") or [])
    if config.file != "bundled" and config.vocab is None and config.special is None:
        return content
    special = config.special or sizes["default_num_special_tokens"]
    vocab = config.vocab or sizes["default_vocab_size"]
    if not 256 <= vocab - special <= len(merges):
        raise UserError(
            f"data.tokenizer.vocab = {vocab} with {special} special tokens leaves {vocab - special} text tokens; "
            f"{config.file!r} can give 256 to {len(merges)}"
        )
    raw["vocab"] = merges[: vocab - special]
    raw["special_tokens"] = _special_tokens(raw.get("special_tokens"), special, config.file == "bundled")
    raw["config"] = {
        **sizes,
        "num_vocab_tokens": vocab - special,
        "default_vocab_size": vocab,
        "default_num_special_tokens": special,
    }
    if config.file == "bundled":
        raw["config"]["version"] = "v13"
        raw.pop("image", None)  # belongs to another model; export_tokenizer writes ours
    return _dump(raw)


def _check_sizes(sizes: dict[str, Any], merges: list[Any], named: list[Any]) -> None:
    """Before mistral-common makes as many entries as a file says, or ids that it does not have. Raises `ValueError`."""
    special, vocab = sizes["default_num_special_tokens"], sizes["default_vocab_size"]
    if not (type(special) is type(vocab) is int and 0 < special <= _MOST_SPECIAL and special < vocab):
        raise ValueError(f"it has {special!r:.40} special tokens of {vocab!r:.40}")
    if not (isinstance(merges, list) and isinstance(named, list) and vocab <= len(merges) + special):
        raise ValueError(f"it does not hold the {vocab} tokens that it speaks of")
    if any(token["rank"] != rank or not isinstance(token["token_str"], str) for rank, token in enumerate(named)):
        raise ValueError("its special tokens are not texts in the order of their ranks, from 0")


def _no_tekken(config: TokenizerConfig, error: Exception) -> UserError:
    """A key that is missing is a `tokenizer.json`'s, of another format; what mistral-common says may be very long."""
    text = str(error) if str(error).isprintable() else repr(str(error))
    why = f"has no {text}" if isinstance(error, KeyError) else f"{type(error).__name__}: {text:.200}"
    return UserError(f"data.tokenizer.file = {config.file!r} is not a usable tekken.json ({why}); give the model's own")


def _special_tokens(defined: list[Any] | None, count: int, bundled: bool) -> list[dict[str, Any]]:
    """The first `count` special tokens, at least the family's first 20, unnamed ones filled in."""
    names = {
        token["rank"]: str(token["token_str"]) for token in defined or tekken_file.Tekkenizer.DEPRECATED_SPECIAL_TOKENS
    }
    if bundled:
        names |= _LATER_SPECIAL
    filler = tekken_file.Tekkenizer.SPECIAL_TOKEN_TEMPLATE
    return [dict(rank=i, token_str=names.get(i, filler.format(id=i)), is_control=True) for i in range(count)]


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _dump(raw: dict[str, Any]) -> bytes:
    return json.dumps(raw, separators=(",", ":")).encode()


def text_of(tokenizer: Tokenizer, stop_ids: Sequence[int]) -> Callable[..., str]:
    """A function from the next tokens of a text to what they add to it; bytes that are not yet a character wait for
    the rest of it, or for `final`. Control tokens are spelled out, except those that end a text."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(tokens: Sequence[int], final: bool = False) -> str:
        pieces = (
            tokenizer.tekken.id_to_byte_piece(t, base.SpecialTokenPolicy.KEEP) for t in tokens if t not in stop_ids
        )
        return decoder.decode(b"".join(pieces), final)

    return add

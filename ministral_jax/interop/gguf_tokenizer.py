"""A Tekken tokenizer as GGUF has it: byte-level BPE of GPT-2's kind, split into words as Tekken does."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from ministral_jax.data.tokenizer import Tokenizer
from ministral_jax.lazy import Lazy

if TYPE_CHECKING:
    import gguf
else:
    gguf = Lazy("gguf")


@cache
def _letters() -> tuple[str, ...]:
    """What GPT-2 writes for each byte: printable ones stand for themselves, the others get letters from 256 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    more = iter(range(256, 512))
    return tuple(chr(byte if byte in printable else next(more)) for byte in range(256))


def _spelled(piece: bytes) -> str:
    return "".join(_letters()[byte] for byte in piece)


def _merges(pieces: Sequence[bytes]) -> list[str]:
    """Pairs of pieces that together are one, in the order of what they make: a reader joins the first it finds."""
    ranks = {piece: rank for rank, piece in enumerate(pieces)}
    found = []
    for piece in pieces:
        pairs = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        whole = sorted((ranks[a], ranks[b]) for a, b in pairs if a in ranks and b in ranks)
        found += [f"{_spelled(pieces[a])} {_spelled(pieces[b])}" for a, b in whole]
    return found


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer, vocab: int, template: str | None) -> None:
    """Write a tokenizer's keys, with ids up to the model's `vocab` that no text has, and a chat template in Jinja."""
    specials = tokenizer.tekken.num_special_tokens
    pieces = [tokenizer.tekken.id_to_byte_piece(i) for i in range(specials, tokenizer.vocab)]
    named = [tokenizer.tekken.id_to_piece(i) for i in range(specials)]
    padding = [f"[PAD{i}]" for i in range(tokenizer.vocab, vocab)]
    kinds = gguf.TokenType
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("tekken")
    writer.add_token_list([*named, *map(_spelled, pieces), *padding])
    writer.add_token_types([kinds.CONTROL] * specials + [kinds.NORMAL] * len(pieces) + [kinds.UNUSED] * len(padding))
    writer.add_token_merges(_merges(pieces))
    writer.add_bos_token_id(tokenizer.bos)
    writer.add_eos_token_id(tokenizer.eos)
    writer.add_unk_token_id(tokenizer.special("<unk>"))
    writer.add_pad_token_id(tokenizer.special("<pad>"))
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    if template is not None:
        writer.add_chat_template(template)

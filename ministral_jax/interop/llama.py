"""GGUF files read by llama.cpp, through llama-cpp-python (extra `llama`): another program's logits of an export."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from ministral_jax.errors import UserError
from ministral_jax.lazy import Lazy

llama_cpp: Any = Lazy("llama_cpp")
mtmd: Any = Lazy("llama_cpp.mtmd_cpp")


def has_llama() -> bool:
    """Whether llama-cpp-python is installed."""
    return find_spec("llama_cpp") is not None


@dataclass(frozen=True)
class Llama:
    """A file in llama.cpp's memory, and a sequence of up to `context` tokens."""

    model: Any
    sequence: Any
    context: int

    @property
    def vocab(self) -> int:
        return llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def logits(self, tokens: Sequence[int], start: int = 0) -> Float[np.ndarray, "T V"]:
        """float32, of tokens that go on from position `start` of the sequence. Raises `UserError`: it is longer than
        `context`, or llama.cpp does not evaluate it."""
        if start == 0:
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.sequence), True)
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i] = int(token), start + i
                batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, 1
            if code := llama_cpp.llama_decode(self.sequence, batch):
                raise UserError(f"llama.cpp does not evaluate {len(tokens)} tokens in {self.context}: error {code}")
            found = llama_cpp.llama_get_logits(self.sequence)
            return np.ctypeslib.as_array(found, (len(tokens), self.vocab)).copy()
        finally:
            llama_cpp.llama_batch_free(batch)

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """Ids of a text; `special`: control tokens that are spelled out in it are tokens."""
        content = text.encode()
        ids = (ctypes.c_int32 * (len(content) + 1))()
        vocab = llama_cpp.llama_model_get_vocab(self.model)
        count = llama_cpp.llama_tokenize(vocab, content, len(content), ids, len(ids), False, special)
        return list(ids[:count])


@cache
def _quiet() -> Any:
    return llama_cpp.llama_log_callback(lambda level, text, data: None)


@contextmanager
def loaded(path: Path, context: int, threads: int = 2, exact: bool = True) -> Iterator[Llama]:
    """A GGUF file for as long as the block lasts, on the CPU; `exact`: with attention and its cache in float32, else as
    llama.cpp serves.

    What the file says of RoPE stands, whereas the class `llama_cpp.Llama` sets YaRN's bounds to 32 and 1. llama.cpp
    keeps quiet from here on.

    Raises:
        UserError: llama-cpp-python is missing, or llama.cpp does not load the file.
    """
    if not has_llama():
        raise UserError(
            f"{path} is read by llama-cpp-python, which is not installed; in the checkout, pip install -e '.[llama]'"
        )
    llama_cpp.llama_log_set(_quiet(), None)
    llama_cpp.llama_backend_init()
    with ExitStack() as stack:
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = 0
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        if not model:
            raise UserError(f"{path}: llama.cpp does not load it")
        stack.callback(llama_cpp.llama_model_free, model)
        sizes = llama_cpp.llama_context_default_params()
        sizes.n_ctx = sizes.n_batch = sizes.n_ubatch = context
        sizes.n_threads = sizes.n_threads_batch = threads
        if exact:
            sizes.flash_attn_type, sizes.type_k, sizes.type_v = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED, 0, 0
        sequence = llama_cpp.llama_init_from_model(model, sizes)
        if not sequence:
            raise UserError(f"{path}: llama.cpp has no room for {context} tokens of it")
        stack.callback(llama_cpp.llama_free, sequence)
        yield Llama(model, sequence, context)


@dataclass(frozen=True)
class Seen:
    """A picture as `mmproj.gguf` makes it tokens of a model; the context is that of mtmd, llama.cpp's part for
    pictures."""

    model: Llama
    context: Any
    chunk: Any

    @property
    def tokens(self) -> int:
        """With the breaks between rows, without the end."""
        return mtmd.mtmd_input_chunk_get_n_tokens(self.chunk)

    def embeddings(self) -> Float[np.ndarray, "T D"]:
        """float32. Raises `UserError`: llama.cpp does not evaluate it."""
        self._check(mtmd.mtmd_encode_chunk(self.context, self.chunk))
        shape = (self.tokens, llama_cpp.llama_model_n_embd(self.model.model))
        return np.ctypeslib.as_array(mtmd.mtmd_get_output_embd(self.context), shape).copy()

    def put(self, start: int) -> None:
        """Into the sequence, from position `start` on. Raises `UserError`: llama.cpp does not evaluate it."""
        after, room = llama_cpp.llama_pos(), self.model.context
        place = (self.model.sequence, self.chunk, start, 0, room, False, ctypes.byref(after))
        self._check(mtmd.mtmd_helper_eval_chunk_single(self.context, *place))

    def _check(self, code: int) -> None:
        if code:
            raise UserError(f"llama.cpp does not evaluate a picture of {self.tokens} tokens: error {code}")


_PERTURB, _ZERO = -6, 255
"""Of `mallopt`: what is allocated is filled with the complement of that byte."""


@contextmanager
def _zeroed() -> Iterator[None]:
    """Memory that is allocated is zero, where the C library can have it so. llama.cpp makes breaks between the rows of
    a picture of memory that it has not set, times 0 (`clip_graph_pixtral`), which is NaN where one was left there."""
    option = getattr(ctypes.CDLL(None), "mallopt", lambda name, value: None)
    option(_PERTURB, _ZERO)
    try:
        yield
    finally:
        option(_PERTURB, 0)


@contextmanager
def seen(model: Llama, tower: Path, picture: UInt8[np.ndarray, "H W 3"], threads: int = 2) -> Iterator[Seen]:
    """A picture for as long as the block lasts, on the CPU. llama.cpp rounds its sides to whole tokens, at least 8 and
    at most 1024 of them, and resizes it to that. The file of the model must have a tokenizer, or llama.cpp ends the
    process.

    Raises:
        UserError: llama.cpp does not load the tower.
    """
    mtmd.mtmd_helper_log_set(_quiet(), None)
    with _zeroed(), ExitStack() as stack:
        options = mtmd.mtmd_context_params_default()
        options.use_gpu, options.warmup, options.n_threads = False, False, threads
        options.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        context = mtmd.mtmd_init_from_file(str(tower).encode(), model.model, options)
        if not context:
            raise UserError(f"{tower}: llama.cpp does not load it")
        stack.callback(mtmd.mtmd_free, context)
        pixels = (ctypes.c_uint8 * picture.size).from_buffer_copy(np.ascontiguousarray(picture).tobytes())
        bitmap = mtmd.mtmd_bitmap_init(picture.shape[1], picture.shape[0], pixels)
        stack.callback(mtmd.mtmd_bitmap_free, bitmap)
        marker = mtmd.mtmd_default_marker()
        text = mtmd.mtmd_input_text(marker, len(marker), False, True)
        chunks = mtmd.mtmd_input_chunks_init()
        stack.callback(mtmd.mtmd_input_chunks_free, chunks)
        bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
        if code := mtmd.mtmd_tokenize(context, chunks, ctypes.byref(text), bitmaps, 1):
            raise UserError(f"{tower}: llama.cpp makes no tokens of a picture: error {code}")
        found = (mtmd.mtmd_input_chunks_get(chunks, i) for i in range(mtmd.mtmd_input_chunks_size(chunks)))
        kind = mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE
        yield Seen(model, context, next(c for c in found if mtmd.mtmd_input_chunk_get_type(c) == kind))

"""What an export costs where it is served: its size, and on this machine what llama.cpp makes of it in a second."""

from __future__ import annotations

import ctypes
import os
import platform
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from statistics import median

from pydantic import BaseModel

from ministral_jax.errors import UserError
from ministral_jax.interop.llama import Llama, has_llama, loaded

PROMPT, GENERATED, THREADS, ROUNDS = 128, 64, 2, 3


class Serving(BaseModel):
    """Tokens per second are of one sequence as llama.cpp serves it: a prompt of 128 tokens, then 64 more one by one;
    the median of three rounds after one that does not count. None where no llama.cpp read the file."""

    bytes: int
    """Of the weights."""
    prompt_per_second: float | None = None
    generated_per_second: float | None = None
    machine: str | None = None


def serving(directory: Path) -> Serving:
    """Measured here and now. Raises `UserError`: llama.cpp does not evaluate the file."""
    weights = [*directory.glob("*.safetensors"), *directory.glob("*.gguf")]
    size, file = sum(path.stat().st_size for path in weights), directory / "model.gguf"
    if not file.is_file() or not has_llama():
        return Serving(bytes=size)
    with loaded(file, PROMPT + GENERATED, THREADS, exact=False) as model:
        _seconds(model)
        prompt, generated = map(median, zip(*(_seconds(model) for _ in range(ROUNDS)), strict=True))
    machine = f"{THREADS} threads of {os.cpu_count()} CPUs, {platform.machine()}"
    paces = dict(prompt_per_second=PROMPT / prompt, generated_per_second=GENERATED / generated)
    return Serving(bytes=size, machine=machine, **paces)


def _seconds(model: Llama) -> tuple[float, float]:
    """For the prompt, and for what is generated; which tokens these are does not matter."""
    llama_cpp = import_module("llama_cpp")

    def evaluate(tokens: Sequence[int]) -> None:
        ids = (ctypes.c_int32 * len(tokens))(*tokens)
        if code := llama_cpp.llama_decode(model.sequence, llama_cpp.llama_batch_get_one(ids, len(tokens))):
            raise UserError(f"llama.cpp does not evaluate {len(tokens)} tokens: error {code}")
        llama_cpp.llama_synchronize(model.sequence)

    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(model.sequence), True)
    start = time.perf_counter()
    evaluate([n % model.vocab for n in range(1, PROMPT + 1)])
    middle = time.perf_counter()
    for n in range(GENERATED):
        evaluate([n % model.vocab])
    return middle - start, time.perf_counter() - middle

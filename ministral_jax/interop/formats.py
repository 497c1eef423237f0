"""The layouts in which a model is written for others to read."""

from typing import Literal

from ministral_jax.interop.export import Format
from ministral_jax.interop.fp8_export import FP8
from ministral_jax.interop.gguf_format import GGUF
from ministral_jax.interop.hf import HF
from ministral_jax.interop.native import NATIVE

FormatName = Literal["hf", "native", "fp8", "gguf"]
FORMATS: dict[FormatName, Format] = {"hf": HF, "native": NATIVE, "fp8": FP8, "gguf": GGUF}

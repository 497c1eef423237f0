"""The layouts in which a model is written for others to read."""

from typing import Literal

from ministral_jax.interop.export import Format
from ministral_jax.interop.hf import HF

FormatName = Literal["hf"]
FORMATS: dict[FormatName, Format] = {"hf": HF}

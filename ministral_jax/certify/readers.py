"""What reads an export: this project, and other programs where they are installed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from importlib.util import find_spec
from math import gcd
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

import ministral_jax
from ministral_jax.certify.prompts import COMPARED, Prompt
from ministral_jax.data.batch import bucket, images_of_rows, stack, text_row
from ministral_jax.data.bins import place_whole
from ministral_jax.data.images import to_patches
from ministral_jax.distributed.placement import MeshConfig, Placement, Rules, make_mesh
from ministral_jax.errors import UserError
from ministral_jax.losses.evaluation import hidden
from ministral_jax.models.spec import ModelSpec
from ministral_jax.models.vision import MEAN, STD
from ministral_jax.models.vlm import VLM, Params
from ministral_jax.sampling.engine import by_rows

Read = Callable[[Prompt], np.ndarray]
"""Logits `[n, V]`, float64, of the last n positions of a prompt, at most `COMPARED`."""


LIMIT = 1e-4
"""Of max |Δlogit| / max |logit| between our reading of a file and another's, both in float32: round-off of up to forty
layers is below it, and every control has to be above."""


@dataclass(frozen=True)
class Reader:
    """`open` loads a directory; its errors are those of the program. `limit`: see `LIMIT`."""

    name: str
    open: Callable[[Path, ModelSpec], Read]
    limit: Callable[[Prompt], float] = lambda prompt: LIMIT
    sees: bool = True
    """Whether it is asked about pictures."""


def readers(layout: str) -> tuple[list[Reader], list[str]]:
    """Other programs that read a format and are installed, and those that are not."""
    needed = {"hf": ("torch", "transformers"), "fp8": ("torch", "transformers", "accelerate")}.get(layout)
    if needed is None:
        return [], []
    if not all(map(find_spec, needed)):
        return [], ["transformers" if layout == "hf" else "transformers with accelerate"]
    name = f"transformers {version('transformers')}"
    return [Reader(name if layout == "hf" else f"{name}, dequantised", _transformers)], []


# ---- ours -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Opened:
    """A model in float32, its heads cut over the devices."""

    model: VLM
    params: Params
    placement: Placement

    def read(self, prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
        """By the name of a prompt, what `Read` gives of it. All stand in one row, for which one program is compiled."""
        spec, place = self.model.spec, self.placement
        sizes = [len(prompt.tokens) for prompt in prompts]
        length = bucket(sum(sizes))
        row = text_row(np.concatenate([prompt.tokens for prompt in prompts]), sizes, length)
        padding = text_row(np.zeros(0, np.int32), [], length)
        rows = stack([row, *[padding] * (place.even(1) - 1)])
        batch = {name: rows[name] for name in ("tokens", "positions", "segments")}
        pictures = [prompt.picture for prompt in prompts if prompt.picture is not None]
        if pictures and spec.vision is not None:
            is_image = (batch["tokens"] == spec.image_token) & (batch["segments"] > 0)
            batch |= images_of_rows([to_patches(pictures, spec.vision)], is_image)
        counts = [min(COMPARED, size) for size in sizes]
        ends = zip(np.cumsum(sizes), counts, strict=True)
        asked = np.concatenate([np.arange(end - count, end, dtype=np.int32) for end, count in ends])
        with jax.set_mesh(place.mesh):
            placed = place_whole(place, batch, spec.vision)
            logits = np.asarray(_program(self.model, place.rules)(self.params, placed, asked), np.float64)
        parts = np.split(logits, np.cumsum(counts)[:-1])
        return {prompt.name: part for prompt, part in zip(prompts, parts, strict=True)}


def opened(path: Path) -> Opened:
    """A finished stage, or an export. Raises `UserError`: as `ministral_jax.load`."""
    devices = jax.devices()
    spec = _spec(path)
    mesh = make_mesh(MeshConfig(tensor=gcd(len(devices), spec.kv_heads)), devices)
    placement = by_rows(Placement(mesh, Rules()))
    # to one device nothing is cut, for which programs would have to be compiled
    return Opened(*ministral_jax.load(path, "float32", placement if len(devices) > 1 else None), placement)


def _spec(path: Path) -> ModelSpec:
    from ministral_jax.interop.checkpoint import is_checkpoint, read_spec
    from ministral_jax.interop.hub import refuse_missing
    from ministral_jax.stages.manifest import finished

    if (path / "manifest.json").is_file():
        return finished(path).spec
    if not is_checkpoint(path):
        refuse_missing(path)
        raise UserError(f"{path} is neither a finished stage (manifest.json) nor a model (config.json or params.json)")
    return read_spec(path)


def _made(model: VLM, rules: Rules) -> Any:
    def logits(params: Params, batch: dict[str, jax.Array], asked: jax.Array) -> Any:
        with rules.active():
            states = hidden(model, params, batch)[:1]
            last = lambda module: module.decoder.logits(jnp.take(states, asked, axis=1))[0]
            return model.apply({"params": params}, method=last)

    # each program runs a few times: at small sizes, optimising it takes longer
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(logits, compiler_options=options)


_program: Any = cache(_made)


# ---- others ---------------------------------------------------------------------------------------------------------


def _transformers(path: Path, spec: ModelSpec) -> Read:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.utils import logging

    logging.disable_progress_bar()
    auto: Any = AutoModelForCausalLM if spec.vision is None else AutoModelForImageTextToText
    config = AutoConfig.from_pretrained(path)
    if (quantised := getattr(config, "quantization_config", None)) is not None:
        quantised["dequantize"] = True  # its kernels for FP8 need a GPU, and round what goes in
    model, said = auto.from_pretrained(path, config=config, dtype=torch.float32, output_loading_info=True)
    if any(said.values()):
        raise UserError(f"transformers does not find what it expects: {said}")
    # what it dequantises is of the scales' dtype, in bfloat16 exact where they are powers of two
    return partial(_ask_transformers, model.float().eval())


def _ask_transformers(model: Any, prompt: Prompt) -> np.ndarray:
    import torch

    images = {}
    if prompt.picture is not None:
        pixels = rearrange((prompt.picture.astype(np.float32) / 255 - MEAN) / STD, "h w c -> 1 c h w")
        sizes = torch.tensor([prompt.picture.shape[:2]])
        images = {"pixel_values": torch.from_numpy(pixels), "image_sizes": sizes}
    with torch.no_grad():
        tokens = torch.from_numpy(prompt.tokens.astype(np.int64))[None]
        logits = model(tokens, logits_to_keep=min(COMPARED, len(prompt.tokens)), **images).logits
    return logits[0].double().numpy()

"""A small vision-language model whose positions pass its original context, and prompts of it."""

from __future__ import annotations

import jax
import numpy as np
from model_cases import BREAK, END, IMG, YARN, Case, Document, pack, random_params, vlm

from ministral_jax.data.images import to_patches
from ministral_jax.distributed.placement import MeshConfig, Placement, Rules, make_mesh
from ministral_jax.models.vision import MEAN, STD
from ministral_jax.models.vlm import VLM, Compute, param_shardings
from ministral_jax.sampling.engine import Completion, Prompt, SamplingOptions

SPEC = vlm(rope=YARN, context=256)
LONG = 40
OPTIONS = SamplingOptions(max_completion_length=LONG, temperature=0.9, top_p=0.9, top_k=20, chunk=16)


def prompt(grids: list[tuple[int, int]], text: int, seed: int) -> tuple[Prompt, tuple[np.ndarray, ...]]:
    """Images of so many tokens (rows, columns), each followed by text; the same for the model's tests."""
    random, side = np.random.RandomState(seed), SPEC.vision.stride
    pixels = [random.randint(0, 256, (r * side, c * side, 3)).astype(np.uint8) for r, c in grids]
    tokens = [1, *random.randint(14, SPEC.vocab, text)]
    for rows, columns in grids:
        layout = ([IMG] * columns + [BREAK]) * rows
        tokens += [*layout[:-1], END, *random.randint(14, SPEC.vocab, text)]
    images = tuple(((p / np.float32(255) - MEAN) / STD).transpose(2, 0, 1).astype(np.float32) for p in pixels)
    return Prompt([int(t) for t in tokens], to_patches(pixels, SPEC.vision) if grids else None, seed), images


# Lengths 4, 27, 12 and 58 with an original context of 12: two of them begin beyond it, all of them end there.
PROMPTS, IMAGES = zip(
    prompt([], 3, 1), prompt([(2, 3), (3, 1)], 4, 2), prompt([(1, 2)], 4, 3), prompt([], 57, 4), strict=True
)


def placed(mesh: dict, devices: int = 1) -> Placement:
    return Placement(make_mesh(MeshConfig(**mesh), jax.devices()[:devices]), Rules())


def parameters(place: Placement, dtype=np.float32) -> dict:
    return jax.device_put(random_params(SPEC, dtype=dtype), param_shardings(SPEC, place))


def reference(completions: list[Completion], compute: Compute = Compute()) -> list[np.ndarray]:  # noqa: B008
    """The trainer's log-probabilities [n, V] at every token of the completions: prompts and completions as documents,
    two packed in a row, in one forward pass of one device."""
    documents = [
        Document(np.array([*PROMPTS[c.prompt].tokens, *c.tokens], np.int32), IMAGES[c.prompt]) for c in completions
    ]
    batch = pack(Case(SPEC, tuple(zip(documents[::2], documents[1::2], strict=True))))
    for n, completion in enumerate(completions):  # an [IMG] that was drawn is a token like any other
        drawn = (batch["segments"][n // 2] == 1 + n % 2) & (
            batch["positions"][n // 2] >= len(PROMPTS[completion.prompt].tokens)
        )
        batch["image_slot"][n // 2, drawn] = -1
    images = {k: batch[k] for k in ("patches", "patch_image", "patch_row", "patch_col", "image_slot")}
    apply = jax.jit(
        lambda p, b, images: VLM(SPEC, compute).apply({"params": p}, b["tokens"], b["positions"], b["segments"], images)
    )
    logprobs = np.asarray(jax.nn.log_softmax(apply(random_params(SPEC), batch, images)))
    found = []
    for n, completion in enumerate(completions):
        here = logprobs[n // 2, batch["segments"][n // 2] == 1 + n % 2]
        found.append(here[len(PROMPTS[completion.prompt].tokens) - 1 : -1])
    return found

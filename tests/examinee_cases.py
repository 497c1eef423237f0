"""A small vision-language model that is examined, and requests of every kind to it."""

from __future__ import annotations

import jax
import numpy as np
from mesh_cases import placement
from model_cases import by_row, random_params, vlm

from ministral_jax.data.batch import images_of_rows, one_per_row
from ministral_jax.data.chat import render
from ministral_jax.data.config import TokenizerConfig
from ministral_jax.data.conversation import Message
from ministral_jax.data.images import ImagePatches
from ministral_jax.data.tokenizer import Tokenizer, load_tokenizer
from ministral_jax.distributed.placement import Placement
from ministral_jax.evaluation.examinee import Continued, Examinee
from ministral_jax.evaluation.questions import colours
from ministral_jax.models.vlm import IMAGE_KEYS, VLM, Compute, param_shardings
from ministral_jax.sampling.engine import Prompt, as_prompt

SPEC = vlm(vocab=512, context=96)
TEXTS = "import os", "while True: pass", "def f(x): return x", "a b c d e f g h i j k l m n o p q r s t u v w x y z" * 4


def tokenizer(root) -> Tokenizer:
    return load_tokenizer(TokenizerConfig(vocab=512, special=64), root)


def examinee(root, place: Placement | None = None, shortest_row: int = 64, **settings) -> Examinee:
    """Random weights, which have something to say: the tokens that are probable differ from place to place."""
    place = place or placement(1)
    params = jax.device_put(random_params(SPEC), param_shardings(SPEC, place))
    return Examinee(VLM(SPEC, Compute(shortest_row=shortest_row)), params, place, tokenizer(root), **settings)


def prompts(tokens: Tokenizer) -> list[Prompt]:
    """Texts of several lengths, and a chat with an image."""
    (document,) = colours(1)
    picture = document.messages[0].parts[0].resize((20, 12))
    chat = render((Message("user", (picture, "What?")),), tokens, SPEC.vision, "here")
    texts = [Prompt([tokens.bos, *tokens.encode(text)], None, n) for n, text in enumerate(TEXTS)]
    return [*texts[:2], as_prompt(chat, SPEC.vision), *texts[2:]]


def continued(tokens: Tokenizer) -> list[Continued]:
    """Each prompt with two continuations."""
    draws = np.random.RandomState(0)
    return [
        Continued(prompt, [int(t) for t in draws.randint(64, 512, length)])
        for prompt in prompts(tokens)
        for length in (1, 7)
    ]


def direct(one: Examinee, tokens: list[int], images: ImagePatches | None = None) -> np.ndarray:
    """Log-probabilities `[n, V]` of what comes after each of the tokens, from one forward pass and its logits."""
    batch = one_per_row([tokens], one.context)
    is_image = (batch["tokens"] == SPEC.image_token) & (images is not None)
    batch = by_row(batch | images_of_rows([images], is_image), SPEC.vision)
    logits = _logits(one.params, {name: batch[name] for name in ("tokens", *IMAGE_KEYS) if name in batch})
    return np.asarray(jax.nn.log_softmax(logits))[0, : len(tokens)].astype(np.float64)


@jax.jit
def _logits(params, batch):
    images = {name: batch[name] for name in IMAGE_KEYS if name in batch} or None
    return VLM(SPEC).apply({"params": params}, batch["tokens"], images=images)

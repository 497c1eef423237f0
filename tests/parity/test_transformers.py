"""Live parity with torch `transformers`, in both directions."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import oracle  # noqa: E402
from model_cases import (  # noqa: E402
    CASES,
    VISION,
    Case,
    by_hf_name,
    image_case,
    loss_and_grads,
    pack,
    random_params,
    relative,
    vlm,
)  # fmt: skip

from ministral_jax.interop.checkpoint import import_checkpoint  # noqa: E402
from ministral_jax.interop.hf import export_hf  # noqa: E402
from ministral_jax.models.spec import PRESETS, ModelSpec, RopeSpec, VisionSpec  # noqa: E402
from ministral_jax.models.vlm import VLM  # noqa: E402

pytestmark = pytest.mark.parity

LOGITS, GRADS = 2e-5, 1e-4


def random_case(seed: int) -> Case:
    """Sizes drawn at random, images in a packed batch."""
    random = np.random.RandomState(seed)
    draw = lambda *choices: choices[random.randint(len(choices))]
    kv_heads, vision_heads, vision_head = draw(1, 2, 3), draw(1, 2, 3), draw(4, 8, 12)
    rope = RopeSpec(
        theta=draw(1e3, 1e4, 1e6), yarn_factor=draw(1.0, 2.0, 16.0), original_context=draw(7, 16, 33),
        temperature_beta=draw(0.0, 0.1, 0.5), beta_fast=draw(32.0, 4.0),
    )  # fmt: skip
    if rope.yarn_factor == 1 and rope.temperature_beta == 0:
        rope = RopeSpec(theta=rope.theta)
    vision = VisionSpec(
        layers=draw(1, 2, 3), width=vision_heads * vision_head, mlp_width=draw(8, 20), heads=vision_heads,
        head_width=vision_head, patch_size=draw(1, 2, 3), max_image_size=64, rope_theta=draw(1e2, 1e4),
    )  # fmt: skip
    spec = ModelSpec(
        layers=draw(1, 2, 4), width=draw(12, 24, 40), mlp_width=draw(16, 36), heads=kv_heads * draw(1, 2, 4),
        kv_heads=kv_heads, head_width=draw(4, 8, 10), vocab=draw(32, 50), context=256, tied=bool(draw(0, 1)),
        norm_eps=draw(1e-5, 1e-3), rope=rope, vision=vision,
    )  # fmt: skip
    return image_case(spec)


# Mistral Medium 3.5: YaRN with its magnitude beyond the original context and without the position temperature, and a
# head of the tower that is no power of two.
MEDIUM = vlm(
    rope=PRESETS["mistral-medium-3.5-128b"].rope.model_copy(update={"theta": 1e3, "original_context": 6}),
    vision=VISION.model_copy(update={"layers": 1, "width": 208, "head_width": 104}),
)
ALL = {**CASES, "medium": image_case(MEDIUM), **{f"random{i}": random_case(i) for i in range(3)}}


def agree(case: Case, params: dict, logits: list[np.ndarray], grads: dict[str, np.ndarray]) -> None:
    batch = pack(case)
    (_, ours), our_grads = loss_and_grads(params, case.spec, batch)
    ours = [np.asarray(ours)[b, s] for b, s in document_places(batch)]
    assert relative(np.concatenate(ours), np.concatenate(logits)) < LOGITS
    named = by_hf_name(our_grads, case.spec)
    assert named.keys() == grads.keys()
    worst = {name: relative(named[name], grads[name]) for name in grads}
    assert max(worst.values()) < GRADS, max(worst.items(), key=lambda item: item[1])


def document_places(batch: dict) -> list[tuple[int, np.ndarray]]:
    """(row, indices) of every packed document."""
    segments = batch["segments"]
    return [(b, np.flatnonzero(row == s)) for b, row in enumerate(segments) for s in range(1, row.max() + 1)]


@pytest.mark.parametrize("name", ALL)
def test_a_model_saved_by_transformers_gives_the_same_logits_and_gradients_here(name, tmp_path):
    case = ALL[name]
    model = oracle.build(case.spec)
    model.save_pretrained(tmp_path / "hf")
    spec, params = import_checkpoint(tmp_path / "hf")
    assert spec == case.spec
    agree(case, params, *oracle.run(model, case))


@pytest.mark.parametrize("name", ALL)
def test_a_model_exported_here_gives_the_same_logits_and_gradients_in_transformers(name, tmp_path):
    case = ALL[name]
    params = random_params(case.spec)
    export_hf(params, case.spec, tmp_path / "hf")
    agree(case, params, *oracle.run(oracle.load(tmp_path / "hf", case.spec), case))


def test_bfloat16_export_holds_the_rounded_parameters(tmp_path):
    case = CASES["images_tied"]
    params = random_params(case.spec)
    export_hf(params, case.spec, tmp_path / "hf", "bfloat16")
    spec, rounded = import_checkpoint(tmp_path / "hf")
    agree(case, rounded, *oracle.run(oracle.load(tmp_path / "hf", spec), case))


def test_a_shuffled_pack_is_noticed():
    """The comparison can fail: positions that do not restart change the logits far more than the tolerance."""
    case = CASES["text_tied_long"]
    params, batch = random_params(case.spec), pack(case)
    wrong = {**batch, "positions": np.broadcast_to(np.arange(batch["tokens"].shape[1]), batch["tokens"].shape)}
    apply = lambda b: VLM(case.spec).apply({"params": params}, b["tokens"], b["positions"], b["segments"])
    assert relative(apply(wrong), apply(batch)) > 100 * LOGITS


def test_the_image_processor_of_an_export_loads(tmp_path):
    from transformers import AutoImageProcessor

    case = CASES["images"]
    export_hf(random_params(case.spec), case.spec, tmp_path / "hf")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "hf")
    image = np.random.RandomState(0).randint(0, 255, (30, 70, 3), np.uint8)
    out = processor(image, return_tensors="np")
    side = case.spec.vision.stride
    assert all(size % side == 0 for size in out["image_sizes"][0])
    assert max(out["image_sizes"][0]) <= case.spec.vision.max_image_size + side


@pytest.mark.parametrize(
    ("size", "ours", "theirs"),
    [
        ((1540, 1540), (55, 55), (55, 55)),
        ((1000, 700), (25, 36), (25, 36)),
        ((3080, 2135), (39, 55), (39, 55)),  # 1067.5 pixels: either way within the same row of tokens
        ((4620, 1598), (20, 55), (19, 55)),  # 532.67: 533 pixels begin a row that 532 do not
        ((1598, 4620), (55, 20), (55, 19)),
    ],
)
def test_the_grid_of_large_pictures_differs_where_rounding_up_begins_a_row(size, ours, theirs, tmp_path):
    """mistral-common, and so this program, rounds the sides of a picture that is made smaller; transformers cuts."""
    from PIL import Image
    from transformers import AutoImageProcessor

    from ministral_jax.data.images import token_grid

    spec = CASES["images"].spec
    assert spec.vision is not None
    vision = spec.vision.model_copy(update={"patch_size": 14, "max_image_size": 1540})
    spec = spec.model_copy(update={"vision": vision})
    assert token_grid(*size, vision) == ours
    export_hf(random_params(spec), spec, tmp_path / "hf")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "hf")
    height, width = processor(Image.new("RGB", size), return_tensors="np")["image_sizes"][0]
    assert (height // vision.stride, width // vision.stride) == theirs

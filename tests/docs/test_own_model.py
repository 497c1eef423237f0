"""The complete recipe of docs/own_model.md: a Hugging Face directory and rows with pictures go in, a directory of half
the size comes out. Every block of the page is run in the order in which it stands."""

import re

import jax
import numpy as np
import pytest
from docs_blocks import blocks
from own_model import PAGE, work_through

import ministral_jax
from ministral_jax.data.images import image_tokens, token_grid
from ministral_jax.models.spec import PRESETS
from ministral_jax.stages.manifest import finished


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The directory of the page, after all that it says but transformers."""
    place = tmp_path_factory.mktemp("own")
    work_through(place, run_python=lambda text: "transformers" not in text)
    return place


def test_half_of_the_parent_comes_out(place):
    half, parent = place / "runs/rehearsal/half-hf/hf", place / "parent"
    model, params = ministral_jax.load(half)
    (before, _), (after, trained) = (ministral_jax.load(p) for p in (parent, place / "runs/rehearsal/half"))
    assert 0.4 < model.spec.decoder_parameters / before.spec.decoder_parameters < 0.6
    assert (half / "tekken.json").read_bytes() == (parent / "tekken.json").read_bytes()
    assert after.spec.layers == model.spec.layers == 6
    native, same = ministral_jax.load(place / "half-native")
    assert native.spec == model.spec and jax.tree.all(jax.tree.map(np.array_equal, same, params))
    close = lambda mine, theirs: np.allclose(mine, theirs, rtol=2**-8, atol=0)  # written in bfloat16
    assert jax.tree.all(jax.tree.map(close, params, trained))


def test_the_report_shows_parent_and_child(place):
    page = (place / "runs/rehearsal/report.html").read_text()
    assert "half" in page and finished(place / "runs/rehearsal/half").steps == 20


def test_the_real_sizes_are_half():
    """What the recipe says of 24B."""
    (recipe,) = (block.text for block in blocks("yaml") if block.page == PAGE)
    sizes = re.search(r"model: \{layers: (\d+), mlp_width: (\d+)\}", recipe)
    parent = PRESETS["mistral-small-3.1-24b"]
    half = parent.model_copy(update={"layers": int(sizes[1]), "mlp_width": int(sizes[2])})
    assert round(parent.parameters / 1e9, 1) == 24.0 and round(half.parameters / 1e9, 1) == 12.1


def test_what_a_picture_costs():
    """The example of the page: 640 x 480 is 18 x 23 tokens."""
    vision = PRESETS["mistral-small-3.1-24b"].vision
    rows, columns = token_grid(640, 480, vision)
    assert (rows, columns) == (18, 23) and len(image_tokens(rows, columns, (0, 1, 2))) == 432
    assert rows * columns * vision.merge**2 == 1656

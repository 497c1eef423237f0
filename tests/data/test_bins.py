"""Pictures in bins: each once and whole, wherever its rows are; and every process has the same room for them."""

import numpy as np
import pytest
from model_cases import IMG, VISION
from picture_cases import GRIDS, mixed, pictures

from ministral_jax.data.batch import images_of_rows
from ministral_jax.data.bins import batch_shapes, binned, most_patches, sizes_of
from ministral_jax.data.images import ImagePatches, patchify, to_patches
from ministral_jax.distributed.placement import Bins
from ministral_jax.models.attention import Part
from ministral_jax.models.kernels import PADDING, cudnn


@pytest.fixture(scope="module")
def batch():
    return mixed()


@pytest.mark.parametrize("bins", [Bins(), Bins(8), Bins(2, 2), Bins(2, 2, 2), Bins(1, 4, 2)])
def test_every_token_finds_its_own_pixels(batch, bins):
    found, block = binned(batch, bins, VISION), VISION.merge**2
    groups = bins.shards * bins.microbatches
    assert found["patches"].dtype == np.uint8 and found["patches"].shape[:2] == (groups, bins.each)
    assert not any(key.startswith("images") for key in found)
    size = len(GRIDS) // bins.shards
    for row, grids in enumerate(GRIDS):
        group = row // size * bins.microbatches + row % size % bins.microbatches
        arrays = {key: found[key][group].reshape(-1, block, *found[key].shape[3:]) for key in found if "patch" in key}
        slots = found["image_slot"][row]
        for pixels in pictures(grids, row):
            expected = patchify(pixels, VISION.patch_size, VISION.merge).reshape(-1, block, VISION.patch_width)
            mine, slots = slots[slots >= 0][: len(expected)], slots[slots >= 0][len(expected) :]
            np.testing.assert_array_equal(arrays["patches"][mine], expected)
            numbers = np.unique(arrays["patch_image"][mine])
            assert len(numbers) == 1 and (arrays["patch_image"] == numbers).sum() == expected.shape[0] * block
            y, x = (arrays[key][mine].ravel() for key in ("patch_row", "patch_col"))
            np.testing.assert_array_equal(pixels[0::2, 0::2, 0][y, x], expected[..., 0].ravel())
        assert not (slots >= 0).any()
    numbers = found["patch_image"]
    real = np.where(numbers > 0, numbers, numbers.max() + 1)
    assert (np.diff(real, axis=-1) >= 0).all(), "ascending, and padding behind"


def test_padding_takes_no_room_from_the_pictures_that_a_fused_kernel_of_gpus_may_have():
    random, bins, small = np.random.default_rng(0), Bins(1, 2), {"tokens": np.zeros((4, 8), np.int32)}
    for count in (1, 3, 9, 20):
        sides = random.integers(8, 16, (4, count, 2))  # of merged tokens: at least 256 patches
        shown = np.empty(4, object)
        for row, grids in enumerate(sides):
            patches = np.zeros((int(grids.prod(axis=1).sum()) * VISION.merge**2, VISION.patch_width), np.uint8)
            shown[row] = ImagePatches(grids, patches)
        slots = np.full((4, 8), -1, np.int32)
        image = binned(small | {"images": shown, "image_slot": slots}, bins, VISION)["patch_image"].reshape(2, -1)
        apart = np.asarray(Part(image, np.zeros(1, np.int32)).apart)
        begins = (np.diff(apart, axis=1, prepend=-1) != 0) & (apart < PADDING)
        assert begins.any(axis=1).all() and begins.sum(axis=1).max() <= cudnn.documents(image.shape[1])


def test_a_batch_of_text_has_no_arrays_of_pictures(batch):
    text = binned(batch | {"images": np.full(len(GRIDS), None)}, Bins(2, 2), VISION)
    assert set(text) == {"tokens", "positions", "segments", "labels"}
    few = binned({key: array[:2] for key, array in batch.items()}, Bins(2, 2), VISION)
    assert few["patches"].shape[:3] == (2, 2, 1024)  # the second shard's are padding


def test_a_picture_that_rows_share_is_there_once(batch):
    shared = {key: np.repeat(array, 4, axis=0) for key, array in batch.items()}
    for name, array in binned(shared, Bins(4, 2), VISION).items():
        alone = binned(batch, Bins(4, 2), VISION)[name]
        np.testing.assert_array_equal(array, alone if name.startswith("patch") else np.repeat(alone, 4, axis=0), name)


def test_a_process_with_a_part_of_the_rows_has_its_part_of_the_whole(batch):
    whole, every = binned(batch, Bins(4, 2), VISION), [sizes_of(one, VISION) for one in batch["images"]]
    for first in (0, 4):
        own = {key: array[first : first + 4] for key, array in batch.items()}
        for name, array in binned(own | {"image_sizes": every}, Bins(4, 2), VISION).items():
            half = len(whole[name]) // 2
            np.testing.assert_array_equal(array, whole[name][half * (first > 0) :][:half], name)


@pytest.mark.parametrize("bins", [Bins(), Bins(2, 4), Bins(4, 2, 2)])
def test_the_fullest_batch_has_room(batch, bins):
    most = most_patches(8, 64, bins, VISION)
    rows = np.random.default_rng(0).integers(1, 5, (8, 9, 2))
    for many in (rows, np.full((8, 1, 2), 4), np.ones((8, 16, 2), int)):
        shown = []
        for grids in many:
            kept = np.cumsum(grids.prod(axis=1)) * 4 <= 64
            shown.append(to_patches(pictures(grids[kept].tolist(), 0), VISION))
        found = binned(batch | images_of_rows(shown, batch["tokens"] == IMG), bins, VISION)
        assert found["patches"].shape[2] <= most
    shapes = batch_shapes(8, 32, (), 64, bins, VISION)
    assert shapes["patches"] == ((bins.shards * bins.microbatches, bins.each, most, 12), np.uint8)

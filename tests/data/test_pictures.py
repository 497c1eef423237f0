"""Pictures as a viewer shows them: upright, of any depth; what cannot be shown says why."""

import io
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps, PngImagePlugin

from ministral_jax.data.images import open_image
from ministral_jax.errors import UserError

RAMP = np.tile(np.linspace(0, 255, 24).astype(np.uint8), (16, 1))


def ramp(mode="RGB") -> Image.Image:
    """24 x 16, dark on the left."""
    return Image.fromarray(RAMP).convert(mode)


def with_orientation(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif.tobytes()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_orientation_is_followed(tmp_path, form, orientation):
    ramp().save(path := tmp_path / "a", form, exif=with_orientation(orientation), **_lossless(form))
    shown = open_image(path, "here")
    with Image.open(path) as image:
        assert shown.tobytes() == ImageOps.exif_transpose(image).convert("RGB").tobytes()
    assert shown.size == ((16, 24) if orientation >= 5 else (24, 16))
    if orientation == 6:
        brightness = np.asarray(shown)[..., 0].mean(axis=1)
        assert (np.diff(brightness) > 0).all()  # top to bottom


def _lossless(form: str) -> dict:
    return {"JPEG": {"quality": 100}, "WEBP": {"lossless": True}}.get(form, {})


@pytest.mark.parametrize("exif", [None, b"", b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\x7f", with_orientation(9)])
def test_no_orientation_or_a_damaged_one_changes_nothing(tmp_path, exif):
    ramp().save(path := tmp_path / "a.png", **({} if exif is None else {"exif": exif}))
    assert open_image(path, "here").tobytes() == ramp().tobytes()


@pytest.mark.parametrize(
    ("image", "suffix"),
    [
        (Image.fromarray(RAMP.astype(np.uint16) * 257), "png"),
        (Image.fromarray(RAMP.astype(np.uint16) * 257), "tiff"),
        (Image.fromarray(RAMP.astype(np.int32) * 257), "tiff"),
        (Image.fromarray(RAMP.astype(np.float32) / 255), "tiff"),
        (ramp("L"), "png"),
        (ramp("RGBA"), "png"),
        (ramp("LA"), "png"),
        (ramp("P"), "gif"),
        (ramp("CMYK"), "tiff"),
    ],
)
def test_any_depth_is_shown_in_eight_bits(tmp_path, image, suffix):
    image.save(path := tmp_path / f"a.{suffix}")
    shown = open_image(path, "here")
    assert shown.mode == "RGB" and np.abs(np.asarray(shown, int) - RAMP[..., None]).max() <= 8


def test_a_profile_that_unpacks_to_much_is_named(tmp_path):
    profile = PngImagePlugin.PngInfo()
    profile.add(b"zTXt", b"a\0\0" + zlib.compress(bytes(70_000_000)))
    ramp().save(path := tmp_path / "a.png", pnginfo=profile)
    with pytest.raises(UserError, match=r"MAX_TEXT_CHUNK\); save it without texts and colour profile"):
        open_image(path, "here")


def test_a_pointer_is_no_picture(tmp_path):
    (tmp_path / "a.png").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(UserError, match=r"^here: image .*a.png is a Git LFS pointer"):
        open_image(tmp_path / "a.png", "here")
    (tmp_path / "b.png").write_bytes(io.BytesIO(b"\x89PNG").getvalue())
    with pytest.raises(UserError, match="give a PNG, JPEG or WebP"):
        open_image(tmp_path / "b.png", "here")

"""Pictures as a viewer shows them: upright, of any depth; what cannot be shown says why."""

import io
import struct
import zlib

import numpy as np
import pytest
from mistral_common.tokens.tokenizers.image import ImageConfig, ImageEncoder, SpecialImageIDs
from PIL import ExifTags, Image, ImageOps, PngImagePlugin

from ministral_jax.data.images import open_image, token_grid
from ministral_jax.errors import UserError
from ministral_jax.models.spec import PRESETS

RAMP = np.tile(np.linspace(0, 255, 24).astype(np.uint8), (16, 1))


def ramp(mode="RGB") -> Image.Image:
    """24 x 16, dark on the left."""
    return Image.fromarray(RAMP).convert(mode)


def with_orientation(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif.tobytes()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "MPO"])
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


@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_a_colour_that_is_transparent_is_white(tmp_path, mode):
    ramp(mode).save(path := tmp_path / "a.png", transparency=(0, 0, 0) if mode == "RGB" else 0)
    pixels = np.asarray(open_image(path, "here"))
    assert (pixels[:, 0] == 255).all() and (pixels[:, 12] < 255).all()


def test_a_png_with_a_flipped_byte_is_damaged(tmp_path):
    ramp().save(path := tmp_path / "a.png")
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 12] ^= 255
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"here: image .*a.png cannot be read"):
        open_image(path, "here")


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


def test_no_other_program_is_asked_about_a_picture(tmp_path, monkeypatch):
    """Pillow lets Ghostscript run what an EPS says."""
    ramp().save(path := tmp_path / "a.png", "EPS")
    with Image.open(path) as image:
        assert image.format == "EPS"
    with pytest.raises(UserError, match=r"here: image .*a.png cannot be read .*give a PNG, JPEG or WebP"):
        open_image(path, "here")


@pytest.mark.parametrize(
    ("side", "said"), [(9460, "has 9460 x 9460 = 89491600 pixels; at most"), (0, "cannot be read")]
)
def test_a_size_is_checked_before_the_pixels(tmp_path, monkeypatch, side, said):
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "verify", lambda image: pytest.fail("it went on"))
    header = struct.pack(">4sIIBBBBB", b"IHDR", side, side, 8, 2, 0, 0, 0)
    ramp().save(path := tmp_path / "a.png")
    content = path.read_bytes()
    path.write_bytes(content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:])
    with pytest.raises(UserError, match=said):
        open_image(path, "here")


def _saved(path, form):
    image, options = ramp(), {}
    match form:
        case "palette GIF" | "animated GIF":
            frames = [ramp("L").point(lambda value, n=n: value if n == 0 else 255) for n in range(3)]
            options = dict(save_all=True, append_images=frames[1:]) if form == "animated GIF" else {}
            image = frames[0].convert("P")
        case "CMYK JPEG" | "LA PNG" | "1-bit PNG":
            image = ramp({"C": "CMYK", "L": "LA", "1": "1"}[form[0]])
        case "1 x 1 PNG":
            image = Image.new("RGB", (1, 1), (10, 20, 30))
    suffix = form.rsplit(" ", maxsplit=1)[-1]
    image.save(path, suffix, **options, **({"quality": 100} if suffix == "JPEG" else {}))


@pytest.mark.parametrize("form", ["palette GIF", "animated GIF", "CMYK JPEG", "LA PNG", "1-bit PNG", "1 x 1 PNG"])
def test_guard_forms_of_pictures_are_decoded(tmp_path, form):
    """Of an animation the first frame."""
    _saved(tmp_path / "a", form)
    shown = open_image(tmp_path / "a", "here")
    assert shown.mode == "RGB"
    if form == "1 x 1 PNG":
        assert shown.size == (1, 1) and shown.getpixel((0, 0)) == (10, 20, 30)
    elif form == "1-bit PNG":
        pixels = np.asarray(shown)
        assert set(pixels.flat) == {0, 255} and pixels[:, :8].mean() < 80 and pixels[:, -8:].mean() > 175
    else:
        assert np.abs(np.asarray(shown, int) - RAMP[..., None]).max() <= 8


@pytest.mark.parametrize("form", ["RGB JPEG", "CMYK JPEG", "animated GIF", "LA PNG"])
@pytest.mark.parametrize("left", [0.0, 0.1, 0.9])
def test_guard_a_picture_that_was_cut_short_is_refused_by_its_row(tmp_path, form, left):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    noise.convert(form.split()[0] if form[0] != "a" else "P").save(path := tmp_path / "a", form.split()[1])
    path.write_bytes(path.read_bytes()[: int(left * path.stat().st_size)])
    with pytest.raises(UserError, match=r"^rows.jsonl row 7: image .* cannot be read") as error:
        open_image(path, "rows.jsonl row 7")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("patch", [14, 16])
@pytest.mark.parametrize(
    "size",
    [
        (4620, 1598), (1598, 4620), (4620, 1597), (3080, 2135), (2135, 3080), (3080, 2137), (1540, 1540), (1541, 1540),
        (8000, 1), (1, 8000), (1, 1), (23, 3), (28, 28), (29, 28), (1539, 29), (100_000, 20), (1541, 1), (6160, 2338),
    ],
)  # fmt: skip
def test_large_pictures_have_mistral_commons_grid(size, patch):
    """Sizes that end in .33, .67 and in .5 after the longest edge was limited: 2135 / 2 = 1067.5, 2137 / 2 = 1068.5."""
    config = ImageConfig(image_patch_size=patch, max_image_size=1540, spatial_merge_size=2)
    columns, rows = ImageEncoder(config, SpecialImageIDs(img=10, img_break=12, img_end=13))._image_to_num_tokens(
        Image.new("1", size)
    )
    vision = PRESETS["mistral-small-3.1-24b"].vision.model_copy(update={"patch_size": patch, "max_image_size": 1540})
    assert token_grid(*size, vision) == (rows, columns)
    if (size, patch) == ((4620, 1598), 14):
        assert (rows, columns) == (20, 55)


@pytest.mark.parametrize("value", [1.5, -0.1, np.nan])
def test_floats_that_are_no_picture(tmp_path, value):
    Image.fromarray(np.full((4, 4), value, np.float32)).save(path := tmp_path / "a.tif")
    with pytest.raises(UserError, match=r"^row 7: image .*a.tif cannot be read \(its floats are not from 0 to 1\)"):
        open_image(path, "row 7")

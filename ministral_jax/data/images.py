"""Images: from a file to patches in merge-block order, and the tokens that stand for them.

The layout is mistral-common's: after the longest edge is limited to `max_image_size`, each started block of
`stride = patch_size * merge` pixels becomes one token. Resizing is Pillow's bicubic (mistral-common uses OpenCV's,
which does not average when it shrinks; transformers uses torchvision's, which does, like this one).
"""

from __future__ import annotations

import base64
import io
import struct
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from einops import rearrange
from PIL import Image, ImageOps

from ministral_jax.errors import UserError
from ministral_jax.files import is_remote, refuse_pointer
from ministral_jax.models.spec import VisionSpec

MOST_PIXELS = 89_478_485
"""Of an image file, checked before it is decoded; above this Pillow itself suspects a decompression bomb."""
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "TIFF", "BMP", "PPM", "JPEG2000", "AVIF")
"""What is decoded. Pillow knows more, and hands some of it to other programs."""
THUMBNAIL = 256
"""Longest side of a picture in a report, in pixels."""


class ImagePatches(NamedTuple):
    """Images in order: `grids` int32 `[I, 2]`, rows and columns of decoder tokens, and all `patches` uint8 `[P, 3pp]`,
    in merge-block order."""

    grids: np.ndarray
    patches: np.ndarray


def open_image(path: Path, where: str) -> Image.Image:
    """Decode an image file to RGB as a viewer shows it: turned as its EXIF orientation says, deep grey scaled to eight
    bits, transparency composited on white. Raises `UserError`: the file is missing, damaged, not an image, empty or
    larger than `MOST_PIXELS`; begins with `where`."""
    try:
        refuse_pointer(path, f"{where}: image {path}")
        content = io.BytesIO(path.read_bytes()) if is_remote(path) else path
        with Image.open(content, formats=_known_formats()) as file:
            _check_size(*file.size, f"{where}: image {path}")
            file.verify()  # of a damaged PNG, whose pixels may be decoded all the same
        with Image.open(content, formats=_known_formats()) as file:
            image = _upright(file)
            if image.mode == "RGB" and "transparency" not in image.info:
                return image.copy()
            layer = (_eight_bits(image) if image.mode.startswith(("I", "F")) else image).convert("RGBA")
            white = Image.new("RGBA", layer.size, "WHITE")
            white.paste(layer, (0, 0), layer)
            return white.convert("RGB")
    except FileNotFoundError:
        raise UserError(f"{where}: image {path} does not exist") from None
    except UserError:
        raise
    except Exception as error:  # a damaged file makes a decoder of Pillow's fail in any way
        # of a chunk that the picture does not need
        way_out = "save it without texts and colour profile" if "MAX_TEXT" in str(error) else "give a PNG, JPEG or WebP"
        raise UserError(f"{where}: image {path} cannot be read ({error}); {way_out}") from error


@cache
def _known_formats() -> list[str]:
    """Those of them that this Pillow has."""
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def _check_size(width: int, height: int, what: str) -> None:
    if width * height > MOST_PIXELS:
        raise UserError(f"{what} has {width} x {height} = {width * height} pixels; at most {MOST_PIXELS} can be read")
    if width * height == 0:
        raise UserError(f"{what} has no pixels ({width} x {height})")


def _upright(image: Image.Image) -> Image.Image:
    """Turned and mirrored as the EXIF orientation says; as it is where that is damaged."""
    try:
        return ImageOps.exif_transpose(image)
    except (OSError, ValueError, SyntaxError, EOFError, struct.error):
        return image


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of more than eight bits: integers of 0 to 65535, floats of 0 to 1. Raises `ValueError`: other floats."""
    values = np.asarray(image, np.float64)
    if image.mode == "F" and not (np.min(values) >= 0 and np.max(values) <= 1):
        raise ValueError("its floats are not from 0 to 1")
    grey = values * (255 if image.mode == "F" else 255 / 65535)
    return Image.fromarray(np.rint(grey.clip(0, 255)).astype(np.uint8))


def token_grid(width: int, height: int, vision: VisionSpec) -> tuple[int, int]:
    """Rows and columns of decoder tokens for an image of `width` x `height` pixels (both at least 1)."""
    ratio = max(width, height) / vision.max_image_size
    if ratio > 1:
        width, height = max(round(width / ratio), 1), max(round(height / ratio), 1)
    return -(-height // vision.stride), -(-width // vision.stride)


def resize(image: Image.Image, vision: VisionSpec) -> np.ndarray:
    """RGB image as uint8 `[stride * rows, stride * columns, 3]`."""
    rows, columns = token_grid(*image.size, vision)
    size = (vision.stride * columns, vision.stride * rows)
    return np.asarray(image if image.size == size else image.resize(size, Image.Resampling.BICUBIC))


def image_tokens(rows: int, columns: int, ids: tuple[int, int, int]) -> list[int]:
    """`[IMG]` x columns and `[IMG_BREAK]` for each row, the very last token `[IMG_END]`; `ids` in that order."""
    image, line_break, end = ids
    return [*([*[image] * columns, line_break] * rows)[:-1], end]


def patchify(pixels: np.ndarray, patch_size: int, merge: int) -> np.ndarray:
    """Patches in merge-block order: `merge**2` consecutive ones, (dy, dx) row-major, make one token; blocks row-major.

    Args:
        pixels: `[H, W, 3]`, sides multiples of `patch_size * merge`.

    Returns:
        `[H W / patch_size**2, 3 patch_size**2]` of the same dtype, each patch ordered (channel, row, column).
    """
    pattern = "(rows dy y) (columns dx x) c -> (rows columns dy dx) (c y x)"
    return rearrange(pixels, pattern, dy=merge, dx=merge, y=patch_size, x=patch_size)


def to_patches(pictures: Sequence[np.ndarray], vision: VisionSpec) -> ImagePatches:
    """Resized pictures, at least one, uint8 `[H, W, 3]` as `resize` gives them."""
    grids = [(p.shape[0] // vision.stride, p.shape[1] // vision.stride) for p in pictures]
    patches = [patchify(p, vision.patch_size, vision.merge) for p in pictures]
    return ImagePatches(np.array(grids, np.int32), np.concatenate(patches))


@cache
def patch_positions(rows: int, columns: int, merge: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column, in patches, of each patch of a `rows` x `columns` token grid; int32, merge-block order."""
    y, x = np.mgrid[: rows * merge, : columns * merge].astype(np.int32)
    blocks = "(rows dy) (columns dx) -> (rows columns dy dx)"
    return rearrange(y, blocks, dy=merge, dx=merge), rearrange(x, blocks, dy=merge, dx=merge)


def unpatchify(patches: np.ndarray, rows: int, columns: int, vision: VisionSpec) -> np.ndarray:
    """The inverse of `patchify`: a picture's uint8 patches `[P, 3pp]`, of a grid of `rows` x `columns` tokens, as
    `[H, W, 3]`."""
    merge, size = vision.merge, vision.patch_size
    pattern = "(rows columns dy dx) (c y x) -> (rows dy y) (columns dx x) c"
    return rearrange(patches, pattern, rows=rows, columns=columns, dy=merge, dx=merge, y=size, x=size)


def thumbnail(pixels: np.ndarray) -> str:
    """uint8 `[H, W, 3]` as a PNG in base64, its longer side `THUMBNAIL` pixels at most: what reports show."""
    image, file = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()

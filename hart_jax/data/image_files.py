"""Image files as RGB: the one decoder of training, precomputing, evaluation and the checks before shards are written.

Whatever the file's kind, its pixels mean the same: 16 bits are reduced to their upper 8, grey is three equal channels,
transparency lies on white, CMYK is converted as Pillow does, and EXIF's orientation is applied. `hart_jax.data.png`
decodes PNG, Pillow everything else.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image

from hart_jax.data import png
from hart_jax.errors import UserError

# By content, whatever the ending says. EPS and the like, which Pillow gives to other programs, are not among them.
FORMATS = frozenset({"PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM"})
_ORIENTATION = 0x0112
_UPRIGHT = 1
# What undoes each other orientation.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)
# What a PNG has where it says how to turn it. Pillow looks behind the pixels for it, and decodes them to get there.
_PNG_MARKS = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")
_DRAFT_SCALES = (8, 4, 2)


def rgb_image(data: bytes) -> Image.Image:
    """The whole image in RGB, turned as it is to be seen, on white where it is transparent.

    Raises:
      UserError: the bytes are not an image, are damaged, or have values whose range nothing says.
    """
    with _opened(data) as (file, orientation):
        return _turned(_rgb(file, data), orientation)


def shown_size(data: bytes) -> tuple[int, int]:
    """Width and height of `rgb_image(data)`, without decoding it.

    Raises:
      UserError: the bytes are not an image.
    """
    with _opened(data) as (file, orientation):
        width, height = file.size
        return (height, width) if orientation in _SIDEWAYS else (width, height)


def square_image(data: bytes, size: int) -> np.ndarray:
    """Decodes an image file to uint8 (size, size, 3): the centre square of its short side, resized with antialiasing.

    A side that is a multiple of `size` is averaged over whole blocks; a JPEG is then decoded at 1/2, 1/4 or 1/8 of its
    size, where that is whole and still at least twice `size`: much faster, and within a grey level on average.

    Raises:
      UserError: as `rgb_image`.
    """
    with _opened(data) as (file, orientation):
        width, height = file.size
        side = min(width, height)
        for scale in _DRAFT_SCALES:
            aligned = not ((width - side) // 2 % scale or (height - side) // 2 % scale)
            # Of an image that is mirrored, the far edges must be whole, too.
            whole = orientation == _UPRIGHT or not (width % scale or height % scale)
            if side % (2 * scale * size) == 0 and aligned and whole:
                file.draft(None, (width // scale, height // scale))
                break
        scale = round(width / file.width)
        image = _turned(_rgb(file, data), orientation)
    if orientation in _SIDEWAYS:
        width, height = height, width
    left, top, side = (width - side) // 2 // scale, (height - side) // 2 // scale, side // scale
    box = (left, top, left + side, top + side)
    if side % size == 0:
        square = image.reduce(side // size, box) if side > size else image.crop(box)
    else:
        square = image.resize((size, size), Image.Resampling.LANCZOS, box)
    return np.asarray(square, dtype=np.uint8)


def is_plain(data: bytes) -> bool:
    """Whether any decoder gives `rgb_image(data)`: a PNG or JPEG of RGB with 8 bits, upright and opaque.

    Raises:
      UserError: the bytes are not an image.
    """
    with _opened(data) as (file, orientation):
        opaque = file.mode == "RGB" and not file.has_transparency_data and orientation == _UPRIGHT
        # Pillow reduces a PNG of 16 bits itself.
        return opaque and (file.format == "JPEG" or (file.format == "PNG" and data[png.BITS] == 8))


@contextmanager
def _opened(data: bytes) -> Iterator[tuple[Image.Image, int]]:
    """An image file, and how it is to be turned; whatever goes wrong within is a `UserError`."""
    try:
        with Image.open(io.BytesIO(data)) as file:
            if file.format not in FORMATS:
                raise UserError(f"it is a file of kind {file.format}, not one of {', '.join(sorted(FORMATS))}")
            yield file, _orientation(file, data)
    except Exception as error:  # decoders raise all kinds
        problem = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"image does not decode ({problem})") from error


def _orientation(file: Image.Image, data: bytes) -> int:
    """EXIF's, 1 to 8; 1 where it has none or one that cannot be read."""
    if file.format == "TIFF" or (file.format == "PNG" and not any(mark in data for mark in _PNG_MARKS)):
        # Pillow turns TIFFs itself.
        return _UPRIGHT
    try:
        orientation = file.getexif().get(_ORIENTATION, _UPRIGHT)
    except Exception:  # damaged metadata, of which Pillow raises all kinds, say nothing of the pixels
        return _UPRIGHT
    return orientation if orientation in _TURNS else _UPRIGHT


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def _rgb(file: Image.Image, data: bytes) -> Image.Image:
    if file.format == "PNG":
        return _on_white(png.png_image(file, data))
    file.load()
    mode = file.mode
    if mode == "F":
        raise UserError("its values are floating-point numbers, whose range nothing says; store it with 8 bits")
    if mode == "I" or mode.startswith("I;16"):
        # The array of a 16-bit image has its byte order in its type.
        return png.of_pixels(np.asarray(file), file.size).convert("RGB")
    return _on_white(file.convert("LA") if mode == "La" else file)


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")

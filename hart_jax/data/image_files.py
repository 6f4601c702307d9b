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

from hart_jax.config.scales import Scale, shape_of
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


def known_size(data: bytes) -> tuple[int, int] | None:
    """As `shown_size`; None of what is no image."""
    try:
        return shown_size(data)
    except UserError:
        return None


def cropped_image(data: bytes, size: Scale) -> np.ndarray:
    """Decodes an image file to uint8 (H, W, 3): the largest part of the ratio H:W around its centre, resized with
    antialiasing; `size` is (H, W), or the side of a square.

    Sides that are the same multiple of H and of W are averaged over whole blocks; a JPEG is then decoded at 1/2, 1/4 or
    1/8 of its size, where that is whole and still at least twice as large: much faster, and within a grey level on
    average.

    Raises:
      UserError: as `rgb_image`.
    """
    height, width = shape_of(size)
    with _opened(data) as (file, orientation):
        sideways = orientation in _SIDEWAYS
        shown = file.size[::-1] if sideways else file.size
        part = _largest_part(*shown, width, height)
        factor = part[0] // width if part[0] * height == part[1] * width and part[0] % width == 0 else 0
        corner = [(whole - cut) // 2 for whole, cut in zip(shown, part, strict=True)]
        for scale in _DRAFT_SCALES:
            aligned = not any(place % scale for place in corner)
            # Of an image that is turned, the far edges must be whole, too.
            whole = orientation == _UPRIGHT or not any(side % scale for side in shown)
            if factor and factor % (2 * scale) == 0 and aligned and whole:
                file.draft(None, (file.width // scale, file.height // scale))
                break
        scale = round(shown[0] / (file.height if sideways else file.width))
        image = _turned(_rgb(file, data), orientation)
    left, top, wide, high = (side // scale for side in (*corner, *part))
    box = (left, top, left + wide, top + high)
    if factor:
        cut = image.reduce(factor // scale, box) if factor > 1 else image.crop(box)
    else:
        cut = image.resize((width, height), Image.Resampling.LANCZOS, box)
    return np.asarray(cut, dtype=np.uint8)


def _largest_part(whole_width: int, whole_height: int, width: int, height: int) -> tuple[int, int]:
    """Width and height of the largest part of an image that has the ratio of the others, in whole pixels."""
    if whole_width * height >= whole_height * width:
        return max(1, round(whole_height * width / height)), whole_height
    return whole_width, max(1, round(whole_width * height / width))


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

"""Pixels of PNG files, by libpng where the extra `fast-data` is installed (in half to two thirds of the time), else by
Pillow. The pixels are the same: where Pillow alone would give others, it is helped here.
"""

import io
import zlib

import numpy as np
from PIL import Image

from hart_jax.errors import UserError

try:
    from imagecodecs import png_decode
except ImportError:
    png_decode = None  # type: ignore[assignment]

# Where the header has the bits of a channel, and the type of colour.
BITS, _COLOUR = 24, 25
_GREY, _RGB = 0, 2


def png_image(file: Image.Image, data: bytes) -> Image.Image:
    """The pixels of an opened PNG as L, LA, RGB, RGBA, or in a mode that Pillow converts to one of these.

    Raises:
      UserError: the bytes are damaged, or their pixels do not match their checksum.
    """
    if png_decode is not None:
        return of_pixels(png_decode(data), file.size)
    _check_pixels(data)
    bits, colour, clear = data[BITS], data[_COLOUR], file.info.get("transparency")
    if bits == 16 and colour == _GREY:
        values = np.asarray(file)
        image = of_pixels(values, file.size)
        return image if clear is None else _with_alpha(image, values != clear)
    file.load()
    if clear is None:
        return file
    if bits == 16 and colour == _RGB:
        # Pillow keeps the upper half of each value, and compares that with the whole of the clear one.
        low = np.asarray(_lower_halves(data)).astype(np.uint16)
        values = np.asarray(file).astype(np.uint16) << 8 | low
        return _with_alpha(Image.fromarray(np.asarray(file)), np.any(values != clear, axis=-1))
    if bits in (2, 4) and colour == _GREY:
        # Pillow spreads the values over 0 to 255, and not the clear one.
        file.info["transparency"] = clear * (255 // (2**bits - 1))
    return file


def of_pixels(pixels: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """(H, W), or (H, W, 1 to 4), of unsigned 8 or 16 bits, as L, LA, RGB or RGBA.

    Raises:
      UserError: the size is not (W, H), or a value is not of 16 bits.
    """
    if pixels.shape[:2] != size[::-1]:
        raise UserError(f"it is {size[0]} x {size[1]} by its header, {pixels.shape[1]} x {pixels.shape[0]} decoded")
    if pixels.dtype != np.uint8:
        if pixels.min() < 0 or pixels.max() > np.iinfo(np.uint16).max:
            raise UserError(f"its values, {pixels.min()} to {pixels.max()}, are not of 16 bits; store it with 8 bits")
        pixels = (pixels >> 8).astype(np.uint8)
    return Image.fromarray(pixels)


def _with_alpha(image: Image.Image, opaque: np.ndarray) -> Image.Image:
    image.putalpha(Image.fromarray(np.where(opaque, 255, 0).astype(np.uint8)))
    return image


def _lower_halves(data: bytes) -> Image.Image:
    """Of the values of an RGB image of 16 bits."""
    file = Image.open(io.BytesIO(data))
    # The same bytes, read as if the lower half of a value came last.
    file.tile = [tile._replace(args="RGB;16L") for tile in file.tile]
    file.load()
    return file


def _check_pixels(data: bytes) -> None:
    """Of the chunks with pixels, whose checksums Pillow does not verify."""
    view, at = memoryview(data), 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(view[at : at + 4])
        named = view[at + 4 : end]
        if named[:4] == b"IDAT" and zlib.crc32(named) != int.from_bytes(view[end : end + 4]):
            raise UserError("IDAT: CRC error")
        at = end + 4

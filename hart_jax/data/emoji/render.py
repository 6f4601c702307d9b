"""One captioned image of the set, and its rendering to an RGB image on white, square or of its own shape."""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from hart_jax.errors import UserError

# Clip art is rendered once at this multiple of the wanted size, then cropped to its ink and reduced.
_OVERSAMPLING = 2
_MAX_RENDER_SIDE = 4096
_MARGIN = 0.04
# How many times as long as wide an image of its own shape is at most: narrower ones get white sides.
MOST_ELONGATED = 2


@dataclass(frozen=True)
class SourceImage:
    """An image before rendering.

    Attributes:
      id: unique file stem, e.g. "fluent3d-1f34e".
      style: a key of `captions.STYLE_PHRASES`.
      category: slug of the content, the folder the image is stored in.
      concept: what is shown, across styles: normalised code points, or "clipart:<title>"; the split is by it.
      captions: the plain caption first.
      data: the bytes of an SVG, PNG or WebP file.
      crop: cut away empty borders (clip art is often a small drawing on a page).
    """

    id: str
    style: str
    category: str
    concept: str
    captions: tuple[str, ...]
    data: bytes
    crop: bool = False


def render(source_image: SourceImage, size: int, keep_shape: bool = False) -> Image.Image:
    """Renders to an RGB image of `size` x `size`, antialiased, composited on white, padded to a square.

    With `keep_shape` a drawing whose borders are cut away is not padded to a square: its longer side is `size`, the
    other one half of that or more.

    Raises:
      Exception: whatever the decoder raises for a file it cannot render; ValueError for an empty drawing.
    """
    is_svg = not source_image.data.startswith((b"\x89PNG", b"RIFF"))
    image = (
        _rasterize_svg(source_image.data, size * (_OVERSAMPLING if source_image.crop else 1))
        if is_svg
        else _decode(source_image.data)
    )
    if source_image.crop:
        box = _ink_box(image)
        longest = max(box[2] - box[0], box[3] - box[1])
        if is_svg and longest < size:
            enlarge = min(_OVERSAMPLING * size / longest, _MAX_RENDER_SIDE / max(image.size))
            image = _rasterize_svg(source_image.data, round(max(image.size) * enlarge))
            box = _ink_box(image)
        image = image.crop(box)
        return _on_white(image, size, round(size * _MARGIN), keep_shape)
    _ink_box(image)
    return _on_white(image, size, 0, False)


def is_colourless(image: Image.Image) -> bool:
    """Whether an RGB image is black, white and grey only."""
    rgb = np.asarray(image, dtype=np.int16)
    return float((rgb.max(axis=2) - rgb.min(axis=2)).mean()) < 1.0


def require_svg_library() -> None:
    """Raises UserError if SVG files cannot be rendered here."""
    try:
        import cairosvg  # noqa: F401
    except (ImportError, OSError) as error:
        raise UserError(
            f"rendering SVG files needs cairosvg and the cairo library ({error}); pip install cairosvg"
        ) from error


def _decode(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data)) as file:
        return file.convert("RGBA")


def _rasterize_svg(data: bytes, longest_side: int) -> Image.Image:
    image = _decode(_svg_to_png(data, output_width=longest_side, output_height=None))
    if image.height > longest_side:
        image = _decode(_svg_to_png(data, output_width=None, output_height=longest_side))
    return image


def _svg_to_png(data: bytes, **size: int | None) -> bytes:
    # Imported here so that reading a finished set needs no cairo library.
    import cairosvg

    try:
        return cairosvg.svg2png(bytestring=data, **size)
    except MemoryError as error:
        if b"skew" not in data:
            raise
        # Two of the glossy icons have a gradient with skewY(-90), whose matrix holds tan(90 degrees): 1.6e16.
        raise ValueError(
            "a skew of 90 degrees in it is beyond cairo's numbers, which it calls out of memory"
        ) from error
    except ZeroDivisionError as error:
        # CairoSVG divides by the distance of an arc's ends to find a gradient's box; SVG says such an arc is nothing.
        raise ValueError("an arc in it ends where it begins, and cairosvg divides by its length") from error


def _ink_box(image: Image.Image) -> tuple[int, int, int, int]:
    """Box of the pixels that differ from a white page; ValueError if there are hardly any."""
    white = Image.new("RGBA", image.size, "white")
    flat = np.asarray(Image.alpha_composite(white, image).convert("RGB")).min(axis=2)
    rows, columns = np.where((flat < 250).any(axis=1))[0], np.where((flat < 250).any(axis=0))[0]
    if len(rows) < 2 or len(columns) < 2:
        raise ValueError("the drawing is empty")
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _on_white(image: Image.Image, size: int, margin: int, keep_shape: bool) -> Image.Image:
    """Fits an RGBA image into a white square, or into as much of one as its shape needs; on white first, so that hidden
    colours do not bleed into edges."""
    room = size - 2 * margin
    scale = room / max(image.size)
    fitted = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    canvas = Image.new("RGBA", image.size, "white")
    flat = Image.alpha_composite(canvas, image).convert("RGB")
    if fitted != image.size:
        flat = flat.resize(fitted, Image.Resampling.LANCZOS)
    width, height = (max(side + 2 * margin, -(-size // MOST_ELONGATED)) if keep_shape else size for side in fitted)
    page = Image.new("RGB", (width, height), "white")
    page.paste(flat, ((width - fitted[0]) // 2, (height - fitted[1]) // 2))
    return page

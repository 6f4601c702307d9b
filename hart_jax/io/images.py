"""Images in and out: value ranges, grids with captions, PNG files that remember how they were made."""

import errno
import os
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from hart_jax.errors import UserError
from hart_jax.io.files import atomic_file
from hart_jax.io.paths import as_path, is_remote, make_folder

_PNG_START, _PNG_END = b"\x89PNG\r\n\x1a\n", b"\0\0\0\0IEND\xaeB\x60\x82"
_CAPTION_SIZE = 12
_CAPTION_MARGIN = 2
_CAPTION_MAX_LINES = 5


def from_uint8(image):
    """A uint8 array, NumPy's or JAX's, as float32 in [-1, 1], as the models take images."""
    return image.astype(np.float32) / 127.5 - 1.0


def to_uint8(image) -> np.ndarray:
    """Values of any float array in [-1, 1] as uint8 in [0, 255], rounded to the nearest and clipped; NaN becomes 0."""
    scaled = (np.asarray(image, np.float32) + 1.0) * 127.5
    return np.clip(np.rint(np.nan_to_num(scaled)), 0, 255).astype(np.uint8)


def grid(
    images: Sequence[np.ndarray] | np.ndarray, columns: int, padding: int = 2, captions: Sequence[str] | None = None
) -> np.ndarray:
    """Arranges images row by row on white, each with its caption below.

    All cells have the largest height and the largest width; smaller images lie in the middle of theirs.

    Args:
      images: uint8, at least one [H, W, 3]; heights and widths may differ.
      columns: images per row; the last row may be shorter.
      padding: white pixels around and between the cells.
      captions: a text for each, wrapped to the cell's width; one longer than five lines is cut with an ellipsis.

    Returns:
      uint8 [H', W', 3].
    """
    images = list(map(np.asarray, images))
    if not images or any(one.dtype != np.uint8 or one.ndim != 3 or one.shape[-1] != 3 for one in images):
        found = ", ".join(sorted({f"{one.dtype} {one.shape}" for one in images})) or "none"
        raise ValueError(f"grid takes at least one image, uint8 [H, W, 3], got {found}")
    if columns < 1:
        raise ValueError(f"columns is {columns}; it must be at least 1")
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"{len(captions)} captions for {len(images)} images")

    count, height, width = len(images), max(map(len, images)), max(one.shape[1] for one in images)
    columns = min(columns, count)
    rows = -(-count // columns)
    font = ImageFont.load_default(_CAPTION_SIZE)
    texts = [_wrap(text, font, width) for text in captions] if captions is not None else [[]] * count
    line_height = sum(font.getmetrics()) if isinstance(font, ImageFont.FreeTypeFont) else _CAPTION_SIZE
    lines_per_row = [max(len(lines) for lines in texts[row * columns : (row + 1) * columns]) for row in range(rows)]
    caption_heights = [lines and lines * line_height + 2 * _CAPTION_MARGIN for lines in lines_per_row]

    total_height = padding + rows * (height + padding) + sum(caption_heights)
    canvas = Image.new("RGB", (padding + columns * (width + padding), total_height), "white")
    draw = ImageDraw.Draw(canvas)
    top = padding
    for row in range(rows):
        for column, index in enumerate(range(row * columns, min((row + 1) * columns, count))):
            left, image = padding + column * (width + padding), images[index]
            middle = left + (width - image.shape[1]) // 2, top + (height - len(image)) // 2
            canvas.paste(Image.fromarray(image), middle)
            for number, line in enumerate(texts[index]):
                draw.text((left, top + height + _CAPTION_MARGIN + number * line_height), line, fill="black", font=font)
        top += height + padding + caption_heights[row]
    return np.asarray(canvas)


def save_png(
    path: str | os.PathLike, image: np.ndarray, metadata: Mapping[str, str] | None = None, overwrite: bool = False
) -> None:
    """Writes uint8 [H, W, 3] (or [H, W]) as PNG, whole or not at all, with `metadata` as text chunks.

    Raises:
      UserError: `path` exists and `overwrite` is False, or its folder cannot be made.
    """
    path = as_path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the name of a PNG file")
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists already; give another name, or remove it first")
    try:
        make_folder(path.parent)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"cannot write {path}: {path.parent} is not a folder") from None
    chunks = PngImagePlugin.PngInfo()
    for key, value in (metadata or {}).items():
        chunks.add_text(key, value)  # text outside Latin-1 becomes an iTXt chunk
    with atomic_file(path) as temporary:
        Image.fromarray(np.asarray(image)).save(temporary, format="PNG", pnginfo=chunks)


def is_whole_png(path: str | os.PathLike) -> bool:
    """Whether a PNG file is there from its first to its last byte, as far as its two ends tell.

    In a bucket it is whole if it is there.
    """
    path = as_path(path)
    if is_remote(path):
        return path.exists()
    try:
        with path.open("rb") as file:
            start = file.read(len(_PNG_START))
            file.seek(-len(_PNG_END), os.SEEK_END)
            return (start, file.read()) == (_PNG_START, _PNG_END)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        # What is shorter than its end cannot be read from there.
        if error.errno == errno.EINVAL:
            return False
        raise


def read_png_metadata(path: str | os.PathLike) -> dict[str, str]:
    """The text chunks of a PNG file, as `save_png` stored them.

    Raises:
      UserError: no such file, or it is not a PNG.
    """
    try:
        with as_path(path).open("rb") as file, Image.open(file, formats=["PNG"]) as image:
            image.load()  # text chunks may follow the pixels
            return {key: str(value) for key, value in image.text.items()}  # type: ignore[attr-defined]
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, SyntaxError) as error:
        raise UserError(f"{path} is not a readable PNG file: {error}") from None


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Breaks at spaces, and inside a word only where the word alone is wider than `width` pixels."""
    lines: list[str] = []
    line = ""
    for word in text.split():
        if line and font.getlength(f"{line} {word}") <= width:
            line = f"{line} {word}"
            continue
        if line:
            lines.append(line)
        line = word
        while len(line) > 1 and font.getlength(line) > width:
            fits = next((n for n in range(len(line) - 1, 1, -1) if font.getlength(line[:n]) <= width), 1)
            lines.append(line[:fits])
            line = line[fits:]
    lines += [line] if line else []
    if len(lines) > _CAPTION_MAX_LINES:
        lines = lines[:_CAPTION_MAX_LINES]
        last = lines[-1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        lines[-1] = last.rstrip() + "…"
    return lines

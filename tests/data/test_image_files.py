"""Every kind of file means the same in the square, as a whole, turned, and when it is checked, whoever decodes it."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from hart_jax.data import png as png_files
from hart_jax.data.check_images import aspect, check_images
from hart_jax.data.image_files import cropped_image, rgb_image, shown_size
from hart_jax.data.mjhq import Example
from hart_jax.errors import UserError
from hart_jax.evaluation.images import decode

SIDE = 24
RAMP = np.arange(SIDE * SIDE).reshape(SIDE, SIDE) / (SIDE * SIDE - 1)
GREY = np.round(RAMP * 65535).astype(np.uint16)
RGB = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
ALPHA = np.where(RAMP > 0.5, 255, 0).astype(np.uint8)


def saved(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(bits: int, colour: int, rows: np.ndarray, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of rows of bytes as the format packs them, with extra chunks ahead of the pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    pixels = zlib.compress(b"".join(b"\0" + bytes(row) for row in rows))
    width = len(rows[0]) * 8 // (bits * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour])
    header = struct.pack(">IIBBBBB", width, len(rows), bits, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def big_endian(array: np.ndarray) -> np.ndarray:
    return np.frombuffer(array.astype(">u2").tobytes(), np.uint8).reshape(len(array), -1)


def on_white(grey: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return np.where(alpha > 0, grey, 255)


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values.astype(np.uint8)[..., None], 3, -1)


UPPER = GREY >> 8
NIBBLES = np.arange(SIDE * SIDE).reshape(SIDE, SIDE) % 16
PACKED = (NIBBLES[:, ::2] << 4 | NIBBLES[:, 1::2]).astype(np.uint8)
PAIRS = NIBBLES % 4
PACKED_PAIRS = (PAIRS[:, ::4] << 6 | PAIRS[:, 1::4] << 4 | PAIRS[:, 2::4] << 2 | PAIRS[:, 3::4]).astype(np.uint8)
# Beside the clear colour others that differ from it in a lower half alone.
RGB_16 = GREY[..., None] + np.arange(3, dtype=np.uint16) % 2
RGB_16[0, 4:7] = RGB_16[0, 3] + np.eye(3, dtype=np.uint16)
RGBA = np.dstack([RGB, ALPHA])
P = Image.fromarray(RGB).quantize(16)
CLEAR_P = np.asarray(P)[0, 0]
# What is in the file -> what is seen.
KINDS = {
    "L;16 png": (png(16, 0, big_endian(GREY)), grey(UPPER)),
    "L;16 png, one value clear": (
        png(16, 0, big_endian(GREY), (b"tRNS", int(GREY[0, 3]).to_bytes(2, "big"))),
        grey(on_white(UPPER, GREY[0, 3] != GREY)),
    ),
    "L;4 png, one value clear": (
        png(4, 0, PACKED, (b"tRNS", b"\0\3")),
        grey(on_white(NIBBLES * 17, NIBBLES != 3)),
    ),
    "L;2 png, one value clear": (
        png(2, 0, PACKED_PAIRS, (b"tRNS", b"\0\2")),
        grey(on_white(PAIRS * 85, PAIRS != 2)),
    ),
    "RGB;16 png": (png(16, 2, big_endian(np.repeat(GREY, 3, 1))), grey(UPPER)),
    "RGB;16 png, one colour clear": (
        png(16, 2, big_endian(RGB_16.reshape(SIDE, -1)), (b"tRNS", RGB_16[0, 3].astype(">u2").tobytes())),
        on_white(RGB_16 >> 8, (RGB_16[0, 3] != RGB_16).any(-1, keepdims=True)).astype(np.uint8),
    ),
    "RGBA;16 png": (
        png(16, 6, big_endian(np.dstack([RGB_16, ALPHA.astype(np.uint16) * 257]).reshape(SIDE, -1))),
        on_white(RGB_16 >> 8, ALPHA[..., None]).astype(np.uint8),
    ),
    "LA;16 png": (
        png(16, 4, big_endian(np.dstack([GREY, ALPHA.astype(np.uint16) * 257]).reshape(SIDE, -1))),
        grey(on_white(UPPER, ALPHA)),
    ),
    "I;16 tiff": (saved(Image.fromarray(GREY), "TIFF"), grey(UPPER)),
    "I;16B tiff": (saved(Image.fromarray(GREY.astype(">u2")), "TIFF"), grey(UPPER)),
    "I tiff": (saved(Image.fromarray(GREY.astype(np.int32)), "TIFF"), grey(UPPER)),
    "16-bit pgm": (b"P5 %d %d 65535\n" % (SIDE, SIDE) + GREY.astype(">u2").tobytes(), grey(UPPER)),
    "1 png": (saved(Image.fromarray(ALPHA).convert("1")), grey(ALPHA)),
    "1 tiff": (saved(Image.fromarray(ALPHA).convert("1"), "TIFF"), grey(ALPHA)),
    "L png": (saved(Image.fromarray(UPPER.astype(np.uint8))), grey(UPPER)),
    "LA png": (saved(Image.fromarray(np.dstack([UPPER, ALPHA]).astype(np.uint8))), grey(on_white(UPPER, ALPHA))),
    "RGB png": (saved(Image.fromarray(RGB)), RGB),
    "RGB png, one colour clear": (
        png(8, 2, RGB.reshape(SIDE, -1), (b"tRNS", RGB[0, 3].astype(">u2").tobytes())),
        on_white(RGB, (RGB[0, 3] != RGB).any(-1, keepdims=True)),
    ),
    "moving png": (saved(Image.fromarray(RGB), save_all=True, append_images=[Image.fromarray(RGB[::-1])]), RGB),
    "RGB tiff": (saved(Image.fromarray(RGB), "TIFF"), RGB),
    "RGB webp": (saved(Image.fromarray(RGB), "WEBP", lossless=True), RGB),
    "RGBA png": (saved(Image.fromarray(RGBA)), on_white(RGB, ALPHA[..., None])),
    "RGBA webp": (saved(Image.fromarray(RGBA), "WEBP", lossless=True), on_white(RGB, ALPHA[..., None])),
    "RGBA tiff": (saved(Image.fromarray(RGBA), "TIFF"), on_white(RGB, ALPHA[..., None])),
    "P png": (saved(P), np.asarray(P.convert("RGB"))),
    "P gif": (saved(P, "GIF"), np.asarray(P.convert("RGB"))),
    "P png, one colour clear": (
        saved(P, transparency=int(CLEAR_P)),
        on_white(np.asarray(P.convert("RGB")), (np.asarray(P) != CLEAR_P)[..., None]),
    ),
    "P gif, one colour clear": (
        saved(P, "GIF", transparency=int(CLEAR_P)),
        on_white(np.asarray(P.convert("RGB")), (np.asarray(P) != CLEAR_P)[..., None]),
    ),
    "CMYK tiff": (
        saved(Image.fromarray(np.dstack([255 - RGB, np.zeros((SIDE, SIDE), np.uint8)]), "CMYK"), "TIFF"),
        RGB,
    ),
}


@pytest.fixture(params=["libpng", "Pillow"])
def decoder(request, monkeypatch):
    """Of PNGs: with the extra `fast-data`, and without."""
    if request.param == "Pillow":
        monkeypatch.setattr(png_files, "png_decode", None)
    else:
        assert png_files.png_decode is not None


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_image_is_what_is_seen(kind: str, decoder):
    data, expected = KINDS[kind]
    np.testing.assert_array_equal(rgb_image(data), expected)
    np.testing.assert_array_equal(cropped_image(data, SIDE), expected)
    np.testing.assert_array_equal(decode(data, 0, kind), expected)
    # A quarter of it: all decoders feed the same reduction.
    np.testing.assert_array_equal(cropped_image(data, 6), cropped_image(saved(Image.fromarray(expected)), 6))


@pytest.mark.parametrize("pixels", [GREY.astype(np.float32), GREY.astype(np.int32) * 2, GREY.astype(np.int32) - 1])
def test_values_without_a_known_range_are_refused(pixels: np.ndarray):
    with pytest.raises(UserError, match="store it with 8 bits"):
        rgb_image(saved(Image.fromarray(pixels), "TIFF"))


def test_a_file_that_pillow_would_give_to_another_program_is_refused():
    with pytest.raises(UserError, match="kind EPS"):
        rgb_image(saved(Image.fromarray(RGB), "EPS"))


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


# Light at the top left, so that each turn shows; wide, so that size and crop do.
WIDE = np.full((40, 64, 3), 40, np.uint8)
WIDE[:20, :32] = (250, 200, 150)
# As it lies in the file: what to do to an upright image to store it so.
STORED = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x),
    7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
    8: lambda x: np.rot90(x, -1),
}


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", STORED)
def test_orientation_turns_size_and_crop_too(orientation: int, kind: str):
    odd = WIDE[:39, :62]
    image = Image.fromarray(np.ascontiguousarray(STORED[orientation](odd)))
    data = saved(image, kind, exif=exif(orientation), **({"lossless": True} if kind == "WEBP" else {}))
    assert shown_size(data) == (62, 39)
    np.testing.assert_array_equal(rgb_image(data), odd)
    np.testing.assert_array_equal(cropped_image(data, 39), odd[:, 11:50])
    np.testing.assert_array_equal(cropped_image(data, 13), cropped_image(saved(Image.fromarray(odd)), 13))


@pytest.mark.parametrize("orientation", STORED)
def test_orientation_of_jpegs_decoded_at_a_part_of_their_size(orientation: int):
    upright = np.asarray(Image.fromarray(WIDE).resize((640, 400), Image.Resampling.BICUBIC))
    image = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    data = saved(image, "JPEG", quality=95, exif=exif(orientation))
    expected = cropped_image(saved(Image.fromarray(upright)), 25)
    difference = np.abs(cropped_image(data, 25).astype(int) - expected)
    assert difference.mean() < 1 and difference.max() <= 6
    assert shown_size(data) == rgb_image(data).size == (640, 400)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_orientation_behind_the_pixels_and_orientations_that_mean_nothing():
    turned = saved(Image.fromarray(np.ascontiguousarray(STORED[6](WIDE))))
    tags = exif(6).removeprefix(b"Exif\0\0")
    end = turned.rindex(b"IEND") - 4
    late = struct.pack(">I", len(tags)) + b"eXIf" + tags + struct.pack(">I", zlib.crc32(b"eXIf" + tags))
    np.testing.assert_array_equal(rgb_image(turned[:end] + late + turned[end:]), WIDE)
    for odd in (exif(9), exif(0), b"Exif\0\0damaged", b"Exif\0\0MM\0*\xff\xff\xff\xff"):
        np.testing.assert_array_equal(rgb_image(saved(Image.fromarray(WIDE), exif=odd)), WIDE)


def test_check_and_loader_agree_on_a_wrong_checksum(tmp_path, decoder):
    """Pillow by itself decodes a PNG whose pixels do not match their checksum."""
    data = bytearray(KINDS["RGB png"][0])
    data[data.index(b"IEND") - 8] ^= 255
    path = tmp_path / "bad.png"
    path.write_bytes(data)
    example = Example("bad", "cat", ("a",), path)
    with Image.open(path) as image:
        image.load()
    with pytest.raises(UserError, match=r"bad\.png does not decode .*CRC"):
        check_images([example])
    for function in (rgb_image, lambda data: cropped_image(data, 6), lambda data: decode(data, 0, "bad")):
        with pytest.raises(UserError, match="does not decode"):
            function(bytes(data))
    assert aspect(example) == 1

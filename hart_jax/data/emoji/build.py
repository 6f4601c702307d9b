"""Builds the captioned image set: `python -m hart_jax.data.emoji --out DIR`.

About 12,000 images of seven styles, from npm and Debian packages with permissive licences (see `SOURCES`), in the
layout of MJHQ-30K, once for training and once for testing:

    DIR/train/meta_data.json        {id: {"category", "prompt", "captions", "style", "concept"}}
    DIR/train/<category>/<id>.png   RGB on white, square; with `--keep_shape` clip art and furniture keep their shapes
    DIR/test/...                    the same, of concepts that training never sees

A concept is held out in every style at once: emoji by code point, clip art and furniture by title. Skin-tone variants
are left out unless asked for; national flags and clock faces are kept in two styles only, fluent3d and twemoji.

A build that was interrupted is resumed by the same command; a finished one is left as it is.
"""

import argparse
import functools
import io
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from hart_jax.data.emoji import packages
from hart_jax.data.emoji.captions import COLOURLESS_PHRASE, STYLE_PHRASES, word_set
from hart_jax.data.emoji.clipart_sources import clipart_images, furniture_images
from hart_jax.data.emoji.emoji_sources import ICONIFY_STYLES, emoji_images, split_key
from hart_jax.data.emoji.render import SourceImage, is_colourless, render, require_svg_library
from hart_jax.errors import UserError
from hart_jax.io.files import atomic_file, read_json, write_json
from hart_jax.io.fingerprint import differences, sha256
from hart_jax.io.ownership import OWNER_FILE, owned
from hart_jax.io.paths import local_only

SOURCES = {
    "fluent3d": packages.FLUENT_3D,
    **ICONIFY_STYLES,
    "clipart": packages.OPENCLIPART,
    "furniture": packages.SWEETHOME3D,
}
RASTER_STYLES = frozenset({"fluent3d", "furniture"})
TEST_PER_MILLE = 40
BUILD_FILE = "build.json"
FORMAT = 1
_RENDER_SECONDS = 20
# Things that the examples and the README ask for: training must see them, whatever the hash says.
ALWAYS_TRAIN = word_set(
    """
    1f34e 1f34f 1f436 1f415 1f431 1f408 1f3e0 1f3e1 1f697 1f698 2b50 2764 1f332 1f333 1f334 1f600 1f603 1f642 1f434
    1f40e 1f41f 1f420 1f426 1f33b 1f339 1f382 1f355 1f354 2600 1f31e 1f319 26bd 1f680 2708 1f6b2 1f34c 1f34a 1f353
    1f347 1f388 1f381 1f511 1f451 1f437 1f42e 1f427 1f981 1f43b 1f438 1f308 2602 1f3b8 1f4f7 2615 1fa91
    """
)


def is_test(concept: str) -> bool:
    """Whether a concept is held out: about 4 % are, by a hash of its code points (or title) that never changes."""
    if concept in ALWAYS_TRAIN:
        return False
    return int(sha256(split_key(concept))[:16], 16) % 1000 < TEST_PER_MILLE


def all_images(styles: list[str], folder: Path | None, *, skin_tones: bool) -> Iterator[SourceImage]:
    """Yields the images of the given styles (keys of `SOURCES`), unrendered."""
    for style in styles:
        if style == "clipart":
            yield from clipart_images(folder)
        elif style == "furniture":
            yield from furniture_images(folder)
        else:
            yield from emoji_images(style, folder, skin_tones=skin_tones)


def build(
    out: Path,
    *,
    folder: Path | None = None,
    image_size: int = 256,
    styles: list[str] | None = None,
    skin_tones: bool = False,
    keep_shape: bool = False,
    workers: int | None = None,
    report: Callable[[str], None] = print,
) -> dict[str, Counter]:
    """Builds the set in `out` and returns the number of images by style for "train", "test" and "skipped".

    Raises:
      UserError: a bad option, a package that cannot be had, or an `out` that holds something else.
    """
    styles = list(SOURCES) if styles is None else styles
    unknown = [style for style in styles if style not in SOURCES]
    if unknown or not styles:
        raise UserError(f"--styles {','.join(unknown) or '(empty)'} is not known; choose from {','.join(SOURCES)}")
    if not 16 <= image_size <= 1024:
        raise UserError(f"--image_size {image_size} is out of range; use 16 to 1024")
    settings: dict = {"format": FORMAT, "image_size": image_size, "styles": styles, "skin_tones": skin_tones}
    settings["keep_shape"] = keep_shape
    settings["packages"] = {style: packages.locate(SOURCES[style], folder).name for style in styles}
    packages.locate(packages.EMOJIBASE, folder)
    if not set(styles) <= RASTER_STYLES:
        require_svg_library()
    with owned(out, "a run that builds the image set"):
        if _claim(out, settings):
            report(f"{out} is complete already")
            return _finished_counts(out)
        return _build(out, folder, settings, workers, report)


def _build(
    out: Path, folder: Path | None, settings: dict, workers: int | None, report: Callable[[str], None]
) -> dict[str, Counter]:
    counts: dict[str, Counter] = {"train": Counter(), "test": Counter(), "skipped": Counter()}
    metadata: dict[str, dict] = {"train": {}, "test": {}}
    digests: dict[str, str] = {}
    report("reading packages")
    source_images = list(all_images(settings["styles"], folder, skin_tones=settings["skin_tones"]))
    splits = ["test" if is_test(source_image.concept) else "train" for source_image in source_images]
    targets = [
        out / split / source_image.category / f"{source_image.id}.png"
        for split, source_image in zip(splits, source_images, strict=True)
    ]
    for target in set(target.parent for target in targets):
        target.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(workers or os.cpu_count()) as pool:
        render_to_file = functools.partial(
            _render_to_file, image_size=settings["image_size"], keep_shape=settings["keep_shape"]
        )
        results = pool.map(render_to_file, source_images, targets, chunksize=16)
        progress = tqdm(
            zip(source_images, splits, targets, results, strict=True), total=len(source_images), unit="image"
        )
        for source_image, split, target, result in progress:
            problem = result.problem
            if not problem and source_image.style == "clipart":
                original = digests.setdefault(result.digest, source_image.id)
                if original != source_image.id:
                    target.unlink()
                    problem = f"the same image as {original}"
            if problem:
                counts["skipped"][source_image.style] += 1
                tqdm.write(f"skipped {source_image.id}: {problem}", file=sys.stderr)
                continue
            counts[split][source_image.style] += 1
            captions = list(source_image.captions)
            if result.colourless and source_image.style == "clipart":
                captions = [text.replace(STYLE_PHRASES["clipart"], COLOURLESS_PHRASE, 1) for text in captions]
            metadata[split][source_image.id] = {
                "category": source_image.category,
                "prompt": captions[0],
                "captions": captions,
                "style": source_image.style,
                "concept": source_image.concept,
            }
    for split, entries in metadata.items():
        (out / split).mkdir(exist_ok=True)
        write_json(out / split / "meta_data.json", entries, indent=1, sort_keys=True)
    finished = {**settings, "complete": True, "counts": counts}
    write_json(out / BUILD_FILE, finished, indent=1, sort_keys=True)
    return counts


def _claim(out: Path, settings: dict) -> bool:
    """Marks `out` as a build of these settings; True if it holds a finished one."""
    record = out / BUILD_FILE
    if record.exists():
        # A set that an earlier version built does not say it.
        known = {"keep_shape": False, **read_json(record)}
        begun_with = {key: known.get(key) for key in settings}
        if begun_with != settings:
            names = ", ".join(differences(begun_with, settings))
            raise UserError(
                f"--out {out} holds a set built with other settings ({names}; see {record}); use another folder"
            )
        return bool(known.get("complete"))
    if any(path.name != OWNER_FILE for path in out.iterdir()):
        raise UserError(f"--out {out} is not empty and not a set built by this command; use another folder")
    write_json(record, settings, indent=1, sort_keys=True)
    return False


def _finished_counts(out: Path) -> dict[str, Counter]:
    return {split: Counter(styles) for split, styles in read_json(out / BUILD_FILE)["counts"].items()}


@dataclass(frozen=True)
class _Rendered:
    """What became of one image: the digest of its PNG and whether it has no colour, or what went wrong."""

    digest: str = ""
    colourless: bool = False
    problem: str = ""


def _render_to_file(source_image: SourceImage, target: Path, image_size: int, keep_shape: bool) -> _Rendered:
    """Renders one image unless its file is there already, and whole."""

    def give_up(*_: object) -> None:
        raise TimeoutError(f"rendering took over {_RENDER_SECONDS} s")

    if not _is_whole(target):
        # Counted in processor time, so that a busy machine leaves out no more than an idle one.
        signal.signal(signal.SIGVTALRM, give_up)
        signal.setitimer(signal.ITIMER_VIRTUAL, _RENDER_SECONDS)
        try:
            image = render(source_image, image_size, keep_shape)
        except Exception as error:  # a drawing library fails in its own ways; the image is named, counted and left out
            return _Rendered(problem=f"{type(error).__name__}: {error}"[:200])
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        with atomic_file(target) as temporary:
            image.save(temporary, format="PNG")
    data = target.read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        return _Rendered(sha256(data), is_colourless(image))


def _is_whole(file: Path) -> bool:
    try:
        with Image.open(file) as image:
            image.load()
    except (OSError, SyntaxError):
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the captioned image set.")
    parser.add_argument("--out", required=True, help="folder to build in; new, empty or an unfinished build")
    parser.add_argument("--packages", help="folder of downloaded packages; without it they are fetched")
    parser.add_argument("--image_size", type=int, default=256, help="longer side of the images, in pixels")
    parser.add_argument("--styles", default=",".join(SOURCES), help="comma-separated; default: %(default)s")
    parser.add_argument("--skin_tones", action="store_true", help="include skin-tone variants")
    parser.add_argument("--keep_shape", action="store_true", help="clip art and furniture are not padded to squares")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="rendering processes")
    args = parser.parse_args()
    packages = local_only(args.packages, "--packages") if args.packages else None
    if packages is not None and not packages.is_dir():
        raise UserError(f"--packages {args.packages} is not a folder; give the one that holds the downloaded files")
    counts = build(
        local_only(args.out, "--out"),
        folder=packages,
        image_size=args.image_size,
        styles=[style for style in args.styles.split(",") if style],
        skin_tones=args.skin_tones,
        keep_shape=args.keep_shape,
        workers=args.workers,
    )
    for split, styles in counts.items():
        listing = ", ".join(f"{style} {number}" for style, number in sorted(styles.items()))
        print(f"{split}: {sum(styles.values())} images ({listing})" if listing else f"{split}: none")

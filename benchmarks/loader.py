"""Images/s of the loader against a PyTorch DataLoader with Pillow: `python benchmarks/loader.py --workers 4`.

Both read the same 1024 px files from disk and give uint8 batches of 256 px, resized with antialiasing (averages over
4 x 4 pixels). They alternate in one run, each time with new workers, whose start is not counted; rates are medians.

`--buckets` compares five aspect buckets with one, in which all of the same files are squares: alternating loaders, of
files of photographs' sizes, each of about a megapixel.

`--cores` measures what one core gives instead, at 256, 512 and 1024 px: images per second of processor time, which
other work on the machine does not change much. `hart_jax.planning.plans.DECODED_BY_CORE` has it.
"""

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hart_jax.config import TokenizerConfig
from hart_jax.config.buckets import bucket_shapes
from hart_jax.data.aspect_buckets import AspectBuckets
from hart_jax.data.mjhq import read_folder
from hart_jax.data.pipeline import make_loader
from hart_jax.data.record_sizes import record_sizes
from hart_jax.data.shards import write_shards
from hart_jax.errors import UserError, run_cli

SOURCE_SIZE, SIZE = 1024, 256
SQUARE = ((SOURCE_SIZE, SOURCE_SIZE),)
BUCKETS = ("1:1", "2:3", "3:2", "3:4", "16:9")
# Widths and heights of files in each of them.
SHAPES = ((1000, 1000), (800, 1200), (1200, 800), (864, 1152), (1280, 720))


def write_images(folder: Path, suffix: str, count: int, shapes: Sequence[tuple[int, int]] = SQUARE) -> Path:
    """A folder of images of these widths and heights, in turns, with detail at all sizes and a little noise, which cost
    a decoder what photographs do."""
    rng = np.random.default_rng(0)
    (folder / "pictures").mkdir(parents=True)
    entries = {}
    for number in range(count):
        width, height = shapes[number % len(shapes)]
        pixels = rng.normal(0, 2, (height, width, 3))
        for side in (4, 16, 64, 256):
            coarse = Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8))
            fine = coarse.resize((width, height), Image.Resampling.BICUBIC)
            pixels += np.asarray(fine, np.float64) / side**0.5
        image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
        image.save(folder / "pictures" / f"{number:05d}{suffix}")
        entries[f"{number:05d}"] = {"category": "pictures", "prompt": f"picture {number}"}
    (folder / "meta_data.json").write_text(json.dumps(entries))
    return folder


class PillowDataset:
    """What `torch.utils.data` asks of a data set by index."""

    def __init__(self, paths: list[Path]):
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> np.ndarray:
        with Image.open(self._paths[index]) as image:
            return np.array(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX))


def torch_batches(torch: Any, folder: Path, batch_size: int, count: int, workers: int) -> Iterable[Any]:
    dataset = PillowDataset([example.path for example in read_folder(folder)])
    sampler = torch.utils.data.RandomSampler(dataset, replacement=True, num_samples=batch_size * count)
    return torch.utils.data.DataLoader(
        dataset, batch_size, sampler=sampler, num_workers=workers, multiprocessing_context="spawn" if workers else None
    )


def images_per_second(batches: Iterable[Any], batch_size: int, count: int) -> float:
    """Of the batches after the first, which waits for the workers to start."""
    iterator = iter(batches)
    next(iterator)
    start = time.perf_counter()
    for _ in itertools.islice(iterator, count - 1):
        pass
    return batch_size * (count - 1) / (time.perf_counter() - start)


def images_per_core_second(shards: Path, size: int, batch_size: int, count: int) -> float:
    """Of the batches after the first, all of this process's threads counted."""
    loader = make_loader(shards, image_size=size, batch_size=batch_size)
    next(loader)
    start = time.process_time()
    for _ in itertools.islice(loader, count - 1):
        pass
    seconds = time.process_time() - start
    loader.close()
    return batch_size * (count - 1) / seconds


def print_cores(folder: Path, suffix: str, arguments: argparse.Namespace) -> None:
    source = write_images(folder / "source", suffix, arguments.images)
    files = [path.stat().st_size for path in (source / "pictures").iterdir()]
    write_shards(source, folder / "shards")
    for size in (256, 512, 1024):
        rates = [
            images_per_core_second(folder / "shards", size, arguments.batch_size, arguments.batches)
            for _ in range(arguments.repeats)
        ]
        print(f"| {suffix[1:]} | {np.mean(files) / 1e3:.0f} | {size} | {np.median(rates):.1f} |", flush=True)


def print_buckets(folder: Path, suffix: str, arguments: argparse.Namespace) -> None:
    shards = folder / "shards"
    write_shards(write_images(folder / "source", suffix, arguments.images, SHAPES), shards)
    config, sizes = TokenizerConfig(), record_sizes(shards)
    rates: dict[int, list[float]] = {1: [], len(BUCKETS): []}
    for repeat in range(2 * arguments.repeats):
        # In turns, and each first as often as the other.
        count = sorted(rates)[(repeat + repeat // 2) % 2]
        names = BUCKETS[:count]
        loader = make_loader(
            shards,
            image_size=SIZE,
            buckets=AspectBuckets.nearest(names, bucket_shapes(names, config), sizes),
            batch_size=arguments.batch_size,
            workers=arguments.workers,
        )
        rates[count].append(images_per_second(loader, arguments.batch_size, arguments.batches))
        loader.close()
    one, five = (np.median(found) for found in rates.values())
    print(f"| {suffix[1:]} | {one:.0f} | {five:.0f} | {five / one:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=4, help="of each loader")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--batches", type=int, default=20, help="of each measurement")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only_ours", action="store_true", help="without PyTorch, and so without a comparison")
    parser.add_argument("--cores", action="store_true", help="what one core gives, at several sizes")
    parser.add_argument("--buckets", action="store_true", help="five aspect buckets against one")
    arguments = parser.parse_args()
    if arguments.batches < 2 or arguments.repeats < 1 or not 1 <= arguments.batch_size <= arguments.images:
        raise UserError("--batches must be 2 or more, --repeats 1 or more, --batch_size from 1 to --images")
    if arguments.cores:
        print(f"from {SOURCE_SIZE} px\n| files | kB each | to px | images per core second |\n|---|---|---|---|")
        for suffix in (".jpg", ".png"):
            with tempfile.TemporaryDirectory() as temporary:
                print_cores(Path(temporary), suffix, arguments)
        return
    if arguments.buckets:
        print(f"{arguments.workers} workers, batches of {arguments.batch_size}, to about {SIZE} x {SIZE} px, images/s")
        print("| files | one bucket | five | five / one |\n|---|---|---|---|")
        for suffix in (".jpg", ".png"):
            with tempfile.TemporaryDirectory() as temporary:
                print_buckets(Path(temporary), suffix, arguments)
        return
    torch: Any = None
    if not arguments.only_ours:
        try:
            import torch
        except ImportError as error:
            raise UserError("needs PyTorch (pip install torch) to compare with; or give --only_ours") from error

    size, count, workers = arguments.batch_size, arguments.batches, arguments.workers
    print(f"{workers} workers, batches of {size}, {SOURCE_SIZE} px to {SIZE} px, images/s")
    print("| files | ours | PyTorch | ours / PyTorch |")
    print("|---|---|---|---|")
    for suffix in (".jpg", ".png"):
        with tempfile.TemporaryDirectory() as temporary:
            folder = write_images(Path(temporary) / "source", suffix, arguments.images)
            shards = Path(temporary) / "shards"
            write_shards(folder, shards)
            ours, theirs = [], []
            for _ in range(arguments.repeats):
                loader = make_loader(shards, image_size=SIZE, batch_size=size, workers=workers)
                ours.append(images_per_second(loader, size, count))
                loader.close()
                if torch:
                    theirs.append(images_per_second(torch_batches(torch, folder, size, count, workers), size, count))
        rate = np.median(ours)
        compared = f"{np.median(theirs):.0f} | {rate / np.median(theirs):.2f}" if torch else "- | -"
        print(f"| {suffix[1:]} | {rate:.0f} | {compared} |", flush=True)


if __name__ == "__main__":
    run_cli(main)

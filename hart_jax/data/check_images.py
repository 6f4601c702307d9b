"""Looks at every image of a folder before anything is made of them, in threads or processes."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from hart_jax.data.image_files import rgb_image, shown_size
from hart_jax.data.mjhq import Example
from hart_jax.errors import UserError


def check_images(examples: list[Example], workers: int = 0) -> None:
    """Decodes every image, in so many processes, or in this one.

    Raises:
      UserError: naming the first image that does not decode.
    """
    with pool_of(workers) as pool:
        checked(pool, decode, examples, "checking")


@contextmanager
def pool_of(workers: int) -> Iterator[Executor]:
    """Processes, or without any threads; nothing more is begun after an error."""
    # Not forked, since the program that writes shards may have threads of its own.
    pool: Executor = (
        ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
        if workers
        else ThreadPoolExecutor(os.cpu_count())
    )
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def checked(pool: Executor, inspect: Callable[[Example], Any], examples: list[Example], verb: str) -> list[Any]:
    """What `inspect` finds in each image, in order."""
    found = pool.map(inspect, examples, chunksize=16)
    return list(tqdm(found, total=len(examples), unit="image", desc=verb, disable=not examples))


def aspect(example: Example) -> float:
    """Longer side over shorter.

    Raises:
      UserError: naming an image that cannot be opened.
    """
    width, height = _of_example(shown_size, example, example.read())
    return max(width, height) / min(width, height)


def decode(example: Example, data: bytes | None = None) -> None:
    """Decodes an image just as training does; `data` are its bytes where they are at hand.

    Raises:
      UserError: naming an image that does not decode.
    """
    _of_example(rgb_image, example, example.read() if data is None else data)


def _of_example(function: Callable[[bytes], Any], example: Example, data: bytes) -> Any:
    try:
        return function(data)
    except UserError as error:
        problem = str(error).removeprefix("image ")
        raise UserError(f"image {example.path} {problem}; fix it or remove its entry") from error

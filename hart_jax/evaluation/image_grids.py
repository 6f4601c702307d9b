"""Images beside their scores: chosen at random, never picked by hand."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hart_jax.config.scales import Scale, shape_of
from hart_jax.evaluation.images import ImageSet, decode
from hart_jax.io.images import grid, save_png

SHOWN, COLUMNS = 32, 8
# Larger ones are shown so.
_LARGEST = 256
Cell = tuple[np.ndarray, str]


def save_sample_grid(
    real: ImageSet, fake: ImageSet, own_N: np.ndarray | None, size: Scale, out: Path, seed: int = 0
) -> None:
    """Writes samples with their captions; below each, where `own_N` says which, the real one of that caption."""
    places = np.random.default_rng(seed).permutation(len(fake.infos))[:SHOWN].tolist()
    rows: list[list[Cell]] = []
    for start in range(0, len(places), COLUMNS):
        row = places[start : start + COLUMNS]
        rows.append([_cell(fake, place, size, fake.infos[place].prompt) for place in row])
        if own_N is not None:
            rows.append([_cell(real, int(own_N[place]), size) for place in row])
    _save(rows, out)


def save_group_grid(fake: ImageSet, by: str, size: Scale, out: Path, seed: int = 0) -> None:
    """Writes a row of samples for each value of the attribute `by`; nothing where no image has one."""
    order = np.random.default_rng(seed).permutation(len(fake.infos)).tolist()
    values = [info.value(by) for info in fake.infos]
    rows = []
    for value in sorted(set(values) - {""}):
        first, *rest = [place for place in order if values[place] == value][:COLUMNS]
        rows.append([_cell(fake, first, size, value), *(_cell(fake, place, size) for place in rest)])
    if rows:
        _save(rows, out)


def _cell(image_set: ImageSet, place: int, size: Scale, caption: str = "") -> Cell:
    height, width = shape_of(size or _LARGEST)
    shrunk = max(1, max(height, width) / _LARGEST)
    shown = max(1, round(height / shrunk)), max(1, round(width / shrunk))
    return decode(image_set.read(place), shown, image_set.infos[place].name), caption


def _save(rows: Sequence[Sequence[Cell]], out: Path) -> None:
    blank = (np.full_like(rows[0][0][0], 255), "")
    columns = max(map(len, rows))
    cells = [cell for row in rows for cell in [*row, *[blank] * (columns - len(row))]]
    images, captions = zip(*cells, strict=True)
    save_png(out, grid(np.stack(images), columns=columns, captions=captions), overwrite=True)

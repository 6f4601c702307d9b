"""How large the images of shards are: said by the files beside them, or measured once and kept."""

from pathlib import Path

import numpy as np
from tqdm import tqdm

from hart_jax.data.image_files import known_size
from hart_jax.data.shards import CHECKSUM_FILE, Folders, RecordSource, as_paths, checksums
from hart_jax.errors import UserError
from hart_jax.io.cache_dir import cache_folder
from hart_jax.io.files import atomic_file
from hart_jax.io.fingerprint import sha256

# No size is known of these: no image, or a damaged record.
UNKNOWN = (0, 0)


def record_sizes(shards: Folders) -> np.ndarray:
    """Height and width in pixels of each record's image as it is shown, (n, 2) int32, of folders one after the other.

    They are kept in the cache folder's `sizes`, by the checksums of the shards, so that the next start reads neither
    images nor captions. Those of a folder with a record that cannot be read are not: another copy may be whole.

    Raises:
      UserError: as `open_shards`.
    """
    return np.concatenate([_of_folder(folder) for folder in as_paths(shards)])


def _of_folder(folder: Path) -> np.ndarray:
    records = RecordSource(folder)
    file = _cache_file(folder)
    known = _read(file, len(records)) if file else None
    if known is not None:
        return known
    found, whole = [], True
    for index in tqdm(range(len(records)), desc="image sizes", mininterval=5, delay=5):
        size = records.captions.size(index)
        if size is None:
            size, readable = _measured(records, index)
            whole = whole and readable
        found.append(size[::-1])
    sizes = np.array(found, np.int32).reshape(-1, 2)
    if file and whole:
        _write(file, sizes)
    return sizes


def _measured(records: RecordSource, index: int) -> tuple[tuple[int, int], bool]:
    """Width and height of a record's image, and whether the record can be read."""
    try:
        image = records[index]["image"]
    except UserError:
        return UNKNOWN, False
    return known_size(image) or UNKNOWN, True


def _cache_file(folder: Path) -> Path | None:
    """None where nothing can be kept."""
    cache = cache_folder()
    if cache is None or not (folder / CHECKSUM_FILE).is_file():
        return None
    return cache / "sizes" / f"{sha256(checksums(folder))[:32]}.npy"


def _read(file: Path, count: int) -> np.ndarray | None:
    try:
        sizes = np.load(file)
    except (OSError, ValueError, EOFError):
        return None
    return sizes if sizes.shape == (count, 2) and sizes.dtype == np.int32 else None


def _write(file: Path, sizes: np.ndarray) -> None:
    try:
        file.parent.mkdir(exist_ok=True)
        with atomic_file(file) as temporary, temporary.open("wb") as stream:
            np.save(stream, sizes)
    except OSError as error:
        print(f"warning: the sizes of images are not kept for the next start ({error.strerror or error})")

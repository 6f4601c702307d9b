"""Released weights as converted once: a folder for each release in the user's cache folder, read tensor by tensor.

A cached model is the one that `read_released` gives; its arrays lie on disk until they are used, so that loading takes
no memory of its own. Every start compares the files' checksums. The name of its folder is a digest of what it was made
from: a changed release has another.
"""

import json
import shutil
import sys
import time
from pathlib import Path

from hart_jax.checkpoints.convert.released import TOKENIZER, TRANSFORMER, read_released
from hart_jax.checkpoints.model_folder import (
    CONFIG,
    WEIGHTS,
    Model,
    abstract_tokenizer,
    abstract_transformer,
    write_part,
)
from hart_jax.config import TokenizerConfig, TransformerConfig, check_fit
from hart_jax.errors import UserError
from hart_jax.io.buckets import local_copy
from hart_jax.io.cache_dir import cache_folder
from hart_jax.io.files import atomic_folder, check_readable, read_json
from hart_jax.io.fingerprint import content_digest, json_digest
from hart_jax.io.safetensors import check_tree, map_weights
from hart_jax.io.tensor_files import Weights, read_weight_map, weight_file

# Of what is stored, and of how it is converted: with another, all is converted anew.
FORMAT = 1
CHECKSUMS = "checksums.json"
_PARTS = ("tokenizer", "transformer")
_FILES = tuple(f"{part}/{name}" for part in _PARTS for name in (CONFIG, WEIGHTS))
_DAY_SECONDS = 86400


def read_released_cached(source: str | Path, weights: Weights = "ema") -> Model:
    """`read_released`, from the cache where it is there, else written into it.

    A damaged cache is made again; one that cannot be written is left out. Both are said on stderr.

    Raises:
      UserError: as `read_released`.
    """
    source = local_copy(source)
    folder = cached_folder(source, weights)
    if folder is None:
        # Something is missing, which this names.
        return read_released(source, weights)
    if folder.is_dir():
        try:
            return _read(folder)
        except UserError as error:
            _warn(f"the converted weights in {folder} are damaged and made again ({error})")
            shutil.rmtree(folder, ignore_errors=True)
    model = read_released(source, weights)
    try:
        _write(folder, model)
        return _read(folder)
    except (OSError, UserError) as error:
        if folder.is_dir():
            # Another process was faster.
            return _read(folder)
        _warn(f"the converted weights are not kept in {folder} ({error}); the next start converts them again")
        return model


def cached_folder(source: Path, weights: Weights = "ema") -> Path | None:
    """Where the converted weights of a release are or would be; None if a file of it is missing, or no cache can be."""
    try:
        files = [file for part in (TOKENIZER, TRANSFORMER) for file in _sources(source / part, part, weights)]
        about = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    except (OSError, UserError):
        return None
    folder = cache_folder()
    return folder and folder / "converted" / json_digest([FORMAT, about])[:32]


def _sources(folder: Path, part: str, weights: Weights) -> list[Path]:
    file = weight_file(folder, weights if part == TRANSFORMER else "model")
    names = set(read_weight_map(file).values()) if file.name.endswith(".index.json") else set()
    return [folder / "config.json", file, *(folder / name for name in sorted(names))]


def _read(folder: Path) -> Model:
    if not (folder / CHECKSUMS).is_file():
        raise UserError("it has no checksums")
    sums = read_json(folder / CHECKSUMS)
    for name in _FILES:
        check_readable(folder / name)
        if content_digest(folder / name) != sums.get(name):
            raise UserError(f"{folder / name} has another checksum")
    tokenizer_config = TokenizerConfig.read(folder / "tokenizer" / CONFIG)
    transformer_config = TransformerConfig.read(folder / "transformer" / CONFIG)
    check_fit(tokenizer_config, transformer_config)
    tokenizer = map_weights(folder / "tokenizer" / WEIGHTS)
    transformer = map_weights(folder / "transformer" / WEIGHTS)
    check_tree(tokenizer, abstract_tokenizer(tokenizer_config), str(folder))
    check_tree(transformer, abstract_transformer(transformer_config), str(folder))
    return Model(tokenizer_config, tokenizer, transformer_config, transformer, text_encoder=None)


def _write(folder: Path, model: Model) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(".*"):
        if time.time() - left.stat().st_mtime > _DAY_SECONDS:
            shutil.rmtree(left, ignore_errors=True)
    with atomic_folder(folder) as target:
        write_part(target / "tokenizer", model.tokenizer_config, model.tokenizer)
        write_part(target / "transformer", model.transformer_config, model.transformer)
        sums = {name: content_digest(target / name) for name in _FILES}
        (target / CHECKSUMS).write_text(json.dumps(sums))


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)

"""The weights of a golden case: a formula of its seed and of every tensor's key, written in the released layout."""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file


def generator(seed: int, name: str) -> np.random.Generator:
    """The random numbers that belong to `name` in a case with this seed."""
    return np.random.Generator(np.random.PCG64(zlib.crc32(f"{seed}/{name}".encode())))


def read_manifest(case: Path) -> dict[str, Any]:
    return json.loads((case / "manifest.json").read_text())


def write_release(manifest: dict[str, Any], out: Path) -> None:
    """Writes `tokenizer/` and `llm/`, each with config.json and model.safetensors."""
    for part in ("tokenizer", "llm"):
        (out / part).mkdir(parents=True)
        (out / part / "config.json").write_text(json.dumps(manifest[f"{part}_config"]))
        save_file(part_tensors(manifest, part), out / part / "model.safetensors")


def part_tensors(manifest: dict[str, Any], part: str) -> dict[str, np.ndarray]:
    """The tensors of "tokenizer" or "llm", by the names they have in its state dict."""
    levels = _levels(manifest["llm_config"])
    tensors = {}
    for key, spec in manifest["tensors"].items():
        owner, name = key.split("/", 1)
        if owner == part:
            tensors[name] = _buffer(name, spec, levels) if spec["kind"] == "buffer" else _weight(manifest, key, spec)
    return tensors


def _weight(manifest: dict[str, Any], key: str, spec: dict[str, Any]) -> np.ndarray:
    values = generator(manifest["seed"], key).standard_normal(tuple(spec["shape"]), np.float32)
    values *= np.float32(spec["scale"])
    values += np.float32(spec["offset"])
    return values


def _levels(config: dict[str, Any]) -> np.ndarray:
    """The scale of every position of the sequence; 0 is the context."""
    sizes = [config["context_token"], *(side * side for side in config["patch_nums"][1:])]
    return np.repeat(np.arange(len(sizes)), sizes)


def _buffer(name: str, spec: dict[str, Any], levels: np.ndarray) -> np.ndarray:
    """What the release stores beside its weights: the levels, the mask they give, and zeros."""
    if name == "lvl_1L":
        return levels[None]
    if name == "attn_bias_for_masking":
        return np.where(levels[:, None] >= levels, np.float32(0), np.float32(-np.inf))[None, None]
    return np.zeros(spec["shape"], np.int64 if "int" in spec["dtype"] else np.float32)

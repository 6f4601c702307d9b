"""Runs of `train.py` in processes of their own, on a few synthetic pictures; shared by tests."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from hart_jax.data.shards import write_shards
from hart_jax.model_folder import write_part
from hart_jax.text.minilm import import_minilm
from tests.tiny import tiny_model
from tests.tiny_bert import write_published

ROOT = Path(__file__).parent.parent
METRICS = "metrics.jsonl"

# A tokenizer that trains in milliseconds a step; {train} and {test} are shard folders.
TOKENIZER_CONFIG = """
from ml_collections import ConfigDict


def get_config():
    return ConfigDict(
        {{
            "tokenizer": {{
                "image_size": 8,
                "patch_nums": (1, 2, 4),
                "channels": 32,
                "channel_multipliers": (1, 1),
                "res_blocks": 1,
                "latent_channels": 4,
                "vocab_size": 32,
            }},
            "loss": {{"perceptual": 0.0, "adversarial": 0.0, "restart_below": 0.95}},
            "optimizer": {{"learning_rate": 1e-3, "warmup_steps": 4}},
            "data": {{"train": {train!r}, "test": {test!r}}},
            "train": {{"steps": 32, "batch_size": 4, "log_every": 2, "save_every": 4, "sample_every": 16}},
        }}
    )
"""

# The transformer on top: {tokenizer} and {text_encoder} are folders.
HART_CONFIG = """
from ml_collections import ConfigDict


def get_config():
    return ConfigDict(
        {{
            "tokenizer": {tokenizer_settings!r},
            "transformer": {transformer_settings!r},
            "loss": {{"condition_top_k": 8, "min_kept": 4, "keep_counts": 2}},
            "optimizer": {{"learning_rate": 1e-3, "warmup_steps": 4}},
            "data": {{"train": {train!r}, "test": {train!r}, "cache": True}},
            "train": {{"steps": 32, "batch_size": 4, "log_every": 2, "save_every": 4, "sample_every": 16}},
            "sample": {{"top_k": 8, "top_k_late": 8}},
            "sample_prompts": ("a red apple", "a blue dog"),
            "tokenizer_from": {tokenizer!r},
            "text_encoder": {text_encoder!r},
        }}
    )
"""


def make_shards(folder: Path, count: int, seed: int) -> Path:
    """Shards of random pictures of 16 px with captions."""
    rng = np.random.default_rng(seed)
    (folder / "source" / "things").mkdir(parents=True)
    entries = {}
    for number in range(count):
        name = f"thing{number:02d}"
        coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((16, 16)).save(folder / "source" / "things" / f"{name}.png")
        captions = [f"thing {number}", f"a picture of thing {number}"]
        entries[name] = {"category": "things", "prompt": captions[0], "captions": captions}
    (folder / "source" / "meta_data.json").write_text(json.dumps(entries))
    write_shards(folder / "source", folder / "shards", records_per_shard=8)
    return folder / "shards"


def write_tokenizer_config(folder: Path) -> Path:
    """A config file of a tiny tokenizer beside its data."""
    train, test = (make_shards(folder / name, count, seed) for name, count, seed in (("train", 14, 0), ("test", 3, 1)))
    path = folder / "tiny_tokenizer.py"
    path.write_text(TOKENIZER_CONFIG.format(train=str(train), test=str(test)))
    return path


def write_hart_config(folder: Path) -> Path:
    """A config file of a tiny transformer beside its data, tokenizer and text encoder."""
    model = tiny_model(context_tokens=6, context_dim=24)
    write_part(folder / "tokenizer", model.tokenizer_config, model.tokenizer)
    import_minilm(write_published(folder / "published"), folder / "text_encoder")
    path = folder / "tiny_hart.py"
    path.write_text(
        HART_CONFIG.format(
            tokenizer_settings=model.tokenizer_config.to_dict(),
            transformer_settings=model.transformer_config.to_dict(),
            train=str(make_shards(folder / "train", 14, seed=0)),
            tokenizer=str(folder / "tokenizer"),
            text_encoder=str(folder / "text_encoder"),
        )
    )
    return path


def start(*arguments: str, cache: Path | None = None) -> subprocess.Popen:
    """Starts `train.py`; `cache` keeps compiled programs between runs."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    if cache is not None:
        environment |= {
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip


def run_to_end(*arguments: str, cache: Path | None = None) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a whole run."""
    with start(*arguments, cache=cache) as process:
        out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def kill_when(process: subprocess.Popen, due: Callable[[], bool]) -> None:
    """Sends SIGKILL as soon as `due` holds; fails if the run ends before."""
    with process:
        while not due():
            assert process.poll() is None, f"ended before it was killed: {process.communicate()}"
            time.sleep(0.001)
        process.kill()
        process.communicate()
    assert process.returncode == -9


def logged_steps(workdir: Path) -> int:
    """Step of the last whole line of the log, 0 without one."""
    path = workdir / METRICS
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0

"""Runs of `sample.py` on tiny models; shared by tests."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from hart_jax.checkpoints.convert.released import read_released
from hart_jax.checkpoints.model_folder import write_model
from hart_jax.config import TransformerConfig
from hart_jax.text.minilm import import_minilm
from tests import tiny_qwen2
from tests.in_process import run_here
from tests.parity.materialize import read_manifest, write_release
from tests.tiny import TOKENIZER, tiny_model
from tests.tiny_bert import write_published
from tests.train_runs import quick_environment

ROOT = Path(__file__).parent.parent
QWEN2 = tiny_qwen2.CASES["untied vision, pads left, system prompt"]
CONFIG = """
from ml_collections import ConfigDict


def get_config():
    return ConfigDict({values!r})
"""


def write_tiny(folder: Path) -> Path:
    """A folder with `model`, a tiny complete model, and its config `tiny.py`."""
    import_minilm(write_published(folder / "published"), folder / "text_encoder")
    model = tiny_model(folder / "text_encoder", context_tokens=6, context_dim=24)
    write_model(folder / "model", model)
    write_config(folder / "tiny.py", model.transformer_config, TOKENIZER.to_dict(), model=str(folder / "model"))
    return folder


def write_released(folder: Path) -> Path:
    """A folder with `release`, its text encoder `qwen2` with `system_prompt.md`, and their config `released.py`."""
    manifest = read_manifest(ROOT / "tests/parity/cases/tiny")
    tensors = {key: spec for key, spec in manifest["tensors"].items() if "/disc." not in key}
    write_release(manifest | {"tensors": tensors}, folder / "release")
    tiny_qwen2.write_folder(folder / "qwen2", QWEN2)
    (folder / "system_prompt.md").write_text(tiny_qwen2.SYSTEM_PROMPT)
    model = read_released(folder / "release")
    # A pod's mesh, which sampling does not ask for.
    write_config(
        folder / "released.py",
        model.transformer_config,
        model.tokenizer_config.to_dict(),
        mesh={"data": -1, "fsdp": 16},
    )
    return folder


def write_config(path: Path, transformer: TransformerConfig, tokenizer: dict[str, Any], **more: Any) -> None:
    values = {
        "tokenizer": tokenizer,
        "transformer": transformer.to_dict(),
        "loss": {"condition_top_k": 8},
        "sample": {"top_k": 8, "top_k_late": 8},
        "mesh": {},
        **more,
    }
    path.write_text(CONFIG.format(values=values))


def environment(folder: Path, devices: int = 1) -> dict[str, str]:
    return {**quick_environment(devices), "HART_CACHE_DIR": str(folder / "cache")}


def start(folder: Path, *flags: str) -> subprocess.Popen:
    """Starts `sample.py` in a process of its own."""
    command = [sys.executable, str(ROOT / "sample.py"), *flags]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def sample(folder: Path, *flags: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a whole run, in this process."""
    return run_here("sample.py", *flags, folder=folder, environment={"HART_CACHE_DIR": str(folder / "cache")})


def write_prompts(path: Path, count: int) -> Path:
    """Prompts with a seed each, the last few as every one of them was."""
    words = ("a red apple", "a blue dog", "a render of a dog", "3d apples")
    lines = [json.dumps({"prompt": words[number % 4], "seed": 100 + number // 4}) for number in range(count)]
    path.write_text("\n".join(lines) + "\n")
    return path

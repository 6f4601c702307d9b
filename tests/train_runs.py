"""Runs of `train.py` in processes of their own, on a few synthetic images; shared by tests."""

import contextlib
import dataclasses
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from hart_jax.checkpoints.model_folder import write_part
from hart_jax.data import shards
from hart_jax.text.minilm import import_minilm
from hart_jax.tokenizer.model import Tokenizer
from hart_jax.transformer.model import Hart
from tests.in_process import run_here
from tests.quickly import QUICKLY, xla_flags
from tests.tiny import tiny_model
from tests.tiny_bert import write_published

ROOT = Path(__file__).parent.parent
METRICS = "metrics.jsonl"
CATEGORIES = ("animals", "things")
# Ratios of five shapes of 4 x 4 tokens, and widths and heights of images with how many have them.
BUCKETS = ("1:1", "2:3", "3:2", "1:2", "2:1")
SIZES = (((16, 16), 6), ((12, 18), 9), ((27, 18), 7), ((10, 20), 5), ((20, 10), 4))
# Of one run, on a machine that does much else.
LIMIT_SECONDS = 3600

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
            "mesh": {{}},
            "data": {{"train": {train!r}, "test": {test!r}, "buckets": {buckets!r}}},
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
            "loss": {{"condition_top_k": 8, "min_kept": 4, "keep_counts": {keep_counts}}},
            "optimizer": {{"learning_rate": 1e-3, "warmup_steps": 4, "muon_learning_rate": {muon!r}}},
            "mesh": {{}},
            "data": {data!r},
            "precompute_tokens": {ahead!r},
            "train": {{"steps": 32, "batch_size": 4, "log_every": 2, "save_every": 4, "sample_every": 16}},
            "sample": {{"top_k": 8, "top_k_late": 8}},
            "sample_prompts": ("a red apple", "a blue dog"),
            "tokenizer_from": {tokenizer!r},
            "text_encoder": {text_encoder!r},
        }}
    )
"""


def make_shards(
    folder: Path, count: int, seed: int, bad: Collection[int] = (), sizes: Sequence[tuple[int, int]] = ()
) -> Path:
    """Shards of random images of 16 px, or of these widths and heights, with captions; of the numbers in `bad`, half
    the file is missing."""
    rng = np.random.default_rng(seed)
    entries = {}
    for category in CATEGORIES:
        (folder / "source" / category).mkdir(parents=True)
    for number in range(count):
        name, category = f"thing{number:03d}", CATEGORIES[number % 2]
        coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        path = folder / "source" / category / f"{name}.png"
        Image.fromarray(coarse).resize(sizes[number] if sizes else (16, 16)).save(path)
        if number in bad:
            os.truncate(path, path.stat().st_size // 2)
        captions = [f"thing {number}", f"a picture of thing {number}"]
        entries[name] = {"category": category, "prompt": captions[0], "captions": captions}
    (folder / "source" / "meta_data.json").write_text(json.dumps(entries))
    with pytest.MonkeyPatch.context() as patch:
        # Files may also go bad after they were checked.
        patch.setattr(shards, "decode", lambda example, data: None)
        shards.write_shards(folder / "source", folder / "shards", records_per_shard=8)
    return folder / "shards"


def bucket_members(buckets: Sequence[str] = BUCKETS) -> dict[str, list[int]]:
    """The numbers of the images in each of these buckets, as `make_training_shards` mixes them."""
    members: dict[str, list[int]] = {bucket: [] for bucket in buckets}

    def elongated(width: int | str, height: int | str) -> float:
        return math.log(int(width) / int(height))

    for number, size in enumerate(_mixed_sizes()):
        nearest = min(buckets, key=lambda bucket: abs(elongated(*bucket.split(":")) - elongated(*size)))
        members[nearest].append(number)
    return members


def _mixed_sizes() -> list[tuple[int, int]]:
    every = [size for size, count in SIZES for _ in range(count)]
    return [every[place] for place in np.random.default_rng(0).permutation(len(every))]


def make_training_shards(folder: Path, buckets: Sequence[str] = ()) -> Path:
    """14 squares, or images of `SIZES`, mixed."""
    sizes = _mixed_sizes() if buckets else [(16, 16)] * 14
    return make_shards(folder, len(sizes), seed=0, sizes=sizes)


def assert_epochs_of_buckets(workdir: Path, buckets: Sequence[str] = BUCKETS) -> None:
    """Every image comes once in each epoch of its bucket, of which each has had at least one."""
    lines = [json.loads(line) for line in (workdir / "records.jsonl").read_text().splitlines()]
    for bucket, members in bucket_members(buckets).items():
        taken = [index for line in lines if line["bucket"] == bucket for index in line["index"]]
        epochs = [taken[start : start + len(members)] for start in range(0, len(taken), len(members))]
        assert len(epochs) > 1, bucket
        assert all(sorted(epoch) == members for epoch in epochs[:-1]), bucket
        assert len(set(epochs[-1])) == len(epochs[-1]) and set(epochs[-1]) <= set(members), bucket


def write_tokenizer_config(folder: Path, *, buckets: Sequence[str] = ()) -> Path:
    """A config file of a tiny tokenizer beside its data."""
    train, test = make_training_shards(folder / "train", buckets), make_shards(folder / "test", 3, seed=1)
    path = folder / "tiny_tokenizer.py"
    path.write_text(TOKENIZER_CONFIG.format(train=str(train), test=str(test), buckets=tuple(buckets)))
    return path


def write_hart_config(
    folder: Path, *, ahead: bool = False, muon: float = 0.0, keep_counts: int = 1, buckets: Sequence[str] = ()
) -> Path:
    """A config file of a tiny transformer beside its data, tokenizer and text encoder; `ahead` precomputes tokens.

    For each of `keep_counts`, and of `buckets`, a step is compiled.
    """
    model = tiny_model(context_tokens=6, context_dim=24)
    write_part(folder / "tokenizer", model.tokenizer_config, model.tokenizer)
    import_minilm(write_published(folder / "published"), folder / "text_encoder")
    train = str(make_training_shards(folder / "train", buckets))
    data = {"train": train, "test": train, "cache": True, "flip": not ahead, "buckets": tuple(buckets)}
    path = folder / "tiny_hart.py"
    path.write_text(
        HART_CONFIG.format(
            tokenizer_settings=dataclasses.asdict(model.tokenizer_config),
            transformer_settings=dataclasses.asdict(model.transformer_config),
            data=data,
            tokenizer=str(folder / "tokenizer"),
            text_encoder=str(folder / "text_encoder"),
            ahead=ahead,
            muon=muon,
            keep_counts=keep_counts,
        )
    )
    return path


def start(*arguments: str, devices: int = 1) -> subprocess.Popen:
    """Starts `train.py` on that many fake devices."""
    [job] = start_job(*arguments, devices=devices)
    return job


def start_job(*arguments: str, processes: int = 1, devices: int = 1) -> list[subprocess.Popen]:
    """Starts `train.py` in so many processes that meet over loopback, each on that many fake devices."""
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    return [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**quick_environment(devices), **meeting},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for meeting in loopback_job(processes)
    ]


def quick_environment(devices: int = 1) -> dict[str, str]:
    """The environment of a process on that many fake devices."""
    flags = xla_flags(f"--xla_force_host_platform_device_count={devices}")
    return {**os.environ, **QUICKLY, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def loopback_job(processes: int) -> list[dict[str, str]]:
    """The variables by which so many processes meet over loopback, of each of them; one needs none."""
    if processes == 1:
        return [{}]
    with socket.create_server(("localhost", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"
    job = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
    return [{**job, "JAX_PROCESS_ID": str(index)} for index in range(processes)]


def outcome(job: list[subprocess.Popen]) -> tuple[int, str, str]:
    """Waits for a job: the exit code that is not 0, if there is one, and all standard output and standard error."""
    with ThreadPoolExecutor(len(job)) as pool:
        texts = list(pool.map(lambda process: process.communicate(timeout=LIMIT_SECONDS), job))
    code = next((process.returncode for process in job if process.returncode), 0)
    return code, "".join(out for out, _ in texts), "".join(err for _, err in texts)


def run_to_end(*arguments: str, processes: int = 1, devices: int = 1) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a whole run; one process with one device is this one."""
    if processes == devices == 1:
        return run_here("train.py", *arguments)
    return outcome(start_job(*arguments, processes=processes, devices=devices))


class Run(NamedTuple):
    """A whole run that nothing disturbed, to hold others against: its workdir, and the flags that make it."""

    workdir: Path
    settings: tuple[str, ...]


def undisturbed(folder: Path, *settings: str) -> Run:
    """A run to the end on one device, in a new workdir in the folder."""
    code, _, err = run_to_end(*settings, f"--workdir={folder / 'whole'}")
    assert code == 0, err
    return Run(folder / "whole", settings)


def blank_grid(hart: Hart, tokenizer: Tokenizer, *_: Any) -> Callable[..., jax.Array]:
    """Instead of a sampler, which takes long to compile."""
    return lambda params, condition, seed, indices, count: jnp.zeros((count, *tokenizer.config.image_shape, 3))


@contextlib.contextmanager
def without_sampling() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hart_jax.training.hart_functions.make_grid_sampler", blank_grid)
        yield


def kill_when(process: subprocess.Popen, due: Callable[[], bool]) -> None:
    """Sends SIGKILL as soon as `due` holds; fails if the run ends before."""
    code, _, _ = signal_when(process, due, signal.SIGKILL)
    assert code == -signal.SIGKILL


def signal_when(process: subprocess.Popen, due: Callable[[], bool], number: signal.Signals) -> tuple[int, str, str]:
    """Sends a signal as soon as `due` holds; exit code, standard output and standard error of the run."""
    with process:
        while not due():
            assert process.poll() is None, f"ended before the signal: {process.communicate()}"
            time.sleep(0.001)
        process.send_signal(number)
        out, err = process.communicate(timeout=LIMIT_SECONDS)
    return process.returncode, out, err


def logged_steps(workdir: Path) -> int:
    """Step of the last whole line of the log, 0 without one."""
    path = workdir / METRICS
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0

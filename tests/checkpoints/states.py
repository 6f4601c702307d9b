"""A training state, and checkpoints of it, whole and damaged; shared by tests."""

import os
import shutil
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from hart_jax.checkpoints.orbax import Checkpoints

CONFIG = {"model": {"width": 8, "patch_nums": (1, 2, 3)}, "train": {"num_steps": 10, "rate": 1e-3}}
OPTIMISER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


@struct.dataclass
class State:
    step: Any
    params: Any
    ema: Any
    opt_state: Any
    discriminator: Any
    rng: Any


def make_state(seed: int = 0) -> State:
    rng = np.random.default_rng(seed)
    params = {
        "layer": {
            "kernel": jnp.asarray(rng.normal(size=(5, 7)), jnp.float32),
            "half": jnp.asarray(rng.normal(size=33), jnp.bfloat16),
        },
        "awkward": jnp.asarray([np.nan, np.inf, -0.0, 1e-42, 3e38], jnp.float32),
    }
    return State(
        step=jnp.int32(seed),
        params=params,
        ema=jax.tree.map(lambda x: x * 2, params),
        opt_state=OPTIMISER.init(params),
        discriminator=None,
        rng=jax.random.key_data(jax.random.key(seed)),
    )


def make_iterator():
    dataset = grain.MapDataset.range(100).seed(0).shuffle().repeat().batch(4)
    return iter(dataset.to_iter_dataset())


def bits(tree: Any) -> list[tuple[str, tuple[int, ...], bytes]]:
    return [(str(x.dtype), x.shape, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


def save_steps(workdir: Path, steps: range, **settings) -> None:
    with Checkpoints(workdir, CONFIG, **settings) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step))


def damage(checkpoint: Path, how: str) -> None:
    files = sorted((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    if how == "truncated":
        for path in files:
            os.truncate(path, path.stat().st_size // 2)
    elif how == "metadata lost":
        (checkpoint / "state" / "_METADATA").unlink()
    elif how == "log truncated":
        os.truncate(checkpoint / "log" / "data.json", 1)
    elif how == "state lost":
        shutil.rmtree(checkpoint / "state")
    else:
        shutil.rmtree(checkpoint)
        checkpoint.mkdir()

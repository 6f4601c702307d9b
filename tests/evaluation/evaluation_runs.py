"""Runs of `evaluate.py` scored by a small network; as a program this file is such a run."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hart_jax.evaluation.features import Evaluators, FeatureExtractor
from hart_jax.evaluation.networks.base import FeatureNetwork, Features
from tests.in_process import run_here
from tests.sample_runs import environment
from tests.train_runs import loopback_job

ROOT = Path(__file__).parents[2]
WIDTH, CLASSES = 10, 4
LIMIT_SECONDS = 900


@dataclasses.dataclass(frozen=True)
class SmallClip:
    """Reads a prompt by its length."""

    images: FeatureNetwork

    def embed(self, prompts: Sequence[str]) -> np.ndarray:
        return np.array([[len(prompt), *range(WIDTH - 1)] for prompt in prompts], np.float32)


def small_network(name: str = "Small", seed: int = 0) -> FeatureNetwork:
    """Random features of images at 4 x 4 px."""
    random = np.random.default_rng(seed)
    params = {
        "features": random.normal(size=(48, WIDTH)).astype(np.float32),
        "classes": random.normal(size=(WIDTH, CLASSES)).astype(np.float32),
    }

    def apply(params, images: jax.Array) -> Features:
        small = jax.image.resize(images.astype(jnp.float32), (len(images), 4, 4, 3), "linear").reshape(len(images), -1)
        features = jnp.matmul(small / 255, params["features"], precision="highest")
        return Features(features, jnp.matmul(features, params["classes"], precision="highest"))

    return FeatureNetwork(name, False, f"{seed:016d}", WIDTH, params, apply)


def small_evaluators(*files: str | None, size: int, batch_size: int, resize: str) -> Evaluators:
    *names, clip = files
    networks = [small_network(name, seed) for seed, name in enumerate(names) if name]
    features = tuple(FeatureExtractor(network, size, batch_size) for network in networks)
    network = small_network("CLIP", 7)
    return Evaluators(features, (SmallClip(network), FeatureExtractor(network, size, batch_size)) if clip else None)


def start(folder: Path, *flags: str, **more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.evaluation.evaluation_runs", *flags]
    paths = {"PYTHONPATH": str(ROOT), **more}
    return subprocess.Popen(
        command,
        cwd=folder,
        env={**environment(folder), **paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(folder: Path, *flags: str, processes: int = 1) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a whole run; one process is this one.

    Of several processes, those of the first that failed.
    """
    if processes == 1:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("hart_jax.evaluation.run.load_evaluators", small_evaluators)
            cache = {"HART_CACHE_DIR": str(folder / "cache")}
            return run_here("evaluate.py", *flags, folder=folder, environment=cache)
    running = [start(folder, *flags, **meeting) for meeting in loopback_job(processes)]
    ends = [(*process.communicate(timeout=LIMIT_SECONDS), process.returncode) for process in running]
    out, err, code = next((end for end in ends if end[2]), ends[0])
    return code, out, err


if __name__ == "__main__":
    sys.path.insert(0, os.fspath(ROOT))
    import evaluate
    from hart_jax.errors import run_cli
    from hart_jax.evaluation import run as evaluation

    evaluation.load_evaluators = small_evaluators
    run_cli(evaluate.main)

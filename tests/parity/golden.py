"""A golden case as its checks see it: its arrays, its imported model, and the comparison of ours with theirs.

Every array is optional. One that is neither compared nor used as an input makes its check fail: none is skipped.
"""

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hart_jax.checkpoints.convert.released import read_released, read_released_discriminator
from hart_jax.checkpoints.model_folder import Model
from tests.parity.materialize import read_manifest, write_release

MAX_ERROR = 1e-4
# The diffusion sampler's first steps amplify rounding by 1/sqrt(alpha-bar).
MAX_ERROR_SAMPLED, MEAN_ERROR_SAMPLED = 1e-2, 1e-3


def find_cases(folder: Path) -> list[Path]:
    """The case folders in `folder`, or `folder` if it is one."""
    return sorted(
        manifest.parent for pattern in ("manifest.json", "*/manifest.json") for manifest in folder.glob(pattern)
    )


class Case:
    """A case whose weights have been written in the released layout and imported from there."""

    def __init__(self, folder: Path):
        manifest = read_manifest(folder)
        self.name, self.seed = folder.name, manifest["seed"]
        self.vectors = np.load(folder / "vectors.npz")
        with tempfile.TemporaryDirectory() as release:
            write_release(manifest, Path(release))
            model: Model = read_released(release)
            self.discriminator = read_released_discriminator(release)
        self.tokenizer_config, self.transformer_config = model.tokenizer_config, model.transformer_config
        self.params = jax.device_put({"tokenizer": model.tokenizer, "transformer": model.transformer})


# One at a time: two full-size models would be twice the memory.
load_case = functools.lru_cache(maxsize=1)(Case)


class Checks:
    """Compares the arrays of one group (`tok.*`, `gen.*`, ...) of a case and remembers which it has seen."""

    def __init__(self, case: Case, group: str):
        self.case, self._vectors = case, case.vectors
        self._unseen = {name for name in case.vectors.files if name.partition(".")[0] == group}
        self._lines: list[str] = []
        self._failed = False

    def has(self, *names: str) -> bool:
        """Whether the case has any of these arrays."""
        return any(name in self._vectors for name in names)

    def given(self, name: str, default: Callable[[], Any] | None = None) -> np.ndarray:
        """An input of the case; `default()` where it has none, an assertion error if there is no default."""
        self._unseen.discard(name)
        if name in self._vectors:
            return self._vectors[name]
        assert default is not None, f"{self.case.name}: without {name} what it leads to cannot be checked"
        return np.asarray(default())

    def close(self, name: str, ours: Any, *, sampled: bool = False) -> None:
        """Compares floats: max|ours - theirs| / max|theirs|, and behind the sampler the same of the means."""
        if name not in self._vectors:
            return
        theirs, ours = self.given(name).astype(np.float64), np.asarray(ours, np.float64)
        if not self._same_shape(name, ours, theirs):
            return
        difference = np.abs(ours - theirs)
        tiny = np.finfo(np.float64).tiny
        worst = difference.max() / max(np.abs(theirs).max(), tiny)
        mean = difference.mean() / max(np.abs(theirs).mean(), tiny)
        # Written so that NaN fails.
        fits = worst <= MAX_ERROR
        if sampled:
            fits = worst <= MAX_ERROR_SAMPLED and mean <= MEAN_ERROR_SAMPLED
        self._report(bool(fits), f"{name}: max relative error {worst:.1e}, mean {mean:.1e}")

    def equal(self, name: str, ours: Any) -> None:
        """Compares integers."""
        if name not in self._vectors:
            return
        theirs, ours = self.given(name), np.asarray(ours)
        if self._same_shape(name, ours, theirs):
            differing = int((ours != theirs).sum())
            self._report(differing == 0, f"{name}: {differing} of {theirs.size} differ")

    def finish(self) -> None:
        """Prints every figure, and fails if one is too large or an array was not looked at."""
        for name in sorted(self._unseen):
            self._report(False, f"{name}: no check knows this array")
        report = "\n".join([f"{self.case.name}:", *self._lines])
        print(report)
        assert not self._failed, report

    def _same_shape(self, name: str, ours: np.ndarray, theirs: np.ndarray) -> bool:
        if ours.shape != theirs.shape:
            self._report(False, f"{name}: shape {ours.shape} instead of {theirs.shape}")
        return ours.shape == theirs.shape

    def _report(self, fits: bool, line: str) -> None:
        self._failed |= not fits
        self._lines.append(f"  {'  ' if fits else '! '}{line}")


def nhwc(array: np.ndarray) -> np.ndarray:
    return array.transpose(0, 2, 3, 1)


def nchw(array: Any) -> np.ndarray:
    return np.asarray(array).transpose(0, 3, 1, 2)


def each_sample(function: Callable[..., Any], *arrays: np.ndarray) -> Any:
    """`function` on one sample at a time, results joined: a full-size batch would not fit into memory."""
    results = [
        jax.device_get(function(*(array[index : index + 1] for array in arrays))) for index in range(len(arrays[0]))
    ]
    return jax.tree.map(lambda *parts: np.concatenate(parts), *results)

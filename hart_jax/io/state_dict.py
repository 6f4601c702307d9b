"""A released state dict, taken out key by key, so that none is missing and none stays unexplained."""

from collections.abc import Mapping

import numpy as np

from hart_jax.errors import UserError


def transpose_conv(weight: np.ndarray) -> np.ndarray:
    """PyTorch OIHW -> HWIO."""
    return weight.transpose(2, 3, 1, 0)


class StateDict:
    """Hands out the tensors of a released part; `finish` says whether every one was explained.

    `source` names the file in messages, `latest` is the key handed out last.
    """

    def __init__(self, tensors: Mapping[str, np.ndarray], source: str):
        self._tensors, self.source, self._used = tensors, source, set[str]()
        self.latest = ""

    def take(self, key: str) -> np.ndarray:
        """The tensor under `key`, as float32; `UserError` if the checkpoint lacks it."""
        if key not in self._tensors:
            raise UserError(
                f"{self.source}: no tensor {key!r}; this is not a checkpoint of the model its config.json says"
            )
        self._used.add(key)
        self.latest = key
        return np.asarray(self._tensors[key], np.float32)

    def take_any(self, key: str) -> np.ndarray | None:
        """The tensor under `key` if there is one."""
        return self.take(key) if key in self._tensors else None

    def explain(self, *keys: str) -> None:
        """Marks buffers that we compute ourselves; a key the checkpoint lacks is no error."""
        self._used.update(keys)

    def linear(self, key: str) -> dict[str, np.ndarray]:
        """A linear layer as Flax has it: kernel (in, out) and bias where there is one."""
        return self._with_bias(key, self.take(f"{key}.weight").T)

    def conv(self, key: str) -> dict[str, np.ndarray]:
        """A convolution as Flax has it: kernel HWIO and bias where there is one."""
        return self._with_bias(key, transpose_conv(self.take(f"{key}.weight")))

    def _with_bias(self, key: str, kernel: np.ndarray) -> dict[str, np.ndarray]:
        bias = self.take_any(f"{key}.bias")
        return {"kernel": kernel} if bias is None else {"kernel": kernel, "bias": bias}

    def affine(self, key: str) -> dict[str, np.ndarray]:
        """A norm's scale and bias."""
        return {"scale": self.take(f"{key}.weight"), "bias": self.take(f"{key}.bias")}

    def finish(self) -> None:
        """Raises `UserError` if a key was not explained."""
        left = sorted(set(self._tensors) - self._used)
        if left:
            names = ", ".join(left[:5]) + (", ..." if len(left) > 5 else "")
            raise UserError(f"{self.source}: {len(left)} tensors that this model has no place for: {names}")

"""Metrics of the steps since the last logged one."""

from typing import Any

import jax
import numpy as np

from hart_jax.errors import UserError


class MetricsBuffer:
    """Collects steps until their means are logged, and stops a run whose steps are all skipped.

    It is stored in every checkpoint, so that a checkpoint may fall between two logged steps and a resumed run still
    logs what an undisturbed one does.

    Args:
      max_skipped: so many skipped steps in a row are an error.
      stored: what `stored` gave for the checkpoint that a run resumes from.
    """

    def __init__(self, max_skipped: int, stored: dict[str, Any] | None = None):
        self._max_skipped = max_skipped
        self._on_device: list[tuple[int, dict[str, jax.Array]]] = []
        self._steps: list[dict[str, float]] = stored["steps"] if stored else []
        self._skipped_in_a_row: int = stored["skipped_in_a_row"] if stored else 0

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """One step's scalars, `skipped_steps` (0 or 1) among them; the device may still be computing them."""
        self._on_device.append((step, metrics))

    def stored(self) -> dict[str, Any]:
        """The metrics as JSON values; waits for the device.

        Raises:
          UserError: too many steps in a row were skipped, or the parameters (`param_norm`) are not finite.
        """
        for step, metrics in jax.device_get(self._on_device):
            if not np.isfinite(metrics.get("param_norm", 0.0)):
                raise UserError(
                    f"step {step}: the parameters are not finite any more, though the loss and the gradients were. The "
                    "latest checkpoint is from before it; start anew with a lower learning rate"
                )
            self._steps.append({name: float(value) for name, value in metrics.items()})
            self._skipped_in_a_row = self._skipped_in_a_row + 1 if metrics["skipped_steps"] else 0
            if self._skipped_in_a_row >= self._max_skipped:
                raise UserError(
                    f"step {step}: the loss or the gradients were not finite, as in all of the last "
                    f"{self._skipped_in_a_row} steps (train.max_skipped); none of them changed the model. "
                    "Start anew with a lower learning rate or train.dtype=float32"
                )
        self._on_device = []
        return {"steps": self._steps, "skipped_in_a_row": self._skipped_in_a_row}

    def close(self) -> dict[str, float]:
        """What to log; the buffer is empty afterwards.

        `skipped_steps` is their number; of all else the mean over the steps that have it and were not skipped, or over
        all if every one was.
        """
        steps = self.stored()["steps"]
        skipped = sum(step["skipped_steps"] for step in steps)
        columns: dict[str, list[float]] = {}
        for step in steps:
            if not step["skipped_steps"] or skipped == len(steps):
                for name, value in step.items():
                    columns.setdefault(name, []).append(value)
        self._steps = []
        return {**{name: float(np.mean(column)) for name, column in columns.items()}, "skipped_steps": skipped}

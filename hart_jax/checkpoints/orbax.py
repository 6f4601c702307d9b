"""Checkpoints of a training run, written by Orbax while training goes on.

A workdir holds

    config.json            the whole configuration, written when the run starts
    checkpoints/<step>/    one directory per complete checkpoint: `state` (arrays), `data` (position in the data),
                           `log` (JSON: what the run has not logged yet) and `digests` (JSON: of all of these)

Orbax writes a checkpoint under a temporary name and renames it when every byte is there, so a run killed at any moment
leaves complete checkpoints and temporary directories, which are ignored when reading and removed when training resumes.

The digests are looked at when a checkpoint is read (`hart_jax.checkpoints.digests`), so that a flipped bit counts as
damage. One that was saved without them is read as it is.
"""

import copy
import fnmatch
import functools
import json
import math
import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax.traverse_util import flatten_dict
from orbax.checkpoint import v1 as ocp

from hart_jax.checkpoints.restoring import (
    check_field,
    check_items,
    digests_of,
    first_line,
    orbax_context,
    read_field,
    read_items,
    read_together,
)
from hart_jax.errors import UserError
from hart_jax.io.files import write_json
from hart_jax.io.fingerprint import differences, told
from hart_jax.io.paths import absolute, as_path, check_no_pattern, is_remote
from hart_jax.parallel.agree import gather_texts

CONFIG_FILE = "config.json"
CHECKPOINT_DIR = "checkpoints"
UNREADABLE_SUFFIX = ".unreadable"
# What Orbax calls the last file of a checkpoint in a bucket.
_COMMITTED = "commit_success.txt"


class Restored(NamedTuple):
    """`log` is what the run gave `save`, None in a checkpoint saved without."""

    step: int
    state: Any
    log: Any


class Checkpoints:
    """Saves and restores the state of one training run.

    Args:
      workdir: directory of the run; created where it does not exist.
      config: the run's whole configuration as nested dicts of JSON values.
      keep: how many of the latest checkpoints stay on disk.
      keep_every: checkpoints of its multiples stay as well; 0 for none.
      keep_best: name of a metric; of the checkpoints saved with a finite value of it, the one with the lowest stays as
        well. Empty for none.
      may_change: dotted config keys ("train.num_steps", or "sample.*" for all of a section) that a resumed run may
        change.
      defaults: a whole configuration, of whose settings a run has those that its own, of an older version, lacks.

    Raises:
      UserError: `workdir` holds checkpoints of another configuration or has * ? [ in its path, or a setting is out of
        range.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        config: Mapping[str, Any],
        keep: int = 3,
        may_change: Collection[str] = (),
        keep_every: int = 0,
        keep_best: str = "",
        defaults: Mapping[str, Any] | None = None,
    ):
        if keep < 1:
            raise UserError(f"keep is {keep}; it must be at least 1")
        self._keep_best = keep_best
        workdir = absolute(as_path(workdir))
        check_no_pattern(workdir, "workdir")
        directory = workdir / CHECKPOINT_DIR
        check_workdir(workdir, config, may_change, defaults)
        _write_config(workdir, config)
        self._orbax = ocp.training.Checkpointer(
            directory,
            context=orbax_context(),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=_preservation(keep, keep_every, keep_best),
            cleanup_tmp_directories=True,
        )

    def save(
        self,
        step: int,
        state: Any,
        data_iterator: Iterator | None = None,
        log: Any = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Starts writing a checkpoint, and returns as soon as the arrays are copied to the host.

        Args:
          step: number of finished training steps; later than that of any checkpoint there is.
          state: pytree of arrays; its buffers may be donated to the next step at once.
          data_iterator: a Grain iterator (or anything Orbax calls a stateful checkpointable); its position is stored.
          log: JSON values to store beside them; they may change as soon as this returns.
          metrics: what this state measures up to, for `keep_best`.

        Raises:
          UserError: `metrics` lack `keep_best`.
        """
        # Orbax writes in the background, while the run goes on adding to its log.
        log = copy.deepcopy(log)
        items = {"state": state, "data": data_iterator, "log": log, "digests": digests_of(state, data_iterator, log)}
        items = {name: item for name, item in items.items() if item is not None}
        self._orbax.save_checkpointables_async(step, items, force=True, metrics=self._measured(metrics))

    def _measured(self, metrics: Mapping[str, float] | None) -> dict[str, float] | None:
        if not self._keep_best or metrics is None:
            return None
        if self._keep_best not in metrics:
            raise UserError(f"keep_best={self._keep_best!r}: no such metric; there are {', '.join(sorted(metrics))}")
        value = metrics[self._keep_best]
        return {self._keep_best: value} if math.isfinite(value) else None

    def restore(self, abstract_state: Any, data_iterator: Iterator | None = None) -> Restored | None:
        """Restores the latest checkpoint that every process can read; all of them restore the same one.

        A checkpoint that is damaged, in the eyes of any process, is reported and set aside as `<step>.unreadable`, so
        that the run can write that step again; the one before it is used. Where the reading itself fails (a mount, the
        network, memory) it is tried again, then an error, and nothing is renamed.

        Args:
          abstract_state: the state's pytree with `jax.ShapeDtypeStruct` (or array) leaves; a leaf's sharding, where it
            has one, says where the array goes, otherwise it goes to the first local device.
          data_iterator: iterator over the same data, moved to the stored position.

        Returns:
          the checkpoint, or None where there is none.

        Raises:
          UserError: all checkpoints that there are are damaged; or one holds other arrays, or cannot be read now.
        """
        items = {"state": jax.tree.map(_with_sharding, abstract_state)}
        if data_iterator is not None:
            items["data"] = data_iterator
        directory = as_path(self._orbax.directory)
        damaged: list[int] = []
        for step in _steps_of_all(directory):
            loaded = read_together(directory / str(step), lambda path: read_items(path, items), check_items)
            if loaded is None:
                damaged.append(step)
                continue
            self._set_aside(damaged)
            return Restored(step, loaded["state"], loaded.get("log"))
        if damaged:
            raise UserError(
                f"none of the checkpoints in {directory} (steps {damaged}) can be read; "
                "see the warnings above, or start again in an empty workdir"
            )
        return None

    def wait(self) -> None:
        """Returns when every started checkpoint is complete on disk."""
        self._orbax.wait()

    def close(self) -> None:
        """Waits, then ends the background threads."""
        self._orbax.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _set_aside(self, steps: list[int]) -> None:
        if not steps:
            return
        problem = ""
        if jax.process_index() == 0:
            try:
                for step in steps:
                    path = as_path(self._orbax.directory) / str(step)
                    path.rename(_free_name(path.with_name(path.name + UNREADABLE_SUFFIX)))
            except OSError as error:
                problem = f"{path}: cannot be renamed ({error.strerror}); move it away by hand"
        problem = gather_texts(problem)[0]
        if problem:
            raise UserError(problem)
        self._orbax.reload()


def load_params(workdir: str | os.PathLike, which: str = "ema") -> dict[str, Any]:
    """Reads one field of the state in the latest readable checkpoint, and nothing else of it.

    Safe beside a running training: it only reads.

    Args:
      workdir: a training workdir.
      which: the field, "ema" or "params" as a rule; dots lead into nested ones ("model.ema").

    Returns:
      nested dict of numpy arrays.

    Raises:
      UserError: no checkpoint, none readable, or no such field.
    """
    directory = absolute(as_path(workdir)) / CHECKPOINT_DIR
    steps = _steps_of_all(directory)
    if not steps:
        raise UserError(f"{workdir} holds no checkpoint; give a training workdir, or train first")
    for step in steps:
        loaded = read_together(directory / str(step), lambda path: read_field(path, which), check_field)
        if loaded is not None:
            for name in which.split("."):
                loaded = loaded[name]
            return loaded
    raise UserError(f"none of the checkpoints in {directory} (steps {steps}) can be read")


def load_config(workdir: str | os.PathLike) -> dict[str, Any]:
    """The configuration a run was started with.

    Raises:
      UserError: `workdir` has no config.json, or it is not JSON.
    """
    path = as_path(workdir) / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise UserError(f"{path} holds no settings; put back the run's own, or start in another workdir")
        return config
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; {workdir} is not a training workdir") from None
    except (json.JSONDecodeError, UnicodeDecodeError, NotADirectoryError, IsADirectoryError) as error:
        raise UserError(f"{path} is not a readable JSON file: {first_line(error)}") from None


def check_workdir(
    workdir: str | os.PathLike,
    config: Mapping[str, Any],
    may_change: Collection[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> bool:
    """Whether `workdir` holds checkpoints; `UserError` if they are of another configuration. Writes nothing.

    Its arguments are those of `Checkpoints`.
    """
    found = bool(_complete_steps(as_path(workdir) / CHECKPOINT_DIR))
    if found:
        flat = functools.partial(flatten_dict, sep=".")
        stored = flat(json.loads(json.dumps(defaults or {}))) | flat(load_config(workdir))
        changed = {
            name: values
            for name, values in differences(stored, json.loads(json.dumps(config))).items()
            if not any(fnmatch.fnmatchcase(name, pattern) for pattern in may_change)
        }
        if changed:
            listed = told(changed, "{name} is {here!r}, the run has {there!r}")
            raise UserError(
                f"{workdir} holds a run of another config: {listed}. Use another workdir, or the config of that run"
            )
    return found


def _preservation(keep: int, keep_every: int, keep_best: str) -> Any:
    policies = ocp.training.preservation_policies
    chosen: list[Any] = [policies.LatestN(keep)]
    if keep_every:
        chosen.append(policies.EveryNSteps(keep_every))
    if keep_best:
        best = policies.BestN(
            # A checkpoint of a run that had another metric.
            get_metric_fn=lambda metrics: metrics.get(keep_best, math.inf),
            reverse=True,
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        chosen.append(best)
    return policies.AnyPreservationPolicy(chosen)


def _write_config(workdir: Path, config: Mapping[str, Any]) -> None:
    if jax.process_index() == 0:
        write_json(workdir / CONFIG_FILE, config, indent=2)


def _complete_steps(directory: Path) -> list[int]:
    """Steps under their final name, latest first; Orbax gives that name to complete checkpoints only."""
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if re.fullmatch("[0-9]+", path.name)]
    if is_remote(directory):
        # There nothing is renamed: a file that is written last says so.
        found = [path for path in found if (path / _COMMITTED).exists()]
    return sorted((int(path.name) for path in found), reverse=True)


def _steps_of_all(directory: Path) -> list[int]:
    """The complete steps that any process sees, latest first: a shared folder may look older to some of them."""
    seen = gather_texts(json.dumps(_complete_steps(directory)))
    return sorted({step for text in seen for step in json.loads(text)}, reverse=True)


def _with_sharding(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _free_name(path: Path) -> Path:
    candidates = (path.with_name(f"{path.name}.{number}") for number in range(1, 1000))
    return next(name for name in (path, *candidates) if not name.exists())

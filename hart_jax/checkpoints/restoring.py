"""Reads a checkpoint in all processes of a job together: all of them take it, or none.

Each process reads by itself and waits for nobody, then all learn what the others found. Damage to a file is a reason to
take an older checkpoint; an error of the reading is not.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint import v1 as ocp

from hart_jax.checkpoints.damage import Damaged, is_damage, is_of_other_arrays, is_passing, root_of
from hart_jax.checkpoints.digests import array_digests, check_digests, host_digest
from hart_jax.errors import TryLater, UserError
from hart_jax.io.fingerprint import sha256
from hart_jax.parallel.agree import gather_texts

# Between the tries of a reading that fails for no fault of the file.
RETRY_SECONDS: tuple[float, ...] = (1, 5, 15)
# Replicas share the writing of an array from so much for each of them.
SHARED_BYTES = 1 << 20
_JSON_ITEMS = ("log", "digests")

Items = dict[str, Any]


def orbax_context() -> ocp.Context:
    """The JSON items as JSON; replicas share the writing of large arrays, as each cut into parts is a program to
    compile."""
    registry = ocp.handlers.local_registry()
    for name in _JSON_ITEMS:
        registry.add(ocp.handlers.JsonHandler, checkpointable_name=name)
    context = ocp.Context()
    context.checkpointables.registry = registry
    context.array.saving.min_slice_bytes_for_replica_parallel = SHARED_BYTES
    return context


def read_together(path: Path, read: Callable[[Path], Any], check: Callable[[Path, Any], None]) -> Any:
    """What `read` and then `check` find good in every process; None, reported, if the checkpoint is damaged for any.

    Every process must call it. `check` may wait for the other processes, `read` may not.

    Raises:
      TryLater: in every process, where the checkpoint may be whole but cannot be read in one of them.
      UserError: it holds other arrays.
    """
    loaded, error = _attempt(lambda: read(path))
    if _agreed_to_be_damaged(path, error):
        return None
    _, error = _attempt(lambda: check(path, loaded))
    return None if _agreed_to_be_damaged(path, error) else loaded


def read_items(path: Path, items: Mapping[str, Any]) -> Items:
    """The items of a checkpoint, and its JSON, as this process sees it."""
    if "data" in items and not list((path / "data").glob("process_*.json")):
        raise Damaged("no position in the data")
    stored = [name for name in _JSON_ITEMS if (path / name).exists()]
    with _alone(orbax_context()):
        loaded = ocp.load_checkpointables(path, {**items, **dict.fromkeys(stored)})
    if "data" in items:
        loaded["data"] = items["data"]
    _check_form(loaded.get("digests"))
    return loaded


def check_items(path: Path, loaded: Items) -> None:
    """Raises `Damaged` where what was read is not what was saved; every process must call it."""
    stored = [json.loads(text) for text in gather_texts(json.dumps(loaded.get("digests")))]
    if not any(stored):
        return
    if any(one != stored[0] for one in stored):
        raise Damaged("the processes read different digests")
    check_digests(array_digests(loaded["state"], copies=True), stored[0]["arrays"])
    for name, found in _of_json(loaded.get("data"), loaded.get("log")).items():
        if stored[0][name] != found:
            raise Damaged(f"{name}: not what was saved, by its digest")


def read_field(path: Path, which: str) -> Any:
    """One field of the state (dots lead into nested ones), as host arrays in their place in nested dicts."""
    fields = ocp.metadata(path).metadata
    if fields is None:
        raise Damaged("its arrays are not described")
    fields = flatten_dict(fields, sep=".")
    wanted = {key: leaf for key, leaf in fields.items() if f"{key}.".startswith(f"{which}.")}
    if not wanted:
        tops = sorted({key.split(".")[0] for key in fields})
        raise UserError(f"checkpoint {path} has no field {which!r}; it has {', '.join(tops)}")
    context = _alone(ocp.Context())
    context.pytree.loading.partial_load = True
    abstract = {key: np.empty(leaf.shape, leaf.dtype) for key, leaf in wanted.items()}
    with context:
        loaded: Any = ocp.load(path, unflatten_dict(abstract, sep="."))
    file = path / "digests" / "data.json"
    if file.parent.exists():
        digests = json.loads(file.read_text(encoding="utf-8"))
        _check_form(digests)
        check_digests(
            {key: host_digest(array) for key, array in flatten_dict(loaded, sep=".").items()}, digests["arrays"]
        )
    return loaded


def check_field(path: Path, loaded: Any) -> None:
    """Nothing that `read_field` has not looked at."""


def digests_of(state: Any, data_iterator: Any, log: Any) -> Items:
    """The digests to save beside these; every process must call it.

    The position in the data must be the same in every process.
    """
    return {"arrays": array_digests(state), **_of_json(data_iterator, log)}


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    # TensorStore appends its whole specification to what it has to say.
    line = next(iter(str(error).splitlines()), "").partition(" [tensorstore_spec")[0]
    return line or type(error).__name__


def _of_json(data_iterator: Any, log: Any) -> dict[str, str]:
    position = None if data_iterator is None else data_iterator.get_state()
    return {name: _text_digest(value) for name, value in (("data", position), ("log", log))}


def _text_digest(value: Any) -> str:
    return sha256(json.dumps(value, sort_keys=True, default=str))[:16]


def _check_form(digests: Any) -> None:
    if digests is None:
        return
    try:
        good = all(isinstance(digest, int) for digest in digests["arrays"].values())
        good = good and isinstance(digests["data"], str) and isinstance(digests["log"], str)
    except (TypeError, KeyError, AttributeError):
        good = False
    if not good:
        raise Damaged("its digests are not what was saved")


def _alone(context: ocp.Context) -> ocp.Context:
    """A context in which this process waits for no other."""
    index = jax.process_index()
    context.multiprocessing.active_processes = {index}
    context.multiprocessing.primary_host = index
    context.multiprocessing.barrier_sync_key_prefix = f"process {index}"
    return context


def _attempt(work: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """What `work` gives, or its error; reading that fails for no fault of the file is tried again."""
    for wait in (*RETRY_SECONDS, None):
        try:
            return work(), None
        except Exception as error:  # Orbax, TensorStore and Grain each raise their own kinds
            root = root_of(error)
            if not isinstance(root, Exception):
                # Orbax wraps Ctrl-C too.
                raise root from None
            if wait is None or not is_passing(error):
                return None, error
            print(f"warning: {first_line(root)}: trying again in {wait} s", file=sys.stderr, flush=True)
            time.sleep(wait)
    raise AssertionError("the last try has no wait")


def _agreed_to_be_damaged(path: Path, error: Exception | None) -> bool:
    """Whether a checkpoint is damaged in the eyes of any process, of which this one has found `error`; reports it.

    Raises:
      TryLater: no process could say so, but one could not read it.
      UserError: it holds other arrays.
    """
    found = "" if error is None else f"{_kind(error)}:{first_line(root_of(error))}"
    said = [(number, *text.partition(":")[::2]) for number, text in enumerate(gather_texts(found)) if text]
    for kind, message in (
        ("failed", "cannot be read now{by}: {reason}; nothing was changed, the same command tries again"),
        ("arrays", "holds other arrays{by} than this run has: {reason}; give the config that it was saved with"),
        ("damaged", "cannot be read{by}: {reason}"),
    ):
        for number, of_kind, reason in said:
            if of_kind != kind:
                continue
            by = f" by process {number}" if jax.process_count() > 1 else ""
            text = f"checkpoint {path} {message.format(by=by, reason=reason)}"
            if kind == "damaged":
                print(f"warning: {text}", flush=True)
                return True
            if error is not None and _kind(error) == "failed" and not is_passing(error):
                # Nothing that is known of files.
                raise error
            raise TryLater(text) if kind == "failed" else UserError(text)
    return False


def _kind(error: Exception) -> str:
    if is_of_other_arrays(error):
        return "arrays"
    return "damaged" if is_damage(error) else "failed"

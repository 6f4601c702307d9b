"""Host arrays of all processes, bit for bit, float64 included. Every process must make the same calls."""

import jax
import numpy as np
from jax.experimental import multihost_utils


def gather_rows(rows: np.ndarray, order: np.ndarray) -> np.ndarray:
    """All processes' rows in global order, in every process.

    What is computed from them does not depend on the number of processes, not even in the last bit.

    Args:
      rows: (n, ...) this process's; n may differ between processes and be 0, the rest of the shape and the type not.
      order: (n,) their global positions.

    Raises:
      ValueError: a row without position, positions other than 0, 1, ... each once over all processes, or rows of
        different shapes or types.
    """
    order = np.asarray(order, np.int64)
    if order.shape != rows.shape[:1]:
        raise ValueError(f"rows of shape {rows.shape} with positions of shape {order.shape}: need one for each row")
    rows, order = np.concatenate(_of_all_processes(rows)), np.concatenate(_of_all_processes(order))
    if not np.array_equal(np.sort(order), np.arange(len(order))):
        raise ValueError(f"positions of {len(order)} rows: need each of 0 to {len(order) - 1} once")
    return rows[np.argsort(order)]


def _of_all_processes(rows: np.ndarray) -> list[np.ndarray]:
    """Each process's rows, in the processes' order; raises `ValueError` unless they differ in number only."""
    if jax.process_count() == 1:
        return [rows]
    row_bytes = rows.dtype.itemsize * int(np.prod(rows.shape[1:]))
    header = np.array([len(rows), row_bytes, rows.dtype.num], np.int32)
    # As Python's integers: the products below are bytes, often more than 2^31.
    headers = multihost_utils.process_allgather(header).tolist()
    if any(other[1:] != headers[0][1:] for other in headers):
        raise ValueError(f"processes gather rows of different bytes or types: {[other[1:] for other in headers]}")
    counts = [count for count, _, _ in headers]
    # As bytes, because JAX would make float32 of float64.
    padded = np.zeros(max(counts) * row_bytes, np.uint8)
    padded[: len(rows) * row_bytes] = np.frombuffer(rows.tobytes(), np.uint8)
    gathered = multihost_utils.process_allgather(padded)
    parts = [part[: count * row_bytes].tobytes() for part, count in zip(gathered, counts, strict=True)]
    return [np.frombuffer(part, rows.dtype).reshape(-1, *rows.shape[1:]) for part in parts]

"""What every process of a job says, told to all of them."""

import jax
import numpy as np
from jax.experimental import multihost_utils


def gather_texts(text: str) -> list[str]:
    """The texts that the processes give, in the order of the processes; every process must call it."""
    if jax.process_count() == 1:
        return [text]
    own = np.frombuffer(text.encode(errors="replace"), np.uint8)
    lengths = np.ravel(multihost_utils.process_allgather(np.int32(len(own))))
    padded = np.zeros(max(1, int(lengths.max())), np.uint8)
    padded[: len(own)] = own
    rows = np.reshape(multihost_utils.process_allgather(padded), (len(lengths), -1))
    return [row[:length].tobytes().decode() for row, length in zip(rows, lengths, strict=True)]

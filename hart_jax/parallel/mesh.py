"""Where a training run's arrays lie: batches split over the devices, everything else on each of them."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hart_jax.errors import UserError


def data_mesh(batch_size: int) -> Mesh:
    """One axis "data" over all devices; `UserError` if the batch does not divide over them."""
    devices = len(jax.devices())
    if batch_size % devices:
        raise UserError(f"train.batch_size={batch_size}: must be a multiple of the {devices} devices")
    # Flax's logical constraints need Auto axes.
    return jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> Any:
    """A host batch on the devices, split along its first axis."""
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))

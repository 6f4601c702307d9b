"""The one attention function of the model. HART's mask is one number per query: it sees the keys before its end."""

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import PartitionSpec

from hart_jax.errors import UserError
from hart_jax.nn.layers import num_shards
from pallas_kernels import attention as kernels
from pallas_kernels.attention import KVEnd, Segments


def scale_causal_segments(context_tokens: int, scale_sizes: tuple[int, ...]) -> Segments:
    """The scale-causal mask: the context sees itself, a scale sees everything up to its own end.

    `scale_sizes` are the tokens present of scales 1, 2, ...:

        context  # . .
        scale 1  # # .
        scale 2  # # #
    """
    sizes = (context_tokens, *scale_sizes)
    return tuple(zip(sizes, np.cumsum(sizes).tolist(), strict=True))


def attention(
    q_BQHK: jax.Array,
    k_BMHK: jax.Array,
    v_BMHK: jax.Array,
    *,
    kv_end: KVEnd = None,
    scale: float,
    implementation: str = "auto",
) -> jax.Array:
    """`pallas_kernels.attention.attention`; each device of the mesh computes its own samples and heads.

    Raises:
      UserError: the implementation lacks this type, width or form of `kv_end`, or is not installed.
    """

    def run(*qkv: jax.Array) -> jax.Array:
        try:
            return kernels.attention(*qkv, kv_end=kv_end, scale=scale, implementation=implementation)
        except NotImplementedError as error:
            raise UserError(f"attention={implementation}: {error}") from error

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return run(q_BQHK, k_BMHK, v_BMHK)
    # An axis that the mesh does not divide, as the batch of one that parameters are initialised with, is whole.
    axes = ("batch" if q_BQHK.shape[0] % num_shards("batch") == 0 else None, None, "heads", None)
    spec = nn.logical_to_mesh_axes(axes) or PartitionSpec()
    return jax.shard_map(run, in_specs=(spec, spec, spec), out_specs=spec, check_vma=False)(q_BQHK, k_BMHK, v_BMHK)

"""The one attention function of the model. HART's mask is one number per query: it sees the keys before its end."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from hart_jax.errors import UserError
from hart_jax.nn.layers import num_shards
from hart_jax.transformer.mask import DenseMask
from pallas_kernels import attention as kernels
from pallas_kernels.attention import KVEnd


def attention(
    q_BQHK: jax.Array,
    k_BMHK: jax.Array,
    v_BMHK: jax.Array,
    *,
    kv_end: KVEnd | DenseMask = None,
    scale: float,
    implementation: str = "auto",
) -> jax.Array:
    """`pallas_kernels.attention.attention`; each device of the mesh computes its own samples and heads.

    A `DenseMask` in place of ends is computed by JAX's own function, all pairs of it.

    Raises:
      UserError: the implementation lacks this type, width or form of `kv_end`, or is not installed.
    """
    if isinstance(kv_end, DenseMask) and implementation not in ("auto", "xla"):
        raise UserError(f"attention={implementation}: takes no dense mask; set attention=xla")

    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        if isinstance(kv_end, DenseMask):
            return jax.nn.dot_product_attention(q, k, v, mask=jnp.asarray(kv_end.seen_QM)[None, None], scale=scale)
        try:
            return kernels.attention(q, k, v, kv_end=kv_end, scale=scale, implementation=implementation)
        except NotImplementedError as error:
            raise UserError(f"attention={implementation}: {error}") from error

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return run(q_BQHK, k_BMHK, v_BMHK)
    # An axis that the mesh does not divide, as the batch of one that parameters are initialised with, is whole.
    axes = ("batch" if q_BQHK.shape[0] % num_shards("batch") == 0 else None, None, "heads", None)
    spec = nn.logical_to_mesh_axes(axes) or PartitionSpec()
    return jax.shard_map(run, in_specs=(spec, spec, spec), out_specs=spec, check_vma=False)(q_BQHK, k_BMHK, v_BMHK)

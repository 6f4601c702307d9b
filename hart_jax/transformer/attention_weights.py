"""What every position attends to, to look at: the weights that attention itself never holds in memory."""

from typing import Any

import jax
import jax.numpy as jnp

from hart_jax.transformer.model import Hart


def attention_weights(hart: Hart, params: Any, condition: Any, ar_input_BLC: jax.Array) -> jax.Array:
    """Attention weights of all blocks in teacher forcing, (layers, B, H, Q, Q) float32, where Q = T + L - 1.

    Positions are the context's T, then the tokens of scales 1, 2, ..., all of them; rows are queries and sum to 1,
    columns are keys. This is as much memory as it says: for small models, or few samples.

    Args:
      params: of the transformer.
      condition: labels, or text states and mask.
      ar_input_BLC: (B, L-1, C), inputs of scales 1.. as `Tokenizer.tokens` gives them.
    """
    sizes = hart.config.sizes[1:]
    all_BN = jnp.tile(jnp.arange(sizes[-1]), (len(ar_input_BLC), 1))
    _, kept = hart.apply({"params": params}, condition, ar_input_BLC, all_BN, mutable=["intermediates"])
    [(q_DBQHK, k_DBQHK)] = kept["intermediates"]["layers"]["attn"]["queries_keys"]
    q, k = q_DBQHK.astype(jnp.float32), k_DBQHK.astype(jnp.float32)
    logits = jnp.einsum("dbqhk,dbmhk->dbhqm", q, k, precision="highest") * hart.config.attention_scale
    seen_QM = hart.mask.seen(hart.config.context_tokens, sizes)
    return jax.nn.softmax(jnp.where(seen_QM, logits, -jnp.inf), axis=-1)

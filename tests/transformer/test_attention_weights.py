"""Attention weights to look at are those that attention applies."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hart_jax.checkpoints.model_folder import abstract_transformer
from hart_jax.nn.layers import rms_norm
from hart_jax.transformer.attention_weights import attention_weights
from hart_jax.transformer.block import SwiGLU
from hart_jax.transformer.model import Hart
from tests.tiny import PATCH_NUMS, random_like, transformer_config

B = 2
ALL_KEPT = np.tile(np.arange(PATCH_NUMS[-1] ** 2), (B, 1))


class Built(NamedTuple):
    hart: Hart
    params: Any
    condition: Any
    ar_input: np.ndarray


def build(remat: str = "none", **changes: Any) -> Built:
    config = transformer_config(**changes)
    rng = np.random.default_rng(0)
    condition = rng.standard_normal((B, config.context_tokens, config.context_dim), np.float32), np.ones((B, 4), int)
    ar_input = rng.standard_normal((B, config.num_tokens - 1, config.latent_channels), np.float32)
    return Built(Hart(config, remat=remat), random_like(abstract_transformer(config)), condition, ar_input)


@pytest.mark.parametrize("changes", [{}, {"disable_aln": False, "attn_l2_norm": True}, {"remat": "full"}])
def test_rows_sum_to_one_and_see_no_later_scale(changes):
    built = build(**changes)
    weights = np.asarray(attention_weights(*built))
    # Context 4, scale 1 with 2x2 tokens, scale 2 with 4x4.
    assert weights.shape == (2, B, 2, 24, 24) and weights.dtype == np.float32
    np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-5)
    assert not weights[..., :4, 4:].any() and not weights[..., 4:8, 8:].any()
    assert weights[..., :4, :4].all() and weights[..., 4:8, :8].all() and weights[..., 8:, :].all()


@pytest.mark.parametrize("attn_l2_norm", [False, True])
def test_a_block_computed_with_them_is_the_models(attn_l2_norm):
    built = build(depth=1, attn_l2_norm=attn_l2_norm)
    config, params = built.hart.config, built.params
    apply = functools.partial(built.hart.apply, {"params": params})
    context = apply(built.condition, method="embed_condition")
    inputs = [apply(context, method="context_input")[0]]
    for scale, latent in ((1, built.ar_input[:, :4]), (2, built.ar_input[:, 4:])):
        inputs.append(apply(latent, scale, np.arange(latent.shape[1])[None], context, method="scale_input")[0])
    x = jnp.concatenate(inputs, axis=1)
    layer = jax.tree.map(lambda leaf: leaf[0], params["layers"])

    def normed(x):
        return rms_norm(x, layer["norm_scale"], config.norm_eps)

    v = jnp.einsum("bqw,whk->bqhk", normed(x), layer["attn"]["qkv"][:, 2]) + layer["attn"]["v_bias"]
    seen = jnp.einsum("bhqm,bmhk->bqhk", attention_weights(*built)[0], v).reshape(x.shape)
    x = x + seen @ layer["attn"]["proj"]["kernel"] + layer["attn"]["proj"]["bias"]
    x = x + SwiGLU(config).apply({"params": layer["mlp"]}, normed(x))
    hidden = apply(built.condition, built.ar_input, ALL_KEPT).last_hidden
    np.testing.assert_allclose(x[:, -16:], hidden, rtol=1e-4, atol=1e-5)

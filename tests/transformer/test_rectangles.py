"""The transformer on rectangles: one on its side gives the same on its side, and a mesh what one device does."""

import os
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest

from hart_jax.checkpoints.model_folder import abstract_transformer
from hart_jax.config import Shape, TransformerConfig
from hart_jax.transformer.attention_weights import attention_weights
from hart_jax.transformer.model import Hart
from tests.quickly import ROOT
from tests.tiny import random_like, transformer_config

B = 2
LATENT = (6, 3)


def inputs_of(config: TransformerConfig) -> tuple[Any, np.ndarray, np.ndarray]:
    """Condition, ar_input (B, L-1, C), and all of the last scale's tokens."""
    rng = np.random.default_rng(0)
    text = rng.standard_normal((B, config.context_tokens, config.context_dim), np.float32)
    condition = text, np.array([[1, 1, 1, 0], [1, 1, 1, 1]], np.int32)
    ar_input = rng.standard_normal((B, config.num_tokens - 1, config.latent_channels), np.float32)
    return condition, ar_input, np.tile(np.arange(config.sizes[-1]), (B, 1))


def on_their_side(x_BLC: np.ndarray, shapes: tuple[Shape, ...]) -> np.ndarray:
    """Tokens of scales of these heights and widths, row by row, as those of their transposes."""
    ends = np.cumsum([height * width for height, width in shapes])
    assert x_BLC.shape[1] == ends[-1]
    turned = []
    for part, (height, width) in zip(np.split(x_BLC, ends[:-1], axis=1), shapes, strict=True):
        turned.append(np.swapaxes(part.reshape(len(part), height, width, -1), 1, 2).reshape(part.shape))
    return np.concatenate(turned, axis=1)


def with_turned_heads(params: Any) -> Any:
    """Queries' and keys' halves swapped, one of them negated: what rotates with rows then does so with columns."""

    def turned(x: np.ndarray) -> np.ndarray:
        first, second = np.split(x, 2, axis=-1)
        return np.concatenate([second, -first], axis=-1)

    attn = params["layers"]["attn"]
    # (layers, W, 3, H, K): queries, keys, values.
    q, k, v = np.moveaxis(attn["qkv"], 2, 0)
    attn = {**attn, "qkv": np.stack([turned(q), turned(k), v], axis=2), "q_bias": turned(attn["q_bias"])}
    return {**params, "layers": {**params["layers"], "attn": attn}}


def test_a_rectangle_on_its_side_gives_its_logits_on_their_side():
    """No place is mixed up, of any scale: rows are told from columns by rotary positions alone."""
    tall, wide = (transformer_config().of_latent(*latent) for latent in (LATENT, LATENT[::-1]))
    params = random_like(abstract_transformer(tall))
    # So that it matters much who attends to whom.
    params["layers"]["attn"]["qkv"] = 6 * params["layers"]["attn"]["qkv"]
    condition, ar_input, kept = inputs_of(tall)
    run = jax.jit(lambda hart, *inputs: hart.apply({"params": inputs[0]}, *inputs[1:]), static_argnums=0)
    ours = run(Hart(tall), params, condition, ar_input, kept)
    turned_input = on_their_side(ar_input, tall.shapes[1:])
    assert (turned_input != ar_input).any()
    theirs = run(Hart(wide), with_turned_heads(params), condition, turned_input, kept)
    expected = on_their_side(np.asarray(ours.logits), tall.shapes)
    np.testing.assert_allclose(theirs.logits, expected, rtol=1e-3, atol=1e-4)
    hidden = on_their_side(np.asarray(ours.last_hidden), tall.shapes[-1:])
    np.testing.assert_allclose(theirs.last_hidden, hidden, rtol=1e-3, atol=1e-4)
    # With the heads as they were rows are not columns.
    other = run(Hart(wide), params, condition, turned_input, kept)
    assert np.abs(other.logits - expected).max() > 1e-2


def test_attention_weights_of_a_rectangle():
    config = transformer_config().of_latent(*LATENT)
    condition, ar_input, _ = inputs_of(config)
    params = random_like(abstract_transformer(config))
    weights = np.asarray(attention_weights(Hart(config), params, condition, ar_input))
    context, sizes = config.context_tokens, config.sizes[1:]
    length = context + sum(sizes)
    assert weights.shape == (2, B, 2, length, length) and config.sizes[-1] == 18
    np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-5)
    start = 0
    for size in (context, *sizes):
        end = start + size
        assert weights[..., start:end, :end].all() and not weights[..., start:end, end:].any()
        start = end


_ON_A_MESH = """
import jax
import numpy as np
from hart_jax.checkpoints.model_folder import abstract_transformer, boxed_transformer
from hart_jax.config import MeshConfig
from hart_jax.parallel.mesh import MeshLayout, put_global
from hart_jax.parallel.rules import parameter_axes
from hart_jax.transformer.model import Hart
from tests.tiny import random_like, transformer_config
from tests.transformer.test_rectangles import LATENT, inputs_of

config = transformer_config().of_latent(*LATENT)
params = random_like(abstract_transformer(config))
(text, mask), ar_input, kept = (jax.tree.map(lambda x: np.concatenate([x] * 4), each) for each in inputs_of(config))
assert jax.device_count() == 8 and len(kept) == 8


def logits(params, *inputs):
    return Hart(config).apply({"params": params}, *inputs).logits


alone = jax.jit(logits)(params, (text, mask), ar_input, kept)
for mesh in (MeshConfig(), MeshConfig(data=2, fsdp=2, tensor=2)):
    layout = MeshLayout.of(mesh, 8)
    placed = put_global(params, layout.state_shardings(params, parameter_axes(boxed_transformer(config))))
    inputs = jax.device_put(((text, mask), ar_input, kept), layout.batch)
    with layout.activate():
        found = jax.jit(logits)(placed, *inputs)
    assert len(found.sharding.device_set) == 8
    np.testing.assert_allclose(found, alone, rtol=1e-4, atol=1e-4, err_msg=str(mesh))
"""


@pytest.mark.slow
def test_teacher_forcing_of_a_rectangle_on_a_mesh():
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", _ON_A_MESH], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

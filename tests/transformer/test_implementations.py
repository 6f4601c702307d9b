"""A whole training step and whole images, the same with every implementation of attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels.attention as kernels
from hart_jax.config import HartLossConfig, SampleConfig
from hart_jax.sampling.sampler import make_sampler
from hart_jax.tokenizer.model import Tokenizer
from hart_jax.training.hart_step import make_loss
from hart_jax.transformer.model import Hart
from pallas_kernels.attention import Blocks
from tests.tiny import TOKENIZER, tiny_model

# Heads as wide as the real ones, so that kernels have them.
MODEL = tiny_model(width=128, heads=2)
TILES = Blocks((128, 128), (128, 128), (128, 128))
BATCH = 2
random = np.random.default_rng(0)
TEXT = random.normal(size=(BATCH, 4, 8)).astype(np.float32), np.tile(np.array([1, 1, 1, 0], np.int32), (BATCH, 1))
IMAGES = random.uniform(-1, 1, (BATCH, 8, 8, 3)).astype(np.float32)


@pytest.fixture
def interpreted(monkeypatch):
    """Kernels run without their device, by Pallas's own interpreter: the one that looks for races has effects, which
    layers in a scan do not take."""
    monkeypatch.setattr("jax.experimental.pallas.tpu.InterpretParams", lambda **_: True)
    monkeypatch.setattr(kernels, "attention", functools.partial(kernels.attention, interpret=True, blocks=TILES))


def losses_and_gradients(implementation: str):
    hart = Hart(MODEL.transformer_config, attention=implementation)
    compute = make_loss(hart, HartLossConfig(condition_top_k=16, min_kept=6))
    kept = np.tile(np.arange(0, 16, 2), (BATCH, 1))
    tokens = Tokenizer(TOKENIZER).apply({"params": MODEL.tokenizer}, IMAGES, method="tokens")
    arguments = tokens, TEXT, MODEL.tokenizer["quantizer"]["codebook"], kept, jax.random.split(jax.random.key(0), BATCH)
    (_, metrics), gradients = jax.jit(jax.value_and_grad(compute, has_aux=True))(MODEL.transformer, *arguments)
    return metrics, gradients


def sampled(implementation: str):
    settings = SampleConfig(top_k=0, top_k_late=0, cfg=2.0, attention=implementation)
    sample = make_sampler(Hart(MODEL.transformer_config), Tokenizer(TOKENIZER), settings)
    return sample({"transformer": MODEL.transformer, "tokenizer": MODEL.tokenizer}, TEXT, 0, jnp.arange(BATCH))


@functools.cache
def expected():
    return losses_and_gradients("reference"), sampled("reference")


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("implementation", ["xla", "tpu", "splash"])
def test_losses_gradients_and_tokens_are_the_same(implementation):
    (metrics, gradients), (image, indices) = expected()
    our_metrics, our_gradients = losses_and_gradients(implementation)
    for name, value in metrics.items():
        np.testing.assert_allclose(our_metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    for ours, theirs in zip(jax.tree.leaves(our_gradients), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * max(1.0, np.abs(theirs).max()))
    our_image, our_indices = sampled(implementation)
    for ours, theirs in zip(our_indices, indices, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_allclose(our_image, image, atol=1e-4)

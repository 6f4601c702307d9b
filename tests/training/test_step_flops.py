"""FLOPs of whole training steps: the model's, which MFU has, and the hardware's, which HFU has."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from hart_jax.checkpoints.model_folder import abstract_tokenizer
from hart_jax.config import HartExperiment, OptimizerConfig, TokenizerLossConfig, experiment_from
from hart_jax.nn.flop_counter import StepFlops
from hart_jax.parallel.mesh import MeshLayout
from hart_jax.text.encoder import load_text_encoder
from hart_jax.tokenizer.model import Tokenizer
from hart_jax.training.hart_functions import hart_functions
from hart_jax.training.hart_step import tokens_of
from hart_jax.training.state import make_optimizer
from hart_jax.training.tokenizer_step import make_tokenizer_step, tokenizer_flops, tokenizer_state
from tests.sample_runs import QWEN2
from tests.tiny import TOKENIZER, experiment_values
from tests.tiny_qwen2 import write_folder

BATCH, KEPT = 4, 8
SHAPE = jax.ShapeDtypeStruct
KEY = jax.eval_shape(lambda: jax.random.key(0))
# The discriminator needs so many pixels.
LARGER = dataclasses.replace(TOKENIZER, image_size=32, patch_nums=(1, 4, 16))
IMAGES = SHAPE((BATCH, 8, 8, 3), jnp.uint8)


@functools.cache
def hart_flops(remat: str = "none", ahead: bool = False, **train) -> StepFlops:
    experiment = experiment_from(experiment_values())
    assert isinstance(experiment, HartExperiment)
    settings = dataclasses.replace(experiment.train, remat=remat, batch_size=BATCH, **train)
    experiment = dataclasses.replace(experiment, train=settings)
    layout = MeshLayout.of(experiment.mesh, BATCH)
    program, tokenizer = hart_functions(experiment, layout), abstract_tokenizer(TOKENIZER)
    condition = SHAPE((BATCH, 4, 8), jnp.float32), SHAPE((BATCH, 4), jnp.int32)
    with layout.activate():
        source = jax.eval_shape(functools.partial(tokens_of, program.tokenizer), tokenizer, IMAGES) if ahead else IMAGES
        arguments = program.init.shapes(), tokenizer, source, condition, KEY
        return program.flops(program.step.trace(*arguments, KEPT), arguments, KEPT)


@pytest.mark.slow
def test_what_is_computed_again_is_no_work_of_the_model():
    none, full = hart_flops("none"), hart_flops("full")
    assert none.model == full.model > 0
    # Every block's forward pass once more: at most a third of all three.
    assert 0.15 * none.model < full.hardware - none.hardware < 0.34 * none.model


def test_the_frozen_tokenizer_is_no_work_of_the_model():
    images, ahead = hart_flops(), hart_flops(ahead=True)
    assert images.model == ahead.model
    assert images.hardware > 1.5 * ahead.hardware
    # Without rematerialisation nothing else is left.
    assert ahead.hardware == pytest.approx(ahead.model, rel=0.05)


def test_a_batch_in_parts_is_the_same_model():
    whole, parts = hart_flops(), hart_flops(accumulate=2)
    assert whole.model == parts.model
    # What does not depend on the batch is computed anew for every part.
    assert parts.hardware == pytest.approx(whole.hardware, rel=0.02)


@functools.cache
def tokenizer_step_flops(freeze: tuple[str, ...] = (), adversarial: bool = False) -> StepFlops:
    tokenizer, optimizer = Tokenizer(LARGER), make_optimizer(OptimizerConfig(), 10)
    params = abstract_tokenizer(LARGER)

    def start(params):
        return tokenizer_state(jax.random.key(0), params, optimizer, (32, 32), freeze, adversarial)

    state, images = jax.eval_shape(start, params), SHAPE((BATCH, 32, 32, 3), jnp.uint8)
    step = make_tokenizer_step(tokenizer, optimizer, TokenizerLossConfig(perceptual=0.0), 0.9)
    traced = step.trace(state, images, KEY, None, adversarial=adversarial)
    return tokenizer_flops(traced, tokenizer, state, images)


@pytest.mark.slow
def test_the_tokenizers_frozen_modules_are_no_work_of_the_model():
    whole, decoder = tokenizer_step_flops(), tokenizer_step_flops(("encoder", "quant_conv", "quantizer"))
    assert whole.hardware == pytest.approx(whole.model, rel=0.1)
    assert decoder.model < 0.7 * whole.model
    # The encoder's forward pass is computed still.
    assert decoder.hardware > decoder.model + 0.1 * whole.model


def test_the_discriminators_own_training_is_work_of_the_model():
    alone, both = tokenizer_step_flops(), tokenizer_step_flops(adversarial=True)
    assert both.model > alone.model
    # In the generator's loss it counts for the hardware only.
    assert both.hardware - alone.hardware > 1.2 * (both.model - alone.model)


def test_captions_encoded_on_the_fly_are_work_of_the_hardware(tmp_path):
    encoder = load_text_encoder(write_folder(tmp_path / "qwen2", QWEN2), dtype="float32")
    once = encoder.batch_flops(4, 6)
    kernels = [leaf for leaf in jax.tree.leaves(encoder.params["layers"]) if leaf.ndim == 3]
    products = 2 * 4 * 6 * sum(leaf.size for leaf in kernels)
    # And the little that attention takes.
    assert products < once < 1.5 * products
    assert encoder.batch_flops(8, 6) == 2 * once

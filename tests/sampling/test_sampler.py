"""The sampler: what it keeps, how it iterates, and that an image does not depend on its batch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hart_jax.config import SampleConfig
from hart_jax.errors import UserError
from hart_jax.nn.dtypes import cast_weights
from hart_jax.sampling.layerwise import LayerwiseSampling, make_layered_sampler, split_layers
from hart_jax.sampling.noise import KeyedNoise
from hart_jax.sampling.rules import iteration_sizes, keep_top, kth_largest
from hart_jax.sampling.sampler import generate, make_sampler
from hart_jax.tokenizer.model import Tokenizer
from hart_jax.tokenizer.resize import area
from hart_jax.transformer.model import Hart
from tests.tiny import TOKENIZER, tiny_model

ALL = SampleConfig(top_k=0, top_k_late=0, cfg=2.0)
MODEL = tiny_model()


@functools.cache
def sampler_of(settings: SampleConfig):
    return make_sampler(Hart(MODEL.transformer_config), Tokenizer(TOKENIZER), settings)


def sample(settings: SampleConfig, prompts: list[int], indices: list[int], seed: int = 0):
    """Images and indices per scale of made-up prompts, each a number."""
    text = np.stack([np.random.default_rng(prompt).normal(size=(4, 8)) for prompt in prompts]).astype(np.float32)
    mask = np.tile(np.array([1, 1, 1, 0], np.int32), (len(prompts), 1))
    params = {"transformer": MODEL.transformer, "tokenizer": MODEL.tokenizer}
    image, tokens = sampler_of(settings)(params, (text, mask), seed, jnp.array(indices))
    return np.asarray(image), [np.asarray(t) for t in tokens]


def test_an_image_does_not_depend_on_its_batch():
    together, tokens = sample(ALL, [5, 6], [0, 3])
    alone, tokens_alone = sample(ALL, [6], [3])
    for scale, index in enumerate(tokens_alone):
        np.testing.assert_array_equal(index[0], tokens[scale][1])
    np.testing.assert_allclose(alone[0], together[1], atol=1e-4)


def test_the_tokens_of_a_sample_decode_to_it():
    image, tokens = sample(dataclasses.replace(ALL, discrete_only=True), [5], [0])
    tokenizer, params = Tokenizer(TOKENIZER), {"params": MODEL.tokenizer}

    def decoded(**how) -> np.ndarray:
        latent = tokenizer.apply(params, tokens, method="decode_indices", **how)
        return np.clip(tokenizer.apply(params, latent, method="decode"), -1, 1)

    np.testing.assert_allclose(decoded(sampled=True), image, atol=1e-4)
    # As the tokens of an image do.
    assert np.abs(decoded() - image).max() > 0.1


def test_seed_and_index_change_the_image():
    _, tokens = sample(ALL, [5, 5], [0, 1])
    _, other = sample(ALL, [5], [0], seed=1)
    assert (tokens[-1][0] != tokens[-1][1]).any()
    assert (tokens[-1][0] != other[-1][0]).any()


def test_each_image_may_have_its_own_seed():
    _, tokens = sample(ALL, [5, 5], [0, 3], seed=np.array([7, 2**32 - 1], np.uint32))
    for seed, index, row in ((7, 0, 0), (2**32 - 1, 3, 1)):
        _, alone = sample(ALL, [5], [index], seed=np.uint32(seed))
        for a, b in zip(alone, tokens, strict=True):
            np.testing.assert_array_equal(a[0], b[row])


def test_images_are_clipped_and_have_the_configured_shape():
    image, tokens = sample(ALL, [1, 2], [0, 0])
    assert image.shape == (2, 8, 8, 3) and np.abs(image).max() <= 1
    assert [t.shape for t in tokens] == [(2, 1), (2, 4), (2, 16)]


@pytest.mark.parametrize(
    "changes",
    [
        {"smooth": True},
        {"discrete_only": True},
        {"masked_iterations": 3},
        {"top_k": 2, "top_k_late": 2},
        {"top_p": 0.5},
    ],
)
def test_every_option_changes_the_image_and_nothing_breaks(changes):
    plain, _ = sample(ALL, [1], [0])
    image, tokens = sample(SampleConfig.from_dict({**ALL.to_dict(), **changes}), [1], [0])
    assert np.isfinite(image).all()
    assert all(((t >= 0) & (t < 16)).all() for t in tokens)
    assert np.abs(image - plain).max() > 1e-4


@pytest.mark.parametrize(
    ("flags", "changes"),
    [
        pytest.param({}, {}, marks=pytest.mark.slow),
        ({"disable_aln": False, "sep_aln_pooling_mode": "avg"}, {"smooth": True, "masked_iterations": 3, "top_k": 3}),
        pytest.param({"shared_aln": True}, {"discrete_only": True}, marks=pytest.mark.slow),
    ],
)
def test_layer_by_layer_samples_the_same(flags, changes):
    model, settings = tiny_model(**flags), SampleConfig.from_dict({**ALL.to_dict(), **changes})
    parts = Hart(model.transformer_config), Tokenizer(TOKENIZER), settings
    params = {"transformer": model.transformer, "tokenizer": model.tokenizer}
    text = np.random.default_rng(0).normal(size=(2, 4, 8)).astype(np.float32)
    wanted = (text, np.array([[1, 1, 1, 0], [1, 1, 1, 1]], np.int32)), 0, jnp.array([0, 3])
    image, tokens = make_sampler(*parts)(params, *wanted)
    again, tokens_again = make_layered_sampler(*parts)(split_layers(params), *wanted)
    for a, b in zip(tokens, tokens_again, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(again, image, atol=1e-4)


def test_narrow_weights_sample_what_wide_ones_do():
    parts = Hart(MODEL.transformer_config, jnp.bfloat16), Tokenizer(TOKENIZER), ALL
    text = np.random.default_rng(0).normal(size=(1, 4, 8)).astype(np.float32)
    wanted = (text, np.ones((1, 4), np.int32)), 0, jnp.array([0])
    narrow = cast_weights(MODEL.transformer, jnp.bfloat16)
    assert narrow["layers"]["attn"]["qkv"].dtype == jnp.bfloat16 and narrow["head"]["kernel"].dtype == np.float32
    sample = make_sampler(*parts)
    wide, narrow = (
        sample({"transformer": each, "tokenizer": MODEL.tokenizer}, *wanted)[1] for each in (MODEL.transformer, narrow)
    )
    for a, b in zip(wide, narrow, strict=True):
        np.testing.assert_array_equal(a, b)


def test_greedy_sampling_takes_the_largest_logit():
    greedy = SampleConfig(top_k=1, top_k_late=1)
    _, tokens = sample(greedy, [1], [0])
    _, again = sample(greedy, [1], [0], seed=9)
    # The first scale's code depends on nothing random; later ones follow from it.
    for a, b in zip(tokens, again, strict=True):
        np.testing.assert_array_equal(a, b)


def test_masked_iterations_fill_every_position_once():
    assert iteration_sizes(16, 1) == [16]
    assert iteration_sizes(16, 2) == [5, 11]


@given(st.integers(2, 400), st.integers(1, 12))
def test_iteration_sizes_add_up(positions, iterations):
    sizes = iteration_sizes(positions, iterations)
    assert sum(sizes) == positions and len(sizes) == iterations


@given(st.integers(1, 8), st.integers(0, 1000))
def test_top_k_keeps_the_largest(k, seed):
    logits = np.random.default_rng(seed).normal(size=(3, 8)).astype(np.float32)
    kept = np.isfinite(np.asarray(keep_top(logits, k, 1.0)))
    assert (kept.sum(-1) == k).all()
    assert all(logits[row][kept[row]].min() >= np.sort(logits[row])[-k] for row in range(3))


@given(st.integers(1, 9), st.lists(st.floats(width=32, allow_nan=False), min_size=9, max_size=9))
def test_kth_largest_is_exact(k, values):
    x = np.array(values, np.float32)
    assert np.asarray(kth_largest(x, k))[0] == np.sort(x)[-k]


@given(st.floats(0.05, 0.95), st.integers(0, 1000))
def test_top_p_keeps_the_smallest_set_of_enough_mass(p, seed):
    logits = 3 * np.random.default_rng(seed).normal(size=8).astype(np.float32)
    probability = np.asarray(jax.nn.softmax(logits))
    kept = np.isfinite(np.asarray(keep_top(logits, 0, p)))
    assert probability[kept].sum() >= p - 1e-5
    assert kept[probability.argmax()]
    without_smallest = probability[kept].sum() - probability[kept].min()
    assert kept.sum() == 1 or without_smallest < p + 1e-5


def test_top_k_over_the_codebook_is_an_error():
    with pytest.raises(UserError, match="top_k=17: the codebook has 16 codes"):
        sampler_of(SampleConfig(top_k=17, top_k_late=0))


def test_class_conditional_models_sample_from_labels():
    model = tiny_model(num_classes=3, context_tokens=1)
    sampler = make_sampler(Hart(model.transformer_config), Tokenizer(TOKENIZER), ALL)
    params = {"transformer": model.transformer, "tokenizer": model.tokenizer}
    image, _ = sampler(params, jnp.array([0, 2]), 0, jnp.array([0, 0]))
    assert image.shape == (2, 8, 8, 3) and np.isfinite(np.asarray(image)).all()


@pytest.mark.parametrize(("latent", "scales"), [((6, 3), (1, 2, 4)), ((3, 6), (1, 2, 4)), ((6, 3), (1, 4))])
def test_a_shape_and_a_list_are_sampled_as_they_are_trained(latent, scales):
    """The logits of its tokens are those of teacher forcing, all scales at once; layer by layer as in one program."""
    configs = (config.of_list(scales).of_latent(*latent) for config in (MODEL.transformer_config, TOKENIZER))
    hart, tokenizer = Hart(next(configs)), Tokenizer(next(configs))
    settings, params = (
        dataclasses.replace(ALL, cfg=0.0),
        {"transformer": MODEL.transformer, "tokenizer": MODEL.tokenizer},
    )
    text = np.random.default_rng(0).normal(size=(2, 4, 8)).astype(np.float32)
    condition, noise = (text, np.array([[1, 1, 1, 0], [1, 1, 1, 1]], np.int32)), KeyedNoise.of(3, jnp.array([0, 2]))
    out = jax.jit(lambda *inputs: generate(hart, tokenizer, *inputs, settings))(params, condition, noise)
    assert out.image.shape == (2, 2 * latent[0], 2 * latent[1], 3)
    shapes = hart.config.shapes
    assert len(shapes) == len(scales)
    assert [index.shape[1] for index in out.indices] == [height * width for height, width in shapes]

    @jax.jit
    def taught(params, indices):
        call = functools.partial(tokenizer.apply, {"params": params["tokenizer"]})
        parts = [
            call(call(index, method="lookup"), scale, method="contribution") for scale, index in enumerate(indices)
        ]
        f_hats = [sum(parts[:scale]) for scale in range(1, len(shapes))]
        inputs = [area(f_hat, shape) for f_hat, shape in zip(f_hats, shapes[1:], strict=True)]
        ar_input = jnp.concatenate([each.reshape(2, -1, each.shape[-1]) for each in inputs], axis=1)
        kept = jnp.tile(jnp.arange(hart.config.sizes[-1]), (2, 1))
        return hart.apply({"params": params["transformer"]}, condition, ar_input, kept).logits

    logits = np.concatenate(out.logits, axis=1)
    np.testing.assert_allclose(logits, taught(params, out.indices), atol=2e-4)
    layered = LayerwiseSampling(hart, tokenizer, settings).run(split_layers(params), condition, noise)
    for scale, index in enumerate(layered.indices):
        np.testing.assert_array_equal(index, out.indices[scale])
        np.testing.assert_allclose(layered.logits[scale], out.logits[scale], atol=2e-4)
    np.testing.assert_allclose(layered.image, out.image, atol=1e-4)

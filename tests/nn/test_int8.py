"""Int8 weights: how far they move, that samplers, files and devices take them, and what is refused."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors as flax_errors
from hypothesis import given
from hypothesis import strategies as st

from hart_jax.checkpoints.model_folder import abstract_transformer
from hart_jax.config import MeshConfig, SampleConfig
from hart_jax.errors import UserError
from hart_jax.io.int8_scheme import Int8, quantize_matrix, shared_axes
from hart_jax.io.safetensors import check_tree, load_weights, save_weights
from hart_jax.nn import layers
from hart_jax.nn.int8 import dequantize, quantize
from hart_jax.parallel.mesh import MeshLayout, put_global
from hart_jax.parallel.rules import parameter_axes
from hart_jax.sampling.layerwise import make_layered_sampler, split_layers
from hart_jax.sampling.sampler import make_sampler
from hart_jax.text.encoder import load_text_encoder
from hart_jax.tokenizer.model import Tokenizer
from hart_jax.transformer.model import Hart
from tests.tiny import TOKENIZER, tiny_model, transformer_config
from tests.tiny_qwen2 import CASES, LENGTH, PROMPTS, write_folder

ROOT = Path(__file__).parents[2]
MODEL = tiny_model()
INT8 = quantize(MODEL.transformer)
SETTINGS = SampleConfig(top_k=0, top_k_late=0, cfg=2.0)


def is_int8(leaf) -> bool:
    return isinstance(leaf, Int8)


def by_name(tree) -> dict[str, object]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_int8)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def wanted(batch: int = 2):
    """A condition, a seed, and indices of images."""
    text = np.random.default_rng(0).normal(size=(batch, 4, 8)).astype(np.float32)
    return (text, np.array([[1, 1, 1, 0]] * batch, np.int32)), 0, jnp.arange(batch)


def forward_of(config):
    """Compiled logits of parameters in teacher forcing."""
    condition, _, _ = wanted()
    latent = np.random.default_rng(1).normal(size=(2, config.num_tokens - 1, config.latent_channels))
    kept = np.tile(np.arange(config.patch_nums[-1] ** 2), (2, 1))
    inputs = condition, latent.astype(np.float32), kept
    return jax.jit(lambda params: Hart(config).apply({"params": params}, *inputs).logits)


def sampler_arguments(transformer, make=make_sampler):
    params = {"transformer": transformer, "tokenizer": MODEL.tokenizer}
    return make(Hart(MODEL.transformer_config), Tokenizer(TOKENIZER), SETTINGS), params


def assert_same_images(one, other):
    for a, b in zip(one[1], other[1], strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(one[0], other[0], atol=1e-4)


@given(
    st.sampled_from(
        [
            ("kernel", (5, 7)),
            ("kernel", (2, 5, 7)),
            ("qkv", (2, 5, 3, 2, 4)),
            ("word_embedding", (9, 5)),
            ("phi_kernel", (2, 3, 3, 5, 4)),
        ]
    ),
    st.integers(0, 1000),
    st.floats(1e-6, 1e6),
)
def test_no_weight_moves_by_more_than_half_a_scale(case, seed, size):
    kind, shape = case
    matrix = (size * np.random.default_rng(seed).standard_t(3, size=shape)).astype(np.float32)
    small = quantize_matrix(matrix, kind, kind)
    assert small.values.dtype == np.int8 and small.scales.dtype == np.float32 and small.shape == shape
    assert (np.abs(small.values * small.scales - matrix) <= small.scales * (0.5 + 1e-4)).all()
    # The largest of each channel is exact but for rounding.
    np.testing.assert_array_equal(np.abs(small.values).max(shared_axes(kind, matrix.ndim)), 127)


def test_a_channel_of_zeros_stays_zero():
    small = quantize_matrix(np.zeros((3, 2), np.float32), "kernel", "kernel")
    np.testing.assert_array_equal(small.values * small.scales, np.zeros((3, 2)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("kind", "equation"), [("kernel", "abi,io->abo"), ("qkv", "bqw,wnhk->bqnhk")])
def test_a_product_is_that_of_the_widened_matrix(kind, equation, dtype):
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(2, 3, 64)), dtype)
    matrix = random.normal(size=(64, 6) if kind == "kernel" else (64, 3, 2, 4)).astype(np.float32)
    small = quantize_matrix(matrix, kind, kind)
    y = jax.jit(layers.matmul, static_argnums=0)(equation, x, small)
    expected = np.einsum(equation, np.asarray(x, np.float32), dequantize(small))
    assert y.dtype == dtype
    np.testing.assert_allclose(np.asarray(y, np.float32), expected, atol=2e-5 if dtype == jnp.float32 else 0.15)
    # As far from the floats' as the scales allow: sum |x| * scale / 2.
    bound = np.abs(np.asarray(x, np.float32)).sum(-1).reshape(2, 3, *[1] * (matrix.ndim - 1)) * small.scales[0] / 2
    exact = np.einsum(equation, np.asarray(x, np.float32), matrix)
    assert (np.abs(expected - exact) <= bound + 1e-4).all()


def test_only_matrices_become_int8():
    before, after = by_name(MODEL.transformer), by_name(INT8)
    assert before.keys() == after.keys()
    for name, leaf in after.items():
        if name.rsplit("/", 1)[-1] in ("kernel", "qkv"):
            assert isinstance(leaf, Int8) and leaf.shape == before[name].shape
        else:
            assert leaf is before[name]
    check_tree(INT8, abstract_transformer(MODEL.transformer_config), "int8")


def test_under_jit_and_from_shapes_it_is_the_same():
    compiled = jax.jit(quantize)(MODEL.transformer)
    shapes = jax.eval_shape(quantize, abstract_transformer(MODEL.transformer_config))
    for one, other, shape in zip(*map(jax.tree.leaves, (INT8, compiled, shapes)), strict=True):
        assert one.shape == shape.shape and one.dtype == other.dtype == shape.dtype
    for one, other in zip(*map(jax.tree.leaves, (dequantize(INT8), dequantize(compiled))), strict=True):
        np.testing.assert_allclose(one, other, atol=0.01)


@pytest.mark.parametrize("flags", [{"disable_aln": False}, {"attn_l2_norm": True}])
def test_teacher_forcing_takes_int8(flags):
    model = tiny_model(**flags)
    forward, int8 = forward_of(model.transformer_config), quantize(model.transformer)
    exact, wide, small = (forward(params) for params in (model.transformer, dequantize(int8), int8))
    np.testing.assert_allclose(small, wide, atol=1e-4 * float(jnp.std(wide)))
    assert 0 < jnp.linalg.norm(small - exact) < 0.1 * jnp.linalg.norm(exact)


def test_both_samplers_sample_the_same():
    sample, params = sampler_arguments(INT8)
    stacked = sample(params, *wanted())
    sample, params = sampler_arguments(INT8, make_layered_sampler)
    assert_same_images(sample(split_layers(params), *wanted()), stacked)


def test_the_stack_is_never_wide():
    # A layer at a time, that is a quarter of the int8 stack.
    config = transformer_config(depth=16, width=256)
    params = jax.eval_shape(quantize, abstract_transformer(config))
    memory = forward_of(config).lower(params).compile().memory_analysis()
    size = sum(leaf.size for leaf in jax.tree.leaves(params["layers"]))
    assert size < memory.argument_size_in_bytes < 1.5 * size
    assert memory.temp_size_in_bytes < size


def test_written_and_read_they_are_the_same(tmp_path):
    save_weights(tmp_path / "weights", dequantize(INT8["layers"]["mlp"]), dtype="float32")
    for one, other in zip(
        *map(jax.tree.leaves, (quantize(load_weights(tmp_path / "weights")), INT8["layers"]["mlp"])), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_what_is_wrong_is_one_error():
    with pytest.raises(UserError, match="is int8 already"):
        quantize(INT8)
    with pytest.raises(UserError, match="there is no matrix"):
        quantize({"norm_scale": np.ones(3)})
    with pytest.raises(UserError, match=r"/kernel is \(3, 3, .* no matrix of a Hart"):
        quantize(MODEL.tokenizer)
    bad = np.ones((2, 2), np.float32)
    bad[0, 1] = np.nan
    with pytest.raises(UserError, match="head/kernel has values that are not finite"):
        quantize({"head": {"kernel": bad}})


def test_weights_of_another_model_are_refused():
    other = quantize(tiny_model(width=32).transformer)
    sample, params = sampler_arguments(other)
    with pytest.raises(flax_errors.ScopeParamShapeError):
        sample(params, *wanted())


def logits_of_split() -> None:
    """In a process of its own, with four devices: split over a mesh, the logits are the same."""
    config = MODEL.transformer_config
    condition, _, _ = wanted()
    latent, kept = np.zeros((2, 20, 4), np.float32), np.tile(np.arange(16), (2, 1))
    boxed = jax.eval_shape(Hart(config).init, jax.random.key(0), condition, latent, kept)["params"]
    layout = MeshLayout.of(MeshConfig(data=1, fsdp=2, tensor=2), 2)
    placed = put_global(INT8, layout.state_shardings(INT8, parameter_axes(boxed)))
    up, qkv = placed["layers"]["mlp"]["up"]["kernel"], placed["layers"]["attn"]["qkv"]
    width, inner, heads = config.width, config.mlp_width, config.heads
    pieces = {name: array.sharding.shard_shape(array.shape) for name, array in vars(up).items()}
    assert pieces == {"values": (2, width // 2, inner // 2), "scales": (2, 1, inner // 2)}
    assert qkv.scales.sharding.shard_shape(qkv.scales.shape) == (2, 1, 3, heads // 2, width // heads)
    alone = forward_of(config)(INT8)
    with layout.activate():
        split = forward_of(config)(placed)
    np.testing.assert_allclose(split, alone, atol=1e-4 * float(jnp.std(alone)))


def test_split_over_devices_they_give_the_same():
    flags = "--xla_force_host_platform_device_count=4"
    code = "import tests.nn.test_int8 as test; test.logits_of_split()"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("qwen2"), next(iter(CASES.values())))


def test_a_text_encoder_reads_them_tensor_by_tensor(qwen2):
    exact, small = (load_text_encoder(qwen2, dtype=dtype) for dtype in ("float32", "int8"))
    for one, other in zip(*map(jax.tree.leaves, (quantize(exact.params), small.params)), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=1e-6)
    states, expected = (np.asarray(encoder(PROMPTS, LENGTH).states_BTD) for encoder in (small, exact))
    cosine = (states * expected).sum(-1) / np.linalg.norm(states, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert cosine.min() > 0.995 and (states != expected).any()


def test_a_text_encoder_over_a_mesh_reads_them_in_place(qwen2):
    layout = MeshLayout.of(MeshConfig(), 1)
    params, placed = (load_text_encoder(qwen2, dtype="int8", layout=place).params for place in (None, layout))
    jax.tree.map(np.testing.assert_array_equal, params, placed)
    assert all(isinstance(leaf.sharding, jax.sharding.NamedSharding) for leaf in jax.tree.leaves(placed))

"""The transformer, in every variant of its flags."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hart_jax.config import DiffusionConfig, TransformerConfig
from hart_jax.diffusion.head import DiffusionHead
from hart_jax.transformer.block import KVCache
from hart_jax.transformer.model import Hart

B, V, C, T, D = 2, 12, 4, 5, 6
SIDES = (1, 2, 3)
# Where the logits of a scale end; the first scale's is predicted by the last context position.
ENDS = np.cumsum([side * side for side in SIDES])

VARIANTS: dict[str, dict[str, Any]] = {
    "release": {},
    "own AdaLN, max": {"disable_aln": False, "use_timestep_embed": False},
    "own AdaLN, mean": {"disable_aln": False, "sep_aln_pooling_mode": "avg", "attn_l2_norm": True},
    "shared AdaLN": {"shared_aln": True, "use_context_norm": False},
    "classes": {"disable_aln": False, "num_classes": 3, "context_tokens": 1, "use_timestep_embed": False},
}
every_variant = pytest.mark.parametrize("name", VARIANTS)


class Built(NamedTuple):
    module: Hart
    params: Any
    condition: Any
    ar_input: np.ndarray
    forward: Any


@functools.cache
def build(name: str) -> Built:
    """A small model with random parameters, none of them zero, inputs for it, and the compiled teacher-forcing pass."""
    settings = {"context_tokens": T, **VARIANTS[name]}
    config = TransformerConfig(
        patch_nums=SIDES, vocab_size=V, latent_channels=C, context_dim=D, depth=2, width=16, heads=2,
        diffusion=DiffusionConfig(width=8, depth=1), **settings,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    ar_input = rng.standard_normal((B, ENDS[-1] - 1, C)).astype(np.float32)
    condition: Any = (rng.standard_normal((B, T, D)).astype(np.float32), np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]))
    if config.num_classes:
        condition = np.array([0, 2])
    module = Hart(config)
    shapes = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), condition, ar_input, all_kept())["params"])
    params = jax.tree.map(lambda leaf: 0.2 * rng.standard_normal(leaf.shape).astype(np.float32), shapes)
    forward = functools.partial(jax.jit(module.apply), {"params": params})
    return Built(module, params, condition, ar_input, forward)


def all_kept() -> np.ndarray:
    return np.tile(np.arange(SIDES[-1] ** 2), (B, 1))


def logits(built: Built, *, condition: Any = None, ar_input: np.ndarray | None = None) -> np.ndarray:
    condition = built.condition if condition is None else condition
    return np.asarray(built.forward(condition, built.ar_input if ar_input is None else ar_input, all_kept()).logits)


@every_variant
def test_shapes(name):
    built = build(name)
    out = built.forward(built.condition, built.ar_input, all_kept())
    assert out.logits.shape == (B, ENDS[-1], V) and out.logits.dtype == jnp.float32
    assert out.last_hidden.shape == (B, 9, 16)
    assert np.isfinite(out.logits).all()


@every_variant
def test_a_scale_does_not_see_later_ones(name):
    built = build(name)
    before = logits(built)
    for scale in range(1, len(SIDES)):
        changed = built.ar_input.copy()
        # Inputs lack scale 0's single token.
        changed[:, ENDS[scale - 1] - 1] += 1.0
        after = logits(built, ar_input=changed)
        np.testing.assert_array_equal(after[:, : ENDS[scale - 1]], before[:, : ENDS[scale - 1]])
        # Within the scale, tokens see each other.
        assert (np.abs(after - before)[:, ENDS[scale - 1] :].max(-1) > 0).all()


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "classes"])
def test_padding_is_attended_to(name):
    built = build(name)
    text, mask = built.condition
    assert mask[0, -1] == 0
    changed = text.copy()
    changed[0, -1] += 1.0
    difference = np.abs(logits(built, condition=(changed, mask)) - logits(built))
    assert (difference[0].max(-1) > 0).all()
    np.testing.assert_array_equal(difference[1], 0)


def test_labels_are_told_apart():
    built = build("classes")
    ours, unconditional = logits(built), logits(built, condition=np.array([0, 3]))
    np.testing.assert_array_equal(ours[0], unconditional[0])
    assert np.abs(ours[1] - unconditional[1]).max() > 0


@every_variant
def test_dropped_tokens_change_nothing_before_the_last_scale(name):
    built = build(name)
    kept = np.array([[0, 3, 4, 8], [1, 2, 6, 7]])
    out = built.forward(built.condition, built.ar_input, kept)
    assert out.logits.shape == (B, ENDS[-2] + 4, V) and out.last_hidden.shape == (B, 4, 16)
    np.testing.assert_allclose(out.logits[:, : ENDS[-2]], logits(built)[:, : ENDS[-2]], rtol=1e-4, atol=1e-5)


@every_variant
def test_with_the_cache_scale_by_scale(name):
    """What sampling computes step by step is what training computes at once."""
    built = build(name)
    config = built.module.config

    @jax.jit
    def by_scale(params, condition, ar_input):
        def call(method, *args, **kwargs):
            return built.module.apply({"params": params}, *args, method=method, **kwargs)

        context = call("embed_condition", condition)
        cache = KVCache.empty(config, B, config.context_tokens + config.num_tokens - 1, jnp.float32)
        x, angle = call("context_input", context)
        hidden, cache = call("blocks", x, angle, context.pooled, cache=cache, cache_start=0)
        parts, filled = [call("logits", hidden[:, -1:], context)], config.context_tokens
        for scale in range(1, len(SIDES)):
            latent = ar_input[:, ENDS[scale - 1] - 1 : ENDS[scale] - 1]
            index = jnp.arange(latent.shape[1])[None]
            x, angle = call("scale_input", latent, scale, index, context)
            hidden, cache = call("blocks", x, angle, context.pooled, cache=cache, cache_start=filled)
            filled += x.shape[1]
            parts.append(call("logits", hidden, context))
        return jnp.concatenate(parts, axis=1)

    out = by_scale(built.params, built.condition, built.ar_input)
    np.testing.assert_allclose(out, logits(built), rtol=1e-4, atol=1e-4)


def test_the_loop_over_blocks_hands_on_activations_alone():
    """And collects new keys and values: a cache that it hands on too is copied by a TPU's compiler for every block."""
    built = build("release")
    config = built.module.config
    cache = KVCache.empty(config, B, 8, jnp.float32)

    def blocks(params, x, cos_sin):
        variables = {"params": params}
        return built.module.apply(variables, x, cos_sin, None, cache=cache, cache_start=4, method="blocks")

    x, cos_sin = jnp.zeros((B, 2, config.width)), jnp.zeros((B, 2, 2, config.head_dim))
    traced = jax.make_jaxpr(blocks)(built.params, x, cos_sin)
    [loop] = [each for each in traced.eqns if each.primitive.name == "scan"]
    new = (config.depth, B, 2, config.width)
    assert [each.aval.shape for each in loop.outvars] == [x.shape, new, new]


@every_variant
def test_every_parameter_has_logical_axis_names(name):
    built = build(name)
    variables = jax.eval_shape(built.module.init, jax.random.key(0), built.condition, built.ar_input, all_kept())
    is_boxed = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)  # noqa: E731
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"], is_leaf=is_boxed):
        where = jax.tree_util.keystr(path)
        assert is_boxed(leaf), where
        assert len(leaf.names) == leaf.value.ndim, where
        assert any(leaf.names), where


def test_bfloat16_stays_near():
    built = build("own AdaLN, max")
    half = Hart(built.module.config, jnp.bfloat16)
    out = jax.jit(half.apply)({"params": built.params}, built.condition, built.ar_input, all_kept())
    exact = logits(built)
    assert out.logits.dtype == jnp.float32
    assert np.abs(out.logits - exact).mean() < 0.1 * np.abs(exact).mean()


@pytest.mark.parametrize("how", [{"remat": "dots"}, {"remat": "full"}, {"unroll": True}], ids=str)
def test_how_blocks_are_compiled_changes_no_gradient(how):
    built = build("release")
    inputs = built.condition, built.ar_input, all_kept()

    def loss(module):
        return lambda params: jnp.sum(module.apply({"params": params}, *inputs).logits ** 2)

    plain, saved = (
        jax.jit(jax.grad(loss(module)))(built.params) for module in (built.module, built.module.clone(**how))
    )
    # Most of the diffusion head takes no part, and has no gradient in either.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), plain, saved)


def test_the_residual_head_sees_hidden_state_and_code_normed():
    built, rng = build("release"), np.random.default_rng(1)
    hidden, code = (rng.standard_normal((B, 7, width)).astype(np.float32) for width in (16, C))

    @jax.jit
    def denoise(params, hidden, code, t):
        call = functools.partial(built.module.apply, {"params": params})
        z = call(hidden, code, method="residual_condition")
        return z, call(code[:, 0], t, z[:, 0], method="denoise")

    z, out = denoise(built.params, hidden, code, np.arange(B))
    embed, norm = built.params["word_embed"], built.params["decoder_norm"]
    summed = hidden + code @ embed["kernel"] + embed["bias"]
    expected = summed / np.sqrt(np.mean(summed**2, axis=-1, keepdims=True) + 1e-6) * norm["scale"]
    np.testing.assert_allclose(z, expected, rtol=1e-4, atol=1e-5)
    head = DiffusionHead(built.module.config.diffusion, C)
    embedded = head.apply({"params": built.params["diffusion_head"]}, expected[:, 0], method="embed")
    alone = head.apply({"params": built.params["diffusion_head"]}, code[:, 0], np.arange(B), embedded)
    assert out.shape == (B, 2 * C) and out.dtype == jnp.float32
    np.testing.assert_allclose(out, alone, rtol=1e-3, atol=1e-4)

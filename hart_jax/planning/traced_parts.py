"""Products of each part of sampling: the modules' own methods, traced at their real sizes; nothing is run.

They are of one row of the transformer or one image, where nothing else is said.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from hart_jax.checkpoints.model_folder import abstract_tokenizer, abstract_transformer
from hart_jax.config import Shape, TokenizerConfig, TransformerConfig
from hart_jax.nn.flop_counter import Product, products_of
from hart_jax.text import minilm_model, qwen2
from hart_jax.text.program import EncoderConfig, make_encode
from hart_jax.text.qwen2 import KeyValues, Qwen2Config
from hart_jax.tokenizer.model import Tokenizer
from hart_jax.tokenizer.resize import area
from hart_jax.transformer.attention import attention
from hart_jax.transformer.block import Block
from hart_jax.transformer.model import Context, Hart

# Words and marks of the release's system prompt; a byte-level vocabulary makes one token of most.
SYSTEM_PROMPT_TOKENS = 131
QKV, OUT, MLP, ADALN = "blocks: qkv", "blocks: output projection", "blocks: MLP", "blocks: AdaLN"
ATTENTION = "attention"
# A doubled image convolved 3x3 is four of these convolutions of what was doubled.
QUARTER = (2, 2)

_transformer_weights = functools.cache(abstract_transformer)
tokenizer_weights = functools.cache(abstract_tokenizer)


def hart_weights(config: TransformerConfig) -> Any:
    """Shapes of the parameters, which are the same for a context of any length."""
    return _transformer_weights(dataclasses.replace(config, context_tokens=1))


def macs(products: Iterable[Product]) -> int:
    return int(sum(product.flops for product in products)) // 2


def largest(products: Iterable[Product]) -> int:
    """How many numbers the largest result has."""
    return max((product.size for product in products), default=0)


def size(tree: Any) -> int:
    """How many numbers a tree of shapes has."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def text_weights(config: EncoderConfig) -> Any:
    module = qwen2 if isinstance(config, Qwen2Config) else minilm_model
    return nn.unbox(module.abstract_params(config))


def vocabulary_size(config: EncoderConfig) -> int:
    """Of the table with a row for each token."""
    return config.vocab_size * config.hidden_size


@functools.cache
def text_products(config: EncoderConfig, length: int) -> list[Product]:
    """Of encoding one prompt padded to so many tokens, behind the system prompt where there is one."""
    tokens: Any = _shape(1, length, dtype=jnp.int32)
    prefix = None
    if isinstance(config, Qwen2Config):
        heads = config.num_hidden_layers, 1, SYSTEM_PROMPT_TOKENS, config.num_key_value_heads, config.head_dim
        before: Any = _shape(*heads)
        prefix = KeyValues(before, before)
    encode = make_encode(config, jnp.float32, None)
    return products_of(encode.trace(text_weights(config), tokens, tokens, prefix).jaxpr.jaxpr)


@functools.cache
def input_products(config: TransformerConfig, scale: int, tokens: int, rows: int) -> list[Product]:
    """Of embedding the context (scale 0), or tokens of a later scale, of so many rows: the level's is one for all."""
    embedded, context = _context(config, rows)
    if not scale:
        return embedded + _hart_products(config, "context_input", context)
    hart, index = Hart(config), np.zeros((1, tokens), np.int32)

    def embed(weights: Any, latent: Any, context: Context) -> Any:
        return hart.apply({"params": weights}, latent, scale, index, context, method="scale_input")

    return _products(embed, hart_weights(config), _shape(rows, tokens, config.latent_channels), context)


@functools.cache
def block_products(config: TransformerConfig, tokens: int, keys: int) -> dict[str, list[Product]]:
    """Of one block, by part, for so many tokens that each see so many keys."""
    layer = jax.tree.map(lambda leaf: _shape(*leaf.shape[1:]), hart_weights(config)["layers"])
    block = Block(config, attention="reference")

    def run(weights: Any, x: Any, cos_sin: Any, pooled: Any) -> Any:
        return block.apply({"params": weights}, x, 0, cos_sin, pooled, None)

    x, cos_sin = _shape(1, tokens, config.width), _shape(1, tokens, 2, config.head_dim)
    products = _products(run, layer, x, cos_sin, _context(config, 1)[1].pooled)
    modulation = [products.pop(0)] if config.adaln == "own" else []
    # Attention's own products come between these; here they are of as many keys as queries.
    qkv, *_, out, gate, up, down = products
    parts = {QKV: [qkv], OUT: [out], MLP: [gate, up, down]}
    if config.adaln != "none":
        parts[ADALN] = modulation
    attend = functools.partial(attention, scale=config.attention_scale, implementation="reference")
    queries, seen = (_shape(1, count, config.heads, config.head_dim) for count in (tokens, keys))
    return {**parts, ATTENTION: _products(attend, queries, seen, seen)}


@functools.cache
def logit_products(config: TransformerConfig, tokens: int) -> list[Product]:
    return _hart_products(config, "logits", _shape(1, tokens, config.width), _context(config, 1)[1])


def residual_condition_products(config: TransformerConfig, tokens: int) -> list[Product]:
    x, code = _shape(1, tokens, config.width), _shape(1, tokens, config.latent_channels)
    return _hart_products(config, "residual_condition", x, code)


def embed_residual_condition_products(config: TransformerConfig, tokens: int) -> list[Product]:
    return _hart_products(config, "embed_residual_condition", _shape(tokens, config.width))


@functools.cache
def denoise_products(config: TransformerConfig, tokens: int, times: int) -> list[Product]:
    """Of one step of the diffusion head, which embeds its time so many times."""
    x, z = _shape(tokens, config.latent_channels), _shape(tokens, config.width)
    return _hart_products(config, "denoise", x, _shape(times, dtype=jnp.int32), z)


@functools.cache
def quantizer_products(config: TokenizerConfig, smooth: bool) -> list[Product]:
    """Between scales: phi(bicubic(code)), then area pooling, as products with whole matrices; `smooth` codes are sums
    over the codebook, also of the last scale."""
    tokenizer, channels, last = Tokenizer(config), config.latent_channels, config.shapes[-1]
    products: list[Product] = []
    for scale, following in enumerate(config.shapes[1:]):

        def add(weights: Any, code: Any, f_hat: Any, scale: int = scale, following: Shape = following) -> Any:
            added = tokenizer.apply({"params": weights}, code, scale, method="contribution")
            return area(f_hat + added, following)

        code, f_hat = _shape(1, config.sizes[scale], channels), _shape(1, *last, channels)
        products += _products(add, tokenizer_weights(config), code, f_hat)
    for size in config.sizes if smooth else ():
        products += _products(jnp.matmul, _shape(size, config.vocab_size), _shape(config.vocab_size, channels))
    return products


@functools.cache
def decoder_products(config: TokenizerConfig) -> tuple[list[Product], list[Product]]:
    """Convolutions, and the products of attention."""
    tokenizer = Tokenizer(config)

    def decode(weights: Any, latent: Any) -> Any:
        return tokenizer.apply({"params": weights}, latent, method="decode")

    products = _products(decode, tokenizer_weights(config), _shape(1, *config.shapes[-1], config.latent_channels))
    return [product for product in products if product.window], [product for product in products if not product.window]


def quarters(convs: list[Product]) -> list[Product]:
    return [product for product in convs if product.window == QUARTER]


@functools.cache
def _context(config: TransformerConfig, rows: int) -> tuple[list[Product], Context]:
    """What embedding the condition takes, and the shapes that it gives."""
    condition: Any = _shape(rows, dtype=jnp.int32)
    if not config.num_classes:
        states = _shape(rows, config.context_tokens, config.context_dim)
        condition = states, _shape(rows, config.context_tokens, dtype=jnp.int32)
    embed, weights = _hart_method(config, "embed_condition"), hart_weights(config)
    return _products(embed, weights, condition), jax.eval_shape(embed, weights, condition)


def _hart_method(config: TransformerConfig, name: str) -> Callable[..., Any]:
    """A method of the transformer as a function of parameters and arrays."""
    hart = Hart(config)
    return lambda weights, *arrays: hart.apply({"params": weights}, *arrays, method=name)


def _hart_products(config: TransformerConfig, name: str, *shapes: Any) -> list[Product]:
    return _products(_hart_method(config, name), hart_weights(config), *shapes)


def _products(function: Callable[..., Any], *arguments: Any) -> list[Product]:
    """Of a function of arrays or shapes."""
    return products_of(jax.make_jaxpr(function)(*arguments).jaxpr)


def _shape(*sides: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sides, dtype)

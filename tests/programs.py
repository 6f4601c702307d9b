"""Every whole program that a user can start, made by the functions that commands call, to be lowered anywhere.

Used by tests/test_lowering.py.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from hart_jax.checkpoints.model_folder import abstract_tokenizer, boxed_transformer
from hart_jax.config import (
    HartExperiment,
    SampleConfig,
    Scale,
    Shape,
    TokenizerConfig,
    TokenizerExperiment,
    TransformerConfig,
)
from hart_jax.data.token_cache import TokenMaker
from hart_jax.evaluation.feature_cache import row_program
from hart_jax.evaluation.features import FeatureExtractor
from hart_jax.evaluation.networks import clip, efficientnet, inception
from hart_jax.evaluation.networks.base import FeatureNetwork
from hart_jax.evaluation.reconstruction import columns_of, make_rebuild
from hart_jax.nn.dtypes import cast_weights
from hart_jax.nn.int8 import quantize
from hart_jax.parallel.mesh import MeshLayout
from hart_jax.parallel.program import Program
from hart_jax.parallel.rules import AXES, RULES, parameter_axes
from hart_jax.sampling.rules import HART_RULES, SampleNumbers
from hart_jax.sampling.sampler import make_sampler
from hart_jax.text.minilm_model import MiniLMConfig
from hart_jax.text.program import encode_program, make_key_values
from hart_jax.text.qwen2 import Qwen2Config, no_prefix
from hart_jax.tokenizer.model import Tokenizer
from hart_jax.tokenizer.perceptual import STAGE_WIDTHS
from hart_jax.training.hart_functions import hart_functions
from hart_jax.training.token_subsampling import kept_counts
from hart_jax.training.tokenizer_functions import tokenizer_functions
from hart_jax.transformer.model import Hart

DEVICES = {"tpu": AbstractDevice("TPU v5 lite", None, "tpu"), "cuda": AbstractDevice("NVIDIA H200", None, "gpu")}
# (data, fsdp, tensor): one device, one slice, and two slices, which the axis `data` crosses.
MESHES = {"1 device": (1, 1, 1), "8 devices": (2, 2, 2), "2 slices": (4, 2, 2)}
BATCH = 16
# Narrow, but with heads of 64 and a last scale of more queries than the libraries' kernels ask for.
SIZES = {"patch_nums": (1, 4, 16), "vocab_size": 32, "latent_channels": 4}
TOKENIZER = TokenizerConfig.from_dict(
    {**SIZES, "image_size": 32, "channels": 32, "channel_multipliers": (1, 1), "res_blocks": 1, "share_quant_resi": 2}
)
TRANSFORMER = TransformerConfig.from_dict(
    {
        **SIZES,
        "context_tokens": 96,
        "context_dim": 16,
        "depth": 2,
        "width": 128,
        "heads": 2,
        "diffusion": {"width": 32, "depth": 1, "sampling_steps": 2},
    }
)
# Another list of scales.
OTHER = (1, 8, 16)
SAMPLE = {"top_k": 8, "top_k_late": 8}
# Height and width in pixels of images in a bucket.
BUCKET = (40, 26)
KEPT = kept_counts(256, HartExperiment.from_dict({}).loss)


def layout_on(platform: str, sizes: tuple[int, int, int]) -> MeshLayout:
    mesh = AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, abstract_device=DEVICES[platform])
    return MeshLayout(mesh, RULES)


def at(tree: Any, shardings: Any) -> Any:
    """The shapes of a tree, each at its place; one place for all, or a tree of them."""
    if isinstance(shardings, jax.sharding.NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree, shardings)


class Call(NamedTuple):
    """A program and what it is called with."""

    program: Program
    arguments: tuple[Any, ...]

    def lowered(self, platform: str) -> str:
        return self.program.lower(*self.arguments, platform=platform).as_text()


def experiment(config: TransformerConfig = TRANSFORMER, **train: Any) -> HartExperiment:
    return HartExperiment.from_dict(
        {
            "tokenizer": dataclasses.asdict(TOKENIZER),
            "transformer": dataclasses.asdict(config),
            "train": {"batch_size": BATCH, **train},
            "sample": SAMPLE,
            "loss": {"condition_top_k": 8},
        }
    )


def condition(config: TransformerConfig, rows: int) -> Any:
    shape = jax.ShapeDtypeStruct
    if config.num_classes:
        return shape((rows,), jnp.int32)
    text = shape((rows, config.context_tokens, config.context_dim), jnp.float32)
    return text, shape((rows, config.context_tokens), jnp.int32)


def images(rows: int = BATCH, shape: Shape = TOKENIZER.image_shape) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((rows, *shape, 3), jnp.uint8)


def transformer_init(layout: MeshLayout, dtype: str) -> Call:
    return Call(hart_functions(experiment(dtype=dtype), layout).init, ())


def transformer_from_params(layout: MeshLayout, dtype: str) -> Call:
    program = hart_functions(experiment(dtype=dtype), layout)
    return Call(program.from_params, (at(program.init.shapes().params, program.shardings.params),))


def transformer_step(
    layout: MeshLayout,
    dtype: str,
    num_kept: int,
    accumulate: int,
    remat: str,
    tokens: bool = False,
    shape: Shape = TOKENIZER.image_shape,
    scales: tuple[int, ...] = (),
) -> Call:
    """`tokens`: computed ahead, of a class-conditional model; `shape`: of the images, a bucket's; `scales`: the list
    that is trained on, another one than the tokens are of."""
    config = dataclasses.replace(TRANSFORMER, num_classes=3, context_tokens=1) if tokens else TRANSFORMER
    functions = hart_functions(experiment(config, dtype=dtype, accumulate=accumulate, remat=remat), layout)
    program = functions.at(shape, scales)
    source: Any = images(shape=shape)
    if tokens:
        params = abstract_tokenizer(TOKENIZER)
        encode = functools.partial(program.base.apply, method="tokens")
        source = jax.eval_shape(encode, {"params": params}, jnp.zeros(source.shape))
    key = jax.eval_shape(lambda: jax.random.key(0))
    arguments = (
        at(program.init.shapes(), program.shardings),
        at(abstract_tokenizer(TOKENIZER), layout.replicated),
        at(source, layout.batch),
        at(condition(config, BATCH), layout.batch),
        at(key, layout.replicated),
        num_kept,
    )
    return Call(program.step, arguments)


def sample_grid(layout: MeshLayout, dtype: str, shape: Shape = TOKENIZER.image_shape) -> Call:
    program = hart_functions(experiment(dtype=dtype), layout).at(shape)
    params = {
        "transformer": at(program.init.shapes().ema, program.shardings.ema),
        "tokenizer": at(abstract_tokenizer(TOKENIZER), layout.replicated),
    }
    # One prompt, of which there are as many as parts of a batch.
    rows = layout.batch_shards
    indices = at(jax.ShapeDtypeStruct((rows,), jnp.int32), layout.batch)
    return Call(program.grid, (params, at(condition(TRANSFORMER, rows), layout.batch), 0, indices, 1))


def sampler(
    layout: MeshLayout,
    dtype: str,
    weights: str = "float",
    latent: tuple[int, int] = TRANSFORMER.shapes[-1],
    scales: tuple[Scale, ...] = TRANSFORMER.patch_nums,
    **settings: Any,
) -> Call:
    compute, boxed = jnp.dtype(dtype), boxed_transformer(TRANSFORMER)
    narrow = quantize if weights == "int8" else functools.partial(cast_weights, dtype=compute)
    transformer = jax.eval_shape(narrow, nn.unbox(boxed))
    params = {
        "transformer": at(transformer, layout.state_shardings(transformer, parameter_axes(boxed))),
        "tokenizer": at(abstract_tokenizer(TOKENIZER), layout.replicated),
    }
    config, tokenizer = (each.of_list(scales).of_latent(*latent) for each in (TRANSFORMER, TOKENIZER))
    networks = Hart(config, compute), Tokenizer(tokenizer, compute)
    program = make_sampler(*networks, SampleConfig.from_dict({**SAMPLE, **settings}), layout)
    rows = (jax.ShapeDtypeStruct((BATCH,), kind) for kind in (jnp.uint32, jnp.int32))
    numbers = SampleNumbers.of(SampleConfig.from_dict({**SAMPLE, **settings}), HART_RULES, config)
    return Call(program, (params, *at((condition(TRANSFORMER, BATCH), *rows), layout.batch), numbers))


def tokenizer_experiment(**changes: Any) -> TokenizerExperiment:
    """With discriminator and LPIPS, of two stages, as its last ones are large."""
    loss = {"perceptual": 0.5, "perceptual_layers": 2, "adversarial": 0.1, "restart_below": 0.1}
    train = {"batch_size": BATCH, **changes}
    return TokenizerExperiment.from_dict({"tokenizer": dataclasses.asdict(TOKENIZER), "loss": loss, "train": train})


def tokenizer_init(layout: MeshLayout, dtype: str) -> Call:
    return Call(tokenizer_functions(tokenizer_experiment(dtype=dtype), layout).init, (at(images(), layout.batch), 9))


def tokenizer_from_params(layout: MeshLayout, dtype: str) -> Call:
    program = tokenizer_functions(tokenizer_experiment(dtype=dtype), layout)
    return Call(program.from_params, (at(abstract_tokenizer(TOKENIZER), layout.replicated),))


def tokenizer_step(layout: MeshLayout, dtype: str, accumulate: int, shape: Shape = TOKENIZER.image_shape) -> Call:
    program = tokenizer_functions(tokenizer_experiment(dtype=dtype, accumulate=accumulate), layout).at(shape)
    key = jax.eval_shape(lambda: jax.random.key(0))
    arguments = (
        at(program.abstract_state, program.shardings),
        at(images(shape=shape), layout.batch),
        at(key, layout.replicated),
        at(abstract_lpips(), layout.replicated),
        True,
    )
    return Call(program.step, arguments)


def tokenizer_grid(layout: MeshLayout, dtype: str) -> Call:
    program = tokenizer_functions(tokenizer_experiment(dtype=dtype), layout)
    params = at(abstract_tokenizer(TOKENIZER), layout.replicated)
    return Call(program.reconstruct, (params, at(images(), layout.batch), 12))


def abstract_lpips() -> Any:
    def stage(into: int, widths: tuple[int, ...]) -> Any:
        pairs = itertools.pairwise((into, *widths))
        return tuple((jnp.zeros((3, 3, a, b)), jnp.zeros(b)) for a, b in pairs)

    def params() -> Any:
        into = (3, *(widths[-1] for widths in STAGE_WIDTHS))
        stages = tuple(stage(a, widths) for a, widths in zip(into, STAGE_WIDTHS, strict=False))
        return {"stages": stages, "linear": tuple(jnp.zeros(widths[-1]) for widths in STAGE_WIDTHS)}

    return jax.eval_shape(params)


QWEN2 = Qwen2Config(
    vocab_size=64,
    hidden_size=128,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
)
VISION = clip.VisionConfig(128, 128, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8)
TEXT = clip.TextConfig(128, 128, num_hidden_layers=1, num_attention_heads=2, vocab_size=64, eos_token_id=63)
MINILM = MiniLMConfig(vocab_size=64, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128)


def text_encoder(layout: MeshLayout, dtype: str, config: Any = QWEN2, split: bool = True) -> Call:
    encoding = encode_program(config, layout, BATCH, 32, dtype, prefix_tokens=8, split=split)
    return Call(encoding.encode, encoding.arguments)


def system_prompt(layout: MeshLayout, dtype: str) -> Call:
    weights, tokens, mask, _ = encode_program(QWEN2, layout, BATCH, 32, dtype).arguments
    prefix = at(jax.eval_shape(functools.partial(no_prefix, QWEN2, jnp.dtype(dtype))), layout.replicated)
    return Call(make_key_values(QWEN2, dtype, layout), (weights, tokens, mask, prefix))


def abstract_networks() -> dict[str, tuple[Callable[..., Any], Any]]:
    """The functions and the shapes of the parameters of the feature networks."""
    key, shape = jax.random.key(0), jax.ShapeDtypeStruct((1, 299, 299, 3), jnp.float32)
    see = functools.partial(clip.features, vision=VISION, preprocessing=clip.Preprocessing(32, 32))
    return {
        "inception": (
            functools.partial(inception.features, resize="pytorch-fid"),
            jax.eval_shape(inception.InceptionV3().init, key, shape)["params"],
        ),
        "efficientnet": (
            efficientnet.features,
            jax.eval_shape(efficientnet.EfficientNetLite0().init, key, shape)["params"],
        ),
        "clip": (see, jax.eval_shape(clip.VisionTower(VISION).init, key, jnp.zeros((1, 32, 32, 3)))["params"]),
    }


def extractor_of(name: str) -> FeatureExtractor:
    apply, params = abstract_networks()[name]
    return FeatureExtractor(FeatureNetwork(name, False, "", 0, params, apply), 0, BATCH)


def features(layout: MeshLayout, dtype: str, network: str, blurred: bool = False) -> Call:
    extractor = extractor_of(network)
    program = row_program("features, blurred" if blurred else "features", extractor.function(blurred=blurred), layout)
    return Call(program, (at(extractor.network.params, layout.replicated), at(images(shape=(64, 64)), layout.batch)))


def reconstructions(layout: MeshLayout, dtype: str) -> Call:
    network = extractor_of("clip").network
    params = {"tokenizer": abstract_tokenizer(TOKENIZER), "lpips": abstract_lpips(), "networks": [network.params]}
    program = row_program("reconstructions", functools.partial(columns_of, Tokenizer(TOKENIZER), [network]), layout)
    return Call(program, (at(params, layout.replicated), at(images(), layout.batch)))


def reconstructions_shown(layout: MeshLayout, dtype: str) -> Call:
    floats = jax.ShapeDtypeStruct(images().shape, jnp.float32)
    return Call(make_rebuild(TOKENIZER), (abstract_tokenizer(TOKENIZER), floats))


def tokens_ahead(layout: MeshLayout, dtype: str) -> Call:
    return Call(TokenMaker(TOKENIZER, None).encode, (abstract_tokenizer(TOKENIZER), images()))


def clip_texts(layout: MeshLayout, dtype: str) -> Call:
    ids, ends = jax.ShapeDtypeStruct((4, 8), jnp.int32), jax.ShapeDtypeStruct((4,), jnp.int32)
    params = jax.eval_shape(clip.TextTower(TEXT).init, jax.random.key(0), ids, ends)["params"]
    return Call(clip.embed_texts, (TEXT, params, ids, ends))


# Every program by its name, and the ways to make and to call it: all that lead to other products, layouts or kernels.
PROGRAMS: dict[str, list[Callable[[MeshLayout, str], Call]]] = {
    "transformer init": [transformer_init],
    "transformer from params": [transformer_from_params],
    "transformer step": [
        functools.partial(transformer_step, num_kept=KEPT[0], accumulate=1, remat="none"),
        functools.partial(transformer_step, num_kept=KEPT[1], accumulate=2, remat="dots"),
        functools.partial(transformer_step, num_kept=KEPT[-1], accumulate=1, remat="full", tokens=True),
        functools.partial(transformer_step, num_kept=KEPT[2], accumulate=2, remat="full", shape=BUCKET),
        functools.partial(
            transformer_step, num_kept=KEPT[-1], accumulate=2, remat="dots", tokens=True, shape=BUCKET, scales=OTHER
        ),
    ],
    "sample grid": [sample_grid, functools.partial(sample_grid, shape=BUCKET)],
    "sampler": [
        sampler,
        functools.partial(sampler, weights="int8", top_p=0.9),
        functools.partial(sampler, masked_iterations=2, smooth=True),
        functools.partial(sampler, latent=(20, 13)),
        functools.partial(sampler, latent=(20, 13), scales=OTHER),
    ],
    "tokenizer init": [tokenizer_init],
    "tokenizer from params": [tokenizer_from_params],
    "tokenizer step": [
        functools.partial(tokenizer_step, accumulate=1),
        functools.partial(tokenizer_step, accumulate=2, shape=BUCKET),
    ],
    "tokenizer grid": [tokenizer_grid],
    "text encoder": [
        text_encoder,
        functools.partial(text_encoder, config=MINILM),
        functools.partial(text_encoder, split=False),
    ],
    "system prompt": [system_prompt],
}
# Always float32, and without anything that a mesh or a platform changes: lowered once for each platform.
PLAIN: dict[str, list[Callable[[MeshLayout, str], Call]]] = {
    "features": [functools.partial(features, network=name) for name in ("inception", "efficientnet", "clip")],
    "features, blurred": [functools.partial(features, network="clip", blurred=True)],
    "reconstructions": [reconstructions],
    "reconstructions shown": [reconstructions_shown],
    "tokens ahead": [tokens_ahead],
    "CLIP texts": [clip_texts],
}

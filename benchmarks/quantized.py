"""What int8 weights cost in quality and save in memory: `python benchmarks/quantized.py --model assets/emoji`.

Images are sampled with float and with int8 weights from the same prompts and the same noise. The float ones, encoded
by the tokenizer, are then what both read in teacher forcing. Without trained weights of full width here, a shallow
transformer and a shallow Qwen2 of the released widths stand for them, with random weights; they say what a layer of
that width adds, not what a deep model does with it. Times are medians of the device that this runs on.
"""

import argparse
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from hart_jax.checkpoints.load import load_model
from hart_jax.checkpoints.model_folder import Model, abstract_transformer
from hart_jax.config import SampleConfig, TransformerConfig
from hart_jax.errors import run_cli
from hart_jax.nn.dtypes import compute_dtype
from hart_jax.nn.int8 import quantize
from hart_jax.sampling.layerwise import make_layered_sampler, split_layers
from hart_jax.sampling.sampler import make_sampler
from hart_jax.text.conditioning import conditioner_of
from hart_jax.text.qwen2 import Qwen2, Qwen2Config, no_prefix
from hart_jax.tokenizer.model import Tokenizer
from hart_jax.transformer.model import Hart

THINGS = ("apple", "dog", "car", "house", "tree", "cat face", "rocket", "flower")
PROMPTS = [f"{style} of a {thing}" for style in ("a 3D render", "a flat icon") for thing in THINGS]
WIDE = {
    "patch_nums": (1, 2, 3, 4, 6, 8),
    "vocab_size": 4096,
    "latent_channels": 32,
    "context_tokens": 300,
    "context_dim": 1536,
    "width": 1536,
    "heads": 24,
}
WIDE_QWEN2 = {"vocab_size": 8192, "hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12}


def bytes_of(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def median_seconds(call: Callable[[], Any], repeats: int) -> float:
    jax.block_until_ready(call())
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds))


def memory(params: Any, small: Any) -> list[tuple[str, str]]:
    floats = sum(leaf.size for leaf in jax.tree.leaves(params))
    return [
        ("float32, MB", f"{4 * floats / 1e6:.1f}"),
        ("bfloat16, MB", f"{2 * floats / 1e6:.1f}"),
        ("int8 with scales, MB", f"{bytes_of(small) / 1e6:.1f}"),
    ]


def relative(small: jax.Array, exact: jax.Array) -> str:
    return f"{float(jnp.linalg.norm(small - exact) / jnp.linalg.norm(exact)):.2%}"


def teacher_forced(config: TransformerConfig, params: Any, small: Any, inputs: Any, indices: Any) -> list:
    """Errors of logits (each position's mean does not matter to the softmax, so it is taken off) and tokens."""
    hart = Hart(config, compute_dtype("auto"))
    forward = jax.jit(lambda weights: hart.apply({"params": weights}, *inputs))
    exact, rounded = (forward(jax.device_put(weights)) for weights in (params, small))
    logits, others = (out.logits - out.logits.mean(-1, keepdims=True) for out in (exact, rounded))
    equal = jnp.mean(logits.argmax(-1) == others.argmax(-1))
    rows = [
        ("error of logits, relative", relative(others, logits)),
        ("error of the last block's output, relative", relative(rounded.last_hidden, exact.last_hidden)),
    ]
    if indices is not None:
        rows.append(("equal most likely tokens", f"{float(equal):.1%}"))
        losses = (-jnp.take_along_axis(jax.nn.log_softmax(x), indices[..., None], -1).mean() for x in (logits, others))
        rows.append(("loss of the tokens, float -> int8", " -> ".join(f"{float(loss):.4f}" for loss in losses)))
    return rows


def psnr(one: jax.Array, other: jax.Array) -> np.ndarray:
    """Of images in [-1, 1], in dB; equal ones count as 60."""
    error = np.mean(np.square(np.asarray(one - other)), axis=(1, 2, 3))
    return 10 * np.log10(4 / np.maximum(error, 4e-6))


def of_model(model: Model, repeats: int, sampling: dict[str, Any]) -> Iterator[tuple[str, str]]:
    config, dtype = model.transformer_config, compute_dtype("auto")
    small = quantize(model.transformer)
    yield from memory(model.transformer, small)
    hart, tokenizer = Hart(config, dtype), Tokenizer(model.tokenizer_config, dtype)
    condition = conditioner_of(config, model.text_encoder)(PROMPTS)
    numbers = jnp.arange(len(PROMPTS))

    def timed(make: Callable, lay: Callable, transformer: Any) -> tuple[float, Any]:
        params = jax.device_put(lay({"transformer": transformer, "tokenizer": model.tokenizer}))
        sample = make(hart, tokenizer, SampleConfig(**sampling))
        found = sample(params, condition, 0, numbers)
        return median_seconds(lambda: sample(params, condition, 0, numbers), repeats), found

    for name, make, lay in (
        ("by layers", make_layered_sampler, split_layers),
        ("one program", make_sampler, lambda params: params),
    ):
        (exact_seconds, exact), (seconds, rounded) = (timed(make, lay, each) for each in (model.transformer, small))
        what = f"{name}: seconds for {len(PROMPTS)} images, float -> int8"
        yield what, f"{exact_seconds:.2f} -> {seconds:.2f}"
    images = exact[0]
    equal = np.concatenate([np.ravel(a == b) for a, b in zip(exact[1], rounded[1], strict=True)]).mean()
    low, middle, high = np.quantile(psnr(images, rounded[0]), [0.1, 0.5, 0.9])
    yield f"equal tokens of {len(PROMPTS)} images, same seed", f"{equal:.1%}"
    yield "their PSNR, dB (10 %, median, 90 %)", f"{low:.1f}, {middle:.1f}, {high:.1f}"
    encode = jax.jit(functools.partial(Tokenizer(model.tokenizer_config).apply, method="tokens"))
    tokens = encode({"params": jax.device_put(model.tokenizer)}, images)
    kept = jnp.tile(jnp.arange(config.sizes[-1]), (len(PROMPTS), 1))
    indices = jnp.concatenate([index.reshape(len(PROMPTS), -1) for index in tokens.indices], axis=1)
    yield from teacher_forced(config, model.transformer, small, (condition, tokens.ar_input_BLC, kept), indices)


def of_wide(depth: int, repeats: int) -> list[tuple[str, str]]:
    """A random transformer of the released width; its weights have the sizes that they start training with."""
    config = TransformerConfig.from_dict({**WIDE, "depth": depth, "diffusion": {"depth": 1}})
    random = np.random.default_rng(0)

    def draw(path: tuple[Any, ...], leaf: Any) -> np.ndarray:
        name = path[-1].key
        if "scale" in name:
            return np.ones(leaf.shape, np.float32)
        fan_in = leaf.shape[-4 if name == "qkv" else -2] if name in ("kernel", "qkv") else 2500
        return (random.standard_normal(leaf.shape, np.float32) * fan_in**-0.5).astype(np.float32)

    params = jax.tree_util.tree_map_with_path(draw, abstract_transformer(config))
    small = quantize(params)
    text = random.standard_normal((1, config.context_tokens, config.context_dim), np.float32)
    condition = text, np.ones((1, config.context_tokens), np.int32)
    inputs = random.standard_normal((1, config.num_tokens - 1, config.latent_channels), np.float32)
    kept = np.arange(config.sizes[-1])[None]
    rows = memory(params, small) + teacher_forced(config, params, small, (condition, inputs, kept), None)
    hart = Hart(config, compute_dtype("auto"))
    forward = jax.jit(lambda weights: hart.apply({"params": weights}, condition, inputs, kept).logits)
    times = [median_seconds(functools.partial(forward, jax.device_put(each)), repeats) for each in (params, small)]
    rows.append(
        (f"seconds for {300 + config.num_tokens - 1} tokens, float -> int8", f"{times[0]:.2f} -> {times[1]:.2f}")
    )
    return rows


def of_text(depth: int, repeats: int) -> list[tuple[str, str]]:
    """A random Qwen2 of the released width, with a shorter table."""
    sizes = {**WIDE_QWEN2, "num_hidden_layers": depth, "num_key_value_heads": 2, "rms_norm_eps": 1e-6}
    config = Qwen2Config(**sizes, rope_theta=1e6)
    model, prefix = Qwen2(config), no_prefix(config, jnp.dtype(jnp.float32))
    ids = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (2, 64)))
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), ids, jnp.ones_like(ids), prefix)["params"])
    small = jax.jit(quantize)(params)
    encode = jax.jit(lambda weights: model.apply({"params": weights}, ids, jnp.ones_like(ids), prefix)[0])
    exact, rounded = encode(params), encode(small)
    cosine = jnp.sum(exact * rounded, -1) / jnp.linalg.norm(exact, axis=-1) / jnp.linalg.norm(rounded, axis=-1)
    times = [median_seconds(functools.partial(encode, each), repeats) for each in (params, small)]
    return [
        *memory(params, small),
        ("cosine of states (mean, lowest)", f"{float(cosine.mean()):.5f}, {float(cosine.min()):.5f}"),
        ("error of states, relative", relative(rounded, exact)),
        ("seconds for 128 tokens, float -> int8", f"{times[0]:.2f} -> {times[1]:.2f}"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="assets/emoji")
    parser.add_argument("--cfg", type=float, default=3.0)
    parser.add_argument("--top_k", type=int, default=5)
    parser.add_argument("--temperature", type=float, default=0.5)
    parser.add_argument("--depth", type=int, default=2, help="of the random transformer and Qwen2")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    sampling = {
        "cfg": arguments.cfg,
        "top_k": arguments.top_k,
        "top_k_late": arguments.top_k,
        "temperature": arguments.temperature,
    }
    parts = {
        arguments.model: lambda: of_model(load_model(arguments.model), arguments.repeats, sampling),
        f"random transformer, {arguments.depth} blocks of width 1536": lambda: of_wide(
            arguments.depth, arguments.repeats
        ),
        f"random Qwen2, {arguments.depth} blocks of width 1536": lambda: of_text(arguments.depth, arguments.repeats),
    }
    print(f"{jax.devices()[0].device_kind}, {compute_dtype('auto')}")
    for name, measure in parts.items():
        print(f"\n| {name} | |\n|---|---|")
        for what, value in measure():
            print(f"| {what} | {value} |", flush=True)


if __name__ == "__main__":
    run_cli(main)

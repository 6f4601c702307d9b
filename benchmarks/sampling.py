"""Sampling speed against what the machine can do: `python benchmarks/sampling.py --model assets/emoji`.

The limit is the rate of a large matrix product, measured in the same run, alternating with the sampler. The FLOPs are
those of the matrix products that must be done (attention's own not counted) and, for the decoder, the compiler's
count. Times are medians.
"""

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hart_jax.errors import run_cli
from hart_jax.experiment import SampleConfig
from hart_jax.generate import make_sampler
from hart_jax.model_folder import Model
from hart_jax.sampling import load_model
from hart_jax.tokenizer.model import Tokenizer
from hart_jax.training.state import compute_dtype
from hart_jax.transformer.model import Hart

MATRIX = 2048


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def size(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def flops_per_image(model: Model) -> float:
    """Two per parameter and token, for both halves of the guidance; the head also for every diffusion step."""
    config, params = model.transformer_config, model.transformer
    layers = size(params["layers"]) * (config.context_tokens + config.num_tokens - 1)
    head = size(params["head"]) * config.num_tokens
    residual = size(params["diffusion_head"]) * config.patch_nums[-1] ** 2 * config.diffusion.sampling_steps
    latent = jnp.zeros((1, config.patch_nums[-1], config.patch_nums[-1], config.latent_channels))
    decode = jax.jit(functools.partial(Tokenizer(model.tokenizer_config).apply, method="decode"))
    decoder = decode.lower({"params": model.tokenizer}, latent).compile().cost_analysis()["flops"]
    return 4 * (layers + head + residual) + decoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="assets/emoji")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    model, dtype = load_model(arguments.model), compute_dtype("auto")
    config = model.transformer_config
    hart, tokenizer = Hart(config, dtype), Tokenizer(model.tokenizer_config, dtype)
    sampler = make_sampler(hart, tokenizer, SampleConfig(top_k=0, top_k_late=0))
    params = jax.device_put({"transformer": model.transformer, "tokenizer": model.tokenizer})
    matrix = jnp.ones((MATRIX, MATRIX), dtype)
    product = jax.jit(lambda a: a @ a)
    device = jax.devices()[0]
    print(f"{device.device_kind}, {model.tokenizer_config.image_size} px, {dtype}")
    print("| batch | s/batch | images/s | GFLOP/image | GFLOP/s | matrix product GFLOP/s | of it |")
    print("|---|---|---|---|---|---|---|")
    for batch in arguments.batch_sizes:
        text = jnp.zeros((batch, config.context_tokens, config.context_dim))
        mask = jnp.ones((batch, config.context_tokens), jnp.int32)
        indices = jnp.arange(batch)
        flops = batch * flops_per_image(model)
        draw = functools.partial(sampler, params, (text, mask), 0, indices)
        multiply = functools.partial(product, matrix)
        seconds(draw), seconds(multiply)
        times = np.median([(seconds(draw), seconds(multiply)) for _ in range(arguments.repeats)], axis=0)
        rate, limit = flops / times[0] / 1e9, 2 * MATRIX**3 / times[1] / 1e9
        row = f"{batch} | {times[0]:.3f} | {batch / times[0]:.1f} | {flops / batch / 1e9:.2f}"
        print(f"| {row} | {rate:.0f} | {limit:.0f} | {rate / limit:.0%} |", flush=True)


if __name__ == "__main__":
    run_cli(main)

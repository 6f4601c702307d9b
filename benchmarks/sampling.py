"""Sampling speed, whole and by part and scale, against what the machine can do:

    python benchmarks/sampling.py --model assets/emoji --batch_sizes 1 4 16
    python benchmarks/sampling.py --config configs/hart_0p7b_256.py --parts

With --config the weights are random, for times do not depend on them; prompts' states are random and already there.
The limit is the rate of a large matrix product, measured in the same run, alternating with the sampler (with --torch,
PyTorch's as well). FLOPs are those of `hart_jax.planning.cost_model` less what the sampler saves of them. --parts runs
layer by layer, as a CPU samples from large models, and waits after every stage.
"""

import argparse
import functools
import resource
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hart_jax.checkpoints.load import load_model
from hart_jax.checkpoints.model_folder import Model, abstract_tokenizer, abstract_transformer
from hart_jax.config import DTYPES, HartExperiment, read_experiment
from hart_jax.errors import UserError, run_cli
from hart_jax.nn.dtypes import cast_weights, compute_dtype
from hart_jax.planning import cost_model
from hart_jax.sampling.layerwise import make_layered_sampler, split_layers
from hart_jax.sampling.pipeline import samples_by_layers
from hart_jax.sampling.sampler import make_sampler
from hart_jax.tokenizer.model import Tokenizer
from hart_jax.transformer.model import Hart

MATRIX = 2048
BLOCKS = (cost_model.QKV, cost_model.OUT, cost_model.MLP, cost_model.ADALN, cost_model.ATTENTION)


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def random_model(experiment: HartExperiment) -> Model:
    """The experiment's model with random weights, of a size that keeps activations finite."""
    generator = np.random.default_rng(0)

    def fill(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        values = generator.standard_normal(leaf.shape, np.float32)
        values *= np.float32(leaf.shape[-2] ** -0.5 if len(leaf.shape) > 1 else 0.02)
        return values

    tokenizer, transformer = abstract_tokenizer(experiment.tokenizer), abstract_transformer(experiment.transformer)
    parts = (jax.tree.map(fill, tree) for tree in (tokenizer, transformer))
    return Model(experiment.tokenizer, next(parts), experiment.transformer, next(parts), text_encoder=None)


def product_rates(dtype: jnp.dtype, torch: bool) -> dict[str, Callable[[], float]]:
    """Functions that measure GFLOP/s of a matrix product once, by whose it is; PyTorch's is float32."""
    matrix = jnp.ones((MATRIX, MATRIX), dtype)
    multiply = jax.jit(functools.partial(jnp.matmul, preferred_element_type=jnp.float32))
    calls: dict[str, Callable[[], object]] = {"JAX's": lambda: multiply(matrix, matrix)}
    if torch:
        import torch as pytorch

        theirs = pytorch.ones((MATRIX, MATRIX))
        calls["PyTorch's"] = lambda: pytorch.mm(theirs, theirs) is None
    for call in calls.values():
        seconds(call)
    return {name: lambda call=call: 2 * MATRIX**3 / seconds(call) / 1e9 for name, call in calls.items()}


def flops_by_step(experiment: HartExperiment, batch: int) -> dict[str, float]:
    """FLOPs of every pass of the blocks, of the rest of the last scale, and of the decoder; less what is saved."""
    saved = {name: 2 * macs for name, macs in cost_model.savings(experiment, batch).items()}
    flops: dict[str, float] = defaultdict(float)
    for one in cost_model.sampling_costs(experiment, batch):
        named = one.part in BLOCKS or one.step == cost_model.DECODER
        step = one.step if named else "choosing, residual and between scales"
        flops[step] += 2 * one.macs
    for name, amount in saved.items():
        if name.startswith("the unconditional context"):
            flops[cost_model.CONTEXT] -= amount
        elif "diffusion head" in name:
            flops["choosing, residual and between scales"] -= amount
        elif name.startswith("upsampling"):
            flops[cost_model.DECODER] -= amount
    return flops


def step_of(name: str, static: dict[str, Any], experiment: HartExperiment) -> str:
    """To which of these steps a stage of the sampler belongs."""
    if name == "decode":
        return cost_model.DECODER
    if name != "block":
        return "choosing, residual and between scales"
    filled, config = 0, experiment.transformer
    for one in cost_model.passes(config, experiment.sample.masked_iterations):
        if filled == static["start"]:
            return one.step
        filled += one.tokens
    raise AssertionError(static)


def report_parts(
    experiment: HartExperiment, batch: int, sample: Callable[[], object], spent: dict[str, float], limit: float
) -> None:
    seconds(sample)
    spent.clear()
    total = seconds(sample)
    print(f"batch {batch}\n| step | s | GFLOP | GFLOP/s | of the matrix product |\n|---|---|---|---|---|")
    for step, flops in flops_by_step(experiment, batch).items():
        rate = flops / spent[step] / 1e9
        print(f"| {step} | {spent[step]:.2f} | {flops / 1e9:.4g} | {rate:.0f} | {rate / limit:.0%} |")
    print(f"| between stages | {total - sum(spent.values()):.2f} | | | |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="A model folder, a workdir, or the released layout.")
    parser.add_argument("--config", help="Samples with random weights of this experiment's sizes.")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--parts", action="store_true", help="Time by part and scale.")
    parser.add_argument("--dtype", choices=DTYPES, default="auto")
    parser.add_argument("--torch", action="store_true", help="PyTorch's matrix product beside JAX's.")
    arguments = parser.parse_args()
    if bool(arguments.model) == bool(arguments.config):
        raise UserError("give either --model or --config")
    if arguments.config:
        experiment = read_experiment(arguments.config)
        if not isinstance(experiment, HartExperiment):
            raise UserError(f"--config={arguments.config}: this config trains a tokenizer; give one with a transformer")
        model = random_model(experiment)
    else:
        model = load_model(arguments.model)
        experiment = HartExperiment(tokenizer=model.tokenizer_config, transformer=model.transformer_config)
    config, spent = model.transformer_config, defaultdict[str, float](float)
    dtype = compute_dtype(arguments.dtype)

    def watch(name: str, static: dict[str, Any], taken: float) -> None:
        spent[step_of(name, static, experiment)] += taken

    parts = Hart(config, dtype), Tokenizer(model.tokenizer_config, dtype), experiment.sample
    params = {"transformer": cast_weights(model.transformer, dtype), "tokenizer": model.tokenizer}
    layered = arguments.parts or samples_by_layers(model)
    if layered:
        sampler = make_layered_sampler(*parts, watch if arguments.parts else None)
    else:
        sampler = make_sampler(*parts)
    params = jax.device_put(split_layers(params) if layered else params)
    del model
    rates = product_rates(dtype, arguments.torch)
    print(f"{jax.devices()[0].device_kind}, {experiment.tokenizer.image_size} px, {np.dtype(dtype)}")

    def sampling_of(batch: int) -> Callable[[], object]:
        text = jax.random.normal(jax.random.key(0), (batch, config.context_tokens, config.context_dim))
        mask = jnp.ones((batch, config.context_tokens), jnp.int32)
        condition = jnp.zeros(batch, jnp.int32) if config.num_classes else (text, mask)
        return functools.partial(sampler, params, condition, 0, jnp.arange(batch))

    if arguments.parts:
        for batch in arguments.batch_sizes:
            report_parts(experiment, batch, sampling_of(batch), spent, rates["JAX's"]())
    else:
        columns = ["batch", "s/batch", "images/s", "GFLOP/image", "GFLOP/s"]
        columns += [f"{name} matrix product, GFLOP/s | of it" for name in rates]
        print(f"| {' | '.join(columns)} |\n{'|---' * (5 + 2 * len(rates))}|")
        for batch in arguments.batch_sizes:
            sample, flops = sampling_of(batch), sum(flops_by_step(experiment, batch).values()) / 1e9
            seconds(sample)
            runs = [(seconds(sample), *(rate() for rate in rates.values())) for _ in range(arguments.repeats)]
            taken, *limits = np.median(runs, axis=0)
            row = f"{batch} | {taken:.3f} | {batch / taken:.2f} | {flops / batch:.4g} | {flops / taken:.0f}"
            shares = " | ".join(f"{limit:.0f} | {flops / taken / limit:.0%}" for limit in limits)
            print(f"| {row} | {shares} |", flush=True)
    print(f"most memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")


if __name__ == "__main__":
    run_cli(main)

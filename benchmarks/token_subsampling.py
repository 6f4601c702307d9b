"""What token subsampling saves: `python benchmarks/token_subsampling.py --topology v5e:16x16` or `... --cpu`.

A step keeps some of the last scale's tokens, one of a few counts drawn from the truncated normal. Compared are a step
that keeps all of them and the mean over the counts, each weighted by how often it is drawn; memory is the largest
count's. With --topology the real 0.7B step is compiled for a pod and its time is the planner's lower bound. With --cpu
a shallow model runs here with the real numbers of tokens, all counts alternating, and times are medians.
The paper: steps 1.4 times as fast at 512 px and 1.9 times at 1024 px, 1.1 times less memory.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hart_jax.checkpoints.model_folder import abstract_tokenizer
from hart_jax.config import (
    HartExperiment,
    HartLossConfig,
    OptimizerConfig,
    TokenizerConfig,
    TransformerConfig,
    read_experiment,
)
from hart_jax.errors import UserError, run_cli
from hart_jax.nn.flop_counter import flops_of
from hart_jax.planning.plan import plan
from hart_jax.tokenizer.model import Tokenizer
from hart_jax.tokenizer.quantizer import Tokens
from hart_jax.training.hart_step import make_hart_step
from hart_jax.training.state import make_optimizer, new_state
from hart_jax.training.token_subsampling import bucket_probabilities
from hart_jax.transformer.model import Hart

PAPER = {512: 1.4, 1024: 1.9}


class Cost(NamedTuple):
    """Of a step: TFLOP (of one chip), seconds, and bytes."""

    tflop: float
    seconds: float
    memory: float


def experiment_of(size: int) -> HartExperiment:
    experiment = read_experiment(f"configs/hart_0p7b_{size}.py")
    assert isinstance(experiment, HartExperiment)
    return experiment


def planned(size: int, counts: list[int], topology: str, batch_size: int) -> dict[int, Cost]:
    """Costs of the real step, by the number of tokens that it keeps."""
    experiment = experiment_of(size)
    train = dataclasses.replace(experiment.train, batch_size=batch_size)
    costs = {}
    for count in counts:
        found = plan(dataclasses.replace(experiment, train=train), topology, num_kept=count)
        costs[count] = Cost(found.flops / found.chips / 1e12, found.step_seconds, found.peak)
    return costs


def shallow(config: TransformerConfig, depth: int, width: int) -> TransformerConfig:
    diffusion = dataclasses.replace(config.diffusion, width=width, depth=1)
    return dataclasses.replace(
        config, depth=depth, width=width, heads=max(1, width // 64), context_dim=width, diffusion=diffusion
    )


def measured(size: int, counts: list[int], depth: int, width: int, repeats: int) -> dict[int, Cost]:
    """Costs of a shallow model's step on one image here; its tokens are given, so that no tokenizer runs."""
    experiment = experiment_of(size)
    config, loss = shallow(experiment.transformer, depth, width), experiment.loss
    hart, tokenizer = Hart(config, remat="full"), Tokenizer(experiment.tokenizer)
    optimizer = make_optimizer(OptimizerConfig(), 1000)
    params = initial(hart)
    codebook = jnp.ones(abstract_tokenizer(experiment.tokenizer)["quantizer"]["codebook"].shape)
    step = make_hart_step(hart, tokenizer, optimizer, loss, 0.99)
    arguments = {"quantizer": {"codebook": codebook}}, tokens_of(experiment.tokenizer), condition(config)
    state = new_state(params, optimizer)
    compiled, flops, costs = {}, {}, {}
    for count in counts:
        traced = step.trace(state, *arguments, jax.random.key(0), count)
        compiled[count], flops[count] = traced.lower().compile(), flops_of(traced.jaxpr.jaxpr)
    times: dict[int, list[float]] = {count: [] for count in counts}
    for repeat in range(repeats + 1):
        for count in counts:
            start = time.perf_counter()
            state, _ = jax.block_until_ready(compiled[count](state, *arguments, jax.random.key(repeat)))
            times[count].append(time.perf_counter() - start)
            tflop = flops[count] / 1e12
            temporaries = compiled[count].memory_analysis().temp_size_in_bytes
            costs[count] = Cost(tflop, float(np.median(times[count][1:] or times[count])), temporaries)
    return costs


def initial(hart: Hart):
    """Parameters of a shallow model, zero in none of its parts."""
    config = hart.config
    latent = jnp.zeros((1, config.num_tokens - 1, config.latent_channels))
    kept = jnp.arange(config.sizes[-1])[None]
    shapes = jax.eval_shape(hart.init, jax.random.key(0), condition(config), latent, kept)
    random = np.random.default_rng(0)
    fill: Callable = lambda leaf: jnp.asarray(0.02 * random.standard_normal(leaf.shape), jnp.float32)  # noqa: E731
    import flax.linen as nn

    return jax.tree.map(fill, nn.unbox(shapes)["params"])


def condition(config: TransformerConfig) -> tuple[jax.Array, jax.Array]:
    shape = (1, config.context_tokens)
    return jnp.ones((*shape, config.context_dim)), jnp.ones(shape, jnp.int32)


def tokens_of(config: TokenizerConfig) -> Tokens:
    random = np.random.default_rng(0)
    indices = tuple(jnp.asarray(random.integers(0, config.vocab_size, (1, size)), jnp.int32) for size in config.sizes)
    inputs = jnp.asarray(random.standard_normal((1, config.num_tokens - 1, config.latent_channels)), jnp.float32)
    return Tokens(indices, jnp.zeros((1, config.sizes[-1], config.latent_channels)), inputs)


def report(size: int, shares: dict[int, float], costs: dict[int, Cost]) -> None:
    everything = max(costs)
    mean = Cost(*(sum(share * costs[count][at] for count, share in shares.items()) for at in range(3)))
    for count in sorted(costs):
        share = f"{shares.get(count, 0):.0%} of steps" if count in shares else "all"
        cost = costs[count]
        print(f"| {size} | {count} ({share}) | {cost.tflop:.2f} | {cost.seconds:.3f} | {cost.memory / 2**30:.2f} |")
    whole, largest = costs[everything], max(costs[count].memory for count in shares)
    print(
        f"{size} px: subsampling takes {whole.tflop / mean.tflop:.2f} times less FLOPs, is "
        f"{whole.seconds / mean.seconds:.2f} times as fast (paper: {PAPER[size]}), and needs "
        f"{whole.memory / largest:.2f} times less memory (paper: 1.1)",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--topology", help="Compiles for it: v5e:16x16.")
    where.add_argument("--cpu", action="store_true", help="Runs a shallow model here.")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(PAPER), choices=PAPER)
    parser.add_argument("--batch_size", type=int, default=512, help="Global batch with --topology.")
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.width % 64:
        raise UserError(f"--width={arguments.width}: must be a multiple of 64, the heads' width")
    print("| px | last-scale tokens kept | TFLOP | s/step | GiB |\n|---|---|---|---|---|")
    for size in arguments.sizes:
        positions = experiment_of(size).transformer.sizes[-1]
        shares = bucket_probabilities(positions, HartLossConfig())
        counts = [*shares, positions]
        if arguments.cpu:
            costs = measured(size, counts, arguments.depth, arguments.width, arguments.repeats)
        else:
            costs = planned(size, counts, arguments.topology, arguments.batch_size)
        report(size, shares, costs)


if __name__ == "__main__":
    run_cli(main)

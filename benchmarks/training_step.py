"""How long a training step of an experiment takes on one device, what of its peak that is, and the memory:

    python benchmarks/training_step.py --config configs/hart_0p7b_256.py --batch_size 32

Weights are as training starts, images and text embeddings are random and already there: neither changes times. The
step is the one that `train.py` runs, with remat and the rest as the config says, keeping the largest number of tokens
of the last scale that the run would; the text encoder, which the data of a run may bring, is not in it. FLOPs are the
step's own (`hart_jax.nn.flop_counter.StepFlops`), GiB the most memory so far; "ready" is when the step is compiled.
Prints a row as soon as it is known.
"""

import argparse
import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np

from hart_jax.checkpoints.model_folder import abstract_tokenizer
from hart_jax.config import DTYPES, HartExperiment, MeshConfig, read_experiment
from hart_jax.errors import UserError, run_cli
from hart_jax.nn.flop_counter import peak_flops
from hart_jax.parallel.mesh import MeshLayout, make_mesh
from hart_jax.parallel.rules import with_changes
from hart_jax.training.hart_functions import hart_functions
from hart_jax.training.token_subsampling import kept_counts


def one_device(experiment: HartExperiment, batch: int) -> MeshLayout:
    """The whole model on the first device; `UserError` where the batch cannot be split as the config says."""
    mesh = make_mesh(MeshConfig(), batch, jax.devices()[:1], experiment.train.accumulate)
    return MeshLayout(mesh, with_changes(()))


def report(experiment: HartExperiment, batch: int, steps: int) -> None:
    """Compiles and runs `steps` steps after a first one, and prints their median time."""
    began = time.perf_counter()
    layout, config = one_device(experiment, batch), experiment.transformer
    program = hart_functions(experiment, layout)
    state = program.init()
    generator = np.random.default_rng(0)
    # Of a size that keeps activations finite.
    tokenizer = jax.tree.map(
        lambda leaf: jnp.asarray(generator.standard_normal(leaf.shape, np.float32) * 0.02),
        abstract_tokenizer(experiment.tokenizer),
    )
    side, length = experiment.tokenizer.image_size, config.context_tokens
    image = jnp.asarray(generator.integers(0, 256, (batch, side, side, 3), np.uint8))
    text = jnp.asarray(generator.standard_normal((batch, length, config.context_dim), np.float32))
    condition = jnp.zeros(batch, jnp.int32) if config.num_classes else (text, jnp.ones((batch, length), jnp.int32))
    num_kept = kept_counts(config.sizes[-1], experiment.loss)[-1]
    data = jax.device_put((tokenizer, image, condition), layout.replicated)
    arguments, key = (state, *data), jax.random.key(0)
    with layout.activate():
        traced = program.step.trace(*arguments, key, num_kept)
        flops = program.flops(traced, (*arguments, key), num_kept)
        run = traced.lower().compile()
    compiled, spent = time.perf_counter() - began, []
    for _ in range(steps + 1):
        start = time.perf_counter()
        state, metrics = run(state, *data, key)
        jax.block_until_ready((state, metrics))
        spent.append(time.perf_counter() - start)
    # The first one warms up.
    seconds, device = float(np.median(spent[1:])), jax.devices()[0]
    peak, memory = peak_flops(device.device_kind), device.memory_stats() or {}
    shares = []
    for amount in (flops.model, flops.hardware):
        shares.append(f"{amount / 1e12:.4g} | " + (f"{amount / seconds / peak:.1%}" if peak else "peak not known"))
    most = memory.get("peak_bytes_in_use")
    cells = [str(side), str(batch), str(num_kept), f"{compiled:.1f}", f"{seconds:.4f}", f"{batch / seconds:.2f}"]
    cells += [*shares, "not reported" if most is None else f"{most / 2**30:.1f}", f"{metrics['loss']:.3f}"]
    print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="An experiment with a transformer.")
    parser.add_argument("--batch_size", type=int, nargs="+", default=[8], help="One or several, tried in order.")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--dtype", choices=DTYPES, default="auto")
    parser.add_argument("--attention", default="auto", help="As train.attention.")
    arguments = parser.parse_args()
    experiment = read_experiment(arguments.config)
    if not isinstance(experiment, HartExperiment):
        raise UserError(f"--config={arguments.config}: this config trains a tokenizer; give one with a transformer")
    if arguments.steps < 1 or min(arguments.batch_size) < 1:
        raise UserError("--steps and --batch_size: must be 1 or more")
    device = jax.devices()[0]
    peak = peak_flops(device.device_kind)
    print(f"{device.device_kind}, JAX {jax.__version__}, peak {f'{peak / 1e12:.0f} TFLOP/s' if peak else 'not known'}")
    columns = ["px", "batch", "kept", "ready after s", "step s", "images/s"]
    columns += ["model TFLOP", "mfu", "device TFLOP", "hfu", "GiB", "loss"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for batch in arguments.batch_size:
        train = dataclasses.replace(
            experiment.train, batch_size=batch, dtype=arguments.dtype, attention=arguments.attention
        )
        try:
            report(dataclasses.replace(experiment, train=train), batch, arguments.steps)
        except jax.errors.JaxRuntimeError as error:
            # A batch that does not fit says nothing about the others.
            print(f"| {experiment.tokenizer.image_size} | {batch} | FAILED: {str(error).splitlines()[0][:200]} |")


if __name__ == "__main__":
    run_cli(main)

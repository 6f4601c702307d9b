"""What XLA makes of one transformer block: every kernel beside the products, and the memory that it moves.

    python benchmarks/block_compiled.py --topology h200:1
    python benchmarks/block_compiled.py --topology v5e:1x1 --config configs/hart_0p7b_512.py

Compiles forward and gradient of a block for a chip that need not be here (`pip install -e ".[gpu]"` or `".[tpu]"`). The
roofline of a kernel is what it moves over the memory's rate; that of products and attention, their FLOPs over the
chip's. Pieces that could be fused would show as kernels that read what the one before wrote.
"""

import argparse
import re
from typing import Any

from hart_jax.config import HartExperiment, TransformerConfig, read_experiment
from hart_jax.errors import UserError, run_cli
from hart_jax.parallel.chips import Chip
from hart_jax.planning.hlo import Kernel, kernels_of


def block_programs(
    config: TransformerConfig, topology: str, batch: int
) -> tuple[dict[str, str], Chip, dict[str, float]]:
    """Texts of the compiled "forward", "forward and backward"; the chip; FLOPs forward of "products", "attention"."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    from hart_jax.planning.topology import read_topology
    from hart_jax.transformer.block import Block
    from hart_jax.transformer.mask import scale_causal_segments

    found = read_topology(topology)
    devices, chip = found.devices, found.chip
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=devices[:1])
    segments = scale_causal_segments(config.context_tokens, config.sizes[1:])
    length = segments[-1][1]
    block = Block(config, segments, dtype=jnp.bfloat16, attention="gpu" if topology.startswith("h") else "tpu")
    x = jax.ShapeDtypeStruct((batch, length, config.width), jnp.bfloat16)
    cos_sin = jax.ShapeDtypeStruct((batch, length, 2, config.head_dim), jnp.float32)
    pooled = None if config.adaln == "none" else jax.ShapeDtypeStruct((batch, config.width), jnp.bfloat16)
    inputs = (x, cos_sin, pooled)

    def init() -> Any:
        x, cos_sin, pooled = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), inputs)
        return nn.unbox(block.init(jax.random.key(0), x, 0, cos_sin, pooled, None)["params"])

    def forward(params: Any, x: Any, cos_sin: Any, pooled: Any) -> Any:
        out, _ = block.apply({"params": params}, x, 0, cos_sin, pooled, None)
        return out

    def both(params: Any, x: Any, cos_sin: Any, pooled: Any, out_gradient: Any) -> Any:
        out, pull = jax.vjp(lambda params, x: forward(params, x, cos_sin, pooled), params, x)
        return out, pull(out_gradient)

    place = NamedSharding(mesh, PartitionSpec())

    def at(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree)

    params = at(jax.eval_shape(init))
    with jax.set_mesh(mesh):
        programs = {
            "forward": jax.jit(forward).lower(params, *at(inputs)),
            "forward and backward": jax.jit(both).lower(params, *at(inputs), at(x)),
        }
        texts = {name: program.compile().as_text() for name, program in programs.items()}
    matrices = config.width * (4 * config.width + 3 * config.mlp_width)
    pairs = sum(size * end for size, end in segments)
    return texts, chip, {"products": 2.0 * batch * length * matrices, "attention": 4.0 * batch * pairs * config.width}


def kind_of(kernel: Kernel) -> str:
    """ "product", "attention", or what else it does, in the names of the traced operations."""
    names = " ".join(kernel.traced)
    if "attention" in names and kernel.call:
        return "attention"
    if kernel.call or (kernel.products and "blhk,kj->blhj" not in names):
        return "product"
    short = [re.split(r"/", name)[-1].split(":")[0] for name in kernel.traced]
    return ", ".join(dict.fromkeys(short)) or "copy"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="h200:1", help="One chip: h200:1, v5e:1x1, v6e:1x1.")
    parser.add_argument("--config", default="configs/hart_0p7b_1024.py")
    parser.add_argument("--batch", type=int, default=4)
    arguments = parser.parse_args()
    experiment = read_experiment(arguments.config)
    if not isinstance(experiment, HartExperiment):
        raise UserError(f"--config={arguments.config}: this config trains a tokenizer; give one with a transformer")
    texts, chip, flops = block_programs(experiment.transformer, arguments.topology, arguments.batch)
    for name, text in texts.items():
        factor = {"products": 1.0, "attention": 1.0} if name == "forward" else {"products": 3.0, "attention": 3.5}
        rooflines = {part: 1e3 * factor[part] * flops[part] / chip.flops for part in flops}
        kernels = [(kind_of(kernel), kernel) for kernel in kernels_of(text)]
        print(
            f"\n{arguments.topology}, batch {arguments.batch}, {name}: floors of "
            + ", ".join(f"{part} {roofline:.3f} ms" for part, roofline in rooflines.items())
        )
        print("| kernel | MB moved | roofline, ms | of all | does |\n|---|---|---|---|---|")
        rest = [(kind, kernel, 1e3 * kernel.runs * kernel.bytes / chip.bandwidth) for kind, kernel in kernels]
        rest = [entry for entry in rest if entry[0] not in ("product", "attention")]
        all_of_it = sum(rooflines.values()) + sum(roofline for *_, roofline in rest)
        for kind, kernel, roofline in rest:
            moved = kernel.runs * kernel.bytes / 1e6
            print(f"| {kernel.name} | {moved:.1f} | {roofline:.3f} | {roofline / all_of_it:.1%} | {kind} |")
        share = sum(roofline for *_, roofline in rest) / all_of_it
        print(f"beside products and attention: {len(rest)} kernels, {share:.1%} of the roofline")


if __name__ == "__main__":
    run_cli(main)

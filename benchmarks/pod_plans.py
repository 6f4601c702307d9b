"""A table of what fits which pod: `python benchmarks/pod_plans.py --results pod_plans.jsonl`.

For each size of the 0.7B model and each topology it compiles the training step, all last-scale tokens that subsampling
can keep included, for ever smaller batches until one fits. A compilation takes minutes, so that batches are left out
whose temporaries, in proportion to those of a batch that is known, do not fit by far. Nothing runs, and no device is
needed; libtpu or JAX's CUDA plug-in is. Each compilation is appended to the results file, and the same command goes on
where it ended. Captions are encoded on the fly, as the configs have it. `--topologies "v5e:16x16" "4*v5e:16x16"
"16*v5e:16x16" --sizes 1024 --each 4` gives rows for several slices, at so many images a chip.
"""

import argparse
import functools
import importlib.metadata
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hart_jax.errors import UserError, run_cli
from hart_jax.parallel.chips import CHIPS, GiB
from hart_jax.planning.plans import Plan

TOPOLOGIES = ("v5e:16x16", "v6e:16x16", "v5p:8x8x4", "h200:8")
SIZES = (1024, 512, 256)
MOST_FSDP = 16
# Images of a chip to try, from more than fits anywhere.
EACH = tuple(2**power for power in range(9, -1, -1))
# So far above a chip's memory a batch is left out that was not compiled.
CLEARLY = 1.25


def sides(topology: str) -> list[int]:
    """Of one slice."""
    return [int(side) for side in topology.partition(":")[2].split("x")]


def chips(topology: str) -> int:
    return int(topology.rpartition("*")[0] or 1) * math.prod(sides(topology))


def kind(topology: str) -> str:
    return topology.rpartition("*")[2].partition(":")[0]


def fsdp_of(topology: str) -> int:
    """Chips that share the state: the most, up to MOST_FSDP, that are whole sides of the pod's torus."""
    some = [math.prod(group) for count in (1, 2) for group in itertools.combinations(sides(topology), count)]
    return max(size for size in some if size <= MOST_FSDP)


def compile_one(size: int, topology: str, batch: int) -> Plan:
    """One plan, in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "hart_jax.planning.plan",
        f"--config=configs/hart_0p7b_{size}.py",
        f"--topology={topology}",
        f"--config.train.batch_size={batch}",
        f"--config.mesh.fsdp={fsdp_of(topology)}",
        "--json",
    ]
    print(" ".join(command[1:]), file=sys.stderr, flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode not in (0, 1):
        raise UserError(f"{' '.join(command[1:])}: ended with code {done.returncode}")
    return Plan(**json.loads(done.stdout))


def row(size: int, plan: Plan) -> str:
    mesh = "x".join(str(side) for side in plan.mesh.values())
    memory = f"{plan.peak / GiB:.1f} of {plan.memory / GiB:.0f}"
    encoder = f"{(plan.text_encoder + plan.text_states) / GiB:.2f}"
    roofline, rate = f"{plan.step_seconds:.2f}", f"{plan.batch_size / plan.step_seconds:.0f}"
    shares = f"{plan.flops / plan.chips / 1e12:.0f} + {plan.text_flops / plan.chips / 1e12:.0f}"
    slow = f"{plan.slow_collective_bytes / 1e6:.0f}" if plan.slow_collective_bytes else ""
    hosts = f"{plan.host_images:.0f} | {plan.host_bytes / 1e6:.0f} | {plan.host_cores:.1f}"
    return (
        f"| {size} | {plan.topology} | {mesh} | {plan.batch_size} | {memory} | {encoder} | {shares} | {slow} | "
        f"{roofline} | {rate} | {plan.mfu:.0%} | {plan.hfu:.0%} | {hosts} |"
    )


def search(
    known: dict[int, Plan],
    alike: Sequence[Plan],
    memory: int,
    batches: Sequence[int],
    compile_batch: Callable[[int], Plan],
) -> Plan | None:
    """The plan of the first of these batches, each smaller than the one before, that fits; None if none does.

    `alike` are plans of as many other chips, which need about as much of the chips' `memory`.
    """
    too_big: Plan | None = None
    for batch in batches:
        # At best, temporaries shrink with the batch.
        if too_big and _scaled(too_big, batch) > too_big.memory:
            continue
        if batch not in known:
            if any(_scaled(plan, batch) > CLEARLY * memory for plan in alike):
                continue
            known[batch] = compile_batch(batch)
        if known[batch].fits:
            return known[batch]
        too_big = known[batch]
    return None


def _scaled(plan: Plan, batch: int) -> float:
    """Bytes with temporaries and states of captions in proportion to the batch."""
    return plan.arguments + plan.text_encoder + (plan.temporaries + plan.text_states) * batch / plan.batch_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, choices=SIZES)
    parser.add_argument("--topologies", nargs="+", default=TOPOLOGIES)
    parser.add_argument("--results", type=Path, default=Path("pod_plans.jsonl"))
    parser.add_argument("--each", type=int, nargs="+", default=EACH, help="images of a chip to try, from the most")
    parser.add_argument("--known", action="store_true", help="Only the rows of what the results file holds.")
    arguments = parser.parse_args()
    lines = arguments.results.read_text().splitlines() if arguments.results.is_file() else []
    records: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def compile_and_keep(size: int, topology: str, batch: int) -> Plan:
        plan = compile_one(size, topology, batch)
        with arguments.results.open("a") as file:
            file.write(json.dumps({"size": size, "plan": vars(plan)}) + "\n")
        return plan

    print(f"JAX {importlib.metadata.version('jax')}; compiled, not run")
    heads = ["px", "chips", "data x fsdp x tensor", "global batch", "GiB per chip", "of them text encoder"]
    heads += ["TFLOP per chip, step + captions", "MB over slow links", "s/step, at least", "images/s, at most"]
    heads += ["mfu, at most", "hfu, at most", "images/s of a host", "MB/s of a host", "cores that decode them"]
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for topology in arguments.topologies:
        batches = [chips(topology) * each for each in arguments.each]
        for size in arguments.sizes:
            plans = [Plan(**record["plan"]) for record in records if record["size"] == size]
            known = {plan.batch_size: plan for plan in plans if plan.topology == topology}
            if arguments.known:
                best = max((p for p in known.values() if p.fits), key=lambda plan: plan.batch_size, default=None)
            else:
                # Refusals say less of memory than programs.
                alike = [p for p in plans if p.chips == chips(topology) and p.device_flops and p.batch_size > p.chips]
                memory = CHIPS[kind(topology)].memory
                compile_batch = functools.partial(compile_and_keep, size, topology)
                best = search(known, alike, memory, batches, compile_batch)
            if best is not None:
                print(row(size, best), flush=True)
            elif known:
                print(f"| {size} | {topology} | | one image a chip does not fit |", flush=True)


if __name__ == "__main__":
    run_cli(main)

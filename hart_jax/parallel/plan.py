"""Whether a job fits a pod, before renting it: compiles the real step, or sampler, for a topology that is not here.

    python -m hart_jax.parallel.plan --config=configs/hart_0p7b_1024.py --topology=v5e:16x16
    python -m hart_jax.parallel.plan --config=configs/hart_0p7b_1024.py --topology=h200:8 --what=sample --batch_size=64

Needs libtpu for TPUs or JAX's CUDA plug-in for GPUs ("h200:8"; "h200:4x8" is four hosts of eight), and no device.
Settings change on the command line (--config.train.batch_size=2048 --config.mesh.fsdp=64 --config.train.remat=full).
The exit code is 0 if it fits, 1 if not, 2 for wrong settings.
"""

import dataclasses
import json
import re
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import NamedSharding

from hart_jax import flags as hart_flags
from hart_jax.errors import UserError, run_cli
from hart_jax.experiment import HartExperiment
from hart_jax.generate import make_sampler
from hart_jax.model_folder import abstract_tokenizer
from hart_jax.parallel.chips import Chip, GiB
from hart_jax.parallel.hlo import Collective, count_work
from hart_jax.parallel.mesh import Placement, make_mesh
from hart_jax.parallel.rules import with_changes
from hart_jax.parallel.topology import topology_devices
from hart_jax.training.flops import flops_of
from hart_jax.training.hart_program import HartProgram, hart_program
from hart_jax.transformer.subsample import keep_buckets

_TOPOLOGY = flags.DEFINE_string("topology", None, "Kind and shape of the devices: v5e:16x16, v5p:8x8x4, h200:8.")
_WHAT = flags.DEFINE_enum("what", "train", ["train", "sample"], "A training step, or drawing a batch of pictures.")
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 0, "Pictures drawn at a time with --what=sample; 0: 8 for each part of the mesh's data * fsdp."
)
_JSON = flags.DEFINE_bool("json", False, "Prints one JSON object instead of a table.")

# Pictures that `sample.py` draws at a time on one device.
PICTURES_EACH = 8


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one step (or drawing one batch) needs. Bytes are of one chip, `flops` of all chips together.

    `flops` are those that the program asks for, rematerialisation included; `executed` those of one chip as compiled.
    `moved` are bytes read from and written to the chip's memory, `sent` those put on its links by kind of collective.
    A program that the compiler refuses has no `executed`, `moved` and `sent`, and `peak` is 0 where it does not say by
    how much it is too big.
    """

    topology: str
    what: str
    chips: int
    mesh: dict[str, int]
    batch_size: int
    remat: str
    memory: int
    arguments: int
    temporaries: int
    peak: int
    fits: bool
    flops: float
    executed: float | None
    moved: float | None
    sent: dict[str, float] | None
    compute_seconds: float
    memory_seconds: float
    link_seconds: float
    compile_seconds: float

    @property
    def step_seconds(self) -> float:
        """A floor: the longest of the three, as if they overlapped perfectly."""
        return max(self.compute_seconds, self.memory_seconds, self.link_seconds)

    @property
    def utilisation(self) -> float:
        """Of the chips' peak FLOP/s, if a step took that floor."""
        return self.compute_seconds / self.step_seconds


@dataclasses.dataclass(frozen=True)
class Job:
    """A function that is traced but not compiled, the arguments it is called with, and where they lie."""

    traced: Any
    arguments: Any
    placement: Placement
    batch_size: int


def training_job(experiment: HartExperiment, devices: list[Any], kept: int | None = None) -> Job:
    """A training step that keeps so many last-scale tokens; None: the most that subsampling keeps."""
    train, config = experiment.train, experiment.transformer
    placement = _placement(experiment, train.batch_size, devices)
    program = hart_program(experiment, placement)
    side = experiment.tokenizer.image_size
    arguments = (
        _at(jax.eval_shape(program.init), program.places),
        _at(abstract_tokenizer(experiment.tokenizer), placement.whole),
        jax.ShapeDtypeStruct((train.batch_size, side, side, 3), jnp.uint8, sharding=placement.batch),
        _condition(experiment, train.batch_size, placement),
        _at(jax.eval_shape(lambda: jax.random.key(0)), placement.whole),
    )
    if kept is None:
        kept = keep_buckets(config.patch_nums[-1] ** 2, experiment.loss)[-1]
    with placement.tracing():
        return Job(program.step.trace(*arguments, kept), arguments, placement, train.batch_size)


def sampling_job(experiment: HartExperiment, devices: list[Any], batch_size: int = 0) -> Job:
    """Drawing a batch of pictures as `sample.py` does, the batch and the weights laid out over the mesh."""
    placement = _placement(experiment, 0, devices)
    parts = placement.mesh.shape["data"] * placement.mesh.shape["fsdp"]
    batch_size = batch_size or PICTURES_EACH * parts
    if batch_size < 1 or batch_size % parts:
        raise UserError(f"--batch_size={batch_size}: must be a multiple of the mesh's data*fsdp={parts}")
    program: HartProgram = hart_program(experiment, placement)
    weights = {
        "transformer": _at(jax.eval_shape(program.init).params, program.places.params),
        "tokenizer": _at(abstract_tokenizer(experiment.tokenizer), placement.whole),
    }
    seed = jax.ShapeDtypeStruct((), jnp.int32, sharding=placement.whole)
    indices = jax.ShapeDtypeStruct((batch_size,), jnp.int32, sharding=placement.batch)
    arguments = weights, _condition(experiment, batch_size, placement), seed, indices
    with placement.tracing():
        sampler: Any = make_sampler(program.hart, program.tokenizer, experiment.sample)
        return Job(sampler.trace(*arguments), arguments, placement, batch_size)


def plan(
    experiment: HartExperiment, topology: str, what: str = "train", batch_size: int = 0, kept: int | None = None
) -> Plan:
    """Compiles for the topology and counts. "auto" precision is bfloat16, as it will be there.

    `batch_size` is that of sampling (see `sampling_job`), `kept` a training step's (see `training_job`).
    """
    devices, chip, devices_per_host = topology_devices(topology)
    if experiment.train.dtype == "auto":
        train = dataclasses.replace(experiment.train, dtype="bfloat16")
        experiment = dataclasses.replace(experiment, train=train)
    started = time.monotonic()
    train_job = what == "train"
    job = training_job(experiment, devices, kept) if train_job else sampling_job(experiment, devices, batch_size)
    common: dict[str, Any] = {
        "topology": topology,
        "what": what,
        "chips": len(devices),
        "mesh": dict(job.placement.mesh.shape),
        "batch_size": job.batch_size,
        "remat": experiment.train.remat,
        "memory": chip.memory,
        "flops": flops_of(job.traced.jaxpr.jaxpr),
    }
    with job.placement.tracing():
        lowered = job.traced.lower()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _too_big(common, job, chip, str(error), time.monotonic() - started)
    seconds = time.monotonic() - started
    memory = compiled.memory_analysis()
    work = count_work(compiled.as_text(), common["mesh"], devices_per_host)
    new_outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes + new_outputs
    return Plan(
        **common,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=peak,
        fits=peak <= chip.memory,
        executed=work.flops,
        moved=work.bytes,
        sent={str(kind): sent for kind, sent in work.sent.items()},
        compute_seconds=max(work.flops, common["flops"] / len(devices)) / chip.flops,
        memory_seconds=work.bytes / chip.bandwidth,
        link_seconds=_link_seconds(work.sent, chip),
        compile_seconds=seconds,
    )


def _too_big(common: dict[str, Any], job: Job, chip: Chip, message: str, seconds: float) -> Plan:
    """What is known of a program that does not fit: the compiler's message gives the temporaries, if anything."""
    arguments = sum(_bytes_of(leaf) for leaf in jax.tree.leaves(job.arguments))
    found = re.search(r"temporaries \(([\d.]+)([KMGT])\)|Used ([\d.]+)([KMGT]) of", message)
    temporaries = peak = 0
    if found is not None:
        amount = float(found[1] or found[3]) * 1024 ** (1 + "KMGT".index(found[2] or found[4]))
        temporaries = int(amount if found[1] else amount - arguments)
        peak = arguments + temporaries
    return Plan(
        **common,
        arguments=arguments,
        temporaries=temporaries,
        peak=peak,
        fits=False,
        executed=None,
        moved=None,
        sent=None,
        compute_seconds=common["flops"] / common["chips"] / chip.flops,
        memory_seconds=0.0,
        link_seconds=0.0,
        compile_seconds=seconds,
    )


def _link_seconds(sent: dict[Collective, float], chip: Chip) -> float:
    slow = sum(size for kind, size in sent.items() if kind.leaves_host and chip.network)
    return (sum(sent.values()) - slow) / chip.link + (slow / chip.network if slow else 0.0)


def _placement(experiment: HartExperiment, batch_size: int, devices: list[Any]) -> Placement:
    mesh = make_mesh(experiment.mesh, batch_size, devices, experiment.train.accumulate)
    return Placement(mesh, with_changes(experiment.mesh.rules))


def _at(tree: Any, places: Any) -> Any:
    """The shapes of a tree, each at its place; one place for all, or a tree of them."""
    if isinstance(places, NamedSharding):
        places = jax.tree.map(lambda _: places, tree)
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places)


def _condition(experiment: HartExperiment, batch_size: int, placement: Placement) -> Any:
    config, shape = experiment.transformer, jax.ShapeDtypeStruct
    if config.num_classes:
        return shape((batch_size,), jnp.int32, sharding=placement.batch)
    text = shape((batch_size, config.context_tokens, config.context_dim), jnp.float32, sharding=placement.batch)
    return text, shape((batch_size, config.context_tokens), jnp.int32, sharding=placement.batch)


def _bytes_of(leaf: jax.ShapeDtypeStruct) -> int:
    count = 1
    for side in leaf.sharding.shard_shape(leaf.shape):
        count *= side
    return count * leaf.dtype.itemsize


def table(plan: Plan) -> str:
    """The plan for people."""
    sizes = " ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    unit = "step" if plan.what == "train" else "batch"
    kind = f"remat {plan.remat}" if plan.what == "train" else "sampling"
    lines = [f"{plan.topology}: {plan.chips} chips, mesh {sizes}, global batch {plan.batch_size}, {kind}"]
    amount = f"{plan.peak / GiB:.2f}" if plan.peak else "more than there is:"
    lines.append(
        f"memory per chip   {amount} of {plan.memory / GiB:.2f} GiB "
        f"(arguments {plan.arguments / GiB:.2f}, temporaries {_gib(plan.temporaries)})"
    )
    even = plan.flops / plan.chips
    counted = f"{plan.flops / 1e15:.2f} P in all, {(plan.executed or even) / 1e12:.2f} T per chip"
    if plan.executed is not None and plan.executed > 1.1 * even:
        counted += f", {plan.executed / even - 1:.0%} more than an even share: chips repeat each other's work"
    lines.append(f"FLOPs per {unit:<7} {counted}")
    if plan.sent is not None and plan.moved is not None:
        sent = ", ".join(f"{kind} {size / 1e9:.2f} GB" for kind, size in plan.sent.items()) or "none"
        lines += [
            f"memory traffic    {plan.moved / 1e9:.1f} GB per chip",
            f"sent per chip     {sent}",
            f"{unit + ', at least':<17} {plan.step_seconds:.3f} s: compute {plan.compute_seconds:.3f}, memory "
            f"{plan.memory_seconds:.3f}, links {plan.link_seconds:.3f}; utilisation at most {plan.utilisation:.0%}",
        ]
    lines.append(f"compiled in       {plan.compile_seconds:.0f} s")
    if not plan.fits:
        over = (
            f"by {(plan.peak - plan.memory) / GiB:.2f} GiB per chip" if plan.peak > plan.memory else "for the compiler"
        )
        lines.append(f"TOO BIG {over}: {advice(plan)}")
    return "\n".join(lines)


def _gib(size: int) -> str:
    return f"{size / GiB:.2f}" if size else "unknown"


def advice(plan: Plan) -> str:
    """Which setting to change, the cheapest first, for a plan that does not fit."""
    fsdp, tensor = plan.mesh["fsdp"], plan.mesh["tensor"]
    if plan.arguments > plan.memory / 2:
        enough = fsdp
        while plan.arguments * fsdp / enough > plan.memory / 2:
            enough *= 2
        if fsdp * plan.mesh["data"] >= enough:
            return f"most of it is weights and their moments; split them further with mesh.fsdp={enough}"
        return f"most of it is weights and their moments; take more chips, with mesh.fsdp={enough}"
    if plan.what == "train" and plan.remat != "full":
        return f"most of it is activations; set train.remat=full (it is {plan.remat})"
    parts = fsdp * plan.mesh["data"]
    each = plan.batch_size // parts
    if each > 1:
        share = (plan.memory - plan.arguments) / plan.temporaries if plan.temporaries else 0.5
        fewer = max(1, min(each - 1, int(each * share)))
        name = "train.batch_size" if plan.what == "train" else "--batch_size"
        return f"most of it is activations; lower {name} to {fewer * parts} or less, or take more chips"
    return f"a chip holds one picture already; split it with mesh.tensor={2 * tensor}"


def main() -> None:
    hart_flags.parse()
    jax.config.update("jax_platforms", "cpu")
    experiment = hart_flags.experiment()
    if not isinstance(experiment, HartExperiment):
        raise UserError("--config: this config trains a tokenizer; give one with a transformer")
    if not _TOPOLOGY.value:
        raise UserError("--topology is missing: give the devices, like --topology=v5e:16x16")
    if _BATCH_SIZE.value and _WHAT.value == "train":
        raise UserError(
            f"--batch_size={_BATCH_SIZE.value}: is of --what=sample; training has --config.train.batch_size"
        )
    planned = plan(experiment, _TOPOLOGY.value, _WHAT.value, _BATCH_SIZE.value)
    print(json.dumps(dataclasses.asdict(planned)) if _JSON.value else table(planned))
    sys.exit(0 if planned.fits else 1)


if __name__ == "__main__":
    run_cli(main)

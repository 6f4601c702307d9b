"""Whether a job fits a pod, before renting it: compiles the real step, or sampler, for a topology that is not here.

    python -m hart_jax.parallel.plan --config=configs/hart_0p7b_1024.py --topology=v5e:16x16
    python -m hart_jax.parallel.plan --config=configs/hart_0p7b_1024.py --topology=h200:8 --what=sample --batch_size=64
    python -m hart_jax.parallel.plan --config=configs/hart_0p7b_512.py --topology=v6e:1x1 --what=sample --batch_size=fit

Needs libtpu for TPUs or JAX's CUDA plug-in for GPUs ("h200:8"; "h200:4x8" is four hosts of eight), and no device.
Settings change on the command line (--config.train.batch_size=2048 --config.mesh.fsdp=64 --config.train.remat=full).
The exit code is 0 if it fits, 1 if not, 2 for wrong settings.
"""

import dataclasses
import functools
import json
import re
import sys
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import NamedSharding

from hart_jax import flags as hart_flags
from hart_jax.buckets import local_copy
from hart_jax.config import read_json
from hart_jax.convert.qwen2 import stored_params
from hart_jax.errors import UserError, run_cli
from hart_jax.evaluation.work import SYSTEM_PROMPT_TOKENS, read_text_size
from hart_jax.experiment import HartExperiment
from hart_jax.generate import make_sampler, narrowed
from hart_jax.memory import MOST_PICTURES
from hart_jax.model_folder import abstract_tokenizer, boxed_transformer
from hart_jax.parallel.chips import Chip, GiB
from hart_jax.parallel.hlo import Collective, count_work
from hart_jax.parallel.mesh import Placement, make_mesh, sampling_mesh
from hart_jax.parallel.rules import parameter_axes, with_changes
from hart_jax.parallel.topology import read_topology
from hart_jax.quantized import quantize
from hart_jax.text.qwen2 import QWEN2_1P5B, KeyValues, Qwen2, Qwen2Config, abstract_params
from hart_jax.text.qwen2_encoder import ROWS_PER_DEVICE
from hart_jax.training.flops import flops_of
from hart_jax.training.hart_program import HartProgram, hart_program
from hart_jax.transformer.subsample import keep_buckets

_TOPOLOGY = flags.DEFINE_string("topology", None, "Kind and shape of the devices: v5e:16x16, v5p:8x8x4, h200:8.")
_WHAT = flags.DEFINE_enum("what", "train", ["train", "sample"], "A training step, or drawing a batch of pictures.")
_BATCH_SIZE = flags.DEFINE_string(
    "batch_size", "0", "Pictures drawn at a time with --what=sample; 0: 8 for each copy of the model; fit: the most."
)
_TEXT_ENCODER = flags.DEFINE_string(
    "text_encoder_config", None, "config.json of the text encoder that draws beside; else the config's, or Qwen2 1.5B."
)
_JSON = flags.DEFINE_bool("json", False, "Prints one JSON object instead of a table.")

# Of one device in the search for the largest batch.
MOST_EACH = 64


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one step (or drawing one batch) needs. Bytes are of one chip, `flops` of all chips together.

    `flops` are those that the program asks for, rematerialisation included; `executed` those of one chip as compiled.
    `moved` are bytes read from and written to the chip's memory, `sent` those put on its links by kind of collective.
    A program that the compiler refuses has no `executed`, `moved` and `sent`, and `peak` is 0 where it does not say by
    how much it is too big. `text_encoder` are the weights of the one that is kept beside the sampler: `peak` counts
    them, the other figures are the sampler's alone.
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
    text_encoder: int = 0

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
    """Drawing a batch of pictures as `sample.py` does, on its mesh."""
    placement = _sampling_placement(experiment, devices)
    parts = placement.batch_parts
    batch_size = batch_size or MOST_PICTURES * parts
    if batch_size < 1 or batch_size % parts:
        raise UserError(f"--batch_size={batch_size}: must be a multiple of the {parts} copies of the model")
    program: HartProgram = hart_program(experiment, placement)
    transformer = boxed_transformer(experiment.transformer)
    axes, transformer = parameter_axes(transformer), nn.unbox(transformer)
    narrow = functools.partial(narrowed, dtype=program.hart.dtype)
    transformer = jax.eval_shape(quantize if experiment.sample.weights == "int8" else narrow, transformer)
    weights = {
        "transformer": _at(transformer, placement.state(transformer, axes)),
        "tokenizer": _at(abstract_tokenizer(experiment.tokenizer), placement.whole),
    }
    seeds = jax.ShapeDtypeStruct((batch_size,), jnp.uint32, sharding=placement.batch)
    indices = jax.ShapeDtypeStruct((batch_size,), jnp.int32, sharding=placement.batch)
    arguments = weights, _condition(experiment, batch_size, placement), seeds, indices
    with placement.tracing():
        sampler: Any = make_sampler(program.hart, program.tokenizer, experiment.sample)
        return Job(sampler.trace(*arguments), arguments, placement, batch_size)


def text_job(config: Qwen2Config, length: int, batch_size: int, placement: Placement, dtype: str = "bfloat16") -> Job:
    """Encoding the prompts of a batch in `length` positions, behind a system prompt."""
    compute = jnp.dtype("bfloat16" if dtype == "int8" else dtype)
    params = stored_params(config, jnp.dtype(dtype))
    rows = min(batch_size, ROWS_PER_DEVICE * placement.batch_parts)
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=placement.batch)
    heads = config.num_hidden_layers, 1, SYSTEM_PROMPT_TOKENS, config.num_key_value_heads, config.head_dim
    before: Any = jax.ShapeDtypeStruct(heads, compute, sharding=placement.whole)
    weights = _at(params, placement.state(params, parameter_axes(abstract_params(config))))
    arguments = weights, tokens, tokens, KeyValues(before, before)
    model = Qwen2(config, compute)
    encode = jax.jit(lambda params, *inputs: model.apply({"params": params}, *inputs)[0], out_shardings=placement.whole)
    with placement.tracing():
        return Job(encode.trace(*arguments), arguments, placement, rows)


def read_text_config(experiment: HartExperiment, file: str | None = None) -> Qwen2Config | None:
    """Of the text encoder beside a sampler: in this config.json, in the experiment's folder, or the published one where
    it fits the model; None where it is another, small one.

    Raises:
      UserError: the file is missing, or is not a Qwen2's.
    """
    if experiment.transformer.num_classes:
        return None
    path = local_copy(file) if file else local_copy(experiment.text_encoder) / "config.json"
    if file or (experiment.text_encoder and path.is_file()):
        values = read_json(path)
        if values.get("model_type") in ("qwen2", "qwen2_vl"):
            return Qwen2Config.from_json(values, str(path))
        if file:
            raise UserError(f"--text_encoder_config={file}: not the config.json of a qwen2 or qwen2_vl")
        return None
    return QWEN2_1P5B if experiment.transformer.context_dim == QWEN2_1P5B.hidden_size else None


def _text_memory(experiment: HartExperiment, text: Qwen2Config | None, job: Job) -> tuple[int, int]:
    """Bytes of one chip: the text encoder's weights, and all else while it encodes the prompts of a batch."""
    if text is None:
        size = None if experiment.transformer.num_classes else read_text_size(experiment.text_encoder)
        return (4 * size.params, 0) if size else (0, 0)
    dtype = "int8" if experiment.sample.weights == "int8" else experiment.train.dtype
    encoding = text_job(text, experiment.transformer.context_tokens, job.batch_size, job.placement, dtype)
    with job.placement.tracing():
        memory = encoding.traced.lower().compile().memory_analysis()
    weights = sum(_bytes_of(leaf) for leaf in jax.tree.leaves(encoding.arguments[0]))
    return weights, memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes - weights


def plan(
    experiment: HartExperiment,
    topology: str,
    what: str = "train",
    batch_size: int = 0,
    kept: int | None = None,
    text: Qwen2Config | None = None,
) -> Plan:
    """Compiles for the topology and counts. "auto" precision is bfloat16, as it will be there.

    `batch_size` is that of sampling (see `sampling_job`), with a text encoder beside it (see `read_text_config`);
    `kept` is a training step's (see `training_job`).
    """
    found = read_topology(topology)
    devices, chip = found.devices, found.chip
    if found.slices > 1 and not experiment.mesh.slices:
        experiment = dataclasses.replace(experiment, mesh=dataclasses.replace(experiment.mesh, slices=found.slices))
    train_job = what == "train"
    dtype = experiment.train.dtype if train_job else experiment.sample.dtype
    train = dataclasses.replace(experiment.train, dtype="bfloat16" if dtype == "auto" else dtype)
    experiment = dataclasses.replace(experiment, train=train)
    started = time.monotonic()
    job = training_job(experiment, devices, kept) if train_job else sampling_job(experiment, devices, batch_size)
    text_weights, text_else = (0, 0) if train_job else _text_memory(experiment, text, job)
    common: dict[str, Any] = {
        "text_encoder": text_weights,
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
        # Without a GPU to try them on, XLA finds no tiles for some products; the library's need none.
        compiled = lowered.compile({"xla_gpu_enable_triton_gemm": False} if devices[0].platform == "gpu" else None)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _too_big(common, job, chip, str(error), time.monotonic() - started)
    seconds = time.monotonic() - started
    memory = compiled.memory_analysis()
    work = count_work(compiled.as_text(), common["mesh"], found.devices_per_island)
    new_outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    # The sampler's weights are there while prompts are encoded.
    sampler = sum(_bytes_of(leaf) for leaf in jax.tree.leaves(job.arguments[0]))
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes + new_outputs
    peak = text_weights + max(peak, sampler + text_else)
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
        peak = arguments + temporaries + common["text_encoder"]
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


def largest_batch(plan_of: Callable[[int], Plan], parts: int) -> Plan:
    """The plan of the largest batch that fits, of at most MOST_EACH pictures in each of so many parts.

    Compiles few: each plan's memory tells which to try next. Where not one picture fits, its plan is returned.
    """
    known: dict[int, Plan] = {}
    fitting, too_many, each = 0, MOST_EACH + 1, MOST_PICTURES
    while too_many - fitting > 1:
        tried = known[each] = plan_of(each * parts)
        fitting, too_many = (each, too_many) if tried.fits else (fitting, each)
        free = tried.memory - tried.arguments - tried.text_encoder
        guess = int(each * free / tried.temporaries) if tried.temporaries else (fitting + too_many) // 2
        each = min(max(guess, fitting + 1), too_many - 1)
    return known[fitting or 1]


def _link_seconds(sent: dict[Collective, float], chip: Chip) -> float:
    slow = sum(size for kind, size in sent.items() if kind.leaves_host and chip.network)
    return (sum(sent.values()) - slow) / chip.link + (slow / chip.network if slow else 0.0)


def _placement(experiment: HartExperiment, batch_size: int, devices: list[Any]) -> Placement:
    mesh = make_mesh(experiment.mesh, batch_size, devices, experiment.train.accumulate)
    return Placement(mesh, with_changes(experiment.mesh.rules))


def _sampling_placement(experiment: HartExperiment, devices: list[Any]) -> Placement:
    sizes = sampling_mesh(experiment.mesh)
    if len(devices) % sizes.tensor:
        raise UserError(f"mesh.tensor={sizes.tensor}: does not divide the {len(devices)} chips")
    return Placement(make_mesh(sizes, 0, devices), with_changes(sizes.rules))


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
        f"(arguments {plan.arguments / GiB:.2f}, temporaries {_gib(plan.temporaries)}"
        + (f", text encoder {plan.text_encoder / GiB:.2f})" if plan.text_encoder else ")")
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
    if plan.what == "sample" and plan.arguments + plan.text_encoder > plan.memory / 2:
        return f"most of it is weights; set --config.sample.weights=int8, or split them with mesh.tensor={2 * tensor}"
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
        free = plan.memory - plan.arguments - plan.text_encoder
        share = free / plan.temporaries if plan.temporaries else 0.5
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
    topology = _TOPOLOGY.value
    if not topology:
        raise UserError("--topology is missing: give the devices, like --topology=v5e:16x16")
    sampling, wanted = _WHAT.value == "sample", _BATCH_SIZE.value
    if wanted != "0" and not sampling:
        raise UserError(f"--batch_size={wanted}: is of --what=sample; training has --config.train.batch_size")
    if wanted != "fit" and not wanted.isdigit():
        raise UserError(f"--batch_size={wanted}: give a number of pictures, 0, or fit")
    text = read_text_config(experiment, _TEXT_ENCODER.value) if sampling else None

    def plan_of(batch_size: int) -> Plan:
        if wanted == "fit":
            print(f"compiling for {batch_size} pictures ...", file=sys.stderr, flush=True)
        return plan(experiment, topology, _WHAT.value, batch_size, text=text)

    if wanted == "fit":
        parts = _sampling_placement(experiment, read_topology(topology).devices).batch_parts
        planned = largest_batch(plan_of, parts)
    else:
        planned = plan_of(int(wanted))
    print(json.dumps(dataclasses.asdict(planned)) if _JSON.value else table(planned))
    sys.exit(0 if planned.fits else 1)


if __name__ == "__main__":
    run_cli(main)

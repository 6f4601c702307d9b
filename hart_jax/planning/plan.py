"""Whether a job fits a pod, before renting it: compiles the real step, or sampler, for a topology that is not here.

    python -m hart_jax.planning.plan --config=configs/hart_0p7b_1024.py --topology=v5e:16x16
    python -m hart_jax.planning.plan --config=configs/hart_0p7b_1024.py --topology=4*v5e:16x16
    python -m hart_jax.planning.plan --config=configs/hart_0p7b_1024.py --topology=h200:8 --what=sample --batch_size=64
    python -m hart_jax.planning.plan --config=configs/hart_0p7b_512.py --topology=v6e:1x1 --what=sample --batch_size=fit
    python -m hart_jax.planning.plan --config=configs/hart_0p7b_1024.py --topology=h200:1 --what=sample --size=768x1360

Needs libtpu for TPUs or JAX's CUDA plug-in for GPUs ("h200:8"; "h200:4x8" is four hosts of eight), and no device.
Settings change on the command line (--config.train.batch_size=2048 --config.mesh.fsdp=64 --config.train.remat=full).
Training with data.buckets and transformer.scale_lists is planned for the largest step of them all.
The exit code is 0 if it fits, 1 if not, 2 for wrong settings.
"""

import dataclasses
import json
import re
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
from absl import flags

from hart_jax import flags as hart_flags
from hart_jax.config import HartExperiment
from hart_jax.config.sizes import image_shape_of, one_size
from hart_jax.errors import UserError, run_cli
from hart_jax.parallel.chips import Chip
from hart_jax.planning.hlo import Work, count_work
from hart_jax.planning.jobs import (
    Job,
    at_image_shape,
    bytes_of,
    encoding_job,
    largest_step,
    read_text_config,
    sampling_job,
    sampling_layout,
    training_job,
    training_steps,
)
from hart_jax.planning.plan_report import table
from hart_jax.planning.plans import Plan
from hart_jax.planning.topology import Topology, read_topology
from hart_jax.sampling.pipeline import MOST_IMAGES
from hart_jax.text.program import EncoderConfig

_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "Kind and shape of the devices: v5e:16x16, 4*v5e:16x16 (four slices), v5p:8x8x4, h200:8."
)
_WHAT = flags.DEFINE_enum("what", "train", ["train", "sample"], "A training step, or sampling a batch of images.")
_BATCH_SIZE = flags.DEFINE_string(
    "batch_size", "0", "Images sampled at a time with --what=sample; 0: 8 for each copy of the model; fit: the most."
)
_SIZE = flags.DEFINE_string(
    "size", None, "Width x height of the images in pixels with --what=sample, like 768x1360; else the model's own."
)
_ASPECT_RATIO = flags.DEFINE_string(
    "aspect_ratio", None, "Or their width to height, like 2:3, at about the model's own number of pixels."
)
_TEXT_ENCODER = flags.DEFINE_string(
    "text_encoder_config", None, "config.json of the text encoder beside it; else the config's, or Qwen2 1.5B."
)
_JSON = flags.DEFINE_bool("json", False, "Prints one JSON object instead of a table.")

# Of one device in the search for the largest batch.
MOST_EACH = 64


@dataclasses.dataclass(frozen=True)
class _Program:
    """A compiled job: bytes of one device, and what it does in one execution."""

    arguments: int
    temporaries: int
    outputs: int
    work: Work


@dataclasses.dataclass(frozen=True)
class _Seconds:
    """What an execution takes at least of each resource, with nothing else in the way."""

    compute: float
    memory: float
    links: float
    slow_links: float

    @property
    def longest(self) -> float:
        return max(self.compute, self.memory, self.links, self.slow_links)


def plan(
    experiment: HartExperiment,
    topology: str,
    what: str = "train",
    batch_size: int = 0,
    num_kept: int | None = None,
    text: EncoderConfig | None = None,
) -> Plan:
    """Compiles for the topology and counts. "auto" precision is bfloat16, as it will be there.

    `batch_size` is that of sampling (see `sampling_job`); `num_kept` is a training step's (see `training_job`). `text`
    is the encoder (see `read_text_config`) of the sampler's prompts, or of the captions that training encodes on the
    fly. With `data.buckets` and several lists of scales the step is that of `largest_step`.
    """
    found = read_topology(topology)
    devices, chip = found.devices, found.chip
    if found.slices > 1 and not experiment.mesh.slices:
        experiment = dataclasses.replace(experiment, mesh=dataclasses.replace(experiment.mesh, slices=found.slices))
    training = what == "train"
    steps = training_steps(experiment) if training else {}
    if training:
        experiment = at_image_shape(experiment, *largest_step(experiment))
    dtype = experiment.train.dtype if training else experiment.sample.dtype
    train = dataclasses.replace(experiment.train, dtype="bfloat16" if dtype == "auto" else dtype)
    experiment = dataclasses.replace(experiment, train=train)
    started = time.monotonic()
    job = training_job(experiment, devices, num_kept) if training else sampling_job(experiment, devices, batch_size)
    common: dict[str, Any] = {
        "topology": topology,
        "what": what,
        "chips": len(devices),
        "hosts": len({device.process_index for device in devices}),
        "mesh": dict(job.layout.mesh.shape),
        "batch_size": job.batch_size,
        "image_size": experiment.tokenizer.image_size,
        "buckets": len({shape for shape, _ in steps}),
        "lists": len({scales for _, scales in steps}),
        "programs": sum(map(len, steps.values())),
        "remat": experiment.train.remat,
        "memory": chip.memory,
        "flops": job.flops.hardware,
        "model_flops": job.flops.model,
    }
    beside = 0
    if text is not None:
        encoding = encoding_job(text, experiment, job.layout, job.batch_size, training=training)
        common["text_encoder"] = sum(bytes_of(leaf) for leaf in jax.tree.leaves(encoding.arguments[0]))
        # Captions whose states were computed ahead leave it only the prompts of sample grids.
        if not (training and experiment.precompute_text):
            encoder = _compile(encoding, found)
            if isinstance(encoder, str):
                raise UserError(f"the text encoder alone does not fit: {encoder.splitlines()[0]}")
            # The step's state or the sampler's weights are there while captions or prompts are encoded.
            there = job.arguments if training else job.arguments[0]
            beside = sum(bytes_of(leaf) for leaf in jax.tree.leaves(there))
            beside += encoder.arguments + encoder.temporaries + encoder.outputs
            if training:
                common |= _captions(encoding, encoder, found)
    compiled = _compile(job, found)
    if isinstance(compiled, str):
        return _too_big(common, job, chip, compiled, time.monotonic() - started)
    work = compiled.work
    resident = common.get("text_encoder", 0) + common.get("text_states", 0)
    peak = max(compiled.arguments + compiled.temporaries + compiled.outputs + resident, beside)
    seconds = _seconds(work, job.flops.hardware, found)
    sent: dict[str, float] = {}
    for kind, size in work.collective_bytes.items():
        sent[str(kind)] = sent.get(str(kind), 0.0) + size
    return Plan(
        **common,
        arguments=compiled.arguments,
        temporaries=compiled.temporaries,
        peak=peak,
        fits=peak <= chip.memory,
        device_flops=work.flops,
        hbm_bytes=work.bytes,
        collective_bytes=sent,
        slow_collective_bytes=sum(size for kind, size in work.collective_bytes.items() if kind.slow),
        overlapped=sum(size for kind, size in work.collective_bytes.items() if kind.overlaps and not kind.slow),
        overlapped_slowly=sum(size for kind, size in work.collective_bytes.items() if kind.overlaps and kind.slow),
        compute_seconds=seconds.compute,
        memory_seconds=seconds.memory,
        link_seconds=seconds.links,
        slow_link_seconds=seconds.slow_links,
        compile_seconds=time.monotonic() - started,
    )


def _captions(encoding: Job, encoder: _Program, topology: Topology) -> dict[str, Any]:
    """What encoding the captions of the next step takes while this one runs."""
    seconds = _seconds(encoder.work, encoding.flops.hardware, topology)
    return {
        "text_states": encoder.outputs,
        "text_temporaries": encoder.temporaries,
        "text_flops": encoding.flops.hardware,
        "text_compute_seconds": seconds.compute,
        "text_seconds": seconds.longest,
    }


def _compile(job: Job, topology: Topology) -> _Program | str:
    """The compiled job, or the compiler's message that it does not fit."""
    gpu = topology.devices[0].platform == "gpu"
    with job.layout.activate():
        lowered = job.traced.lower()
    try:
        # Without a GPU to try them on, XLA finds no tiles for some products; the library's need none.
        compiled = lowered.compile({"xla_gpu_enable_triton_gemm": False} if gpu else None)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return str(error)
    memory = compiled.memory_analysis()
    return _Program(
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
        count_work(compiled.as_text(), dict(job.layout.mesh.shape), topology.devices_per_island),
    )


def _seconds(work: Work, flops: float, topology: Topology) -> _Seconds:
    """Of a program of which all devices together are asked for `flops`."""
    chip = topology.chip
    slow = sum(size for kind, size in work.collective_bytes.items() if kind.slow)
    return _Seconds(
        max(work.flops, flops / len(topology.devices)) / chip.flops,
        work.bytes / chip.bandwidth,
        (sum(work.collective_bytes.values()) - slow) / chip.link,
        slow / chip.network,
    )


def _too_big(common: dict[str, Any], job: Job, chip: Chip, message: str, seconds: float) -> Plan:
    """What is known of a program that does not fit: the compiler's message gives the temporaries, if anything."""
    arguments = sum(bytes_of(leaf) for leaf in jax.tree.leaves(job.arguments))
    found = re.search(r"temporaries \(([\d.]+)([KMGT])\)|Used ([\d.]+)([KMGT]) of", message)
    temporaries = peak = 0
    if found is not None:
        amount = float(found[1] or found[3]) * 1024 ** (1 + "KMGT".index(found[2] or found[4]))
        temporaries = int(amount if found[1] else amount - arguments)
        peak = arguments + temporaries + common.get("text_encoder", 0) + common.get("text_states", 0)
    return Plan(
        **common,
        arguments=arguments,
        temporaries=temporaries,
        peak=peak,
        fits=False,
        device_flops=None,
        hbm_bytes=None,
        collective_bytes=None,
        slow_collective_bytes=0.0,
        overlapped=0.0,
        overlapped_slowly=0.0,
        compute_seconds=common["flops"] / common["chips"] / chip.flops,
        memory_seconds=0.0,
        link_seconds=0.0,
        slow_link_seconds=0.0,
        compile_seconds=seconds,
    )


def largest_batch(plan_of: Callable[[int], Plan], parts: int) -> Plan:
    """The plan of the largest batch that fits, of at most MOST_EACH images in each of so many parts.

    Compiles few: each plan's memory tells which to try next. Where not one image fits, its plan is returned.
    """
    known: dict[int, Plan] = {}
    fitting, too_many, each = 0, MOST_EACH + 1, MOST_IMAGES
    while too_many - fitting > 1:
        tried = known[each] = plan_of(each * parts)
        fitting, too_many = (each, too_many) if tried.fits else (fitting, each)
        free = tried.memory - tried.arguments - tried.text_encoder
        guess = int(each * free / tried.temporaries) if tried.temporaries else (fitting + too_many) // 2
        each = min(max(guess, fitting + 1), too_many - 1)
    return known[fitting or 1]


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
    if wanted != "fit" and not re.fullmatch("[0-9]{1,9}", wanted):
        raise UserError(f"--batch_size={wanted}: give a number of images, 0, or fit")
    size = one_size(_SIZE.value, _ASPECT_RATIO.value)
    if size is not None and not sampling:
        raise UserError(f"{size}: a size is of --what=sample; training has --config.data.buckets")
    if size is not None:
        experiment = experiment.sampled()
        experiment = at_image_shape(experiment, image_shape_of(size, experiment.tokenizer))
    text = read_text_config(experiment, _TEXT_ENCODER.value)
    if text is None and experiment.text_encoder and not experiment.transformer.num_classes:
        print(f"{experiment.text_encoder}: not here, so that no text encoder is counted", file=sys.stderr)

    def plan_of(batch_size: int) -> Plan:
        if wanted == "fit":
            print(f"compiling for {batch_size} images ...", file=sys.stderr, flush=True)
        return plan(experiment, topology, _WHAT.value, batch_size, text=text)

    if wanted == "fit":
        parts = sampling_layout(experiment, read_topology(topology).devices).batch_shards
        planned = largest_batch(plan_of, parts)
    else:
        planned = plan_of(int(wanted))
    print(json.dumps(dataclasses.asdict(planned)) if _JSON.value else table(planned))
    sys.exit(0 if planned.fits else 1)


if __name__ == "__main__":
    run_cli(main)

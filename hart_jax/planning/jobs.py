"""What a plan compiles: the very programs that training and sampling run, traced for devices that are not here."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from hart_jax.checkpoints.model_folder import abstract_tokenizer, boxed_transformer
from hart_jax.config import HartExperiment
from hart_jax.errors import UserError
from hart_jax.io.buckets import local_copy
from hart_jax.nn.dtypes import cast_weights
from hart_jax.nn.flop_counter import StepFlops, flops_of
from hart_jax.nn.int8 import quantize
from hart_jax.parallel.mesh import Placement, make_mesh, sampling_mesh
from hart_jax.parallel.rules import parameter_axes, with_changes
from hart_jax.planning.traced_parts import SYSTEM_PROMPT_TOKENS
from hart_jax.sampling.pipeline import MOST_PICTURES
from hart_jax.sampling.sampler import make_sampler
from hart_jax.text.minilm_model import MiniLMConfig
from hart_jax.text.program import EncoderConfig, encode_program, read_encoder_config
from hart_jax.text.qwen2 import QWEN2_1P5B, Qwen2Config
from hart_jax.text.qwen2_encoder import ROWS_PER_DEVICE
from hart_jax.training.hart_program import HartProgram, hart_program
from hart_jax.training.token_subsampling import keep_buckets


@dataclasses.dataclass(frozen=True)
class Job:
    """A function that is traced but not compiled, the arguments it is called with, and where they lie."""

    traced: Any
    arguments: Any
    placement: Placement
    batch_size: int
    flops: StepFlops


def training_job(experiment: HartExperiment, devices: list[Any], kept: int | None = None) -> Job:
    """A training step that keeps so many last-scale tokens; None: the most that subsampling keeps."""
    train, config = experiment.train, experiment.transformer
    placement = _placement(experiment, train.batch_size, devices)
    program = hart_program(experiment, placement)
    side = experiment.tokenizer.image_size
    arguments = (
        _at(program.init.shapes(), program.places),
        _at(abstract_tokenizer(experiment.tokenizer), placement.whole),
        jax.ShapeDtypeStruct((train.batch_size, side, side, 3), jnp.uint8, sharding=placement.batch),
        _condition(experiment, train.batch_size, placement),
        _at(jax.eval_shape(lambda: jax.random.key(0)), placement.whole),
    )
    if kept is None:
        kept = keep_buckets(config.patch_nums[-1] ** 2, experiment.loss)[-1]
    with placement.tracing():
        traced = program.step.trace(*arguments, kept)
        return Job(traced, arguments, placement, train.batch_size, program.flops(traced, arguments, kept))


def sampling_job(experiment: HartExperiment, devices: list[Any], batch_size: int = 0) -> Job:
    """Drawing a batch of pictures as `sample.py` does, on its mesh."""
    placement = sampling_placement(experiment, devices)
    parts = placement.batch_parts
    batch_size = batch_size or MOST_PICTURES * parts
    if batch_size < 1 or batch_size % parts:
        raise UserError(f"--batch_size={batch_size}: must be a multiple of the {parts} copies of the model")
    program: HartProgram = hart_program(experiment, placement)
    transformer = boxed_transformer(experiment.transformer)
    axes, transformer = parameter_axes(transformer), nn.unbox(transformer)
    narrow = functools.partial(cast_weights, dtype=program.hart.dtype)
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
        traced = sampler.trace(*arguments)
    # Nothing is computed again, and nothing learns.
    flops = flops_of(traced.jaxpr.jaxpr)
    return Job(traced, arguments, placement, batch_size, StepFlops(flops, flops))


def encoding_job(
    config: EncoderConfig, experiment: HartExperiment, placement: Placement, batch_size: int, *, training: bool
) -> Job:
    """Encoding a batch of captions as training does on the fly, or prompts as drawing does: of a large encoder at most
    `ROWS_PER_DEVICE` of each device at a time."""
    dtype, rows = experiment.train.dtype, batch_size
    if training or dtype == "auto":
        dtype = "bfloat16"
    if isinstance(config, MiniLMConfig):
        dtype = "float32"
    elif not training:
        rows = min(batch_size, ROWS_PER_DEVICE * placement.batch_parts)
        dtype = "int8" if experiment.sample.weights == "int8" else dtype
    length = experiment.transformer.context_tokens
    prefix = SYSTEM_PROMPT_TOKENS if isinstance(config, Qwen2Config) else 0
    program = encode_program(config, placement, rows, length, dtype, prefix, split=training)
    traced = program.trace()
    return Job(traced, program.arguments, placement, rows, StepFlops(0.0, flops_of(traced.jaxpr.jaxpr)))


def read_text_config(experiment: HartExperiment, file: str | None = None) -> EncoderConfig | None:
    """Of the text encoder beside training or a sampler: in this config.json, in the experiment's folder, or the
    published one where it fits the model; None where there is none, or it is another one whose folder is not here.

    Raises:
      UserError: the file is missing, or of no encoder that is known, or its states are of another width.
    """
    if experiment.transformer.num_classes:
        return None
    # Of a bucket this file alone is fetched.
    path = local_copy(file or f"{experiment.text_encoder}/config.json")
    if not file and not (experiment.text_encoder and path.is_file()):
        return QWEN2_1P5B if experiment.transformer.context_dim == QWEN2_1P5B.hidden_size else None
    return read_encoder_config(path)


def _placement(experiment: HartExperiment, batch_size: int, devices: list[Any]) -> Placement:
    mesh = make_mesh(experiment.mesh, batch_size, devices, experiment.train.accumulate)
    return Placement(mesh, with_changes(experiment.mesh.rules))


def sampling_placement(experiment: HartExperiment, devices: list[Any]) -> Placement:
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


def bytes_of(leaf: jax.ShapeDtypeStruct) -> int:
    count = 1
    for side in leaf.sharding.shard_shape(leaf.shape):
        count *= side
    return count * leaf.dtype.itemsize

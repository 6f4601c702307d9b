"""What a plan compiles: the very programs that training and sampling run, traced for devices that are not here."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from hart_jax.checkpoints.model_folder import abstract_tokenizer, boxed_transformer
from hart_jax.config import HartExperiment, Scale, Shape
from hart_jax.errors import UserError
from hart_jax.io.buckets import local_copy
from hart_jax.nn.dtypes import cast_weights
from hart_jax.nn.flop_counter import StepFlops, flops_of
from hart_jax.nn.int8 import quantize
from hart_jax.parallel.mesh import MeshLayout, make_mesh, sampling_mesh
from hart_jax.parallel.rules import parameter_axes, with_changes
from hart_jax.planning.traced_parts import SYSTEM_PROMPT_TOKENS
from hart_jax.sampling.pipeline import MOST_IMAGES
from hart_jax.sampling.sampler import make_sampler
from hart_jax.text.minilm_model import MiniLMConfig
from hart_jax.text.program import EncoderConfig, encode_program, read_encoder_config
from hart_jax.text.qwen2 import QWEN2_1P5B, Qwen2Config
from hart_jax.text.qwen2_encoder import ROWS_PER_DEVICE
from hart_jax.training.buckets import shapes_of
from hart_jax.training.hart_functions import HartFunctions, hart_functions, networks_at
from hart_jax.training.token_subsampling import kept_counts


@dataclasses.dataclass(frozen=True)
class Job:
    """A function that is traced but not compiled, the arguments it is called with, and where they lie."""

    traced: Any
    arguments: Any
    layout: MeshLayout
    batch_size: int
    flops: StepFlops


def at_image_shape(experiment: HartExperiment, shape: Shape, scales: Sequence[Scale] = ()) -> HartExperiment:
    """The experiment with all images of this height and width in pixels, in this list of scales or in `patch_nums`."""
    transformer, tokenizer = networks_at(experiment, shape, scales)
    return dataclasses.replace(
        experiment,
        tokenizer=tokenizer,
        transformer=dataclasses.replace(transformer, scale_lists=()),
        data=dataclasses.replace(experiment.data, buckets=()),
        sample=dataclasses.replace(experiment.sample, scales=()),
    )


# Height and width of the images in pixels, and the list of scales.
Step = tuple[Shape, tuple[Scale, ...]]


def training_steps(experiment: HartExperiment) -> dict[Step, tuple[int, ...]]:
    """All that a training has steps of, with the numbers of last-scale tokens that it keeps: each is a program."""
    shapes = shapes_of(experiment.data, experiment.tokenizer).values()
    return {
        (shape, scales): kept_counts(networks_at(experiment, shape, scales)[0].sizes[-1], experiment.loss)
        for shape, scales in itertools.product(shapes, experiment.transformer.lists)
    }


def largest_step(experiment: HartExperiment) -> Step:
    """The one with the most positions, where it keeps the most tokens."""

    def positions(step: Step, counts: tuple[int, ...]) -> int:
        return sum(networks_at(experiment, *step)[0].sizes[:-1]) + counts[-1]

    steps = training_steps(experiment)
    return max(steps, key=lambda step: positions(step, steps[step]))


def training_job(experiment: HartExperiment, devices: list[Any], num_kept: int | None = None) -> Job:
    """A training step that keeps so many last-scale tokens, of images of the model's size; None: the most that
    subsampling keeps."""
    train, config = experiment.train, experiment.transformer
    layout = _layout(experiment, train.batch_size, devices)
    program = hart_functions(experiment, layout)
    arguments = (
        _at(program.init.shapes(), program.shardings),
        _at(abstract_tokenizer(experiment.tokenizer), layout.replicated),
        jax.ShapeDtypeStruct(
            (train.batch_size, *experiment.tokenizer.image_shape, 3), jnp.uint8, sharding=layout.batch
        ),
        _condition(experiment, train.batch_size, layout),
        _at(jax.eval_shape(lambda: jax.random.key(0)), layout.replicated),
    )
    if num_kept is None:
        num_kept = kept_counts(config.sizes[-1], experiment.loss)[-1]
    with layout.activate():
        traced = program.step.trace(*arguments, num_kept)
        return Job(traced, arguments, layout, train.batch_size, program.flops(traced, arguments, num_kept))


def sampling_job(experiment: HartExperiment, devices: list[Any], batch_size: int = 0) -> Job:
    """Sampling a batch of images as `sample.py` does, on its mesh, in the scales of `sample.scales`."""
    experiment = experiment.sampled()
    layout = sampling_layout(experiment, devices)
    parts = layout.batch_shards
    batch_size = batch_size or MOST_IMAGES * parts
    if batch_size < 1 or batch_size % parts:
        raise UserError(f"--batch_size={batch_size}: must be a multiple of the {parts} copies of the model")
    program: HartFunctions = hart_functions(experiment, layout)
    transformer = boxed_transformer(experiment.transformer)
    axes, transformer = parameter_axes(transformer), nn.unbox(transformer)
    narrow = functools.partial(cast_weights, dtype=program.hart.dtype)
    transformer = jax.eval_shape(quantize if experiment.sample.weights == "int8" else narrow, transformer)
    weights = {
        "transformer": _at(transformer, layout.state_shardings(transformer, axes)),
        "tokenizer": _at(abstract_tokenizer(experiment.tokenizer), layout.replicated),
    }
    seeds = jax.ShapeDtypeStruct((batch_size,), jnp.uint32, sharding=layout.batch)
    indices = jax.ShapeDtypeStruct((batch_size,), jnp.int32, sharding=layout.batch)
    arguments = weights, _condition(experiment, batch_size, layout), seeds, indices
    with layout.activate():
        sampler: Any = make_sampler(program.hart, program.tokenizer, experiment.sample)
        traced = sampler.trace(*arguments)
    # Nothing is computed again, and nothing learns.
    flops = flops_of(traced.jaxpr.jaxpr)
    return Job(traced, arguments, layout, batch_size, StepFlops(flops, flops))


def encoding_job(
    config: EncoderConfig, experiment: HartExperiment, layout: MeshLayout, batch_size: int, *, training: bool
) -> Job:
    """Encoding a batch of captions as training does on the fly, or prompts as sampling does: of a large encoder at most
    `ROWS_PER_DEVICE` of each device at a time."""
    dtype, rows = experiment.train.dtype, batch_size
    if training or dtype == "auto":
        dtype = "bfloat16"
    if isinstance(config, MiniLMConfig):
        dtype = "float32"
    elif not training:
        rows = min(batch_size, ROWS_PER_DEVICE * layout.batch_shards)
        dtype = "int8" if experiment.sample.weights == "int8" else dtype
    length = experiment.transformer.context_tokens
    prefix = SYSTEM_PROMPT_TOKENS if isinstance(config, Qwen2Config) else 0
    program = encode_program(config, layout, rows, length, dtype, prefix, split=training)
    traced = program.trace()
    return Job(traced, program.arguments, layout, rows, StepFlops(0.0, flops_of(traced.jaxpr.jaxpr)))


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


def _layout(experiment: HartExperiment, batch_size: int, devices: list[Any]) -> MeshLayout:
    mesh = make_mesh(experiment.mesh, batch_size, devices, experiment.train.accumulate)
    return MeshLayout(mesh, with_changes(experiment.mesh.rules))


def sampling_layout(experiment: HartExperiment, devices: list[Any]) -> MeshLayout:
    sizes = sampling_mesh(experiment.mesh)
    if len(devices) % sizes.tensor:
        raise UserError(f"mesh.tensor={sizes.tensor}: does not divide the {len(devices)} chips")
    return MeshLayout(make_mesh(sizes, 0, devices), with_changes(sizes.rules))


def _at(tree: Any, shardings: Any) -> Any:
    """The shapes of a tree, each at its place; one place for all, or a tree of them."""
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree, shardings)


def _condition(experiment: HartExperiment, batch_size: int, layout: MeshLayout) -> Any:
    config, shape = experiment.transformer, jax.ShapeDtypeStruct
    if config.num_classes:
        return shape((batch_size,), jnp.int32, sharding=layout.batch)
    text = shape((batch_size, config.context_tokens, config.context_dim), jnp.float32, sharding=layout.batch)
    return text, shape((batch_size, config.context_tokens), jnp.int32, sharding=layout.batch)


def bytes_of(leaf: jax.ShapeDtypeStruct) -> int:
    count = 1
    for side in leaf.sharding.shard_shape(leaf.shape):
        count *= side
    return count * leaf.dtype.itemsize

"""Images from prompts with a model from anywhere: what `sample.py` and a notebook call.

pipe = load("assets/emoji")
images = pipe("a flat icon of a dog", seed=0)
tall = pipe("a flat icon of a dog", seed=0, size="2:3")
"""

import contextlib
import dataclasses
import functools
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hart_jax.checkpoints.load import load_model
from hart_jax.checkpoints.model_folder import Model, boxed_transformer
from hart_jax.config import HartExperiment, MeshConfig, SampleConfig, Shape, TransformerConfig
from hart_jax.config.scale_lists import list_of
from hart_jax.config.sizes import Size, check_shape, image_shape_of, size_text
from hart_jax.diffusion.schedule import DIFFUSION, Objective
from hart_jax.errors import UserError
from hart_jax.io.cache_dir import cache_folder
from hart_jax.io.images import to_uint8
from hart_jax.io.paths import as_path
from hart_jax.nn.dtypes import cast_weights, compute_dtype
from hart_jax.nn.int8 import quantize
from hart_jax.parallel.mesh import MeshLayout, make_mesh, put_global, sampling_mesh
from hart_jax.parallel.rules import parameter_axes, with_changes
from hart_jax.sampling.layerwise import make_layered_sampler, split_layers
from hart_jax.sampling.memory import check_memory
from hart_jax.sampling.rules import HART_RULES, NUMBERS, Rules, SampleNumbers
from hart_jax.sampling.sampler import Sampler, make_sampler
from hart_jax.text.conditioning import conditioner_of
from hart_jax.text.encoder import SYSTEM_PROMPT_FILE, text_options
from hart_jax.text.system_prompt import read_system_prompt
from hart_jax.tokenizer.model import Tokenizer
from hart_jax.transformer.mask import SCALE_CAUSAL, Mask
from hart_jax.transformer.model import Hart

# A CPU samples layer by layer from larger models, whose weights do not stay in its caches anyway.
LAYERED_BYTES = 2**28
# Sampled at a time, of each part of a batch. More are not faster; layer by layer, a second image makes use of the
# weights that are read, and more only wait for each other.
MOST_IMAGES, MOST_LAYERED = 8, 2


def use_compilation_cache() -> None:
    """Keeps compiled functions on disk, so that the next process starts quickly.

    In $JAX_COMPILATION_CACHE_DIR where that is set, else in a subfolder of `cache_folder`, or nowhere if there is none.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ and (folder := cache_folder()) is not None:
        jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def text_source(
    model: Model, experiment: HartExperiment, text_encoder: str | None = None, system_prompt: str | None = None
) -> tuple[str | Path | None, str | Path | None]:
    """Folder of the text encoder and file of its system prompt, None for none or the one in the folder.

    What is given comes before what a model brings along, and that before what the experiment names.

    Raises:
      UserError: the folder is not there, of a model that takes prompts.
    """
    if not text_encoder and model.text_encoder:
        beside = model.text_encoder / SYSTEM_PROMPT_FILE
        carried = model.system_prompt or (beside if beside.is_file() else None)
        return model.text_encoder, system_prompt or carried or experiment.system_prompt or None
    folder = text_encoder or experiment.text_encoder or None
    if folder and not as_path(folder).is_dir() and not model.transformer_config.num_classes:
        raise UserError(f"{folder}: no such folder; the model needs its text encoder: give it with --text_encoder")
    return folder, system_prompt or experiment.system_prompt or None


def check_text(text_encoder: str | None, system_prompt: str | None) -> None:
    """Raises `UserError` where these, if given, are not a text encoder's folder and a system prompt's file."""
    if text_encoder:
        text_options(text_encoder, None)
    if system_prompt:
        read_system_prompt(system_prompt)


def samples_by_layers(model: Model) -> bool:
    """Whether `make_layered_sampler` is the faster one here."""
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(model.transformer["layers"]))
    return jax.default_backend() == "cpu" and jax.device_count() == 1 and size > LAYERED_BYTES


@dataclasses.dataclass(frozen=True)
class SampleRequest:
    """An image to sample: number `index` of `prompt`, a text or the label of a class, under `seed`.

    `shape` is its height and width in pixels; None: the model's own.
    """

    prompt: str | int
    seed: int
    index: int
    shape: Shape | None = dataclasses.field(default=None, kw_only=True)


@dataclasses.dataclass(frozen=True)
class Sample(SampleRequest):
    """One sample: `image` is uint8 (H, W, 3)."""

    image: np.ndarray


def sampling_layout(
    mesh: MeshConfig, config: TransformerConfig, devices: Sequence[jax.Device] | None = None
) -> MeshLayout:
    """Where it is sampled: `sampling_mesh` over these devices, all of this process if not given.

    Raises:
      UserError: `mesh.tensor` does not divide the devices or the model, or there are several processes, which sample
        each for itself: they must name their devices.
    """
    if devices is None and jax.process_count() > 1:
        raise UserError(f"sampling in {jax.process_count()} processes: each samples on its own; start them one by one")
    devices = jax.local_devices() if devices is None else devices
    if mesh.tensor > 1 and len(devices) % mesh.tensor:
        raise UserError(f"mesh.tensor={mesh.tensor}: does not divide the {len(devices)} devices there are")
    sizes = sampling_mesh(mesh)
    layout = MeshLayout(make_mesh(sizes, 0, devices), with_changes(sizes.rules))
    layout.check_divides({"heads": config.heads, "mlp": config.mlp_width, "vocab": config.vocab_size})
    return layout


class Pipeline:
    """Samples images; compiled once per batch size and size of image, whatever the guidance, temperature, top-k and
    top-p.

    Only keeping all codes (`top_k` 0 at every scale, `top_p` 1) is a program of its own, which compiles once.

    It samples the list `settings.scales`, one of those that the model was trained on unless `untrained_scales`.
    `text_encoder` replaces the folder that the model names, `system_prompt` the file of its system prompt. Images are
    shared out over the devices, all of this process if not given; only `tensor` and `rules` of the mesh count.
    `rules` are the sampler's; `mask` and `objective` must be those that the model was trained with.
    """

    def __init__(
        self,
        model: Model,
        settings: SampleConfig,
        text_encoder: str | Path | None = None,
        system_prompt: str | Path | None = None,
        mesh: MeshConfig | None = None,
        devices: Sequence[jax.Device] | None = None,
        *,
        rules: Rules = HART_RULES,
        mask: Mask = SCALE_CAUSAL,
        objective: Objective = DIFFUSION,
        untrained_scales: bool = False,
    ):
        scales = list_of(settings.scales, model.transformer_config, untrained_scales)
        self._settings = settings.of_model(model.transformer_config, untrained_scales)
        self._rules, self._config = rules, model.transformer_config.of_list(scales)
        self._tokenizer_config = model.tokenizer_config.of_list(scales)
        config, dtype = self._config, compute_dtype(settings.dtype)
        layout = sampling_layout(mesh or MeshConfig(), config, devices)
        self._devices = list(layout.mesh.devices.flat)
        # One device needs no layout, and may be any.
        self._layout = layout if len(self._devices) > 1 else None
        self._layered = self._layout is None and samples_by_layers(model)
        self._parts = self._layout.batch_shards if self._layout else 1
        # By height and width of the images: what samples them, and how many at a time were found to fit.
        self._samplers: dict[Shape, Sampler] = {}
        self._at_once: dict[Shape, int] = {}
        text_dtype = "int8" if settings.weights == "int8" else settings.dtype
        text = text_encoder or model.text_encoder, system_prompt or model.system_prompt
        self._hart = Hart(config, dtype, mask=mask, objective=objective)
        # What does not fit the model is named before its weights are laid out.
        self._sampler_of(self.own_shape)
        with _weights_fit():
            with jax.default_device(self._devices[0]):
                self._conditioner = conditioner_of(config, *text, self._layout, text_dtype)
            self._params = self._put(model, settings)

    @property
    def settings(self) -> SampleConfig:
        """What it was made with. A call takes other `NUMBERS`; the rest is compiled in and needs another pipeline."""
        return self._settings

    @property
    def own_shape(self) -> Shape:
        """Height and width, in pixels, of the images that the model was trained on."""
        return self._tokenizer_config.image_shape

    def prepare(self, shape: Shape | None) -> None:
        """Makes ready for images of this height and width in pixels; None: the model's own. Compiles nothing.

        Raises:
          UserError: the model has no such images, the settings do not fit them, or one does not fit into memory.
        """
        self._sampler_of(shape or self.own_shape)

    def _sampler_of(self, shape: Shape) -> Sampler:
        """What samples images of this height and width: all have the same parameters."""
        if shape not in self._samplers:
            self._samplers[shape] = self._make_sampler(shape)
        return self._samplers[shape]

    def _make_sampler(self, shape: Shape) -> Sampler:
        check_shape(shape, self._tokenizer_config, f"size {size_text(shape)}")
        height, width = (side // self._tokenizer_config.downsampling for side in shape)
        config, tokenizer = self._config.of_latent(height, width), self._tokenizer_config.of_latent(height, width)
        # The model's own is tried in any case.
        if shape != self.own_shape:
            tensor = self._layout.mesh.shape["tensor"] if self._layout else 1
            check_memory(config, tokenizer, self._hart.dtype, self._devices[0], tensor)
        networks = self._hart.clone(config=config), Tokenizer(tokenizer, self._hart.dtype)
        settings = dataclasses.replace(self._settings, scales=())
        if self._layered:
            return make_layered_sampler(*networks, settings, rules=self._rules)
        return make_sampler(*networks, settings, self._layout, self._rules)

    def _put(self, model: Model, settings: SampleConfig) -> Any:
        narrow = functools.partial(cast_weights, dtype=compute_dtype(settings.dtype))
        transformer = (quantize if settings.weights == "int8" else narrow)(model.transformer)
        params = {"transformer": transformer, "tokenizer": model.tokenizer}
        if self._layout is None:
            return jax.device_put(split_layers(params) if self._layered else params, self._devices[0])
        axes = parameter_axes(boxed_transformer(model.transformer_config))
        return {
            "transformer": put_global(transformer, self._layout.state_shardings(transformer, axes)),
            "tokenizer": put_global(model.tokenizer, self._layout.replicated),
        }

    def batch_size(self, count: int, wanted: int = 0) -> int:
        """Of so many images, how many to sample at a time: `wanted`, or with 0 as many as are of use, made a multiple
        of the parts that the devices share a batch in."""
        each = -(-(wanted or count) // self._parts)
        if not wanted:
            each = min(each, MOST_LAYERED if self._layered else MOST_IMAGES)
        return self._parts * min(each, -(-count // self._parts))

    def check(self, prompts: Sequence[str | int]) -> None:
        """Raises `UserError` for none, an empty prompt, or a label that the model does not have."""
        self._conditioner.check(prompts)

    def _numbers(self, changes: Mapping[str, Any]) -> SampleNumbers:
        settings = SampleConfig.from_dict({**self._settings.to_dict(), **changes})
        settings.check_fits(self._config)
        if fixed := [name for name in changes if name not in NUMBERS]:
            raise UserError(
                f"{', '.join(fixed)}: compiled into the pipeline; give it to load or Pipeline. "
                f"A call takes {', '.join(NUMBERS)}"
            )
        shapes = self._config.shapes
        compiled, wanted = (self._rules.iterations_of(each, shapes) for each in (self._settings, settings))
        if wanted != compiled:
            raise UserError(
                f"{', '.join(changes)}: rules.iterations gives {wanted} then, not the {compiled} that are compiled "
                "into the pipeline; give them to load or Pipeline"
            )
        return SampleNumbers.of(settings, self._rules, self._config)

    def batches(
        self, batches: Iterable[Sequence[SampleRequest]], at_once: int, /, **changes: Any
    ) -> Iterator[list[Sample]]:
        """The images of each batch, of at most `at_once` of one shape; each depends on its request alone.

        Where the device's memory does not hold a batch, half of it is sampled at a time from then on. On an accelerator
        the next batch is on its way while one is looked at. `changes` are of the settings `NUMBERS`; they compile
        nothing, see `Pipeline`.

        Raises:
          UserError: a batch has images of several shapes; see `prepare`; the device has not enough memory for one
            image; or a change is no such setting, does not fit, or changes what `rules.iterations` gives.
        """
        return self._batches(batches, at_once, self._numbers(changes))

    def _batches(
        self, batches: Iterable[Sequence[SampleRequest]], at_once: int, numbers: SampleNumbers
    ) -> Iterator[list[Sample]]:
        before: tuple[Sequence[SampleRequest], list[jax.Array]] | None = None
        for batch in batches:
            started = batch, self._start(batch, at_once, numbers)
            if before is not None:
                yield self._finish(*before, at_once, numbers)
            before = started
            if self._devices[0].platform == "cpu":
                yield self._finish(*started, at_once, numbers)
                before = None
        if before is not None:
            yield self._finish(*before, at_once, numbers)

    def _shape_of(self, batch: Sequence[SampleRequest]) -> Shape:
        shape, *others = {request.shape or self.own_shape for request in batch}
        if others:
            raise UserError(f"images of {len(others) + 1} sizes in one batch: make a batch of each size")
        return shape

    def _start(self, batch: Sequence[SampleRequest], at_once: int, numbers: SampleNumbers) -> list[jax.Array]:
        shape = self._shape_of(batch)
        while True:
            each = min(at_once, self._at_once.get(shape, at_once))
            try:
                return [self._images(batch[at : at + each], each, numbers) for at in range(0, len(batch), each)]
            except (jax.errors.JaxRuntimeError, MemoryError) as error:
                self._fewer(shape, each, error)

    def _finish(
        self, batch: Sequence[SampleRequest], images: list[jax.Array], at_once: int, numbers: SampleNumbers
    ) -> list[Sample]:
        while True:
            try:
                arrays = to_uint8(np.concatenate(jax.device_get(images)))
                return [
                    Sample(one.prompt, one.seed, one.index, array, shape=one.shape)
                    for one, array in zip(batch, arrays, strict=False)
                ]
            except (jax.errors.JaxRuntimeError, MemoryError) as error:
                self._fewer(self._shape_of(batch), len(images[0]), error)
                images = self._start(batch, at_once, numbers)

    def _fewer(self, shape: Shape, count: int, error: Exception) -> None:
        """After an error while so many were sampled at a time: half of them, where memory was short."""
        if not _is_out_of_memory(error):
            raise error
        if count <= self._parts:
            smaller = "" if shape == self.own_shape else f"a smaller size than {size_text(shape)}, "
            raise UserError(
                f"out of memory: {count} images at a time do not fit on a device; "
                f"set {smaller}--config.mesh.tensor=2 or --weights=int8"
            ) from error
        fewer = self._parts * -(-count // (2 * self._parts))
        if fewer < self._at_once.get(shape, count):
            self._at_once[shape] = fewer
            print(f"{count} images at a time do not fit in the device's memory; sampling {fewer}", file=sys.stderr)

    def _images(self, batch: Sequence[SampleRequest], count: int, numbers: SampleNumbers) -> jax.Array:
        # A shorter batch is filled up, so that one compilation serves all.
        full = [*batch, *[batch[0]] * (count - len(batch))]
        seeds = np.array([request.seed for request in full], np.uint32)
        indices = np.array([request.index for request in full], np.int32)
        sample = self._sampler_of(self._shape_of(batch))
        condition = self._conditioner([request.prompt for request in full])
        where = self._devices[0] if self._layout is None else self._layout.batch
        return sample(self._params, *jax.device_put((condition, seeds, indices), where), numbers)[0]

    def sample(
        self,
        prompts: Sequence[str | int],
        num_images: int = 1,
        seed: int = 0,
        batch_size: int = 0,
        size: Size | None = None,
        **changes: Any,
    ) -> Iterator[list[Sample]]:
        """Batches of images, `num_images` of each prompt, or label for a class-conditional model.

        An image depends on (prompt, seed, its index, size) and the settings alone. `size` is "WIDTHxHEIGHT" in pixels,
        "W:H" at the model's own number of pixels, or (width, height); None: the model's own. `changes`: see `batches`.

        Raises:
          UserError: see `check`, `prepare` and `batches`, or a number is out of range.
        """
        self.check(prompts)
        _check_whole("num_images", num_images, 1)
        _check_whole("seed", seed, 0, 2**32)
        _check_whole("batch_size", batch_size, 0)
        shape = image_shape_of(size, self._tokenizer_config)
        self.prepare(shape)
        requests = [
            SampleRequest(prompt, seed, index, shape=shape) for prompt in prompts for index in range(num_images)
        ]
        at_once = self.batch_size(len(requests), batch_size)
        return self.batches(
            [requests[start : start + at_once] for start in range(0, len(requests), at_once)], at_once, **changes
        )

    def __call__(
        self,
        prompts: str | int | Sequence[str | int],
        seed: int = 0,
        num_images: int = 1,
        size: Size | None = None,
        **changes: Any,
    ) -> np.ndarray:
        """All images at once, uint8 (N, H, W, 3), prompt by prompt (or label by label); `pipe("a dog", cfg=3.0)` has
        another guidance, see `batches`, and `pipe("a dog", size="2:3")` another shape, see `sample`."""
        prompts = [prompts] if isinstance(prompts, str | int) else prompts
        return np.stack(
            [sample.image for batch in self.sample(prompts, num_images, seed, size=size, **changes) for sample in batch]
        )


def _check_whole(name: str, value: Any, least: int, end: int = 2**63) -> None:
    if not isinstance(value, int | np.integer) or not least <= value < end:
        raise UserError(f"{name}={value!r}: must be a whole number from {least} to 2**{end.bit_length() - 1} - 1")


@contextlib.contextmanager
def _weights_fit() -> Iterator[None]:
    """Makes an error of too little memory for them the user's."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        raise UserError(
            "out of memory: the weights do not fit on a device; set --weights=int8, or --config.mesh.tensor=2 on "
            "several devices"
        ) from error


def load(
    path: str | Path,
    *,
    cache: bool = True,
    rules: Rules = HART_RULES,
    mask: Mask = SCALE_CAUSAL,
    objective: Objective = DIFFUSION,
    untrained_scales: bool = False,
    **changes: Any,
) -> Pipeline:
    """A pipeline of the model at a path (see `load_model`), with the sampling settings that it brings along.

    Args:
      rules: of the sampler; `mask` and `objective`: those that the model was trained with. See `Pipeline`.
      untrained_scales: `scales` may be a list that the model was not trained on.
      changes: of the settings, by name: `load("assets/emoji", cfg=3.0, temperature=1.0)`; see `SampleConfig`.

    Raises:
      UserError: no such model, an unknown setting, or a value that does not fit.
    """
    model = load_model(path, cache)
    settings = SampleConfig.from_dict({**model.sample_config.to_dict(), **changes})
    ideas: dict[str, Any] = {"rules": rules, "mask": mask, "objective": objective}
    return Pipeline(model, settings, **ideas, untrained_scales=untrained_scales)


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)

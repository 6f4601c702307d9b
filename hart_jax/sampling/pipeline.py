"""Images from prompts with a model from anywhere: what `sample.py` and a notebook call.

pipe = load("assets/emoji")
images = pipe("a flat icon of a dog", seed=0)
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
from hart_jax.config import HartExperiment, MeshConfig, SampleConfig, TransformerConfig
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
    """An image to sample: number `index` of `prompt`, a text or the label of a class, under `seed`."""

    prompt: str | int
    seed: int
    index: int


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
    """Samples images; compiled once per batch size, whatever the guidance, temperature, top-k and top-p.

    Only keeping all codes (`top_k` 0 at every scale, `top_p` 1) is a program of its own, which compiles once.

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
    ):
        self._settings, self._rules, self._config = settings, rules, model.transformer_config
        config, dtype = model.transformer_config, compute_dtype(settings.dtype)
        layout = sampling_layout(mesh or MeshConfig(), config, devices)
        self._devices = list(layout.mesh.devices.flat)
        # One device needs no layout, and may be any.
        self._layout = layout if len(self._devices) > 1 else None
        self._layered = self._layout is None and samples_by_layers(model)
        self._parts = self._layout.batch_shards if self._layout else 1
        # What was found to fit.
        self._at_once = sys.maxsize
        text_dtype = "int8" if settings.weights == "int8" else settings.dtype
        text = text_encoder or model.text_encoder, system_prompt or model.system_prompt
        hart = Hart(config, dtype, mask=mask, objective=objective)
        networks = hart, Tokenizer(model.tokenizer_config, dtype)
        self._sample: Sampler = (
            make_layered_sampler(*networks, settings, rules=rules)
            if self._layered
            else make_sampler(*networks, settings, self._layout, rules)
        )
        with _weights_fit():
            with jax.default_device(self._devices[0]):
                self._conditioner = conditioner_of(config, *text, self._layout, text_dtype)
            self._params = self._put(model, settings)

    @property
    def settings(self) -> SampleConfig:
        """What it was made with. A call takes other `NUMBERS`; the rest is compiled in and needs another pipeline."""
        return self._settings

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
        sides = self._config.patch_nums
        compiled, wanted = (self._rules.iterations_of(each, sides) for each in (self._settings, settings))
        if wanted != compiled:
            raise UserError(
                f"{', '.join(changes)}: rules.iterations gives {wanted} then, not the {compiled} that are compiled "
                "into the pipeline; give them to load or Pipeline"
            )
        return SampleNumbers.of(settings, self._rules, self._config)

    def batches(
        self, batches: Iterable[Sequence[SampleRequest]], size: int, /, **changes: Any
    ) -> Iterator[list[Sample]]:
        """The images of each batch, of at most `size`; each depends on its request alone.

        Where the device's memory does not hold a batch, half of it is sampled at a time from then on. On an accelerator
        the next batch is on its way while one is looked at. `changes` are of the settings `NUMBERS`; they compile
        nothing, see `Pipeline`.

        Raises:
          UserError: the device has not enough memory for one image, or a change is no such setting, does not fit, or
            changes what `rules.iterations` gives.
        """
        return self._batches(batches, size, self._numbers(changes))

    def _batches(
        self, batches: Iterable[Sequence[SampleRequest]], size: int, numbers: SampleNumbers
    ) -> Iterator[list[Sample]]:
        before: tuple[Sequence[SampleRequest], list[jax.Array]] | None = None
        for batch in batches:
            started = batch, self._start(batch, size, numbers)
            if before is not None:
                yield self._finish(*before, size, numbers)
            before = started
            if self._devices[0].platform == "cpu":
                yield self._finish(*started, size, numbers)
                before = None
        if before is not None:
            yield self._finish(*before, size, numbers)

    def _start(self, batch: Sequence[SampleRequest], size: int, numbers: SampleNumbers) -> list[jax.Array]:
        while True:
            each = min(size, self._at_once)
            try:
                return [self._images(batch[at : at + each], each, numbers) for at in range(0, len(batch), each)]
            except (jax.errors.JaxRuntimeError, MemoryError) as error:
                self._fewer(each, error)

    def _finish(
        self, batch: Sequence[SampleRequest], images: list[jax.Array], size: int, numbers: SampleNumbers
    ) -> list[Sample]:
        while True:
            try:
                arrays = to_uint8(np.concatenate(jax.device_get(images)))
                return [
                    Sample(one.prompt, one.seed, one.index, array) for one, array in zip(batch, arrays, strict=False)
                ]
            except (jax.errors.JaxRuntimeError, MemoryError) as error:
                self._fewer(len(images[0]), error)
                images = self._start(batch, size, numbers)

    def _fewer(self, size: int, error: Exception) -> None:
        """After an error while so many were sampled at a time: half of them, where memory was short."""
        if not _is_out_of_memory(error):
            raise error
        if size <= self._parts:
            raise UserError(
                f"out of memory: {size} images at a time do not fit on a device; "
                "set --config.mesh.tensor=2 or --weights=int8"
            ) from error
        fewer = self._parts * -(-size // (2 * self._parts))
        if fewer < self._at_once:
            self._at_once = fewer
            print(f"{size} images at a time do not fit in the device's memory; sampling {fewer}", file=sys.stderr)

    def _images(self, batch: Sequence[SampleRequest], size: int, numbers: SampleNumbers) -> jax.Array:
        # A shorter batch is filled up, so that one compilation serves all.
        full = [*batch, *[batch[0]] * (size - len(batch))]
        seeds = np.array([request.seed for request in full], np.uint32)
        indices = np.array([request.index for request in full], np.int32)
        condition = self._conditioner([request.prompt for request in full])
        where = self._devices[0] if self._layout is None else self._layout.batch
        return self._sample(self._params, *jax.device_put((condition, seeds, indices), where), numbers)[0]

    def sample(
        self, prompts: Sequence[str | int], num_images: int = 1, seed: int = 0, batch_size: int = 0, **changes: Any
    ) -> Iterator[list[Sample]]:
        """Batches of images, `num_images` of each prompt, or label for a class-conditional model.

        An image depends on (prompt, seed, its index) and the settings alone. `changes`: see `batches`.

        Raises:
          UserError: see `check` and `batches`, or a number is out of range.
        """
        self.check(prompts)
        _check_whole("num_images", num_images, 1)
        _check_whole("seed", seed, 0, 2**32)
        _check_whole("batch_size", batch_size, 0)
        requests = [SampleRequest(prompt, seed, index) for prompt in prompts for index in range(num_images)]
        size = self.batch_size(len(requests), batch_size)
        return self.batches(
            [requests[start : start + size] for start in range(0, len(requests), size)], size, **changes
        )

    def __call__(
        self, prompts: str | int | Sequence[str | int], seed: int = 0, num_images: int = 1, **changes: Any
    ) -> np.ndarray:
        """All images at once, uint8 (N, H, W, 3), prompt by prompt (or label by label); `pipe("a dog", cfg=3.0)` has
        another guidance, see `batches`."""
        prompts = [prompts] if isinstance(prompts, str | int) else prompts
        return np.stack(
            [sample.image for batch in self.sample(prompts, num_images, seed, **changes) for sample in batch]
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
    **changes: Any,
) -> Pipeline:
    """A pipeline of the model at a path (see `load_model`), with the sampling settings that it brings along.

    Args:
      rules: of the sampler; `mask` and `objective`: those that the model was trained with. See `Pipeline`.
      changes: of the settings, by name: `load("assets/emoji", cfg=3.0, temperature=1.0)`; see `SampleConfig`.

    Raises:
      UserError: no such model, an unknown setting, or a value that does not fit.
    """
    model = load_model(path, cache)
    settings = SampleConfig.from_dict({**model.sample_config.to_dict(), **changes})
    return Pipeline(model, settings, rules=rules, mask=mask, objective=objective)


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)

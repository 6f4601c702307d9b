"""Pipelines: the same tokens in any batch on any devices, batch sizes by memory, where a text encoder comes from."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from hart_jax.checkpoints.model_folder import abstract_tokenizer, abstract_transformer, read_model, write_model
from hart_jax.config import HartExperiment, SampleConfig, read_experiment
from hart_jax.errors import UserError
from hart_jax.sampling import memory, pipeline
from hart_jax.sampling.pipeline import MOST_IMAGES, Pipeline, SampleRequest, text_source
from hart_jax.sampling.rules import Rules
from hart_jax.sampling.sampler import make_sampler
from hart_jax.tokenizer.model import Tokenizer
from hart_jax.transformer.model import Hart
from tests.sample_runs import ROOT, environment, sample, write_released
from tests.tiny import tiny_model
from tests.tiny_qwen2 import SYSTEM_PROMPT

SETTINGS = SampleConfig(top_k=8, top_k_late=8)
SIDES_1024 = (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)
LABELS = tiny_model(num_classes=3, context_tokens=1)


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    return write_released(tmp_path_factory.mktemp("released"))


def released_flags(released: Path) -> list[str]:
    return [f"--config={released / 'released.py'}", f"--checkpoint={released / 'release'}"]


@pytest.mark.slow
def test_the_released_folders_sample(released, tmp_path):
    """And from the second time on with the weights converted before: the same images."""
    (released / "prompts.txt").write_text("7\ta red apple\na blue dog\n")
    given = [f"--prompts_file={released / 'prompts.txt'}", f"--text_encoder={released / 'qwen2'}"]
    files = []
    for start in range(2):
        out = tmp_path / f"out{start}"
        code, _, err = sample(
            released, *released_flags(released), *given, "--system_prompt=system_prompt.md", f"--out={out}"
        )
        assert code == 0 and "warning" not in err, err
        assert len(list((released / "cache/converted").iterdir())) == 1
        files.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert files[0] == files[1] and len(files[0]) == 4
    run, first, second = map(json.loads, (out / "00000-pictures.jsonl").read_text().splitlines())
    assert (first["seed"], second["seed"], run["batch_size"]) == (7, 0, 2)
    # Without what is kept, and without a system prompt: another image.
    code, _, err = sample(released, *released_flags(released), *given, "--nocache", f"--out={out}")
    assert code == 0, err
    assert (out / "00002-a-red-apple.png").read_bytes() != files[0]["00000-a-red-apple.png"]


def test_the_text_encoder_is_the_given_then_the_models_then_the_configs(released, tmp_path):
    experiment = read_experiment(released / "released.py")
    assert isinstance(experiment, HartExperiment)
    folder = str(released / "qwen2")
    named = dataclasses.replace(experiment, text_encoder=folder, system_prompt="data/hart")
    plain = tiny_model()
    assert text_source(plain, experiment) == (None, None)
    assert text_source(plain, named) == (folder, "data/hart")
    mine = str(tmp_path)
    assert text_source(plain, named, mine) == (mine, "data/hart")
    assert text_source(plain, named, mine, "prompt.txt") == (mine, "prompt.txt")
    own = dataclasses.replace(plain, text_encoder=released / "qwen2", system_prompt=released / "system_prompt.md")
    assert text_source(own, named) == (released / "qwen2", released / "system_prompt.md")
    write_model(tmp_path / "model", own)
    beside = tmp_path / "model/text_encoder/system_prompt.txt"
    assert beside.read_text() == SYSTEM_PROMPT
    assert text_source(read_model(tmp_path / "model"), named) == (tmp_path / "model/text_encoder", beside)


_ON_DEVICES = """
import dataclasses
import sys
import jax
import numpy as np
from hart_jax.config import MeshConfig
from hart_jax.config import SampleConfig
from hart_jax.sampling.pipeline import SampleRequest, Pipeline
from tests.tiny import tiny_model

folder = sys.argv[1]
model = tiny_model(context_tokens=16, context_dim=24, heads=4)
words = ("a red apple", "a blue dog", "the side of the dog")
requests = [SampleRequest(words[number % 3], number // 2, number % 2) for number in range(8)]


def tokens(devices, batch, weights="float", shape=None, scales=(), **mesh):
    settings = SampleConfig(top_k=8, top_k_late=8, weights=weights, scales=scales)
    text, mesh, devices = (folder + "/qwen2", folder + "/system_prompt.md"), MeshConfig(**mesh), jax.devices()[:devices]
    pipe = Pipeline(model, settings, *text, mesh, devices, untrained_scales=True)
    shape = shape or pipe.own_shape
    pipe.prepare(shape)
    size, found, sampler = pipe.batch_size(8, batch), [], pipe._samplers[shape]

    def sample(*inputs):
        images, indices = sampler(*inputs)
        found.append(np.concatenate([np.asarray(index) for index in indices], axis=1))
        return images, indices

    pipe._samplers[shape] = sample
    wanted = [dataclasses.replace(request, shape=shape) for request in requests]
    batches = [wanted[start : start + size] for start in range(0, 8, size)]
    images = [sample.image for batch in pipe.batches(batches, size) for sample in batch]
    return size, np.concatenate(found)[:8], np.stack(images), pipe


one = tokens(1, 1)
assert one[0] == 1 and len(np.unique(one[1], axis=0)) == 8
for devices, batch, mesh in ((1, 8, {}), (8, 3, {"fsdp": 16}), (4, 2, {"tensor": 2, "data": 4})):
    size, found, images, pipe = tokens(devices, batch, **mesh)
    np.testing.assert_array_equal(found, one[1], err_msg=str((devices, batch, mesh)))
    assert np.abs(images.astype(int) - one[2]).max() <= 1
    assert size == {1: 8, 8: 8, 4: 2}[devices]
    if mesh.get("tensor"):
        kernel = pipe._params["transformer"]["layers"]["attn"]["qkv"]
        assert kernel.addressable_shards[0].data.size * 2 == kernel.size
_, _, images, pipe = tokens(4, 8, "int8", tensor=2)
assert pipe._params["transformer"]["layers"]["attn"]["qkv"].values.dtype == np.int8
assert (images != one[2]).any()
for scales in ((), (1, 4)):
    one = tokens(1, 1, shape=(12, 6), scales=scales)
    for devices, mesh in ((8, {}), (4, {"tensor": 2})):
        _, found, images, _ = tokens(devices, 8, shape=(12, 6), scales=scales, **mesh)
        np.testing.assert_array_equal(found, one[1], err_msg=str((devices, mesh)))
        assert images.shape == (8, 12, 6, 3) and np.abs(images.astype(int) - one[2]).max() <= 1
"""


@pytest.mark.slow
def test_batches_and_devices_do_not_change_a_token(released):
    command = [sys.executable, "-c", _ON_DEVICES, str(released)]
    done = subprocess.run(command, cwd=ROOT, env=environment(released, 8), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_pipeline_of_labels_rounds_its_batches_and_explains_too_little_memory(monkeypatch):
    pipe = Pipeline(LABELS, SETTINGS)
    assert pipe.batch_size(20, 3) == 3 and pipe.batch_size(2, 3) == 2
    assert pipe.batch_size(20) == MOST_IMAGES
    assert pipe([1, 2], seed=3).shape == (2, 8, 8, 3)

    def too_big(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes")

    monkeypatch.setitem(pipe._samplers, pipe.own_shape, too_big)
    with pytest.raises(UserError, match=r"out of memory: 1 images at a time do not fit on a device; set --config"):
        list(pipe.sample([0, 1], num_images=2, batch_size=4))
    broken = jax.errors.JaxRuntimeError("INTERNAL")
    monkeypatch.setitem(pipe._samplers, pipe.own_shape, lambda *_: (_ for _ in ()).throw(broken))
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        list(pipe.sample([0]))


@pytest.mark.parametrize("where", ["when it starts", "when it is fetched"])
def test_where_memory_ends_fewer_are_sampled_at_a_time(where, monkeypatch, capsys):
    pipe = Pipeline(LABELS, SETTINGS)
    prompts, sample, sizes = [0, 1, 2, 1, 0, 2, 1], pipe._samplers[pipe.own_shape], []
    expected = pipe(prompts, seed=5)
    too_much = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes")

    class Lost:
        def __len__(self):
            return sizes[-1]

    def limited(params, condition, seeds, indices, numbers):
        sizes.append(len(seeds))
        if sizes[-1] <= 2:
            return sample(params, condition, seeds, indices, numbers)
        if where == "when it starts":
            raise too_much
        return (Lost(),)

    fetch = jax.device_get

    def device_get(images):
        if any(isinstance(image, Lost) for image in images):
            raise too_much
        return fetch(images)

    monkeypatch.setitem(pipe._samplers, pipe.own_shape, limited)
    monkeypatch.setattr(jax, "device_get", device_get)
    np.testing.assert_array_equal(pipe(prompts, seed=5), expected)
    assert sizes[0] == 7 and sizes[-4:] == [2, 2, 2, 2] and set(sizes) == {7, 4, 2}
    assert "7 images at a time do not fit in the device's memory; sampling 4" in capsys.readouterr().err
    sizes.clear()
    pipe(prompts, seed=6)
    assert sizes == [2, 2, 2, 2]


def test_one_device_cannot_be_split_and_several_processes_sample_apart(monkeypatch):
    with pytest.raises(UserError, match=r"mesh.tensor=2: does not divide the 1 devices"):
        Pipeline(LABELS, SETTINGS, mesh=pipeline.MeshConfig(tensor=2))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="sampling in 2 processes: each samples on its own"):
        Pipeline(LABELS, SETTINGS)


def test_images_in_bfloat16_are_near_those_in_float32():
    one_code = dataclasses.replace(SETTINGS, top_k=1, top_k_late=1)
    exact, near = (
        Pipeline(LABELS, dataclasses.replace(one_code, dtype=dtype))([0, 1, 2]).astype(float)
        for dtype in ("float32", "bfloat16")
    )
    assert 0 < np.abs(near - exact).mean() < 0.2 * exact.std()
    with pytest.raises(UserError, match="dtype='half': must be one of auto, float32, bfloat16"):
        SampleConfig(dtype="half")


def test_latents_are_decoded_in_parts():
    # Four at once, and two and two: three do not divide four.
    settings = [dataclasses.replace(SETTINGS, decode_at_once=count) for count in (0, 3)]
    images, others = (Pipeline(LABELS, each)([0, 1], num_images=2) for each in settings)
    assert np.abs(others.astype(int) - images).max() <= 1
    with pytest.raises(UserError, match="decode_at_once=-1"):
        SampleConfig(decode_at_once=-1)


@pytest.mark.parametrize("layered", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_numbers_of_a_call_compile_nothing(layered, monkeypatch, caplog):
    monkeypatch.setattr(pipeline, "samples_by_layers", lambda model: layered)
    model = tiny_model(num_classes=3, context_tokens=1)
    settings = SampleConfig(cfg=0.7, top_k=8, top_k_late=4, top_p=0.9)
    other = {"cfg": 3.1, "temperature": 0.7, "top_k": 3, "top_k_late": 0, "late_scale": 1, "top_p": 0.8}
    pipe = Pipeline(model, settings)
    plain = pipe([0, 1])
    with jax.log_compiles(), caplog.at_level("WARNING"):
        changed = pipe([0, 1], **other)
        assert not [record for record in caplog.records if "Compiling" in record.message]
        expected = Pipeline(model, dataclasses.replace(settings, **other))([0, 1])
        assert [record for record in caplog.records if "Compiling" in record.message]
    np.testing.assert_array_equal(changed, expected)
    assert (changed != plain).any()
    np.testing.assert_array_equal(pipe([0, 1]), plain)
    # None of all, and then some: another program, of the same pipeline.
    everything = {"top_k": 0, "top_k_late": 0, "top_p": 1.0}
    whole = Pipeline(model, dataclasses.replace(settings, **everything))([0, 1])
    np.testing.assert_array_equal(pipe([0, 1], **everything), whole)


def test_what_a_call_cannot_change_is_named():
    pipe = Pipeline(tiny_model(num_classes=3, context_tokens=1), SampleConfig(top_k=8, top_k_late=4))
    with pytest.raises(UserError, match="smooth: compiled into the pipeline; give it to load or Pipeline"):
        pipe(0, smooth=True)
    with pytest.raises(UserError, match="unknown key temprature"):
        pipe(0, temprature=1.0)
    with pytest.raises(UserError, match="top_k=17: the codebook has 16 codes"):
        pipe(0, top_k=17)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"seed": -1}, r"seed=-1: must be a whole number from 0 to 2\*\*32 - 1"),
        ({"seed": 2**32}, "seed=4294967296: must be"),
        ({"num_images": 0}, "num_images=0: must be a whole number from 1"),
        ({"num_images": 2.0}, "num_images=2.0: must be"),
        ({"batch_size": -1}, "batch_size=-1: must be"),
        ({"size": 64}, 'size 64: give "768x1152", "2:3", or width and height'),
        ({"size": "9x12"}, "size 9x12: height and width must be multiples of 2 px; give 8x12 or 10x12"),
        ({"size": (2, 4)}, "size 2x4: too small for the 3 scales of the model; give 4x6 or more"),
        ({"size": "1:5"}, "ratio 1:5: at most 4:1 is possible"),
        ({"cfg": 1e39}, r"cfg=1e\+39: must be 0 or more and finite, as float32"),
        ({"temperature": 1e-39}, "temperature=1e-39: must be above 0 and finite, as float32"),
        (
            {"late_scale": 1},
            r"late_scale: rules.iterations gives \[1, 3, 3\] then, not the \[1, 1, 3\] that are compiled",
        ),
    ],
)
def test_what_a_call_cannot_be_made_with_is_named(call, message):
    def finer_late(settings, scale, scales):
        return 3 if scale >= settings.late_scale else 1

    settings = SampleConfig(top_k=8, top_k_late=4, late_scale=2)
    pipe = Pipeline(tiny_model(num_classes=3, context_tokens=1), settings, rules=Rules(iterations=finer_late))
    with pytest.raises(UserError, match=message):
        pipe(0, **call)


def test_a_call_takes_numbers_of_arrays():
    pipe = Pipeline(LABELS, SETTINGS)
    for cfg in np.linspace(1.0, 2.0, 2):
        np.testing.assert_array_equal(pipe(0, cfg=cfg, top_k=np.int64(4)), pipe(0, cfg=float(cfg), top_k=4))


@pytest.mark.parametrize("label", ["a dog", 0.5])
def test_what_is_no_label_is_named(label):
    with pytest.raises(UserError, match=f"label {label!r}: the model has labels 0 to 2"):
        Pipeline(LABELS, SETTINGS)([label])


@pytest.mark.parametrize("layered", [False, True])
def test_a_pipeline_samples_images_of_any_size(layered, monkeypatch):
    monkeypatch.setattr(pipeline, "samples_by_layers", lambda model: layered)
    pipe = Pipeline(LABELS, SETTINGS)
    plain = pipe([0, 1], seed=3)
    for size in ("8x8", "1:1", (8, 8)):
        np.testing.assert_array_equal(pipe([0, 1], seed=3, size=size), plain)
    assert list(pipe._samplers) == [(8, 8)]
    wide = pipe([0, 1], seed=3, size="12x6")
    assert wide.shape == (2, 6, 12, 3)
    np.testing.assert_array_equal(pipe([0, 1], seed=3, size=(12, 6)), wide)
    # Alone, and of a pipeline that has seen no other size.
    alone = Pipeline(LABELS, SETTINGS)(1, seed=3, size="12x6")
    assert np.abs(alone[0].astype(int) - wide[1]).max() <= 1
    np.testing.assert_array_equal(pipe([0, 1], seed=3), plain)


@pytest.mark.parametrize("changes", [{"weights": "int8"}, {"masked_iterations": 3, "smooth": True}])
def test_every_setting_has_its_effect_at_other_sizes(changes):
    plain, other = (Pipeline(LABELS, dataclasses.replace(SETTINGS, **each))(0, size="6x12") for each in ({}, changes))
    assert other.shape == (1, 12, 6, 3) and (other != plain).any()


def test_iterations_fit_the_size():
    pipe = Pipeline(LABELS, dataclasses.replace(SETTINGS, masked_iterations=16))
    with pytest.raises(UserError, match="masked_iterations=16: the last scale has 15 positions"):
        pipe(0, size="6x10")


def test_a_batch_has_one_size():
    pipe = Pipeline(LABELS, SETTINGS)
    requests = [SampleRequest(0, 0, 0), SampleRequest(0, 0, 0, shape=(6, 12))]
    with pytest.raises(UserError, match="images of 2 sizes in one batch: make a batch of each size"):
        next(pipe.batches([requests], 2))


def test_a_size_that_cannot_fit_into_memory_is_refused_before_it_is_compiled(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 0)
    pipe = Pipeline(LABELS, SETTINGS)
    # The model's own size is tried in any case.
    assert len(pipe(0)) == 1
    with pytest.raises(UserError, match=r"size 12x6: one image takes \S+ GiB or more, and 0.0 GiB are free; give a"):
        pipe.sample([0], size="12x6")
    monkeypatch.undo()
    with pytest.raises(
        UserError, match=r"size 800000x800000: one image takes 95,\S+ GiB or more, and \S+ GiB are free"
    ):
        pipe(0, size="800000x800000")


def test_what_an_accelerator_has_left_counts():
    class Device:
        platform = "gpu"

        def __init__(self, stats):
            self.memory_stats = lambda: stats

    configs = LABELS.transformer_config, LABELS.tokenizer_config, None
    needed = memory.bytes_of_one(*configs)
    for stats in (None, {}, {"bytes_limit": needed + 5, "bytes_in_use": 5}):
        memory.check_memory(*configs, Device(stats))
    with pytest.raises(UserError, match="size 8x8: one image takes"):
        memory.check_memory(*configs, Device({"bytes_limit": needed + 5, "bytes_in_use": 6}))


@pytest.mark.parametrize("vocab_size", [16, pytest.param(2048, marks=pytest.mark.slow)])
def test_the_memory_of_an_image_is_not_overestimated(vocab_size):
    config = dataclasses.replace(LABELS.transformer_config, vocab_size=vocab_size).of_latent(16, 24)
    tokenizer = dataclasses.replace(LABELS.tokenizer_config, vocab_size=vocab_size).of_latent(16, 24)
    params = {"transformer": abstract_transformer(config), "tokenizer": abstract_tokenizer(tokenizer)}
    rows = [jax.ShapeDtypeStruct((1,), kind) for kind in (np.int32, np.uint32, np.int32)]
    program = make_sampler(Hart(config), Tokenizer(tokenizer), SampleConfig(top_k=0, top_k_late=0))
    taken = program.lower(params, *rows).compile().memory_analysis().temp_size_in_bytes
    assert taken / 8 < memory.bytes_of_one(config, tokenizer, None) < taken

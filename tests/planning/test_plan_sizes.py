"""Plans at other sizes than the model's, and of training with buckets: what is compiled, said and refused."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest

from hart_jax.config import HartExperiment, read_experiment
from hart_jax.config.experiment import experiment_from
from hart_jax.planning.jobs import at_image_shape, largest_step, sampling_job, training_job, training_steps
from hart_jax.planning.plan_report import table
from tests.in_process import run_here
from tests.planning.test_plan import SMALL, changed, needs_libtpu, run, write_config
from tests.tiny import experiment_values

BUCKETS = ("1:1", "2:3", "3:2", "9:16", "16:9")


def bucketed(experiment: HartExperiment, *buckets: str) -> HartExperiment:
    return dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, buckets=buckets))


def tiny_experiment(*buckets: str) -> HartExperiment:
    experiment = experiment_from(experiment_values())
    assert isinstance(experiment, HartExperiment)
    train = dataclasses.replace(experiment.train, batch_size=2)
    return bucketed(dataclasses.replace(experiment, train=train), *buckets)


def test_the_table_says_of_which_size_and_how_many_steps_a_run_compiles():
    sized = changed(SMALL, image_size=(1248, 832), buckets=1, programs=4)
    lines = table(sized).splitlines()
    assert lines[0].endswith("global batch 512, remat full, 832x1248 px")
    assert lines[-2] == "a run compiles    at most 4 steps; this is the largest"
    lines = table(changed(sized, buckets=5, programs=20)).splitlines()
    assert lines[-2] == "a run compiles    at most 20 steps, of 5 buckets; this is the largest"
    lines = table(changed(sized, buckets=5, lists=3, programs=60)).splitlines()
    assert lines[-2] == "a run compiles    at most 60 steps, of 5 buckets and 3 lists of scales; this is the largest"
    sampled = table(changed(SMALL, what="sample", image_size=512))
    assert sampled.splitlines()[0].endswith("sampling, 512x512 px") and "a run compiles" not in sampled


def test_a_training_compiles_a_step_for_each_bucket_list_and_kept_count():
    released = read_experiment("configs/hart_0p7b_1024.py")
    assert isinstance(released, HartExperiment)
    whole = released.transformer.patch_nums
    assert training_steps(released) == {((1024, 1024), whole): (32, 704, 1376, 2048)}
    assert largest_step(released) == ((1024, 1024), whole)
    steps = training_steps(bucketed(released, *BUCKETS))
    assert [shape for shape, _ in steps] == [(1024, 1024), (1248, 832), (832, 1248), (1360, 768), (768, 1360)]
    positions = {}
    for (shape, scales), counts in steps.items():
        # Half of the last scale's tokens at most, and as few as a square keeps.
        assert len(counts) == 4 and counts[0] == 32 and counts[-1] == shape[0] * shape[1] // 512
        positions[shape, scales] = sum(at_image_shape(released, shape).transformer.sizes[:-1]) + counts[-1]
    largest = positions[largest_step(bucketed(released, *BUCKETS))]
    assert largest == max(positions.values()) > positions[(1024, 1024), whole]


def test_lists_of_scales_are_trained_on_in_every_bucket():
    tiny = tiny_experiment("1:1", "2:1")
    lists = dataclasses.replace(tiny, transformer=dataclasses.replace(tiny.transformer, scale_lists=((1, 4),)))
    steps = training_steps(lists)
    assert list(steps) == list(itertools.product([(8, 8), (6, 12)], [(1, 2, 4), (1, 4)]))
    assert largest_step(lists) == ((6, 12), (1, 2, 4))
    short = at_image_shape(lists, (6, 12), (1, 4))
    assert short.transformer.shapes == short.tokenizer.shapes == ((1, 1), (3, 6))
    assert short.transformer.levels == (0, 2) and short.transformer.lists == ((1, (3, 6)),)
    # What is sampled is another list, which a training does not ask for.
    sampled = dataclasses.replace(lists, sample=dataclasses.replace(lists.sample, scales=2))
    assert at_image_shape(sampled, (6, 12)).transformer == at_image_shape(lists, (6, 12)).transformer
    assert at_image_shape(sampled.sampled(), (6, 12)).transformer == short.transformer


def test_an_experiment_of_another_shape():
    tiny = tiny_experiment()
    assert at_image_shape(tiny, (8, 8)) == tiny
    wide = at_image_shape(tiny, (6, 12))
    assert wide.tokenizer.image_shape == (6, 12) and wide.transformer.shapes[-1] == (3, 6)
    assert dataclasses.replace(wide, tokenizer=tiny.tokenizer, transformer=tiny.transformer) == tiny


@pytest.mark.slow
def test_what_is_planned_is_the_program_of_its_size():
    """The step's images and the sampler's have that shape; what is trained has the same parameters."""
    tiny, devices = tiny_experiment(), jax.devices()[:1]
    wide = at_image_shape(tiny, (6, 12))
    square, job = (training_job(each, devices) for each in (tiny, wide))
    assert job.arguments[2].shape == (2, 6, 12, 3)
    assert jax.tree.map(np.shape, job.arguments[:2]) == jax.tree.map(np.shape, square.arguments[:2])
    # 18 tokens for 16: more work.
    assert 1 < job.flops.model / square.flops.model < 1.5
    sampled = sampling_job(wide, devices, 2)
    image, *_ = jax.tree.leaves(sampled.traced.out_info)
    assert image.shape == (2, 6, 12, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size=64x96"], "64x96: a size is of --what=sample; training has --config.data.buckets"),
        (["--what=sample", "--size=64x99"], "size 64x99: height and width must be multiples of 8 px; give 64x96 or"),
        (["--what=sample", "--size=64x96", "--aspect_ratio=2:3"], "--aspect_ratio: a --size has a ratio already"),
        (['--config.data.buckets=("1:1", "1:5")'], "data.buckets: ratio 1:5: at most 4:1"),
    ],
)
def test_wrong_sizes_end_before_compiling(arguments, message):
    given = ["--config=configs/emoji_hart.py", "--topology=v5e:2x2", *arguments]
    code, _, err = run_here("hart_jax.planning.plan", *given)
    assert code == 2 and message in err and err.count("\n") == 1, err


@needs_libtpu
@pytest.mark.parametrize("size", ["--size=12x6", "--aspect_ratio=2:1"])
def test_a_tiny_sampler_of_another_size_for_a_tpu(size, tmp_path):
    done = run(f"--config={write_config(tmp_path)}", "--topology=v5e:2x2", "--json", "--what=sample", size)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["image_size"] == [6, 12] and found["programs"] == 0 and found["peak"] > found["arguments"] > 0


@needs_libtpu
def test_a_tiny_training_with_buckets_for_a_tpu(tmp_path):
    buckets = '--config.data.buckets=("1:1", "1:2", "2:1")'
    given = ["--topology=v5e:2x2", "--json", buckets, "--config.train.batch_size=8"]
    done = run(f"--config={write_config(tmp_path)}", *given)
    assert done.returncode == 0, done.stderr
    found, experiment = json.loads(done.stdout), tiny_experiment("1:1", "1:2", "2:1")
    programs = sum(map(len, training_steps(experiment).values()))
    assert found["image_size"] == list(largest_step(experiment)[0]) and found["fits"]
    assert (found["buckets"], found["lists"], found["programs"]) == (3, 1, programs)

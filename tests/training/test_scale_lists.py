"""Training on several lists of scales: which one a step has, and that `patch_nums` are trained as they are alone."""

import dataclasses
import functools
import math
import shutil
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hart_jax.checkpoints.model_folder import abstract_tokenizer
from hart_jax.checkpoints.orbax import CHECKPOINT_DIR
from hart_jax.checkpoints.workdir import read_workdir
from hart_jax.config import HartExperiment, experiment_from
from hart_jax.parallel.mesh import MeshLayout
from hart_jax.training.hart_functions import HartFunctions, hart_functions
from hart_jax.training.hart_step import tokens_at, tokens_of
from hart_jax.training.list_draws import draw_list
from hart_jax.training.metrics import SAMPLES_DIR, read_metrics
from hart_jax.training.token_subsampling import draw_num_kept
from tests.in_process import run_here
from tests.kill_and_resume import assert_same_run
from tests.tiny import TOKENIZER, experiment_values, tiny_model
from tests.train_runs import run_to_end, without_sampling, write_hart_config

BATCH, KEPT, SHAPE = 4, 8, jax.ShapeDtypeStruct
LISTED = {"scale_lists": [[1, 4]]}
PARAMS = abstract_tokenizer(TOKENIZER)


def test_every_list_is_as_likely_as_the_others():
    drawn = [draw_list(3, step, "abc") for step in range(3000)]
    # Five standard deviations.
    assert all(abs(count - 1000) < 5 * math.sqrt(3000 * 2 / 9) for count in Counter(drawn).values())
    assert drawn == [draw_list(3, step, "abc") for step in range(3000)]
    assert drawn != [draw_list(4, step, "abc") for step in range(3000)]
    assert draw_list(3, 7, ["alone"]) == "alone"


def test_lists_are_drawn_apart_from_the_numbers_of_kept_tokens():
    loss = experiment_from(experiment_values()).loss
    steps = range(1, 3001)
    pairs = Counter((draw_list(0, step, "abc"), draw_num_kept(0, step, 1024, loss)) for step in steps)
    kept = Counter(draw_num_kept(0, step, 1024, loss) for step in steps)
    for (_, count), found in pairs.items():
        assert abs(found - kept[count] / 3) < 5 * math.sqrt(kept[count] * 2 / 9)


@functools.cache
def functions(listed: bool) -> HartFunctions:
    experiment = experiment_from(experiment_values(**(LISTED if listed else {})))
    assert isinstance(experiment, HartExperiment)
    experiment = dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, batch_size=BATCH))
    return hart_functions(experiment, MeshLayout.of(experiment.mesh, BATCH))


def sources(functions: HartFunctions) -> dict[str, object]:
    images = SHAPE((BATCH, 8, 8, 3), jnp.uint8)
    encode = functools.partial(tokens_of, functions.tokenizer)
    return {"images": images, "tokens": jax.eval_shape(encode, PARAMS, images)}


def arguments(functions: HartFunctions, source: object) -> tuple:
    condition = SHAPE((BATCH, 4, 8), jnp.float32), SHAPE((BATCH, 4), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return functions.init.shapes(), PARAMS, source, condition, key


@pytest.mark.parametrize("kind", ["images", pytest.param("tokens", marks=pytest.mark.slow)])
def test_the_models_own_list_is_the_very_program_that_it_is_alone(kind):
    alone, listed = functions(False), functions(True)
    assert listed.at((8, 8), (1, 2, 4)) is listed.at((8, 8)) is listed
    steps = [each.step.lower(*arguments(each, sources(each)[kind]), KEPT).as_text() for each in (alone, listed)]
    assert steps[0] == steps[1]


def test_flops_are_those_of_the_list():
    own = functions(True)
    other = own.at((8, 8), (1, 4))
    assert other is own.at((8, 8), (1, 4)) and other.hart.config.levels == (0, 2)
    found = []
    with MeshLayout.of(experiment_from(experiment_values()).mesh, BATCH).activate():
        for each in (own, other):
            given = arguments(each, sources(own)["tokens"])
            found.append(each.flops(each.step.trace(*given, KEPT), given, KEPT))
    assert found[0].model > found[1].model
    # Quantising anew is no work of the model.
    assert found[1].hardware / found[1].model > found[0].hardware / found[0].model


@functools.partial(jax.jit, static_argnames=("method", "networks"))
def made(params, source, method, networks):
    return method(*networks, params, source)


def test_tokens_computed_ahead_give_those_of_another_list_as_their_images_do():
    own, params = functions(True), tiny_model().tokenizer
    other = own.at((8, 8), (1, 4))
    images = np.random.default_rng(0).integers(0, 255, (BATCH, 8, 8, 3)).astype(np.uint8)
    ahead = made(params, images, tokens_of, (own.tokenizer,))
    assert [index.shape[1] for index in ahead.indices] == [1, 4, 16]
    again = made(params, ahead, tokens_at, (other.tokenizer, other.base))
    exact = made(params, images, tokens_of, (other.tokenizer,))
    assert [index.shape[1] for index in again.indices] == [1, 16]
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), again, exact)
    assert tokens_at(own.tokenizer, own.base, params, ahead) is ahead


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return write_hart_config(tmp_path_factory.mktemp("lists") / "inputs", ahead=True)


# Steps in which both lists come in each half.
STEPS, SEED = 6, 4
DRAWN = [len(draw_list(SEED, step, [(1, 2, 4), (1, 4)])) for step in range(1, STEPS + 1)]


def flags(config: Path, steps: int = STEPS) -> list[str]:
    """Of a run whose steps do not depend on how many there are."""
    settings = ["optimizer.schedule=constant", "train.log_every=1", "train.save_every=3", "train.log_records=True"]
    settings += [f"train.seed={SEED}", f"train.steps={steps}", f"train.sample_every={STEPS}"]
    return [f"--config={config}", *(f"--config.{each}" for each in (*settings, "transformer.scale_lists=((1, 4),)"))]


@pytest.fixture(scope="module")
def whole(config) -> Path:
    workdir = config.parent / "whole"
    with without_sampling():
        code, out, err = run_to_end(*flags(config), f"--workdir={workdir}")
    assert code == 0, err
    assert "at most 2 training steps are compiled" in out
    return workdir


@pytest.mark.slow
def test_a_run_logs_and_shows_each_list(whole):
    assert set(DRAWN[:3]) == set(DRAWN[3:]) == {2, 3}
    for line, count in zip(read_metrics(whole), DRAWN, strict=True):
        assert line[f"loss_{count}_scales"] == line["loss"] and f"loss_{5 - count}_scales" not in line
        assert ("loss_scale_2" in line) == (count == 3) and ("loss_scale_1_of_2" in line) == (count == 2)
    grids = sorted(path.name for path in (whole / SAMPLES_DIR).iterdir())
    assert grids == ["samples_00000006.png", "samples_2_scales_00000006.png"]


@pytest.mark.slow
def test_a_run_that_goes_on_ends_with_the_same_bits(config, whole, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(whole, again)
    shutil.rmtree(again / CHECKPOINT_DIR / str(STEPS))
    shutil.rmtree(again / SAMPLES_DIR)
    with without_sampling():
        code, out, err = run_to_end(*flags(config), f"--workdir={again}")
    assert code == 0, err
    assert f"resuming at step 3 of {STEPS}" in out
    assert_same_run(again, whole, ("params", "ema"))


@pytest.mark.slow
def test_two_processes_draw_the_lists_that_one_draws(config, tmp_path):
    logs = []
    for processes, devices in ((1, 2), (2, 1)):
        workdir = tmp_path / f"{processes}"
        arguments = *flags(config), "--config.train.sample_every=0", f"--workdir={workdir}"
        code, _, err = run_to_end(*arguments, processes=processes, devices=devices)
        assert code == 0, err
        logs.append(read_metrics(workdir))
    for one, two, count in zip(*logs, DRAWN, strict=True):
        assert one.keys() == two.keys() and f"loss_{count}_scales" in one
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)


def without(config: Path, steps: int) -> list[str]:
    return [flag.replace("((1, 4),)", "()") for flag in flags(config, steps)]


@pytest.mark.slow
def test_a_run_keeps_its_lists(config, whole):
    code, _, err = run_to_end(*without(config, 9), f"--workdir={whole}")
    assert code == 2 and "transformer.scale_lists" in err, err


@pytest.mark.slow
def test_a_run_hands_its_lists_on(config, whole, tmp_path):
    assert read_workdir(whole).transformer_config.scale_lists == ((1, 4),)
    model = tmp_path / "model"
    code, _, err = run_here("hart_jax.checkpoints.export", "--workdir", str(whole), "--out", str(model))
    assert code == 0, err
    for checkpoint in (whole, model):
        out = tmp_path / f"{checkpoint.name}.png"
        asked = f"--checkpoint={checkpoint}", "--scales=2", "--prompt=a red apple", f"--out={out}"
        code, _, err = run_here("sample.py", *asked)
        assert code == 0 and out.is_file(), err
    # The next stage may have other lists.
    stage = [f"--config.init_from={whole}", "--config.train.sample_every=0"]
    code, _, err = run_to_end(*without(config, 1), *stage, f"--workdir={tmp_path / 'stage'}")
    assert code == 0, err

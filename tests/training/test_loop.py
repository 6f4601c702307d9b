"""The loop around a task that is nothing but a number: what is saved, in which order, and what a rerun may change."""

import dataclasses
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hart_jax.checkpoints.orbax import check_workdir
from hart_jax.config import (
    HartExperiment,
    MeshConfig,
    SampleConfig,
    TokenizerExperiment,
    TrainConfig,
    read_experiment,
)
from hart_jax.data.aspect_buckets import AspectBuckets
from hart_jax.data.batches import Batches
from hart_jax.errors import UserError
from hart_jax.parallel.mesh import MeshLayout
from hart_jax.training.hart_task import HartTask
from hart_jax.training.loop import MAY_CHANGE, run
from tests.train_runs import write_hart_config

TRAIN = TrainConfig(steps=6, batch_size=2, log_every=1, save_every=2, sample_every=4)


class Counting:
    """Adds a batch's numbers to its state; at some steps something happens instead of a grid, or after the step."""

    def __init__(self, layout: MeshLayout, at_step: Any = None, at_grid: Any = None, buckets: Any = None):
        self.shardings = {"total": layout.replicated}
        self._layout, self._at_step, self._at_grid = layout, at_step or {}, at_grid or {}
        self.buckets, self.programs = buckets, 1
        self.grids = len(buckets.names) if buckets else 1

    def batches(self) -> Batches:
        numbers = grain.MapDataset.range(12).map(lambda x: {"index": np.int32(x)})
        return Batches(numbers.repeat().batch(2), workers=0)

    def init(self) -> dict[str, jax.Array]:
        return {"total": jnp.zeros(())}

    def abstract_state(self) -> Any:
        return jax.eval_shape(self.init)

    def load_pretrained(self) -> None:
        pass

    def init_state(self) -> Any:
        return jax.device_put(self.init(), self._layout.replicated)

    def step(self, state: Any, batch: Any, step: int) -> Any:
        if step in self._at_step:
            self._at_step[step]()
        total = state["total"] + batch["index"].sum()
        return {"total": total}, {
            "loss": total,
            "model_flops": jnp.float32(1),
            "hardware_flops": jnp.float32(1),
            "skipped_steps": jnp.float32(0),
        }

    def sample_grids(self, state: Any) -> dict[str, np.ndarray]:
        step = int(state["total"])
        if self._at_grid:
            raise self._at_grid.pop(0)
        names = [f"samples_{name}" for name in self.buckets.names] if self.buckets else ["samples"]
        return {name: np.full((2, 2, 3), step % 256, np.uint8) for name in names}


@pytest.fixture
def shards(tmp_path) -> Path:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "SHA256SUMS").write_text("0123  shard\n")
    return tmp_path / "shards"


def train(
    workdir: Path, shards: Path, train: TrainConfig = TRAIN, at_step=None, at_grid=None, buckets=None, **changes
) -> None:
    data = dataclasses.replace(TokenizerExperiment().data, train=str(shards))
    experiment = dataclasses.replace(TokenizerExperiment(), data=data, train=train, **changes)
    layout = MeshLayout.of(MeshConfig(), train.batch_size)
    run(Counting(layout, at_step, at_grid, buckets), layout, train, experiment.to_dict(), workdir)


def contents(workdir: Path) -> dict[str, bytes]:
    paths = [workdir / "metrics.jsonl", *(workdir / "samples").iterdir()]
    return {path.name: path.read_bytes() for path in paths}


def steps(workdir: Path) -> list[str]:
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


def test_a_grid_that_fails_costs_a_warning(tmp_path, shards, capsys):
    train(tmp_path / "run", shards, at_grid=[ValueError("no such prompt"), ValueError("no such prompt")])
    assert steps(tmp_path / "run") == ["4", "6"]
    said = "warning: step 4: no sample grid (ValueError: no such prompt); training goes on"
    out, err = capsys.readouterr()
    assert [line for line in err.splitlines() if "no sample grid" in line] == [said]
    assert "compiling" in out.splitlines()[1] and "step 4: sampling a grid" in err
    assert out.splitlines()[-1].startswith(f"{tmp_path / 'run'}: done; ")


def test_a_run_that_ends_within_a_grid_has_its_checkpoint_and_samples_the_grid_when_resumed(tmp_path, shards):
    train(tmp_path / "whole", shards)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", shards, at_grid=[KeyboardInterrupt()])
    assert steps(tmp_path / "run")[-1] == "4"
    train(tmp_path / "run", shards)
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")
    assert {"samples_00000004.png", "samples_00000006.png"} <= set(contents(tmp_path / "run"))


def test_a_run_that_ended_between_the_grids_of_two_buckets_samples_them_when_resumed(tmp_path, shards, capsys):
    buckets = AspectBuckets(("1:1", "2:3"), ((8, 8), (10, 6)), np.zeros(12, np.int32))
    workdir = tmp_path / "run"
    train(workdir, shards, buckets=buckets)
    first = capsys.readouterr().out.splitlines()[0]
    assert first == "buckets: 1:1 8x8 px, 12 images; 2:3 6x10 px, 0 images; at most 1 training steps are compiled"
    expected = contents(workdir)
    (workdir / "samples" / "samples_2:3_00000006.png").unlink()
    train(workdir, shards, buckets=buckets)
    assert contents(workdir) == expected and len(expected) == 5
    others = dataclasses.replace(buckets, of_record=np.ones(12, np.int32))
    with pytest.raises(UserError, match=r"^data\.buckets: images lie in other buckets than when the run in"):
        train(workdir, shards, dataclasses.replace(TRAIN, steps=8), buckets=others)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, None)])
def test_a_signal_saves_the_step_and_says_that_the_run_has_not_ended(tmp_path, shards, number, code):
    train(tmp_path / "whole", shards)
    ends = SystemExit if code else KeyboardInterrupt
    with pytest.raises(ends, match=str(code or "saved step 3; the same command resumes there")):
        train(tmp_path / "run", shards, at_step={3: lambda: signal.raise_signal(number)})
    assert steps(tmp_path / "run")[-1] == "3"
    train(tmp_path / "run", shards)
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_other_shards_at_the_same_path_are_noticed(tmp_path, shards):
    workdir = tmp_path / "run"
    train(workdir, shards)
    longer = dataclasses.replace(TRAIN, steps=8)
    moved = shutil.copytree(shards, tmp_path / "moved")
    train(workdir, moved, longer)
    (moved / "SHA256SUMS").write_text("4567  shard\n")
    longer = dataclasses.replace(TRAIN, steps=10)
    with pytest.raises(UserError, match=r"the training shards are not those .* remove .*inputs\.json"):
        train(workdir, moved, longer)
    assert steps(workdir) == ["6", "8"]
    (workdir / "inputs.json").write_text("{")
    with pytest.raises(UserError, match=r"inputs\.json: is damaged"):
        train(workdir, moved, longer)
    (workdir / "inputs.json").unlink()
    train(workdir, moved, longer)
    assert steps(workdir) == ["10", "8"]


def test_a_run_without_a_checkpoint_may_start_with_other_data(tmp_path, shards):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "inputs.json").write_text('{"data": "of shards that nothing was trained on"}')
    train(tmp_path / "run", shards)
    assert steps(tmp_path / "run") == ["4", "6"]


def test_what_cannot_matter_may_change(tmp_path):
    experiment = HartExperiment(sample_prompts=("a dog",), tokenizer_from="tokenizer")
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    (tmp_path / "config.json").write_text(json.dumps(experiment.to_dict()))

    def allowed(**changes: Any) -> bool:
        return check_workdir(tmp_path, dataclasses.replace(experiment, **changes).to_dict(), MAY_CHANGE)

    assert allowed(
        sample=SampleConfig(cfg=1.5, top_k=20, weights="int8"),
        sample_prompts=("a cat", "a dog"),
        model="assets/emoji",
        init_from="runs/before",
        train=dataclasses.replace(experiment.train, remat="full", attention="xla", unroll=True),
    )
    for changes in (
        {"train": dataclasses.replace(experiment.train, dtype="bfloat16")},
        {"tokenizer_from": "another"},
        {"loss": dataclasses.replace(experiment.loss, drop_text=0.2)},
    ):
        with pytest.raises(UserError, match="a run of another config"):
            allowed(**changes)


def test_grids_show_captions_of_the_data_where_no_prompts_are_given(tmp_path):
    given = read_experiment(write_hart_config(tmp_path))
    layout = MeshLayout.of(given.mesh, given.train.batch_size, 1)
    task = HartTask(given, tmp_path, layout)
    assert task.shown == given.sample_prompts
    task = HartTask(dataclasses.replace(given, sample_prompts=()), tmp_path, layout)
    assert len(task.shown) == 8 and set(task.shown) <= {f"thing {number}" for number in range(14)}


def test_an_empty_prompt_is_an_error_at_the_start(tmp_path):
    experiment = HartExperiment(sample_prompts=("a dog", " "))
    with pytest.raises(UserError, match=r"sample_prompts=\('a dog', ' '\): an entry is empty"):
        HartTask(experiment, tmp_path, None)

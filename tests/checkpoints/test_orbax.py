"""Checkpoints: bit-exact round trips, kills at any moment, damaged directories, other configs."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct

from hart_jax.checkpoints import restoring
from hart_jax.checkpoints.orbax import Checkpoints, load_config, load_params
from hart_jax.errors import UserError
from tests.train_runs import ROOT, loopback_job, quick_environment

CONFIG = {"model": {"width": 8, "patch_nums": (1, 2, 3)}, "train": {"num_steps": 10, "rate": 1e-3}}
OPTIMISER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


@struct.dataclass
class State:
    step: Any
    params: Any
    ema: Any
    opt_state: Any
    discriminator: Any
    rng: Any


def make_state(seed: int = 0) -> State:
    rng = np.random.default_rng(seed)
    params = {
        "layer": {
            "kernel": jnp.asarray(rng.normal(size=(5, 7)), jnp.float32),
            "half": jnp.asarray(rng.normal(size=33), jnp.bfloat16),
        },
        "awkward": jnp.asarray([np.nan, np.inf, -0.0, 1e-42, 3e38], jnp.float32),
    }
    return State(
        step=jnp.int32(seed),
        params=params,
        ema=jax.tree.map(lambda x: x * 2, params),
        opt_state=OPTIMISER.init(params),
        discriminator=None,
        rng=jax.random.key_data(jax.random.key(seed)),
    )


def make_iterator():
    dataset = grain.MapDataset.range(100).seed(0).shuffle().repeat().batch(4)
    return iter(dataset.to_iter_dataset())


def bits(tree: Any) -> list[tuple[str, tuple[int, ...], bytes]]:
    return [(str(x.dtype), x.shape, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


def save_steps(workdir: Path, steps: range, **settings) -> None:
    with Checkpoints(workdir, CONFIG, **settings) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step))


def damage(checkpoint: Path, how: str) -> None:
    files = sorted((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    if how == "truncated":
        for path in files:
            os.truncate(path, path.stat().st_size // 2)
    elif how == "metadata lost":
        (checkpoint / "state" / "_METADATA").unlink()
    elif how == "log truncated":
        os.truncate(checkpoint / "log" / "data.json", 1)
    elif how == "state lost":
        shutil.rmtree(checkpoint / "state")
    else:
        shutil.rmtree(checkpoint)
        checkpoint.mkdir()


def test_round_trip_is_bit_exact_and_continues_the_data(tmp_path):
    state, iterator = make_state(3), make_iterator()
    for _ in range(5):
        next(iterator)
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        assert checkpoints.restore(state, iterator) is None
        checkpoints.save(4, state, iterator)
        expected = [next(iterator) for _ in range(30)]

    abstract, iterator = jax.eval_shape(lambda: state), make_iterator()
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        step, restored, log = checkpoints.restore(abstract, iterator)
    assert (step, log) == (4, None)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert bits(restored) == bits(state)
    np.testing.assert_array_equal([next(iterator) for _ in range(30)], expected)


def test_what_is_not_logged_yet_is_stored_to_the_last_bit(tmp_path):
    log = [{"loss": float(np.float32(0.1)), "absent": float("nan")}, {}]
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        checkpoints.save(1, make_state(1), log=log)
        checkpoints.save(2, make_state(2), log=[])
        checkpoints.wait()
        assert checkpoints.restore(make_state()).log == []
        damage(tmp_path / "checkpoints" / "2", "log truncated")
        step, _, restored = checkpoints.restore(make_state())
    assert step == 1
    assert str(restored) == str(log)


def test_saved_state_may_be_donated_at_once(tmp_path):
    step_fn = jax.jit(lambda x: x + 1, donate_argnums=0)
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        x = jnp.zeros((1000, 1000))
        for step in range(1, 4):
            x = step_fn(x)
            checkpoints.save(step, {"params": x})
            for _ in range(5):
                x = step_fn(x)
    np.testing.assert_array_equal(load_params(tmp_path, "params"), np.full((1000, 1000), 13.0))


def test_keeps_the_latest(tmp_path):
    with Checkpoints(tmp_path, CONFIG, keep=2) as checkpoints:
        for step in (2, 4, 6, 7):
            checkpoints.save(step, make_state(step))
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["6", "7"]


def test_keeps_multiples_and_the_best_besides_the_latest(tmp_path):
    losses = {1: 5.0, 2: 3.0, 3: 4.0, 4: math.nan, 5: 4.0, 6: None, 7: 6.0, 8: 9.0, 9: 2.0, 10: 3.0, 11: 3.0}
    settings = {"keep": 1, "keep_every": 5, "keep_best": "loss"}
    kept = {}
    # Twice, as a run that is killed and resumed: the metrics are read back.
    for steps in (range(1, 8), range(8, 12)):
        with Checkpoints(tmp_path, CONFIG, **settings) as checkpoints:
            for step in steps:
                metrics = None if losses[step] is None else {"loss": losses[step], "other": 0.0}
                checkpoints.save(step, {"params": jnp.ones(3)}, metrics=metrics)
                checkpoints.wait()
                kept[step] = {int(name) for name in os.listdir(tmp_path / "checkpoints")}
    assert kept[4] == {2, 4}
    assert kept[7] == {2, 5, 7}
    assert kept[8] == {2, 5, 8}
    assert kept[9] == {5, 9}
    assert kept[11] == {5, 9, 10, 11}


def test_best_by_a_metric_that_is_not_logged(tmp_path):
    with (
        Checkpoints(tmp_path, CONFIG, keep_best="lost") as checkpoints,
        pytest.raises(UserError, match="keep_best='lost': no such metric; there are accuracy, loss"),
    ):
        checkpoints.save(1, {"params": jnp.ones(3)}, metrics={"loss": 1.0, "accuracy": 0.0})


def test_restores_onto_a_sharding(tmp_path):
    save_steps(tmp_path, range(1, 2))
    sharding = jax.NamedSharding(jax.make_mesh((1,), ("data",)), jax.P())
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), make_state())
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        _, restored, _ = checkpoints.restore(abstract)
    assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(restored))


@pytest.mark.parametrize("name", ["lr[1]", "a*", "a?"])
def test_a_workdir_that_orbax_takes_for_a_pattern_is_refused(tmp_path, name):
    """Orbax calls what it saves there complete, and cannot read it."""
    with pytest.raises(UserError, match=r"checkpoints cannot be kept below a name with \*, \? or \["):
        Checkpoints(tmp_path / name / "run", CONFIG)
    assert not (tmp_path / name).exists()


def test_folders_that_are_no_steps_are_no_checkpoints(tmp_path):
    save_steps(tmp_path, range(1, 3))
    for name in ("²", "x", "3.unreadable"):
        (tmp_path / "checkpoints" / name).mkdir()
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        assert checkpoints.restore(make_state())[0] == 2


@pytest.mark.parametrize("how", ["truncated", "metadata lost", "state lost", "empty"])
def test_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, capfd, how):
    save_steps(tmp_path, range(1, 4))
    damage(tmp_path / "checkpoints" / "3", how)
    assert bits(load_params(tmp_path)) == bits(make_state(2).ema)
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        step, restored, _ = checkpoints.restore(make_state())
        assert (step, bits(restored)) == (2, bits(make_state(2)))
        checkpoints.save(3, make_state(3))
    out = capfd.readouterr().out
    assert "checkpoints/3 cannot be read" in out and "tensorstore_spec" not in out
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        assert checkpoints.restore(make_state())[0] == 3
    assert (tmp_path / "checkpoints" / "3.unreadable").exists()


def test_whichever_file_is_torn_nothing_wrong_is_restored(tmp_path):
    whole = tmp_path / "whole"
    with Checkpoints(whole, CONFIG) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step), make_iterator(), log=[step])
    files = [path.relative_to(whole) for path in (whole / "checkpoints" / "2").rglob("*") if path.is_file()]
    found = {}
    for number, file in enumerate(files):
        torn = tmp_path / str(number)
        shutil.copytree(whole, torn)
        os.truncate(torn / file, (torn / file).stat().st_size // 2)
        with Checkpoints(torn, CONFIG) as checkpoints:
            step, state, log = checkpoints.restore(make_state(), make_iterator())
        assert bits(state) == bits(make_state(step)) and log == [step]
        found[file] = step
    # Some files do not matter; those with the arrays do.
    assert {1, 2} == set(found.values())
    assert all(
        step == 1 for file, step in found.items() if file.parent.name == "d" and file.parent.parent.name == "state"
    )


@pytest.mark.parametrize("item", ["state", "data", "log", "digests"])
def test_an_item_that_is_readable_but_not_what_was_saved_counts_as_damaged(tmp_path, capfd, item):
    """What a flipped bit may do that no format notices."""
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        iterator = make_iterator()
        for step in (1, 2, 3):
            next(iterator)
            checkpoints.save(step, make_state(step), iterator, log=[step])
    shutil.rmtree(tmp_path / "checkpoints" / "3" / item)
    shutil.copytree(tmp_path / "checkpoints" / "1" / item, tmp_path / "checkpoints" / "3" / item)
    if item in ("state", "digests"):
        assert bits(load_params(tmp_path)) == bits(make_state(2).ema)
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        step, state, log = checkpoints.restore(make_state(), make_iterator())
    assert (step, bits(state), log) == (2, bits(make_state(2)), [2])
    assert "not what was saved, by its digest" in capfd.readouterr().out
    assert (tmp_path / "checkpoints" / "3.unreadable").exists()


def test_flipped_bits_in_the_arrays_are_never_restored(tmp_path):
    save_steps(tmp_path / "whole", range(1, 3))
    [arrays] = (tmp_path / "whole" / "checkpoints" / "2" / "state" / "d").iterdir()
    raw = arrays.read_bytes()
    # At the end of the file: the arrays' bytes, before the table of contents.
    for number, place in enumerate(np.linspace(0, len(raw) - 1, 6, dtype=int)):
        shutil.copytree(tmp_path / "whole", tmp_path / str(number))
        flipped = bytearray(raw)
        flipped[place] ^= 4
        (tmp_path / str(number) / arrays.relative_to(tmp_path / "whole")).write_bytes(bytes(flipped))
        with Checkpoints(tmp_path / str(number), CONFIG) as checkpoints:
            step, state, _ = checkpoints.restore(make_state())
        assert bits(state) == bits(make_state(step))


def test_a_checkpoint_of_a_version_without_digests_opens(tmp_path):
    save_steps(tmp_path, range(1, 3))
    shutil.rmtree(tmp_path / "checkpoints" / "2" / "digests")
    assert bits(load_params(tmp_path)) == bits(make_state(2).ema)
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        step, state, _ = checkpoints.restore(make_state())
    assert (step, bits(state)) == (2, bits(make_state(2)))


def failing_reads(monkeypatch, error: Exception, times: int) -> list[Exception]:
    """The next `times` reads of arrays raise `error`, wrapped as Orbax does; gives what was raised."""
    raised: list[Exception] = []
    for name in ("load", "load_checkpointables"):
        read = getattr(restoring.ocp, name)

        def failing(*arguments, read=read):
            if len(raised) < times:
                raised.append(error)
                raise KeyError("Failed to load checkpointable: state") from error
            return read(*arguments)

        monkeypatch.setattr(restoring.ocp, name, failing)
    monkeypatch.setattr(restoring, "RETRY_SECONDS", (0, 0))
    return raised


PASSING = [
    OSError(errno.EIO, "Input/output error"),
    PermissionError(errno.EACCES, "Permission denied"),
    ValueError("UNAVAILABLE: Error reading a file: the server is away"),
]


@pytest.mark.parametrize("error", PASSING, ids=str)
def test_an_error_of_the_reading_is_tried_again_and_renames_nothing(tmp_path, monkeypatch, error):
    save_steps(tmp_path, range(1, 3))
    failing_reads(monkeypatch, error, times=2)
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        assert checkpoints.restore(make_state()).step == 2
    failing_reads(monkeypatch, error, times=2)
    assert bits(load_params(tmp_path)) == bits(make_state(2).ema)
    raised = failing_reads(monkeypatch, error, times=100)
    with (
        Checkpoints(tmp_path, CONFIG) as checkpoints,
        pytest.raises(UserError, match=r"checkpoints/2 cannot be read now.*nothing was changed"),
    ):
        checkpoints.restore(make_state())
    with pytest.raises(UserError, match=r"checkpoints/2 cannot be read now"):
        load_params(tmp_path)
    assert len(raised) == 6
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "2"]


@pytest.mark.parametrize(
    "error",
    [MemoryError("out"), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), ZeroDivisionError("a bug")],
    ids=lambda error: type(error).__name__,
)
def test_what_says_nothing_of_the_file_is_raised_as_it_is(tmp_path, monkeypatch, error):
    save_steps(tmp_path, range(1, 3))
    raised = failing_reads(monkeypatch, error, times=100)
    with Checkpoints(tmp_path, CONFIG) as checkpoints, pytest.raises(KeyError) as found:
        checkpoints.restore(make_state())
    assert found.value.__cause__ is error
    assert len(raised) == 1
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "2"]


def test_other_arrays_than_the_run_has_are_an_error_and_rename_nothing(tmp_path):
    save_steps(tmp_path, range(1, 3))
    wider = {**make_state().params, "awkward": jnp.zeros(7)}
    for other in (make_state().replace(params=wider), make_state().replace(params={**wider, "new": jnp.zeros(3)})):
        with (
            Checkpoints(tmp_path, CONFIG) as checkpoints,
            pytest.raises(UserError, match=r"checkpoints/2 holds other arrays than this run has"),
        ):
            checkpoints.restore(other)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "2"]


RESTORING_TOGETHER = """
    import errno, os, sys
    import jax, numpy as np
    from jax.sharding import NamedSharding, PartitionSpec
    from hart_jax.checkpoints import restoring
    from hart_jax.checkpoints.orbax import Checkpoints
    from hart_jax.errors import UserError
    from hart_jax.parallel.launch import join_processes

    join_processes()
    mesh = jax.make_mesh((2,), ("data",))
    restoring.RETRY_SECONDS = (0,)

    def state(step):
        places = {"parts": NamedSharding(mesh, PartitionSpec("data")), "whole": NamedSharding(mesh, PartitionSpec())}
        whole = np.full((4, 3), step, np.float32)
        return {name: jax.make_array_from_callback(whole.shape, at, lambda i: whole[i]) for name, at in places.items()}

    with Checkpoints(sys.argv[1], {"a": 1}) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state(step), log=[step])

    read, left = restoring.ocp.load_checkpointables, [0, None]

    def failing(path, items):
        if jax.process_index() == 1 and path.name == "2" and left[0]:
            left[0] -= 1
            raise left[1]
        return read(path, items)

    restoring.ocp.load_checkpointables = failing
    for case in (
        (9, OSError(errno.EIO, "Input/output error")),
        (9, RuntimeError("RESOURCE_EXHAUSTED: Out of memory")),
        (1, OSError(errno.EIO, "Input/output error")),
        (1, FileNotFoundError("no such file")),
    ):
        left[:] = case
        with Checkpoints(sys.argv[1], {"a": 1}) as checkpoints:
            try:
                restored = checkpoints.restore(jax.eval_shape(lambda: state(0)) | state(0))
                values = {float(x) for leaf in restored.state.values() for x in leaf.addressable_data(0).ravel()}
                found = f"step {restored.step} {values} {restored.log}"
            except (UserError, RuntimeError) as error:
                found = type(error).__name__
        print("found", found, sorted(os.listdir(sys.argv[1] + "/checkpoints")), flush=True)
"""


def test_processes_restore_the_same_checkpoint_though_one_cannot_read_the_newest(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(RESTORING_TOGETHER), str(tmp_path)]
    job = [
        subprocess.Popen(command, cwd=ROOT, env={**quick_environment(), **meeting}, stdout=subprocess.PIPE, text=True)
        for meeting in loopback_job(2)
    ]
    first, second = (
        [line for line in process.communicate(timeout=600)[0].splitlines() if line.startswith("found")]
        for process in job
    )
    both = ["found step 2 {2.0} [2] ['1', '2']", "found step 1 {1.0} [1] ['1', '2.unreadable']"]
    assert first == ["found TryLater ['1', '2']"] * 2 + both
    assert second == ["found TryLater ['1', '2']", "found RuntimeError ['1', '2']", *both]


def test_no_readable_checkpoint_is_an_error_and_nothing_is_moved(tmp_path):
    save_steps(tmp_path, range(1, 3))
    for step in ("1", "2"):
        damage(tmp_path / "checkpoints" / step, "state lost")
    with Checkpoints(tmp_path, CONFIG) as checkpoints, pytest.raises(UserError, match=r"\[2, 1\]"):
        checkpoints.restore(make_state())
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "2"]
    with pytest.raises(UserError, match="can be read"):
        load_params(tmp_path)


KILLED_RUN = """
    import sys
    import jax.numpy as jnp
    from hart_jax.checkpoints.orbax import Checkpoints

    with Checkpoints(sys.argv[1], {"a": 1}, keep=2) as checkpoints:
        restored = checkpoints.restore({"params": jnp.zeros((700, 1000))})
        for step in range((restored[0] if restored else 0) + 1, 10_000):
            checkpoints.save(step, {"params": jnp.full((700, 1000), float(step))})
            print(step, flush=True)
"""


def test_killed_at_any_moment_the_latest_checkpoint_is_whole(tmp_path):
    reached = 0
    for steps_before_kill in (1, 4, 6):
        command = [sys.executable, "-c", textwrap.dedent(KILLED_RUN), str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            lines = [int(process.stdout.readline()) for _ in range(steps_before_kill)]
            process.send_signal(signal.SIGKILL)
        assert lines[0] >= reached
        with Checkpoints(tmp_path, {"a": 1}) as checkpoints:
            restored = checkpoints.restore({"params": jnp.zeros((700, 1000))})
            assert not list((tmp_path / "checkpoints").glob("*tmp*"))
        if restored is not None:
            reached, state, _ = restored
            np.testing.assert_array_equal(state["params"], np.full((700, 1000), float(reached)))
    assert reached >= 4


def test_unfinished_directories_are_ignored(tmp_path):
    save_steps(tmp_path, range(1, 2))
    shutil.copytree(tmp_path / "checkpoints" / "1", tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp")
    damage(tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp", "state lost")
    assert bits(load_params(tmp_path)) == bits(make_state(1).ema)
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        assert checkpoints.restore(make_state())[0] == 1


def test_another_config_is_refused(tmp_path):
    save_steps(tmp_path, range(1, 2))
    before = (tmp_path / "config.json").read_bytes()
    other = {"model": {"width": 16, "patch_nums": (1, 2, 3)}, "train": {"num_steps": 10, "rate": 1e-3, "warmup": 5}}
    with pytest.raises(UserError) as error:
        Checkpoints(tmp_path, other)
    assert "model.width is 16, the run has 8; train.warmup is 5, the run has '(absent)'" in str(error.value)
    assert (tmp_path / "config.json").read_bytes() == before


def test_keys_that_may_change_are_updated(tmp_path):
    save_steps(tmp_path, range(1, 2))
    longer = {**CONFIG, "train": {"num_steps": 20, "rate": 1e-3}}
    with Checkpoints(tmp_path, longer, may_change={"train.num_steps"}) as checkpoints:
        assert checkpoints.restore(make_state()).step == 1
    assert load_config(tmp_path)["train"]["num_steps"] == 20


def test_settings_that_a_run_of_an_older_version_lacks_are_the_defaults(tmp_path):
    save_steps(tmp_path, range(1, 2))
    defaults = {"model": {"width": 4, "depth": 2}}
    newer = {**CONFIG, "model": {**CONFIG["model"], "depth": 2}}
    with Checkpoints(tmp_path, newer, defaults=defaults) as checkpoints:
        assert checkpoints.restore(make_state()).step == 1
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    newer["model"]["depth"] = 3
    with pytest.raises(UserError, match=r"model\.depth is 3, the run has 2"):
        Checkpoints(tmp_path, newer, defaults=defaults)


def test_load_params(tmp_path):
    save_steps(tmp_path, range(1, 3))
    ema = load_params(tmp_path)
    assert isinstance(ema["layer"]["kernel"], np.ndarray)
    assert bits(ema) == bits(make_state(2).ema)
    assert bits(load_params(tmp_path, "params")) == bits(make_state(2).params)
    with pytest.raises(UserError, match=r"no field 'emma'; it has .*ema"):
        load_params(tmp_path, "emma")


def test_wrong_workdirs_and_settings(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        load_params(tmp_path / "nowhere")
    with pytest.raises(UserError, match="not a training workdir"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not a readable JSON"):
        load_config(tmp_path)
    with pytest.raises(UserError, match="keep is 0"):
        Checkpoints(tmp_path / "new", CONFIG, keep=0)
    assert not (tmp_path / "new").exists()

"""Checkpoints: bit-exact round trips, kills at any moment, damaged directories, other configs."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hart_jax.checkpoints.orbax import Checkpoints, load_config, load_params
from hart_jax.errors import UserError
from tests.checkpoints.states import CONFIG, bits, damage, make_iterator, make_state, save_steps


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


def test_the_log_may_go_on_at_once(tmp_path):
    log = {"steps": [{"loss": 1.0}]}
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        checkpoints.save(1, {"params": jnp.zeros((1000, 1000))}, log=log)
        log["steps"].append({"loss": 2.0})
        checkpoints.wait()
        assert checkpoints.restore({"params": jnp.zeros((1000, 1000))}).log == {"steps": [{"loss": 1.0}]}


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
            # Orbax removes what was not finished beside us; it waits for that before it saves.
            ends = time.monotonic() + 60
            while list((tmp_path / "checkpoints").glob("*tmp*")):
                assert time.monotonic() < ends
                time.sleep(0.05)
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

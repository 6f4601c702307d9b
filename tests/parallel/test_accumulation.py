"""A batch in parts, split over a mesh, trains as the whole batch on one device does."""

import numpy as np
import pytest

from hart_jax.training.metrics import read_metrics
from tests.train_runs import run_to_end, write_hart_config, write_tokenizer_config

LENGTH = ["--config.train.steps=6", "--config.train.batch_size=8", "--config.train.sample_every=6"]
PARTS = ["--config.train.accumulate=2", "--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"]


@pytest.mark.parametrize("write", [write_hart_config, write_tokenizer_config], ids=["hart", "tokenizer"])
def test_parts_on_eight_devices_train_as_the_whole_on_one(tmp_path, write):
    config = write(tmp_path / "inputs")
    histories = []
    for name, settings, devices in (("whole", [], 1), ("parts", PARTS, 8)):
        arguments = (f"--config={config}", f"--workdir={tmp_path / name}", *LENGTH, *settings)
        code, _, err = run_to_end(*arguments, devices=devices)
        assert code == 0, err
        histories.append(read_metrics(tmp_path / name))
    whole, parts = histories
    assert [line["step"] for line in parts] == [2, 4, 6]
    for ours, theirs in zip(parts, whole, strict=True):
        for name in ("loss", "loss_token", "loss_diffusion", "mse", "vq"):
            if name in theirs:
                np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, err_msg=f"{name} at {ours['step']}")

"""However the devices are laid out, and over however many processes, training computes the same losses."""

import numpy as np
import pytest

from hart_jax.training.metrics import read_metrics
from tests.train_runs import run_to_end, write_hart_config, write_tokenizer_config

CONFIGS = {"hart": write_hart_config, "tokenizer": write_tokenizer_config}
# Processes, and the mesh over their 8 devices.
LAYOUTS = [(1, (8, 1, 1)), (1, (2, 4, 1)), (1, (2, 2, 2)), (2, (2, 2, 2))]
LENGTH = ("--config.train.steps=20", "--config.train.batch_size=8", "--config.train.sample_every=20")


def train(folder, config, workdir, processes, devices, sizes):
    mesh = [f"--config.mesh.{axis}={size}" for axis, size in zip(("data", "fsdp", "tensor"), sizes, strict=True)]
    code, _, err = run_to_end(
        f"--config={config}",
        f"--workdir={workdir}",
        *mesh,
        *LENGTH,
        processes=processes,
        devices=devices // processes,
    )
    assert code == 0, err
    return read_metrics(workdir)


@pytest.fixture(scope="module", params=CONFIGS)
def one_device(request, tmp_path_factory):
    """A config file and its metrics on one device."""
    folder = tmp_path_factory.mktemp(request.param)
    config = CONFIGS[request.param](folder / "inputs")
    return folder, config, train(folder, config, folder / "one", 1, 1, (1, 1, 1))


@pytest.mark.parametrize(
    ("processes", "sizes"), LAYOUTS, ids=[f"{count}-{'x'.join(map(str, sizes))}" for count, sizes in LAYOUTS]
)
def test_eight_devices_train_as_one_does(one_device, processes, sizes):
    folder, config, expected = one_device
    workdir = folder / "-".join(map(str, (processes, *sizes)))
    metrics = train(folder, config, workdir, processes, 8, sizes)
    assert [line["step"] for line in metrics] == list(range(2, 21, 2))
    for ours, theirs in zip(metrics, expected, strict=True):
        for name in ("loss", "loss_token", "loss_diffusion", "mse", "vq"):
            if name in theirs:
                np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, err_msg=f"{name} at {ours['step']}")

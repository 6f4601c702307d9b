"""Metrics survive kills and resume to the same bytes; images, curves and progress appear where they should."""

import io
import json
import math
import os
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import colormaps
from matplotlib.colors import to_hex
from PIL import Image

from hart_jax.errors import UserError
from hart_jax.training.curves import plot_curves
from hart_jax.training.metrics import RECORDS_FILE, MetricsWriter, Progress, read_metrics


def values_at(step: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(step).normal(size=2).astype(np.float32)
    return {"loss": np.exp(draw[0]), "loss/scale_1": draw[1]}


def run(workdir, first: int, last: int, resumed_step: int | None) -> None:
    writer = MetricsWriter(workdir, resumed_step)
    for step in range(first, last + 1):
        writer.scalars(step, values_at(step))
        writer.timings(step, {"images_per_second": 100.0 / (step + 1)})
    writer.close()


def test_resumed_log_equals_the_undisturbed_one(tmp_path):
    run(tmp_path / "whole", 1, 9, None)
    run(tmp_path / "killed", 1, 7, None)
    with open(tmp_path / "killed" / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 8, "lo')
    run(tmp_path / "killed", 5, 9, resumed_step=4)
    whole, killed = (tmp_path / name / "metrics.jsonl" for name in ("whole", "killed"))
    assert whole.read_bytes() == killed.read_bytes()
    assert [line["step"] for line in read_metrics(tmp_path / "killed", "timings.jsonl")] == list(range(1, 10))


def test_records_are_cut_back_with_the_log(tmp_path):
    with MetricsWriter(tmp_path, records=True) as writer:
        for step in range(1, 8):
            writer.records(step, np.arange(step, step + 2, dtype=np.int32))
    with MetricsWriter(tmp_path, resumed_step=4, records=True) as writer:
        writer.records(5, [0, 1])
    lines = read_metrics(tmp_path, RECORDS_FILE)
    assert lines == [*({"step": step, "index": [step, step + 1]} for step in range(1, 5)), {"step": 5, "index": [0, 1]}]


def test_fresh_start_forgets_a_run_that_never_reached_a_checkpoint(tmp_path):
    run(tmp_path, 0, 3, None)
    run(tmp_path, 0, 2, None)
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1, 2]


def test_lines_are_on_disk_before_the_writer_closes(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.scalars(1, {"loss": 1.5})
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 1.5}]
    writer.close()


@given(st.floats(width=32, allow_nan=False))
def test_float32_survives_json(value):
    assert np.float32(json.loads(json.dumps({"x": float(np.float32(value))}))["x"]) == np.float32(value)


def test_what_is_not_finite_is_null(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.scalars(1, {"loss": math.nan, "norm": np.float32(np.inf), "rate": 0.5})
        writer.timings(1, {"seconds": math.inf})
    for name in ("metrics.jsonl", "timings.jsonl"):
        lines = (tmp_path / name).read_text().splitlines()
        assert [json.loads(line, parse_constant=pytest.fail)["step"] for line in lines] == [1]
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": None, "norm": None, "rate": 0.5}
    [line] = read_metrics(tmp_path)
    assert math.isnan(line["loss"]) and math.isnan(line["norm"]) and line["rate"] == 0.5


@pytest.mark.parametrize("damage", [b"\0\0\0\0\n", b'{"step": \n', b"3\n", b'{"loss": 1.0}\n', b"\xff\n"])
def test_a_damaged_log_is_one_error_that_names_it(tmp_path, damage):
    with MetricsWriter(tmp_path) as writer:
        writer.scalars(1, {"loss": 1.0})
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + damage + b'{"step": 3, "loss": 1.0}\n')
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 is damaged"):
        read_metrics(tmp_path)
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 is damaged"):
        MetricsWriter(tmp_path, resumed_step=3)
    assert path.read_bytes() == before


def test_images_and_tensorboard_files(tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    with MetricsWriter(tmp_path) as writer:
        writer.image(3, "samples", np.zeros_like(image))
        writer.image(3, "samples", image)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "samples" / "samples_00000003.png")), image)
    assert [name for name in os.listdir(tmp_path / "tensorboard") if "tfevents" in name]


def test_inactive_writer_writes_nothing(tmp_path):
    with MetricsWriter(tmp_path / "other_process", active=False) as writer:
        writer.scalars(1, {"loss": 1.0})
        writer.timings(1, {"seconds": 1.0})
        writer.image(1, "samples", np.zeros((2, 2, 3), np.uint8))
    assert os.listdir(tmp_path) == []


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()])
def test_progress_shows_loss_rate_and_time_left(stream):
    with Progress(total=20, initial=10, stream=stream, every_seconds=0.0) as progress:
        assert progress.images_per_second == 0 and progress.seconds_left == math.inf
        for step in range(11, 21):
            progress.update(step, loss=0.25, images=4)
    assert progress.images_per_second > 0 and progress.seconds_left == 0
    text = stream.getvalue()
    assert "20/20" in text and "loss 0.2500" in text and "images/s" in text
    assert "0.0 images/s" not in text and "?" not in text.replace("?step/s", "").replace("<?", "")


def test_progress_in_a_log_file_is_sparse_but_ends_with_the_last_step():
    stream = io.StringIO()
    progress = Progress(total=1000, stream=stream, every_seconds=3600)
    for step in range(1, 1001):
        progress.update(step, loss=1.0, images=1)
    assert len(stream.getvalue().splitlines()) == 1 and "step 1000/1000" in stream.getvalue()


def colours_of(path) -> set[str]:
    return {"#{:02x}{:02x}{:02x}".format(*colour) for colour in np.asarray(Image.open(path)).reshape(-1, 3)}


@pytest.mark.parametrize("log_y", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 3000])
def test_chosen_curves_are_plotted(tmp_path, log_y, steps):
    lines = [{"step": s, "loss": 3 * s**-0.3, "flat": 2.0, "accuracy": 0.5} for s in range(1, steps + 1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    colours = colours_of(plot_curves(tmp_path, ["loss", "flat"], log_y=log_y))
    assert {"#1f77b4", "#ff7f0e"} <= colours
    assert "#2ca02c" not in colours


@pytest.mark.slow
def test_every_subject_has_a_panel(tmp_path):
    def line(step: int) -> dict[str, float]:
        scales = {
            f"{kind}_scale_{scale}": 0.1 * scale + 1 / step for kind in ("loss", "accuracy") for scale in range(14)
        }
        return {"step": step, "loss": 1 / step, **scales, "gradient_norm": 2.0, "learning_rate": 1e-4}

    def timing(step: int) -> dict[str, float]:
        return {"step": step, "images_per_second": 50.0, "step_seconds": 2.0, "data_wait_seconds": 0.1}

    sizes = []
    for files in (("metrics",), ("metrics", "timings")):
        for name, make in (("metrics", line), ("timings", timing)):
            lines = [json.dumps(make(step)) + "\n" for step in range(1, 9)] if name in files else []
            (tmp_path / f"{name}.jsonl").write_text("".join(lines))
        image = Image.open(plot_curves(tmp_path))
        sizes.append(image.size)
    # Losses, scales' losses and accuracies, norms, learning rate; speed and waits.
    assert sizes == [(2 * 800, 3 * 360), (2 * 800, 4 * 360)]
    # Every scale has a colour of its own.
    rainbow = {to_hex(colormaps["turbo"](number / 13)) for number in range(14)}
    assert rainbow <= colours_of(tmp_path / "curves.png")


def test_values_without_a_logarithm_leave_the_others_where_they_are(tmp_path):
    lines = [{"step": step, "loss": 1.0 if step % 2 else math.nan, "vq": 0.0} for step in range(1, 5)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    colours = colours_of(plot_curves(tmp_path))
    assert "#1f77b4" in colours and "#ff7f0e" not in colours


@given(st.lists(st.floats(1e-30, 1e30), min_size=1, max_size=5), st.booleans())
@settings(max_examples=10, deadline=None)
def test_curves_take_any_positive_values(tmp_path_factory, values, log_y):
    workdir = tmp_path_factory.mktemp("curves")
    lines = [json.dumps({"step": step, "loss": value}) + "\n" for step, value in enumerate(values)]
    (workdir / "metrics.jsonl").write_text("".join(lines))
    assert plot_curves(workdir, ["loss"], log_y=log_y).exists()


def test_curves_without_matplotlib(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'hart_jax\[curves\]'"):
        plot_curves(tmp_path)


def test_curves_without_data_or_of_unknown_metrics(tmp_path):
    with pytest.raises(UserError, match="nothing to plot"):
        plot_curves(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    with pytest.raises(UserError, match="no metric lost; it has loss"):
        plot_curves(tmp_path, names=["lost"])

"""The manifest names code, libraries and devices of every start."""

import datetime
import json
import re

import jax

from hart_jax.io.run_info import RUNS_FILE, append_manifest


def test_every_start_adds_a_line(tmp_path):
    for step in (0, 40):
        append_manifest(tmp_path, step, 100)
    first, second = (json.loads(line) for line in (tmp_path / RUNS_FILE).read_text().splitlines())
    assert [(run["step"], run["steps"]) for run in (first, second)] == [(0, 100), (40, 100)]
    assert second["versions"]["jax"] == jax.__version__
    assert (second["devices"], second["processes"]) == (jax.device_count(), 1)
    assert second["commit"] is None or re.fullmatch("[0-9a-f]{40}(-dirty)?", second["commit"])
    started = datetime.datetime.fromisoformat(second["time"])
    assert datetime.timedelta() <= datetime.datetime.now(datetime.UTC) - started < datetime.timedelta(minutes=10)

"""Killed at random moments, over one and two processes; `tests/kill_and_resume.py` is for more of them."""

import pytest

from tests.kill_and_resume import kill_and_resume


@pytest.mark.parametrize(("experiment", "processes", "kills"), [("tokenizer", 1, 3), ("hart", 2, 2)])
def test_a_run_ends_as_if_nobody_had_killed_it(tmp_path, experiment, processes, kills):
    assert len(kill_and_resume(tmp_path, experiment, processes, kills, seed=kills)) == kills

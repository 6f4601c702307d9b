"""One of two processes killed at a random moment; `tests/kill_and_resume.py` is for more of them."""

import pytest

from tests.kill_and_resume import kill_and_resume


@pytest.mark.slow
def test_a_run_ends_as_if_nobody_had_killed_it(tmp_path):
    # Over one process, `tests/test_train_resume.py` kills at three chosen moments.
    assert len(kill_and_resume(tmp_path, "hart", processes=2, kills=1, seed=3)) == 1

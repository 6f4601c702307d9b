"""Scores of reconstructions, on images whose distance is known."""

import jax.numpy as jnp
import numpy as np
import pytest

from hart_jax.data.pick_prompts import pick_prompts
from hart_jax.errors import UserError
from hart_jax.evaluation.reconstruction import psnr
from tests.train_runs import make_shards


def test_psnr_is_that_of_unit_range():
    a = jnp.zeros((2, 4, 4, 3))
    # 0.2 in [-1, 1] is 0.1 in [0, 1]: 20 dB.
    np.testing.assert_allclose(np.asarray(psnr(a, a + 0.2)), 20.0, rtol=1e-5)


def test_prompts_are_drawn_without_repeating(tmp_path):
    shards = make_shards(tmp_path, 6, seed=0)
    prompts = pick_prompts(shards, 4)
    assert len(set(prompts)) == 4 and prompts == pick_prompts(shards, 4) != pick_prompts(shards, 4, seed=1)
    with pytest.raises(UserError, match="only 6 different prompts"):
        pick_prompts(shards, 7)

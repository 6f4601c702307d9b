"""Batches in parts: means and rows are those of the whole batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hart_jax.training.accumulate import accumulate_microbatches


@pytest.mark.parametrize("parts", [1, 2, 3, 6])
def test_means_and_rows_are_those_of_the_whole_batch(parts):
    rows = {"x": jnp.arange(12.0).reshape(6, 2), "key": jax.random.split(jax.random.key(0), 6)}
    seen = []

    def compute(rows):
        seen.append(len(rows["x"]))
        drawn = rows["x"] + jax.vmap(lambda key: jax.random.normal(key, (2,)))(rows["key"])
        return {"mean": drawn.mean(axis=0), "square": jnp.mean(drawn**2)}, drawn

    (means, drawn), (expected, expected_drawn) = accumulate_microbatches(compute, rows, parts), compute(rows)
    assert seen[0] == 6 // parts
    np.testing.assert_allclose(drawn, expected_drawn, rtol=1e-5)
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-6), means, expected)


def test_a_part_has_every_nth_row():
    """So that a device that holds a stretch of the batch holds the rows of that stretch in every part."""
    parts = []

    def compute(rows):
        jax.debug.callback(lambda part: parts.append(np.asarray(part).tolist()), rows, ordered=True)
        return rows.mean(), None

    mean, none = accumulate_microbatches(compute, jnp.arange(8), 2)
    jax.effects_barrier()
    assert parts == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert float(mean) == 3.5 and none is None

"""The tiles that kernels visit, counted: every tile that somebody sees, and hardly another."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hart_jax.config import HartExperiment, read_experiment
from hart_jax.config.sizes import image_shape_of
from hart_jax.transformer.mask import scale_causal_segments
from pallas_kernels.attention.mask import Layout, row_ends
from pallas_kernels.attention.shapes import SCALES, SHAPES
from pallas_kernels.attention.tiles import by_keys, by_queries, tiles_of

QUERY_TILE, KEY_TILE = 4, 8


def pairs(visits, row: int) -> list[tuple[int, int]]:
    count = int(visits.count_R[row])
    return list(zip(visits.outer_RN[row, :count].tolist(), visits.inner_RN[row, :count].tolist(), strict=True))


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12))
def test_each_pass_visits_what_is_seen(ends):
    end_RQ = np.repeat(np.asarray(ends, np.int32), 2)[None]
    end_RQ = Layout.even(end_RQ.shape[1], QUERY_TILE).pad(end_RQ, 1, mode="edge")
    tiles = tiles_of(end_RQ, 40, QUERY_TILE, KEY_TILE)
    seen = (np.arange(40) < end_RQ[0, :, None]).reshape(-1, QUERY_TILE, 5, KEY_TILE).any((1, 3))
    needed = {(int(i), int(j)) for i, j in np.argwhere(seen)}
    forward, backward = pairs(by_queries(tiles), 0), [(i, j) for j, i in pairs(by_keys(tiles), 0)]
    # A tile of which nothing is seen is visited once, so that it gets its zeros.
    assert set(forward) == needed | {(i, 0) for i in range(len(seen)) if not seen[i].any()}
    assert needed <= set(backward) and len(set(backward) - needed) <= (~seen.any(0)).sum() + (~seen.any(1)).sum()
    for visits in (forward, pairs(by_keys(tiles), 0)):
        outer = [tile for tile, _ in visits]
        assert outer == sorted(outer) and len(set(visits)) == len(visits)
    whole = (np.arange(40) < end_RQ[0, :, None]).reshape(-1, QUERY_TILE, 5, KEY_TILE).all((1, 3))
    np.testing.assert_array_equal(tiles.whole_RT[0], whole.sum(1))


def test_traced_ends_give_the_same_tiles():
    end_RQ = np.random.default_rng(0).integers(0, 41, (3, 24)).astype(np.int32)
    ours, theirs = (tiles_of(xp.asarray(end_RQ), 40, QUERY_TILE, KEY_TILE) for xp in (np, jnp))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)
    for schedule in (by_queries, by_keys):
        for row in range(3):
            assert pairs(schedule(ours), row) == pairs(schedule(theirs), row)


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(1, 90)), min_size=1, max_size=8),
    st.integers(1, 20),
    st.booleans(),
)
def test_layouts_lose_nothing(segments, tile, exact):
    queries = sum(size for size, _ in segments)
    layout = Layout.aligned(tuple(segments), tile, KEY_TILE, exact)
    x = np.arange(queries)
    padded = layout.pad(x + 1, 0)
    np.testing.assert_array_equal(layout.unpad(padded, 0), x + 1)
    assert padded.shape == (layout.rows,) and int((padded == 0).sum()) == layout.rows - queries
    assert exact or layout.rows % tile == 0


@pytest.mark.parametrize("name", SCALES)
def test_real_shapes_are_those_of_the_published_models(name):
    pixels, _, ratio = name.partition(" ")
    experiment = read_experiment(f"configs/hart_0p7b_{pixels}.py")
    assert isinstance(experiment, HartExperiment)
    height, width = image_shape_of(ratio or None, experiment.tokenizer)
    config = experiment.transformer.of_latent(height // 16, width // 16)
    assert SHAPES[name].segments == scale_causal_segments(config.context_tokens, config.sizes[1:])


@pytest.mark.parametrize("tile", [(128, 128), (256, 256), (256, 512), (512, 512)], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_real_shapes_visit_about_one_boundary_tile_a_row(name, tile):
    """The ideal is the area of what is seen. A row of tiles may end within one; small scales share rows."""
    shape = SHAPES[name]
    layout = Layout.aligned(shape.segments, *tile)
    end_RQ = layout.pad(row_ends(shape.segments, shape.queries, shape.keys), 1, mode="edge")
    tiles = tiles_of(end_RQ, -(-shape.keys // tile[1]) * tile[1], *tile)
    ideal = shape.pairs / (tile[0] * tile[1])
    rows = layout.rows // tile[0]
    for schedule in (by_queries, by_keys):
        (visited,) = schedule(tiles).count_R
        # Rows of queries that were added to the last tile of a piece see as much as the others.
        added = (layout.rows - shape.queries) / tile[0] * shape.keys / tile[1]
        assert ideal <= visited <= ideal + rows + added

"""Images that do not decode: others take their places, they are named once and counted, up to a limit."""

import itertools
from pathlib import Path

import grain
import numpy as np
import pytest

from hart_jax.data.batches import Batches
from hart_jax.data.pipeline import make_loader
from hart_jax.errors import UserError
from tests.data.test_pipeline import indices, number_of, take


def test_bad_records_are_replaced_named_once_and_counted(corrupted: Path, capsys: pytest.CaptureFixture[str]):
    options = {"image_size": 8, "batch_size": 4, "seed": 3, "text": number_of}
    loader = make_loader(corrupted, **options)
    batches = take(loader, 100)
    assert sorted(loader.bad_records.names) == ["'pic050'", "'pic051'"]
    lines = capsys.readouterr().err.splitlines()
    assert sorted(line.split(",")[0] for line in lines) == [
        f"warning: record 'pic{number:03d}' does not decode" for number in (50, 51)
    ]
    # The other images come once, 52 instead of each of the two; its own colour and caption come with it.
    for epoch in (batches[:50], batches[50:]):
        visits = sorted(itertools.chain(*indices(epoch)))
        assert visits == [*range(50), 52, 52, *range(52, 200)]
    for batch in batches:
        np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["index"])
        np.testing.assert_array_equal(batch["number"], batch["index"])
    assert "wanted" not in batches[0]


def test_bad_records_have_the_same_places_in_every_process(corrupted: Path):
    options = {"image_size": 8, "batch_size": 4, "seed": 3}
    one = np.array(indices(take(make_loader(corrupted, **options), 50)))
    loaders = [make_loader(corrupted, **options, rows=rows) for rows in ((0, 1), (2, 3))]
    np.testing.assert_array_equal(np.hstack([indices(take(loader, 50)) for loader in loaders]), one)
    assert sorted(sum((loader.bad_records.names for loader in loaders), ())) == ["'pic050'", "'pic051'"]


@pytest.mark.parametrize("limit", [0, 1])
def test_more_bad_records_than_allowed(corrupted: Path, limit: int):
    loader = make_loader(corrupted, image_size=8, batch_size=4, seed=3, max_bad_records=limit)
    with pytest.raises(UserError, match=r"'pic05[01]'.* decode"):
        take(loader, 50)


def test_the_error_counts_and_names_bad_records(corrupted: Path):
    # Only neighbours run out of attempts while reading; here each is replaced, and their number is too large.
    records = grain.MapDataset.range(4).map(lambda n: {"index": np.int32(n + 1), "wanted": np.int32(n)})
    loader = Batches(records.batch(1), 0, lambda number: f"'r{number}'", max_bad_records=2)
    next(loader), next(loader)
    with pytest.raises(UserError, match=r"3 records do not decode, more than max_bad_records=2: 'r0', 'r1', 'r2'"):
        next(loader)


def test_evaluation_stops_at_a_bad_record(corrupted: Path):
    with pytest.raises(UserError, match="image 'pic050' of the shards: image does not decode"):
        list(make_loader(corrupted, image_size=8, batch_size=50, train=False))

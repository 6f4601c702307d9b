"""Buckets of aspect ratios: who is in which, whose turn it is, and batches of one at a time."""

import collections
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hart_jax.config.buckets import bucket_shapes
from hart_jax.config.scales import area_of
from hart_jax.config.sizes import at_shape
from hart_jax.data import aspect_buckets, token_cache
from hart_jax.data.aspect_buckets import AspectBuckets, BucketOrder, nearest_shape
from hart_jax.data.image_files import cropped_image
from hart_jax.data.pipeline import make_loader
from hart_jax.data.precompute import AddTokens, precompute
from hart_jax.data.precomputed import TOKENS, PrecomputedTokens, describe_tokens, is_precomputed
from hart_jax.data.record_sizes import record_sizes
from hart_jax.data.shards import RecordSource, write_shards
from hart_jax.data.token_cache import cache_tokens
from hart_jax.errors import UserError
from hart_jax.io.fingerprint import sha256sum
from hart_jax.io.images import from_uint8
from hart_jax.tokenizer.model import Tokenizer
from tests.data.test_pipeline import assert_same, indices, number_of, take
from tests.tiny import TOKENIZER, tiny_model

NAMES = ("1:1", "2:3", "3:2", "1:3", "3:1")
# Of 4 x 4 tokens of 2 px.
SHAPES = bucket_shapes(NAMES, TOKENIZER)
# Widths and heights, with how many images have them.
SIZES = (((24, 24), 6), ((16, 24), 9), ((30, 20), 7), ((10, 30), 5), ((40, 10), 4))
BATCH = 3
sides = st.integers(1, 4000)
shapes = st.tuples(st.integers(2, 64), st.integers(2, 64))


def write_sized(folder: Path, sizes=SIZES) -> Path:
    """Shards of random images of these sizes, mixed; each says its number in its captions."""
    rng = np.random.default_rng(0)
    every = [size for size, count in sizes for _ in range(count)]
    entries = {}
    (folder / "source" / "all").mkdir(parents=True)
    for number, place in enumerate(rng.permutation(len(every))):
        width, height = every[place]
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "source" / "all" / f"{number:03d}.png")
        entries[f"{number:03d}"] = {"category": "all", "prompt": f"a {number}", "captions": [f"a {number}"]}
    (folder / "source" / "meta_data.json").write_text(json.dumps(entries))
    write_shards(folder / "source", folder / "shards", records_per_shard=10)
    return folder / "shards"


@pytest.fixture(scope="module")
def sized(tmp_path_factory) -> Path:
    return write_sized(tmp_path_factory.mktemp("sized"))


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HART_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def buckets_of(shards: Path) -> AspectBuckets:
    return AspectBuckets.nearest(NAMES, SHAPES, record_sizes(shards))


def load(shards: Path, **options):
    known = {"image_size": 8, "buckets": buckets_of(shards), "batch_size": BATCH, "seed": 3, "text": number_of}
    return make_loader(shards, **{**known, **options})


def loss_by_crop(size: tuple[int, int], shape: tuple[int, int]) -> float:
    """The share of an image that is cut off."""
    first, second = size[0] / size[1], shape[0] / shape[1]
    return 1 - min(first, second) / max(first, second)


@given(st.lists(st.tuples(sides, sides), min_size=1, max_size=9), st.lists(shapes, min_size=1, max_size=6, unique=True))
def test_an_image_goes_where_it_is_cropped_least(sizes, choice):
    for size, bucket in zip(sizes, nearest_shape(np.array(sizes), choice), strict=True):
        losses = [loss_by_crop(size, shape) for shape in choice]
        assert losses[bucket] <= min(losses) + 1e-8
        assert all(losses[bucket] < loss for loss in losses[:bucket]) or min(losses) > losses[bucket] - 1e-8


def test_of_equally_near_shapes_the_first_is_taken_and_an_unknown_size_is_a_square():
    turned = [(2, 3), (3, 2)]
    assert nearest_shape(np.array([(5, 5), (700, 700)]), turned).tolist() == [0, 0]
    assert nearest_shape(np.array([(5, 5), (700, 700)]), turned[::-1]).tolist() == [0, 0]
    assert nearest_shape(np.array([(0, 0), (9, 1)]), [(4, 1), (1, 1)]).tolist() == [1, 0]


def test_sizes_stand_beside_the_shards(sized, monkeypatch):
    expected = []
    for record in map(RecordSource(sized).__getitem__, range(31)):
        height, width, _ = np.asarray(cropped_image(record["image"], (1, 1))).shape
        path = sized.parent / "source" / "all" / f"{record['id']}.png"
        width, height = Image.open(path).size
        expected.append((height, width))
    monkeypatch.setattr(RecordSource, "__getitem__", None)
    np.testing.assert_array_equal(record_sizes(sized), expected)


def test_shards_of_an_earlier_version_are_measured_once(sized, tmp_path, monkeypatch):
    expected = record_sizes(sized)
    old = write_sized(tmp_path)
    about = json.loads((old / "dataset.json").read_text())
    for shard in about["shards"]:
        file = (old / shard["file"]).with_suffix(".captions.jsonl")
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps({k: line[k] for k in ("category", "captions")}) + "\n" for line in lines))
        shard["captions_bytes"] = file.stat().st_size
    (old / "dataset.json").write_text(json.dumps(about))
    files = sorted([*old.glob("*.array_record"), *old.glob("*.jsonl")])
    (old / "SHA256SUMS").write_text("".join(f"{sha256sum(file)}  {file.name}\n" for file in files))
    np.testing.assert_array_equal(record_sizes(old), expected)
    with monkeypatch.context() as patch:
        patch.setattr(RecordSource, "__getitem__", None)
        np.testing.assert_array_equal(record_sizes([old, sized]), [*expected, *expected])
    (kept,) = [file for file in (tmp_path / "cache" / "sizes").iterdir() if np.load(file).shape == (31, 2)][:1]
    kept.write_bytes(b"\x93NUMPY")
    np.testing.assert_array_equal(record_sizes(old), expected)


def test_sizes_are_as_shown_and_of_what_is_no_image_not_known(tmp_path, monkeypatch):
    folder = tmp_path / "source"
    (folder / "all").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (12, 30)).save(folder / "all" / "a.jpg", exif=exif)
    (folder / "all" / "b.png").write_bytes(b"no image")
    entries = {name: {"category": "all", "prompt": name} for name in ("a", "b")}
    (folder / "meta_data.json").write_text(json.dumps(entries))
    monkeypatch.setattr("hart_jax.data.shards.decode", lambda example, data: None)
    write_shards(folder, tmp_path / "out")
    assert record_sizes(tmp_path / "out").tolist() == [[12, 30], [0, 0]]


def test_the_order_is_drawn_in_proportion_and_counts_every_bucket(monkeypatch):
    monkeypatch.setattr(aspect_buckets, "_BLOCK", 50)
    aspect_buckets._of_block.cache_clear()
    order, seen = BucketOrder(5, (1.0, 2.0, 5.0)), collections.Counter[int]()
    for step in range(2000):
        bucket, before = order(step)
        assert before == seen[bucket]
        seen[bucket] += 1
    aspect_buckets._of_block.cache_clear()
    np.testing.assert_allclose([seen[bucket] / 2000 for bucket in range(3)], [0.125, 0.25, 0.625], atol=0.04)
    assert [order(step) for step in (1999, 7)] == [BucketOrder(5, (2.0, 4.0, 10.0))(step) for step in (1999, 7)]
    assert [order(step)[0] for step in range(40)] != [BucketOrder(6, (1.0, 2.0, 5.0))(step)[0] for step in range(40)]


def test_each_bucket_has_epochs_of_its_own_and_images_of_its_size(sized):
    buckets = buckets_of(sized)
    assert buckets.counts == tuple(count for _, count in SIZES)
    records, visits = RecordSource(sized), collections.defaultdict(list)
    for batch in take(load(sized), 60):
        bucket = int(batch["bucket"])
        visits[bucket] += batch["index"].tolist()
        assert batch["image"].shape == (BATCH, *SHAPES[bucket], 3)
        first = cropped_image(records[batch["index"][0]]["image"], SHAPES[bucket])
        np.testing.assert_array_equal(batch["image"][0], first)
        np.testing.assert_array_equal(batch["number"], batch["index"])
    for bucket, numbers in enumerate(buckets.records):
        count = len(numbers)
        epochs = [visits[bucket][start : start + count] for start in range(0, len(visits[bucket]), count)]
        assert len(epochs) > 1 and epochs[0] != epochs[1]
        assert all(sorted(epoch) == numbers.tolist() for epoch in epochs[:-1])


def test_processes_workers_caches_and_resumed_runs_have_the_same_batches(sized):
    expected = take(load(sized, flip=True), 30)
    parts = [take(load(sized, flip=True, rows=rows, cache=True), 30) for rows in ((0, 1), (2,))]
    for whole, *shares in zip(expected, *parts, strict=True):
        assert {int(share["bucket"]) for share in shares} == {int(whole["bucket"])}
        for name in ("image", "index", "number"):
            np.testing.assert_array_equal(np.concatenate([share[name] for share in shares]), whole[name])
    loader = load(sized, flip=True, workers=1)
    loader.set_state({"next_index": 25})
    assert_same(take(loader, 5), expected[25:])
    loader.close()


def test_one_bucket_of_the_models_ratio_is_as_without(sized):
    alone = AspectBuckets.nearest(NAMES[:1], SHAPES[:1], record_sizes(sized))
    without = take(load(sized, buckets=None, flip=True), 12)
    for batch in (found := take(load(sized, buckets=alone, flip=True), 12)):
        assert batch.pop("bucket") == 0
    assert_same(found, without)


def test_folders_keep_their_weights_within_buckets(sized, tmp_path):
    squares = write_sized(tmp_path, (((24, 24), 8), ((16, 24), 2)))
    both, weights = [sized, squares], (1.0, 3.0)
    buckets = buckets_of_all(both)
    shares = buckets.shares(RecordSource(both).folder_starts, weights)
    np.testing.assert_allclose(shares.sum(axis=0) / shares.sum(), (0.25, 0.75))
    loader = load(both, buckets=buckets, weights=weights, batch_size=2)
    visits = np.array(indices(take(loader, 400)))
    assert np.mean(visits >= 31) == pytest.approx(0.75, abs=0.05)
    counts = collections.Counter(visits.ravel().tolist())
    of_squares = [counts[number] for number in range(31, 41)]
    assert max(of_squares) - min(of_squares) < 12


def buckets_of_all(folders) -> AspectBuckets:
    return AspectBuckets.nearest(NAMES, SHAPES, record_sizes(folders))


def test_a_bucket_with_too_few_images_is_named(sized):
    with pytest.raises(
        UserError, match=r"data\.buckets: 3:1 \(\d+x\d+\) has 4 of the 31 images, fewer than the batch of"
    ):
        load(sized, batch_size=5)
    with pytest.raises(UserError, match="training without end"):
        load(sized, epochs=2)


def test_a_bad_record_is_replaced_by_the_next_of_its_bucket(sized, tmp_path, monkeypatch):
    folder = tmp_path / "source"
    folder.mkdir()
    for path in (sized.parent / "source").rglob("*"):
        target = folder / path.relative_to(sized.parent / "source")
        target.mkdir(exist_ok=True) if path.is_dir() else target.write_bytes(path.read_bytes())
    bad = int(buckets_of(sized).records[1][2])
    image = folder / "all" / f"{bad:03d}.png"
    image.write_bytes(image.read_bytes()[:200])
    monkeypatch.setattr("hart_jax.data.shards.decode", lambda example, data: None)
    write_shards(folder, tmp_path / "out")
    loader = load(tmp_path / "out")
    visits = np.array(indices(take(loader, 60))).ravel()
    assert bad not in visits and loader.bad_records.numbers == (bad,)
    counts = collections.Counter(visits.tolist())
    following = int(buckets_of(sized).records[1][3])
    others = [counts[int(number)] for number in buckets_of(sized).records[1] if number not in (bad, following)]
    assert counts[following] >= 2 * min(others)


@pytest.mark.slow
def test_tokens_are_those_of_the_buckets_size(sized, tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "BATCH", 8)
    params, buckets = tiny_model().tokenizer, buckets_of(sized)
    table = cache_tokens(TOKENIZER, params, sized, tmp_path / "tokens", buckets=buckets)
    assert precompute(sized, tmp_path / "stored", [AddTokens(TOKENIZER, params, NAMES)]) == 31
    stored = PrecomputedTokens(tmp_path / "stored")
    for bucket, shape in enumerate(SHAPES):
        config, number = at_shape(TOKENIZER, shape, 2), int(buckets.records[bucket][-1])
        image = cropped_image(RecordSource(sized)[number]["image"], shape)[None]
        expected = Tokenizer(config).apply({"params": params}, from_uint8(image), method="tokens")
        row = table(number)
        np.testing.assert_array_equal(row["indices"], np.concatenate(expected.indices, axis=1)[0])
        np.testing.assert_allclose(row["f_rest"], expected.f_rest_BPC[0], rtol=2e-3, atol=1e-4)
        assert len(row["f_rest"]) == area_of(config.shapes[-1])
        assert_same([stored(number)], [row])
    tokens = take(load(sized, tokens=table, flip=False), 20)
    for with_tokens, with_images in zip(tokens, take(load(sized), 20), strict=True):
        np.testing.assert_array_equal(with_tokens["index"], with_images["index"])
        np.testing.assert_array_equal(
            with_tokens["indices"], [table(index)["indices"] for index in with_images["index"]]
        )
    assert is_precomputed(tmp_path / "stored", TOKENS, lambda: describe_tokens(TOKENIZER, params, NAMES))
    for others in ((), NAMES[:2]):
        with pytest.raises(UserError, match="were computed with another buckets"):
            is_precomputed(
                tmp_path / "stored", TOKENS, lambda others=others: describe_tokens(TOKENIZER, params, others)
            )

"""Tokens computed ahead: the table gives what the tokenizer gives, and an interrupted table is done again."""

import dataclasses
import itertools
import pickle

import jax
import numpy as np
import pytest

from hart_jax.data import token_cache
from hart_jax.data.pipeline import make_loader
from hart_jax.data.precomputed import describe_tokens, index_type
from hart_jax.data.token_cache import cache_tokens
from hart_jax.errors import UserError
from hart_jax.io.images import from_uint8
from hart_jax.tokenizer.model import Tokenizer
from tests.data.conftest import file_size_limit
from tests.tiny import TOKENIZER, random_like, tiny_model


@pytest.fixture(scope="module")
def params():
    return tiny_model().tokenizer


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """23 images are two full batches and one that is filled up."""
    monkeypatch.setattr(token_cache, "BATCH", 10)


def test_the_table_is_the_tokenizer(shards, params, tmp_path, capsys):
    table = cache_tokens(TOKENIZER, params, shards, tmp_path)
    assert "23/23" in capsys.readouterr().err
    for number in (0, 9, 10, 22):
        # What image `number` of the shards shows, see conftest.py.
        image = np.full((1, 8, 8, 3), (number, 2 * number, 3 * number), np.uint8)
        expected = Tokenizer(TOKENIZER).apply({"params": params}, from_uint8(image), method="tokens")
        row = table(number)
        np.testing.assert_array_equal(row["indices"], np.concatenate(expected.indices, axis=1)[0])
        np.testing.assert_allclose(row["f_rest"], expected.f_rest_BPC[0], rtol=2e-3, atol=1e-4)
        np.testing.assert_allclose(row["ar_input"], expected.ar_input_BLC[0], rtol=2e-3, atol=1e-4)


def test_a_complete_table_is_read_and_an_incomplete_one_redone(shards, params, tmp_path, monkeypatch):
    cache_tokens(TOKENIZER, params, shards, tmp_path)
    whole = cache_tokens(TOKENIZER, params, shards, tmp_path)(3)
    (column,) = tmp_path.glob("*/indices.npy")
    np.save(column, np.zeros_like(np.load(column)))
    assert not cache_tokens(TOKENIZER, params, shards, tmp_path)(3)["indices"].any(), "the complete table is read"
    (column.parent / "complete.json").unlink()
    again = cache_tokens(TOKENIZER, params, shards, tmp_path)(3)
    jax.tree.map(np.testing.assert_array_equal, again, whole)


def test_another_tokenizer_has_its_own_table(shards, params, tmp_path):
    cache_tokens(TOKENIZER, params, shards, tmp_path)
    cache_tokens(TOKENIZER, random_like(params, seed=5), shards, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_what_does_not_decode_is_named_and_replaced(corrupted, params, tmp_path, capsys):
    with pytest.raises(UserError, match=r"2 records do not decode, more than max_bad_records=1: 'pic050', 'pic051'"):
        cache_tokens(TOKENIZER, params, corrupted, tmp_path, max_bad_records=1)
    capsys.readouterr()
    table = cache_tokens(TOKENIZER, params, corrupted, tmp_path, max_bad_records=2)
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert warnings == [
        f"warning: record 'pic{number:03d}' does not decode, it gets no tokens ({count} so far, 2 allowed)"
        for count, number in ((1, 50), (2, 51))
    ]
    with pytest.raises(UserError, match="image 50"):
        table(50)
    loader = make_loader(corrupted, image_size=8, batch_size=4, tokens=pickle.loads(pickle.dumps(table)))
    batches = list(itertools.islice(loader, 50))
    assert sorted(loader.bad_records.names) == ["'pic050'", "'pic051'"]
    assert sorted(np.concatenate([batch["index"] for batch in batches])) == [*range(50), 52, 52, *range(52, 200)]
    for batch in batches:
        for row, index in enumerate(batch["index"]):
            np.testing.assert_array_equal(batch["indices"][row], table(index)["indices"])


def test_indices_of_more_than_65536_codes_are_whole(params):
    """The upper codes alone are near what the encoder gives."""
    config = dataclasses.replace(TOKENIZER, vocab_size=70_000)
    codebook = np.full((70_000, config.latent_channels), 1e3, np.float32)
    codebook[-400:] = np.random.default_rng(0).normal(size=(400, config.latent_channels))
    params = {**params, "quantizer": {**params["quantizer"], "codebook": codebook}}
    images = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), np.uint8)
    indices = token_cache.TokenMaker(config, params)(images)["indices"]
    assert indices.min() >= 70_000 - 400 and len(np.unique(indices)) > 10
    # Shards with tokens of such a codebook say so: those of earlier versions were wrong.
    assert describe_tokens(config, params)["indices"] == "uint32"
    assert "indices" not in describe_tokens(TOKENIZER, params)


@pytest.mark.parametrize(("codes", "dtype"), [(16, np.uint16), (65_536, np.uint16), (65_537, np.uint32)])
def test_indices_have_the_narrowest_type_that_holds_them(codes: int, dtype: type):
    assert index_type(codes) is dtype


def test_values_beyond_float16_are_refused(shards, params, tmp_path):
    params = {**params, "quantizer": {**params["quantizer"], "codebook": params["quantizer"]["codebook"] + 1e6}}
    with pytest.raises(UserError, match=r"tokens' .* do not fit float16"):
        cache_tokens(TOKENIZER, params, shards, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def quick_tokens(monkeypatch):
    """Tokens that cost nothing: of each image its first values."""

    def tokens_of(images: np.ndarray) -> dict[str, np.ndarray]:
        return {name: images[:, 0, :, 0].astype(np.float16) for name in token_cache.FIELDS}

    monkeypatch.setattr(token_cache, "TokenMaker", lambda config, params: tokens_of)


@pytest.mark.parametrize("damage", [lambda data: data[:-50], lambda data: b"", lambda data: b"\x93NUMPY" + data[6:70]])
@pytest.mark.usefixtures("quick_tokens")
def test_a_damaged_table_is_made_again(shards, params, tmp_path, capsys, damage):
    for name in ("f_rest.npy", "complete.json"):
        cache_tokens(TOKENIZER, params, shards, tmp_path)
        (file,) = tmp_path.glob(f"*/{name}")
        file.write_bytes(damage(file.read_bytes()))
        again = cache_tokens(TOKENIZER, params, shards, tmp_path)
        assert (again(22)["f_rest"] == 22).all()
        assert "the tokens in" in capsys.readouterr().err


@pytest.mark.usefixtures("quick_tokens")
def test_a_full_disk_leaves_no_table(shards, params, tmp_path):
    with file_size_limit(300), pytest.raises(UserError, match=r"cannot be written \(File too large\)"):
        cache_tokens(TOKENIZER, params, shards, tmp_path)
    assert not list(tmp_path.iterdir())

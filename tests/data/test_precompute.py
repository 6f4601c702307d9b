"""Tokens and text embeddings in the records are those of the caches; interrupted work goes on; no other models."""

import pickle
import sys

import jax
import numpy as np
import pytest

from hart_jax.checkpoints.model_folder import write_part
from hart_jax.data import precompute as tool
from hart_jax.data.pipeline import load_captions, make_loader
from hart_jax.data.precompute import AddTexts, AddTokens, main, precompute
from hart_jax.data.precomputed import (
    TEXTS,
    TOKENS,
    PrecomputedTexts,
    PrecomputedTokens,
    describe_texts,
    describe_tokens,
    is_precomputed,
    unpack,
)
from hart_jax.data.shards import RecordSource, open_shards, verify
from hart_jax.data.text_cache import cache_texts
from hart_jax.data.token_cache import cache_tokens
from hart_jax.errors import UserError
from hart_jax.text.encoder import load_text_encoder, text_options
from hart_jax.text.minilm import import_minilm
from tests.sample_runs import QWEN2
from tests.tiny import TOKENIZER, random_like, tiny_model
from tests.tiny_bert import write_published
from tests.tiny_qwen2 import SYSTEM_PROMPT, write_folder

POSITIONS = 6


@pytest.fixture(scope="module")
def params():
    return tiny_model().tokenizer


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    import_minilm(write_published(folder / "published"), folder / "encoder")
    return folder / "encoder"


@pytest.fixture(scope="module")
def stored(shards, params, encoder_folder, tmp_path_factory):
    """The shards with both fields."""
    out = tmp_path_factory.mktemp("stored") / "out"
    assert precompute(shards, out, [AddTokens(TOKENIZER, params), AddTexts(encoder_folder, POSITIONS)]) == 23
    return out


def test_records_hold_what_the_tables_hold(shards, stored, params, encoder_folder, tmp_path):
    assert verify(stored) == 3
    tokens = cache_tokens(TOKENIZER, params, shards, tmp_path)
    encoder, about = load_text_encoder(encoder_folder), describe_texts(encoder_folder, POSITIONS)
    texts = cache_texts(encoder, about, load_captions(shards), POSITIONS, tmp_path)
    stored_tokens, stored_texts = (
        pickle.loads(pickle.dumps(kind(stored))) for kind in (PrecomputedTokens, PrecomputedTexts)
    )
    before, after = RecordSource(shards), RecordSource(stored)
    assert len(after) == len(before) and after.categories == before.categories
    for index in range(23):
        kept = {name: value for name, value in after[index].items() if name not in (TOKENS, TEXTS)}
        assert kept == before[index]
        jax.tree.map(np.testing.assert_array_equal, stored_tokens(index), tokens(index))
        for number, caption in enumerate(kept["captions"]):
            found = stored_texts.at(index, number)
            assert found["mask"].dtype == texts(caption)["mask"].dtype
            np.testing.assert_array_equal(found["mask"], texts(caption)["mask"])
            # Other captions were encoded in the same batch.
            np.testing.assert_allclose(found["text"], texts(caption)["text"], atol=2e-3)


def test_interrupted_work_goes_on(shards, stored, params, encoder_folder, tmp_path, monkeypatch):
    fields = [AddTokens(TOKENIZER, params), AddTexts(encoder_folder, POSITIONS)]
    written = []

    def interrupted(path, records):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        return write_records(path, records)

    write_records = tool.write_records
    monkeypatch.setattr(tool, "write_records", interrupted)
    with pytest.raises(KeyboardInterrupt):
        precompute(shards, tmp_path / "out", fields)
    with pytest.raises(UserError, match="unfinished"):
        open_shards(tmp_path / "out")
    with pytest.raises(UserError, match="other images or settings"):
        precompute(shards, tmp_path / "out", fields[:1])
    times = [path.stat().st_mtime_ns for path in written]
    monkeypatch.setattr(tool, "write_records", write_records)
    precompute(shards, tmp_path / "out", fields)
    assert [path.stat().st_mtime_ns for path in written] == times
    for path in stored.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name
    # Complete: nothing is left to do.
    monkeypatch.setattr(tool, "write_records", None)
    assert precompute(shards, tmp_path / "out", fields) == 23


def test_other_models_are_refused(shards, stored, params, encoder_folder):
    assert is_precomputed(stored, TOKENS, lambda: describe_tokens(TOKENIZER, params))
    assert is_precomputed(stored, TEXTS, lambda: describe_texts(encoder_folder, POSITIONS))
    assert not is_precomputed(shards, TOKENS, lambda: {})
    assert not is_precomputed([stored, shards], TEXTS, lambda: {})
    with pytest.raises(UserError, match="the tokens in its records were computed with another tokenizer"):
        is_precomputed(stored, TOKENS, lambda: describe_tokens(TOKENIZER, random_like(params, seed=5)))
    with pytest.raises(UserError, match="the texts in its records were computed with another positions"):
        is_precomputed(stored, TEXTS, lambda: describe_texts(encoder_folder, POSITIONS + 1))


@pytest.mark.parametrize(
    "packed",
    [
        5,
        {"a": 5},
        {"a": {"dtype": "<f2", "shape": (3,)}},
        {"a": {"dtype": "<f2", "shape": (3,), "bytes": b"12345"}},
        {"a": {"dtype": "<f2", "shape": (3,), "bytes": b"12"}},
        {"a": {"dtype": "O", "shape": (1,), "bytes": bytes(8)}},
        {"a": {"dtype": "nonsense", "shape": (1,), "bytes": bytes(8)}},
    ],
)
def test_arrays_of_another_shape_are_damage(packed):
    with pytest.raises(UserError, match="computed ahead is damaged"):
        unpack(packed)


def test_texts_say_what_the_encoder_read_and_computed_in(stored, tmp_path):
    folder = write_folder(tmp_path / "qwen2", QWEN2)
    (tmp_path / "prompt.txt").write_text(SYSTEM_PROMPT)
    plain, behind, coarse = (
        describe_texts(folder, 6, text_options(folder, prompt, dtype))
        for prompt, dtype in (("", "auto"), (tmp_path / "prompt.txt", "float32"), ("", "bfloat16"))
    )
    assert plain["dtype"] == "float32" and "system_prompt" not in plain
    assert {name for name in behind if behind[name] != plain.get(name)} == {"system_prompt"}
    assert {name for name in coarse if coarse[name] != plain[name]} == {"dtype"}
    # One beside the encoder counts where none is given, and is the encoder's then, too.
    write_folder(folder, QWEN2)
    (folder / "system_prompt.txt").write_text(SYSTEM_PROMPT)
    assert describe_texts(folder, 6, text_options(folder, None)) == behind
    states = [
        load_text_encoder(folder, **text_options(folder, prompt))(["a dog"], 6).states_BTD
        for prompt in (None, tmp_path / "prompt.txt")
    ]
    np.testing.assert_array_equal(*states)
    # Its vocabulary counts where it is read: beside a tokenizer.json it is not.
    (folder / "merges.txt").write_text("a b")
    assert describe_texts(folder, 6, text_options(folder, None)) == behind
    (folder / "merges.txt").unlink()
    fields = AddTexts(folder, 6, tmp_path / "prompt.txt", "float32").about
    assert fields == behind
    with pytest.raises(UserError, match="computed with another text_encoder, positions, dtype, system_prompt"):
        is_precomputed(stored, TEXTS, lambda: behind | {"positions": 9})


def test_what_does_not_decode_is_named_and_replaced(corrupted, params, tmp_path, capsys):
    with pytest.raises(UserError, match=r"2 records do not decode, more than max_bad_records=1: 'pic050', 'pic051'"):
        precompute(corrupted, tmp_path / "few", [AddTokens(TOKENIZER, params)], max_bad_records=1)
    out = tmp_path / "out"
    precompute(corrupted, out, [AddTokens(TOKENIZER, params)], max_bad_records=2)
    assert "record 'pic051' does not decode, it gets no tokens (2 so far, 2 allowed)" in capsys.readouterr().err
    loader = make_loader(out, image_size=8, batch_size=4, tokens=PrecomputedTokens(out))
    visits = sorted(np.concatenate([next(loader)["index"] for _ in range(50)]))
    assert visits == [*range(50), 52, 52, *range(52, 200)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--tokenizer, --text_encoder, or both"),
        (["--text_encoder", "{encoder}"], "needs --context_tokens"),
        (["--tokenizer", "nowhere"], "nowhere"),
        (["--text_encoder", "{encoder}", "--context_tokens=6", "--buckets=1:1"], "--buckets are of tokens: give --tok"),
        (["--tokenizer", "{tokenizer}", "--buckets=1:1,7"], "^--buckets: ratio '7': write it as width:height"),
        (["--tokenizer", "{tokenizer}", "--buckets=2:3,3:4"], "^--buckets: 2:3 and 3:4 both give 6x10"),
    ],
)
def test_wrong_arguments(shards, encoder_folder, params, tmp_path, monkeypatch, arguments, message):
    write_part(tmp_path / "tokenizer", TOKENIZER, params)
    given = [argument.format(encoder=encoder_folder, tokenizer=tmp_path / "tokenizer") for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["precompute", "--shards", str(shards), "--out", str(tmp_path / "out"), *given])
    with pytest.raises(UserError, match=message):
        main()
    assert not (tmp_path / "out").exists()


def test_the_command(shards, stored, params, tmp_path, monkeypatch, capsys):
    write_part(tmp_path / "tokenizer", TOKENIZER, params)
    options = ["--shards", str(shards), "--out", str(tmp_path / "out"), "--tokenizer", str(tmp_path / "tokenizer")]
    monkeypatch.setattr(sys, "argv", ["precompute", *options])
    main()
    assert "23 records with tokens in" in capsys.readouterr().out
    jax.tree.map(np.testing.assert_array_equal, PrecomputedTokens(tmp_path / "out")(7), PrecomputedTokens(stored)(7))


def test_the_command_with_buckets(shards, stored, params, tmp_path, monkeypatch):
    """All images are squares: their tokens are as without."""
    write_part(tmp_path / "tokenizer", TOKENIZER, params)
    options = ["--shards", str(shards), "--out", str(tmp_path / "out"), "--tokenizer", str(tmp_path / "tokenizer")]
    monkeypatch.setattr(sys, "argv", ["precompute", *options, "--buckets=1:1,2:1"])
    main()
    assert is_precomputed(tmp_path / "out", TOKENS, lambda: describe_tokens(TOKENIZER, params, ("1:1", "2:1")))
    jax.tree.map(np.testing.assert_array_equal, PrecomputedTokens(tmp_path / "out")(7), PrecomputedTokens(stored)(7))

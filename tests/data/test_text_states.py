"""Text states computed ahead: the table gives what the encoder gives, and an interrupted table is done again."""

import pickle

import numpy as np
import pytest

from hart_jax.data.text_states import CaptionTokens, precompute
from hart_jax.text.encoder import load_text_encoder
from hart_jax.text.minilm import import_minilm
from tests.tiny_bert import write_published

CAPTIONS = ["a blue dog", "a red apple", "a red apple of a blue dog of a dog"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    import_minilm(write_published(folder / "published"), folder / "encoder")
    return load_text_encoder(folder / "encoder")


def test_the_table_is_the_encoder(encoder, tmp_path, capsys):
    table = precompute(encoder, CAPTIONS, 6, tmp_path)
    assert "3 captions, 1 cut to 6 positions" in capsys.readouterr().out
    for caption in CAPTIONS:
        states = encoder([caption], 6)
        np.testing.assert_allclose(table(caption)["text"], np.asarray(states.states_BTD[0]), atol=2e-3)
        np.testing.assert_array_equal(table(caption)["mask"], states.mask_BT[0])


def test_a_complete_table_is_read_and_an_incomplete_one_redone(encoder, tmp_path, capsys):
    precompute(encoder, CAPTIONS, 6, tmp_path)
    capsys.readouterr()
    precompute(encoder, CAPTIONS, 6, tmp_path)
    assert capsys.readouterr().out == ""
    next(tmp_path.glob("*/captions.json")).unlink()
    precompute(encoder, CAPTIONS, 6, tmp_path)
    assert "3 captions" in capsys.readouterr().out


def test_other_captions_or_lengths_have_their_own_table(encoder, tmp_path):
    for captions, length in ((CAPTIONS, 6), (CAPTIONS[:2], 6), (CAPTIONS, 8)):
        precompute(encoder, captions, length, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_workers_read_the_table_and_tokenize_without_the_weights(encoder, tmp_path):
    table = precompute(encoder, CAPTIONS, 6, tmp_path)
    tokens = CaptionTokens(encoder, 6)
    for text in (table, tokens):
        sent = pickle.dumps(text)
        assert len(sent) < 10_000
        for name, values in text(CAPTIONS[1]).items():
            np.testing.assert_array_equal(pickle.loads(sent)(CAPTIONS[1])[name], values)
    states = encoder([CAPTIONS[1]], 6)
    ids, mask = tokens(CAPTIONS[1])["input_ids"], tokens(CAPTIONS[1])["mask"]
    np.testing.assert_array_equal(encoder.encode(ids[None], mask[None]), states.states_BTD)

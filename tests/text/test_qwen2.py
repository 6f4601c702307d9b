"""Qwen2 against PyTorch: committed numbers, and the same live where torch is installed; what it refuses."""

import functools
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from safetensors.numpy import save_file

from hart_jax.errors import UserError
from hart_jax.text import qwen2_encoder
from hart_jax.text.encoder import load_text_encoder
from hart_jax.text.qwen2 import Qwen2Config, abstract_params
from hart_jax.text.system_prompt import read_system_prompt
from tests.tiny_bert import write_published
from tests.tiny_qwen2 import (
    CASES,
    LENGTH,
    LONG_SYSTEM_PROMPT,
    PAD,
    PROMPTS,
    REFERENCE,
    SYSTEM_PROMPT,
    file_tensors,
    pytorch_states,
    write_folder,
)

ROOT = Path(__file__).parents[2]
PLAIN, BEHIND_PROMPT, NESTED, BARE = CASES
PUBLISHED_1B5 = {
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
}


def prompt_file(folder: Path, case: str) -> Path | None:
    if not CASES[case].system_prompt:
        return None
    path = folder / "system_prompt.txt"
    path.write_text(CASES[case].system_prompt)
    return path


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    return functools.cache(lambda case: write_folder(tmp_path_factory.mktemp("qwen2"), CASES[case]))


@pytest.fixture(scope="module")
def encoder_of(folder_of):
    @functools.cache
    def load(case, dtype="float32"):
        folder = folder_of(case)
        return load_text_encoder(folder, system_prompt=prompt_file(folder, case), dtype=dtype)

    return load


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "qwen2", CASES[PLAIN])


@pytest.mark.parametrize("case", CASES)
def test_states_are_those_of_pytorch(encoder_of, case):
    # Of padding as well: HART's transformer sees it.
    expected = np.load(REFERENCE)[case]
    encoded = encoder_of(case)(PROMPTS, LENGTH)
    assert encoded.states_BTD.dtype == jnp.float32
    np.testing.assert_allclose(encoded.states_BTD, expected, atol=1e-4 * float(expected.std()))


@pytest.mark.torch
@pytest.mark.parametrize("case", CASES)
def test_pytorch_still_gives_the_committed_states(folder_of, case):
    pytest.importorskip("torch")
    np.testing.assert_allclose(pytorch_states(CASES[case], folder_of(case)), np.load(REFERENCE)[case], atol=2e-5)


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_is_close(encoder_of, case):
    encoder = encoder_of(case, "bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(encoder.params)} == {jnp.dtype(jnp.bfloat16)}
    states, expected = encoder(PROMPTS, LENGTH).states_BTD, np.load(REFERENCE)[case]
    assert np.linalg.norm(states - expected) <= 0.03 * np.linalg.norm(expected)


# Every printable character of Latin, some of other scripts, composed and not, spaces of all kinds, special tokens.
TEXTS = [
    *PROMPTS,
    f"a dog{PAD} of",
    "  two\n\nlines's 12 ",
    "".join(map(chr, range(33, 0x250))),
    "e\u0301te\u0301 \u1e9b\u0323 \uac00 \u1100\u1161 中文，标点。 दे वना गरी مرحبا 👩‍👩‍👧 \u200b\u3000\u00a0x",
    "I'LL we'Ve \t\r\n \r x<|im_end|>y <|im_end|> <|im_start|>",
]


@pytest.mark.parametrize("case", [PLAIN, NESTED])
@pytest.mark.parametrize("length", [5, LENGTH, 2000])
def test_tokens_are_those_of_transformers(folder_of, encoder_of, case, length):
    from transformers import AutoTokenizer

    published = AutoTokenizer.from_pretrained(folder_of(case))
    expected = published(TEXTS, padding="max_length", max_length=length, truncation=True, return_tensors="np")
    ids, mask, truncated = encoder_of(case).tokenize(TEXTS, length)
    np.testing.assert_array_equal(ids, expected.input_ids)
    np.testing.assert_array_equal(mask, expected.input_ids != published.pad_token_id)
    assert truncated == tuple(len(published(prompt).input_ids) > length for prompt in TEXTS)
    assert ids.dtype == mask.dtype == np.int32


def test_without_tokenizer_json_its_parts_give_the_same_tokens(tmp_path, monkeypatch, encoder_of):
    folder = write_folder(tmp_path, CASES[PLAIN])
    whole = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(whole["model"]["vocab"]))
    (folder / "merges.txt").write_text("\n".join(" ".join(pair) for pair in whole["model"]["merges"]))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    added = {str(token.pop("id")): token for token in whole["added_tokens"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"added_tokens_decoder": added}))
    found = load_text_encoder(folder, dtype="float32").tokenize(TEXTS, 2000)
    for ours, theirs in zip(found, encoder_of(PLAIN).tokenize(TEXTS, 2000), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'hart_jax\[transformers\]'"):
        load_text_encoder(folder)


@pytest.mark.parametrize("case", [BEHIND_PROMPT, BARE])
def test_the_system_prompt_is_computed_once_and_counts_as_if_it_were_read(encoder_of, case):
    encoder = encoder_of(case)
    ids, mask, _ = encoder.tokenize(PROMPTS, LENGTH)
    before = np.tile(encoder._tokenizer(CASES[case].system_prompt, LENGTH)[0], (len(PROMPTS), 1))
    alone = qwen2_encoder.Qwen2Encoder(encoder.config, encoder.params, encoder._tokenizer)
    whole = alone.encode(np.concatenate([before, ids], 1), np.concatenate([np.ones_like(before), mask], 1))
    np.testing.assert_allclose(encoder.encode(ids, mask), whole[:, before.shape[1] :], atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_what_stands_at_padding_changes_no_token(encoder_of, case):
    encoder = encoder_of(case)
    ids, mask, _ = encoder.tokenize(PROMPTS, LENGTH)
    other = encoder.encode(np.where(mask, ids, 7), mask)
    np.testing.assert_allclose(encoder.encode(ids, mask)[mask > 0], other[mask > 0], atol=1e-5)


@pytest.mark.parametrize("case", [PLAIN, BEHIND_PROMPT])
def test_a_prompt_has_the_same_states_in_every_batch(encoder_of, monkeypatch, case):
    encoder = encoder_of(case)
    expected = np.load(REFERENCE)[case]
    monkeypatch.setattr(qwen2_encoder, "ROWS_PER_DEVICE", 3)
    many = encoder([*PROMPTS, PROMPTS[1]], LENGTH).states_BTD
    np.testing.assert_allclose(many, expected[[0, 1, 2, 1]], atol=1e-5)
    np.testing.assert_allclose(encoder(PROMPTS[2:], LENGTH).states_BTD, expected[2:], atol=1e-5)


def test_a_pickled_encoder_tokenizes_and_carries_no_weights(encoder_of):
    encoder = encoder_of(BEHIND_PROMPT)
    encoder(PROMPTS, LENGTH)
    copy = pickle.loads(pickle.dumps(encoder))
    for ours, theirs in zip(copy.tokenize(PROMPTS, LENGTH), encoder.tokenize(PROMPTS, LENGTH), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert not hasattr(copy, "params")
    assert copy.context_dim == 24


_ON_MESHES = """
import sys
import numpy as np
from hart_jax.config import MeshConfig
from hart_jax.parallel.mesh import MeshLayout
from hart_jax.text.encoder import load_text_encoder
from tests.tiny_qwen2 import LENGTH, PROMPTS
folder, prompt, out = sys.argv[1:]
states = []
for data, fsdp, tensor in ((2, 2, 2), (1, 2, 4)):
    layout = MeshLayout.of(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), 8)
    encoder = load_text_encoder(folder, system_prompt=prompt, dtype="float32", layout=layout)
    up = encoder.params["layers"]["up"]["kernel"]
    assert up.addressable_shards[0].data.size * fsdp * tensor == up.size
    states.append(np.asarray(encoder(PROMPTS, LENGTH).states_BTD))
np.save(out, states)
"""


def test_eight_devices_give_the_same_states(tmp_path, folder_of):
    # Three prompts on four parts of a batch; six heads in four parts.
    prompt, out = prompt_file(tmp_path, BEHIND_PROMPT), tmp_path / "states.npy"
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", _ON_MESHES, str(folder_of(BEHIND_PROMPT)), str(prompt), str(out)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    expected = np.load(REFERENCE)[BEHIND_PROMPT]
    for states in np.load(out):
        np.testing.assert_allclose(states, expected, atol=1e-5)


def test_weights_in_several_files(tmp_path, encoder_of):
    folder = write_folder(tmp_path, CASES[PLAIN])
    tensors = file_tensors(CASES[PLAIN])
    (folder / "model.safetensors").unlink()
    files = [f"model-{index:05}-of-00003.safetensors" for index in (1, 2, 3)]
    for index, file in enumerate(files):
        save_file(dict(list(tensors.items())[index::3]), folder / file)
    weight_map = {name: files[index % 3] for index, name in enumerate(tensors)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    loaded = load_text_encoder(folder, dtype="float32").params
    jax.tree.map(np.testing.assert_array_equal, loaded, encoder_of(PLAIN).params)
    (folder / files[1]).unlink()
    with pytest.raises(UserError, match=files[1]):
        load_text_encoder(folder)


def test_every_parameter_of_the_published_size_has_logical_axes():
    boxes = jax.tree.leaves(
        abstract_params(Qwen2Config(**PUBLISHED_1B5)), is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
    )
    assert all(isinstance(box, nn.LogicallyPartitioned) and len(box.names) == box.value.ndim for box in boxes)
    assert sum(box.value.size for box in boxes) == 1_543_714_304


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen3"}, r"'qwen3' is unknown; known are bert, qwen2, qwen2_vl"),
        ({"hidden_act": "gelu"}, r"config\.json: hidden_act is 'gelu'; only 'silu'"),
        ({"head_dim": 8}, r"head_dim is 8; only 4 is supported"),
        ({"use_sliding_window": True}, r"use_sliding_window is true"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, r"layer_types has 'sliding_attention'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, r"rope_scaling has the type yarn"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, r"partial_rotary_factor is set"),
        ({"rope_scaling": "linear"}, r"rope_scaling is 'linear'"),
        ({"rope_theta": None}, r"rope_theta is missing"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config is set"),
        ({"num_attention_heads": 5}, r"hidden_size 24 is not an even multiple of num_attention_heads 5"),
        ({"num_key_value_heads": 4}, r"num_attention_heads 6 is not a multiple of num_key_value_heads 4"),
        ({"hidden_size": "wide"}, r"hidden_size is 'wide'"),
        ({"num_hidden_layers": 2}, r"12 tensors that this model has no place for: model\.layers\.2\."),
        ({"num_hidden_layers": 4}, r"no tensor 'model\.layers\.3\.\S+ and 11 more"),
        ({"intermediate_size": 48}, r"mlp\.down_proj\.weight' is \(24, 40\); by its config\.json it is \(24, 48\)"),
        ({"vocab_size": 290}, r"the tokenizer has 296 tokens but the embedding only 290 rows"),
    ],
)
def test_other_models_are_user_errors(tmp_path, change, message):
    folder = write_folder(tmp_path, CASES[PLAIN], config=change)
    with pytest.raises(UserError, match=message):
        load_text_encoder(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.layers.0.self_attn.o_proj.bias": np.ones(24)}, r"1 tensors .* no place for: \S+o_proj\.bias"),
        ({"model.norm.weight": None}, r"no tensor 'model\.norm\.weight'"),
        ({"model.norm.weight": np.ones(23)}, r"'model\.norm\.weight' is \(23,\); by its config\.json it is \(24,\)"),
        ({"model.embed_tokens.weight": None}, r"no tensor embed_tokens\.weight"),
    ],
)
def test_other_tensors_are_user_errors(tmp_path, change, message):
    tensors = {name: value for name, value in (file_tensors(CASES[PLAIN]) | change).items() if value is not None}
    folder = write_folder(tmp_path, CASES[PLAIN], tensors=tensors)
    with pytest.raises(UserError, match=message):
        load_text_encoder(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", r"config\.json: no such file"),
        ("tokenizer.json", r"no tokenizer\.json, nor vocab\.json and merges\.txt"),
        ("tokenizer_config.json", r"no tokenizer_config\.json"),
        ("model.safetensors", r"no weight file; looked for model\.safetensors"),
    ],
)
def test_missing_files_are_user_errors(folder, name, message):
    (folder / name).unlink()
    with pytest.raises(UserError, match=message):
        load_text_encoder(folder)
    with pytest.raises(UserError, match=r"none/config\.json: no such file"):
        load_text_encoder(folder / "none")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", r"config\.json: not a readable JSON file"),
        ("tokenizer.json", r"tokenizer\.json cannot be read"),
        ("tokenizer_config.json", r"tokenizer_config\.json: not a readable JSON object"),
        ("model.safetensors", r"cut short or not a safetensors file"),
    ],
)
def test_files_cut_short_are_user_errors(folder, name, message):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=message):
        load_text_encoder(folder)


def test_a_tokenizer_without_padding_and_unknown_options_are_user_errors(tmp_path, folder):
    with pytest.raises(UserError, match="dtype is 'float16'; choose one of float32, bfloat16"):
        load_text_encoder(folder, dtype="float16")
    with pytest.raises(UserError, match="type bert has no setting system_prompt"):
        load_text_encoder(write_published(tmp_path / "bert"), system_prompt="prompt.txt")
    for change, message in (
        ({"pad_token": None}, "no pad_token"),
        ({"pad_token": "<pad>"}, "the tokenizer has no token '<pad>', which is its pad_token"),
        ({"padding_side": "both"}, "padding_side is 'both'; it must be left or right"),
    ):
        write_folder(folder, CASES[PLAIN], tokenizer=change)
        with pytest.raises(UserError, match=message):
            load_text_encoder(folder)


def test_no_prompt_and_no_room_are_user_errors(encoder_of):
    with pytest.raises(UserError, match="context length 0"):
        encoder_of(PLAIN)(["a dog"], 0)
    with pytest.raises(UserError, match="empty"):
        encoder_of(PLAIN)(["a dog", " "], LENGTH)


@pytest.mark.parametrize("text", [SYSTEM_PROMPT, LONG_SYSTEM_PROMPT.rstrip("\n"), "  été 🍎 \n\n"])
def test_a_system_prompt_counts_to_the_last_character(tmp_path, text):
    path = tmp_path / "prompt.txt"
    path.write_bytes(text.encode())
    assert read_system_prompt(path) == text
    path.write_bytes(("\ufeff" + text.replace("\n", "\r\n")).encode())
    assert read_system_prompt(path) == text
    source = f"import nothing_there\nother = 1\nllm_system_prompt = None\nllm_system_prompt: str = {text!r}\nexit(1)\n"
    (tmp_path / "hart" / "utils").mkdir(parents=True)
    (tmp_path / "hart" / "utils" / "constants.py").write_text(source)
    assert read_system_prompt(tmp_path) == read_system_prompt(tmp_path / "hart" / "utils" / "constants.py") == text


def test_the_constant_of_a_clone_may_be_written_in_parts(tmp_path):
    path = tmp_path / "constants.py"
    path.write_text('llm_system_prompt = ("""Say "more":\nPrompt:\\n"""\n "x")\n')
    assert read_system_prompt(str(path)) == 'Say "more":\nPrompt:\nx'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("prompt.txt", None, r"prompt\.txt cannot be read: No such file"),
        ("prompt.txt", b" \n", r"prompt\.txt is empty"),
        ("prompt.txt", b"\xff\xfe\x00", r"prompt\.txt is not UTF-8 text"),
        ("constants.py", b"llm_system_prompt = (", r"constants\.py is not a Python file"),
        ("constants.py", b"default_prompts = []", r"constants\.py has no constant llm_system_prompt"),
        ("constants.py", b"llm_system_prompt = open('x').read()", r"llm_system_prompt is not a plain string"),
        ("constants.py", b"llm_system_prompt = ''", r"llm_system_prompt is not a plain string"),
    ],
)
def test_system_prompts_that_cannot_be_read(tmp_path, folder, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_text_encoder(folder, system_prompt=tmp_path / name)
    with pytest.raises(UserError, match=r"hart/utils/constants\.py cannot be read"):
        read_system_prompt(tmp_path)

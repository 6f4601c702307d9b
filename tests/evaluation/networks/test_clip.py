"""CLIP of tiny sizes: against transformers' CLIPModel, numbers that it gave, Pillow; folders that are refused."""

import copy
import dataclasses
import json
import sys

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file
from tokenizers import pre_tokenizers

from hart_jax.errors import UserError
from hart_jax.evaluation.networks.clip import Preprocessing, clip_score, load_clip, preprocessed

PROMPTS = ["a red apple", "a dog!", "the 3 hats of a very long and much too long prompt", "A  Dog"]

# The first tokens of every CLIP: bytes, bytes that end words, what was merged, start and end.
_BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
_MERGES = [("d", "o"), ("do", "g</w>"), ("r", "e"), ("re", "d</w>")]
_TOKENS = [*_BYTES, *(f"{byte}</w>" for byte in _BYTES), *("".join(merge) for merge in _MERGES)]
TOKENS = [*_TOKENS, "<|startoftext|>", "<|endoftext|>"]
END = len(TOKENS) - 1

CONFIG = {
    "model_type": "clip",
    "projection_dim": 12,
    "text_config": {
        "vocab_size": len(TOKENS),
        "hidden_size": 20,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "bos_token_id": END - 1,
        "eos_token_id": END,
        "pad_token_id": 1,
    },
    "vision_config": {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "image_size": 32,
        "patch_size": 8,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
}
PREPROCESSING = {
    "crop_size": {"height": 32, "width": 32},
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": {"shortest_edge": 34},
}


def changed(text=(), vision=(), **values):
    """CONFIG with other settings."""
    config = copy.deepcopy(CONFIG) | values
    config["text_config"] |= dict(text)
    config["vision_config"] |= dict(vision)
    return config


CONFIGS = {
    "new end token": CONFIG,
    "old end token": changed(text={"eos_token_id": 2}),
    "gelu": changed(
        text={"hidden_act": "gelu", "layer_norm_eps": 1e-3},
        vision={"hidden_act": "gelu", "layer_norm_eps": 1e-2, "patch_size": 7, "num_attention_heads": 2},
        projection_dim=7,
    ),
}


def published_tensors(config=CONFIG):
    """Random weights that keep activations of order one, by published names."""
    rng = np.random.default_rng(0)
    text, vision = config["text_config"], config["vision_config"]

    def linear(name, features, inputs, bias=True):
        weight = {f"{name}.weight": rng.standard_normal((features, inputs)) / inputs**0.5}
        return weight | ({f"{name}.bias": 0.2 * rng.standard_normal(features)} if bias else {})

    def norm(name, width):
        return {f"{name}.weight": rng.uniform(0.5, 1.5, width), f"{name}.bias": 0.2 * rng.standard_normal(width)}

    def layers(name, sizes):
        width, found = sizes["hidden_size"], {}
        for prefix in (f"{name}.encoder.layers.{index}." for index in range(sizes["num_hidden_layers"])):
            for part in "qkv":
                found |= linear(f"{prefix}self_attn.{part}_proj", width, width)
            found |= linear(f"{prefix}self_attn.out_proj", width, width)
            found |= norm(f"{prefix}layer_norm1", width) | norm(f"{prefix}layer_norm2", width)
            found |= linear(f"{prefix}mlp.fc1", sizes["intermediate_size"], width)
            found |= linear(f"{prefix}mlp.fc2", width, sizes["intermediate_size"])
        return found

    width, window = vision["hidden_size"], vision["patch_size"]
    positions = (vision["image_size"] // window) ** 2 + 1
    tensors = {
        "logit_scale": np.array(2.6592),
        "vision_model.embeddings.class_embedding": rng.standard_normal(width),
        "vision_model.embeddings.patch_embedding.weight": rng.standard_normal((width, 3, window, window)) / window,
        "vision_model.embeddings.position_embedding.weight": rng.standard_normal((positions, width)),
        **norm("vision_model.pre_layrnorm", width),
        **layers("vision_model", vision),
        **norm("vision_model.post_layernorm", width),
        **linear("visual_projection", config["projection_dim"], width, bias=False),
    }
    width = text["hidden_size"]
    tensors |= {
        "text_model.embeddings.token_embedding.weight": rng.standard_normal((text["vocab_size"], width)),
        "text_model.embeddings.position_embedding.weight": rng.standard_normal(
            (text["max_position_embeddings"], width)
        ),
        **layers("text_model", text),
        **norm("text_model.final_layer_norm", width),
        **linear("text_projection", config["projection_dim"], width, bias=False),
    }
    return {name: value.astype(np.float32) for name, value in tensors.items()}


def write_published(folder, config=CONFIG, tensors=None):
    folder.mkdir(parents=True)
    save_file(tensors or published_tensors(config), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING))
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(TOKENS)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in _MERGES))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer", "model_max_length": 16}')
    return folder


def images():
    """Three of 50 by 44 pixels."""
    rows, columns = np.mgrid[:50, :44]
    waves = [np.sin(rows / (3 + index) + columns * (index - 2) / 9) * 127 + 127 for index in range(9)]
    x_BHWC = np.stack(waves, -1).reshape(50, 44, 3, 3).transpose(2, 0, 1, 3).astype(np.uint8)
    x_BHWC[1, 10:20, 20:30] = (255, 0, 128)
    return x_BHWC


def resized_by_pillow(x_HWC, size, crop):
    height, width, _ = x_HWC.shape
    wide, tall = (int(size * side / min(height, width)) for side in (width, height))
    image = Image.fromarray(x_HWC).resize((wide, tall), Image.Resampling.BICUBIC)
    left, top = (wide - crop) // 2, (tall - crop) // 2
    return np.asarray(image.crop((left, top, left + crop, top + crop)))


def relative(found, wanted):
    return np.linalg.norm(np.asarray(found) - wanted) / np.linalg.norm(wanted)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_published(tmp_path_factory.mktemp("clip") / "tiny")


@pytest.fixture(scope="module")
def clip(folder):
    """Compiled, so that tests share it."""
    clip = load_clip(folder)
    return dataclasses.replace(clip, images=dataclasses.replace(clip.images, apply=jax.jit(clip.images.apply)))


def images_of(clip, x_BHWC):
    return np.asarray(clip.images.apply(clip.images.params, x_BHWC).features_BF)


def test_it_says_what_it_is(clip, tmp_path):
    network = clip.images
    assert network.name == "CLIP ViT-24/8@32px (tiny)" and not network.standard and network.width == 12
    assert images_of(clip, images()).shape == (3, 12) and images_of(clip, images()).dtype == np.float32
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves((network.params, clip.text_params)))
    other = load_clip(write_published(tmp_path / "other")).images
    assert other.name.endswith("(other)") and other.digest == network.digest and len(other.digest) == 16
    (tmp_path / "other/preprocessor_config.json").write_text(json.dumps(PREPROCESSING | {"size": 32}))
    assert load_clip(tmp_path / "other").images.digest != network.digest


def test_committed_numbers(clip):
    np.testing.assert_allclose(images_of(clip, images())[:, ::3], IMAGES, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(clip.embed(PROMPTS)[:, ::3], TEXTS, rtol=1e-3, atol=1e-3)


@pytest.mark.torch
@pytest.mark.parametrize("name", CONFIGS)
def test_against_transformers(name, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel

    folder, config = write_published(tmp_path / "published", CONFIGS[name]), CONFIGS[name]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = CLIPModel(CLIPConfig.from_dict(config)).eval()
    tensors = {key: torch.from_numpy(value) for key, value in published_tensors(config).items()}
    model.load_state_dict(tensors)
    # As it writes them: only what differs from its defaults, in several files.
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="40KB")
    assert (folder / "model.safetensors.index.json").is_file()
    clip = load_clip(folder)

    mean, std = (np.array(PREPROCESSING[f"image_{part}"], np.float32) for part in ("mean", "std"))
    pixels = np.stack([(resized_by_pillow(x, 34, 32) / np.float32(255) - mean) / std for x in images()])
    texts = tokenizer(PROMPTS, padding=True, truncation=True, max_length=16, return_tensors="pt")
    with torch.no_grad():
        wanted = [
            model.get_image_features(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())),
            model.get_text_features(**texts),
        ]
    embedded, texts = (getattr(output, "pooler_output", output).numpy() for output in wanted)
    assert relative(images_of(clip, images()), embedded) < 1e-4
    assert relative(clip.embed(PROMPTS), texts) < 1e-4


def test_end_tokens_old_and_new_name_the_same_place(clip, tmp_path):
    old = load_clip(write_published(tmp_path / "old", CONFIGS["old end token"]))
    np.testing.assert_array_equal(old.embed(PROMPTS), clip.embed(PROMPTS))
    # The first is followed by others where a prompt spells it out.
    spelt, plain = old.embed(["a dog! <|endoftext|> red", "a dog!"])
    assert relative(spelt, plain) < 1e-6


def test_settings_of_old_configs(clip, tmp_path):
    towers = {name: CONFIG[name] for name in ("text_config", "vision_config")}
    wrong = {name: sizes | {"num_hidden_layers": 7} for name, sizes in towers.items()}
    config = CONFIG | wrong | {f"{name}_dict": sizes for name, sizes in towers.items()}
    old = load_clip(write_published(tmp_path / "tiny", config, published_tensors()))
    assert old.images.digest == clip.images.digest


def test_an_embedding_does_not_depend_on_its_batch(clip):
    x_BHWC, texts = images(), clip.embed(PROMPTS)
    assert relative(images_of(clip, x_BHWC[[2, 0, 1]]), images_of(clip, x_BHWC)[[2, 0, 1]]) < 1e-6
    many = clip.embed(PROMPTS[::-1] * 9)
    assert many.shape == (36, 12) and many.dtype == np.float32
    assert relative(many, np.tile(texts[::-1], (9, 1))) < 1e-6
    assert relative(texts[3], clip.embed(["a dog"])[0]) < 1e-6
    assert relative(texts[0], texts[1]) > 0.1


def test_long_prompts_are_cut_before_the_end_token(clip):
    shorter = clip.embed(["a b c d e f g h i j k l m n"])
    assert relative(clip.embed(["a b c d e f g h i j k l m n o p q"]), shorter) < 1e-6
    assert relative(clip.embed(["a b c d e f g h i j k l m"]), shorter) > 1e-3


@pytest.mark.parametrize(("height", "width"), [(300, 400), (120, 120), (40, 31), (32, 90)])
def test_images_are_resized_as_pillow_does(height, width):
    x_HWC = np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)
    settings = Preprocessing(size=48, crop=40, mean=(0, 0, 0), std=(1 / 255,) * 3)
    off = np.abs(np.asarray(preprocessed(x_HWC[None], settings)[0]) - resized_by_pillow(x_HWC, 48, 40))
    assert off.max() < 1.01 and np.mean(off > 0.01) < 2e-3


def test_scores():
    images = np.array([[3.0, 0], [0, 2], [1, 1], [0, 0]])
    texts = np.array([[1.0, 0], [0, -1], [5, 0], [1, 0]])
    np.testing.assert_allclose(clip_score(images, texts), [100, 0, 100 / 2**0.5, 0], rtol=1e-6)


@pytest.fixture
def copied(tmp_path):
    return write_published(tmp_path / "copied")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("config.json", r"config\.json: no such file"),
        ("model.safetensors", r"no weight file; looked for model\.safetensors"),
        ("preprocessor_config.json", r"preprocessor_config\.json: no such file"),
        ("merges.txt", r"no tokenizer\.json, nor vocab\.json and merges\.txt"),
    ],
)
def test_missing_files(copied, file, message):
    (copied / file).unlink()
    with pytest.raises(UserError, match=message):
        load_clip(copied)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (changed(model_type="siglip"), r"config\.json: model_type is 'siglip'; only 'clip' is supported"),
        (changed(text={"hidden_act": "relu"}), "text_config: hidden_act is 'relu'; choose one of gelu, quick_gelu"),
        (changed(vision={"num_attention_heads": 5}), "vision_config: hidden_size 24 is not a multiple"),
        (changed(vision={"patch_size": [8, 8]}), r"vision_config: patch_size is \[8, 8\]; it must be a positive whole"),
        (changed(vision={"image_size": 40}), "crop_size is 32, but the model's image_size 40"),
        (changed(text={"vocab_size": 99}), "the tokenizer has 518 tokens but the embedding only 99 rows"),
        (changed(text={"intermediate_size": 33}), "text/layers/mlp_in/bias .3, 32. instead of .3, 33."),
        (changed(text={"num_hidden_layers": 4}), r"no tensor 'text_model\.encoder\.layers\.3\.layer_norm1\.weight'"),
        (changed(text={"num_hidden_layers": 2}), r"no place for: text_model\.encoder\.layers\.2\.layer_norm1\.bias"),
    ],
)
def test_configs_of_other_models(copied, config, message):
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        load_clip(copied)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"resample": 2}, r"preprocessor_config\.json: resample is 2; only 3 is supported"),
        ({"do_center_crop": False}, "do_center_crop is False; only True is supported"),
        ({"rescale_factor": 1}, "rescale_factor is 1; only 1/255"),
        ({"size": {"height": 32, "width": 32}}, "size is {'height': 32, 'width': 32}; only a number of pixels"),
        ({"crop_size": {"height": 32, "width": 30}}, "crop_size is .*; only a number of pixels"),
        ({"image_std": [1, 1]}, "must be of three channels"),
        ({"image_mean": 1}, "a setting is of the wrong type"),
        ({"size": 30}, "crop_size at most size"),
    ],
)
def test_preprocessing_of_other_models(copied, values, message):
    (copied / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING | values))
    with pytest.raises(UserError, match=message):
        load_clip(copied)


def test_without_transformers_the_extra_is_named(copied, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'hart_jax\[transformers\]'"):
        load_clip(copied)


def test_wrong_tensors_and_tokenizers(copied):
    tensors = load_file(copied / "model.safetensors")
    save_file(tensors | {"visual_projection.bias": np.zeros(12, np.float32)}, copied / "model.safetensors")
    with pytest.raises(UserError, match=r"unexpected .vision/projection/bias"):
        load_clip(copied)
    deeper = "vision_model.encoder.layers.1.mlp.fc1.weight"
    save_file(tensors | {deeper: tensors[deeper][:9]}, copied / "model.safetensors")
    with pytest.raises(UserError, match=r"tensor .* does not fit config\.json"):
        load_clip(copied)
    save_file(tensors, copied / "model.safetensors")
    (copied / "config.json").write_text(json.dumps(changed(text={"eos_token_id": 7})))
    with pytest.raises(UserError, match=r"does not end texts with the token that config\.json calls eos_token_id, 7"):
        load_clip(copied).embed(["a dog"])
    (copied / "vocab.json").write_text("[")
    with pytest.raises(UserError, match="the tokenizer cannot be read"):
        load_clip(copied)


def test_empty_prompts_are_refused(clip):
    for prompts, message in (([], "no prompt"), (["a", " "], "prompt 2 of 2 is empty")):
        with pytest.raises(UserError, match=message):
            clip.embed(prompts)


# By transformers' CLIPModel of PyTorch.
IMAGES = [
    [-0.94389, 0.59362, -0.51918, -1.20909],
    [-0.58912, 0.54384, -0.59780, -1.07785],
    [-1.02324, 0.13185, -0.34100, -1.18744],
]
TEXTS = [
    [0.21218, 0.30994, -2.90744, -0.17239],
    [0.70763, 1.25592, -0.93531, 0.32840],
    [0.74339, 0.66942, -2.09533, -0.32261],
    [0.75680, 0.34702, -2.17310, -1.24910],
]

"""A tiny BERT in the published layout, its tensors by a formula, so that no weights need be committed."""

import json

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "apple", "##s", "blue", "dog", "of", "render", "3", "##d"]
CONFIG = {
    "model_type": "bert",
    "vocab_size": len(WORDS),
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 12,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
}


def published_tensors():
    """The tensors of a tiny BERT, by a formula, so that no weights need be committed."""
    width, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    shapes = {
        "embeddings.word_embeddings.weight": (CONFIG["vocab_size"], width),
        "embeddings.position_embeddings.weight": (CONFIG["max_position_embeddings"], width),
        "embeddings.token_type_embeddings.weight": (2, width),
        "embeddings.LayerNorm": None,
        "pooler.dense": (width, width),
    }
    for layer in range(CONFIG["num_hidden_layers"]):
        prefix = f"encoder.layer.{layer}."
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            shapes[f"{prefix}attention.{part}"] = (width, width)
        shapes[f"{prefix}attention.output.LayerNorm"] = None
        shapes[f"{prefix}intermediate.dense"] = (inner, width)
        shapes[f"{prefix}output.dense"] = (width, inner)
        shapes[f"{prefix}output.LayerNorm"] = None
    tensors = {"embeddings.position_ids": np.arange(CONFIG["max_position_embeddings"])[None]}
    for seed, (name, shape) in enumerate(shapes.items()):
        if name.endswith(".weight"):
            tensors[name] = waves(seed, shape)
        elif shape is None:
            tensors[f"{name}.weight"] = 1 + 0.3 * waves(seed, (width,))
            tensors[f"{name}.bias"] = 0.2 * waves(seed + 0.5, (width,))
        else:
            tensors[f"{name}.weight"] = 0.5 * waves(seed, shape)
            tensors[f"{name}.bias"] = 0.2 * waves(seed + 0.5, shape[:1])
    return {name: array if "ids" in name else array.astype(np.float32) for name, array in tensors.items()}


def waves(seed, shape):
    index = np.arange(np.prod(shape), dtype=np.float64).reshape(shape)
    return np.sin(index * index * 0.7312 + index * 1.9 + seed * 12.9898)


def write_published(folder, tensors=None, config=None):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors or published_tensors(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config or CONFIG))
    tokenizer = Tokenizer(models.WordPiece({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    tokenizer.enable_padding(length=8)
    tokenizer.enable_truncation(3)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder

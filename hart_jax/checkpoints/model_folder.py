"""A model folder, complete in itself: `tokenizer/ transformer/ text_encoder/`, each with config and weights.

`sampling.json` beside them says how the model is best sampled from; without it, as the release.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hart_jax.checkpoints.class_names import read_classes, write_classes
from hart_jax.config import SampleConfig, Settings, TokenizerConfig, TransformerConfig, check_fit
from hart_jax.errors import UserError
from hart_jax.io.buckets import local_copy
from hart_jax.io.files import atomic_folder
from hart_jax.io.paths import as_path
from hart_jax.io.safetensors import check_tree, load_weights, save_weights
from hart_jax.text.encoder import SYSTEM_PROMPT_FILE
from hart_jax.text.system_prompt import read_system_prompt
from hart_jax.tokenizer.model import Tokenizer
from hart_jax.transformer.model import Hart

CONFIG, WEIGHTS, SAMPLING = "config.json", "model.safetensors", "sampling.json"


@dataclasses.dataclass(frozen=True)
class Model:
    """Settings and parameters (float32) of the two trained parts; `text_encoder` is the third's folder, or None.

    `system_prompt` is the file of the text encoder's system prompt where it does not lie in that folder.
    `classes` are the names of a class-conditional model's classes, in the order of their labels, where they are known.
    `sampling` are the settings that the model brings along, None of one that says nothing.
    """

    tokenizer_config: TokenizerConfig
    tokenizer: Any
    transformer_config: TransformerConfig
    transformer: Any
    text_encoder: Path | None
    system_prompt: Path | None = None
    classes: tuple[str, ...] = ()
    sampling: SampleConfig | None = None

    @property
    def sample_config(self) -> SampleConfig:
        """The model's own settings, or the release's."""
        return self.sampling or SampleConfig.default(self.tokenizer_config.vocab_size)


def abstract_tokenizer(config: TokenizerConfig) -> Any:
    """Shapes of the tokenizer's parameters, without computing any."""
    image = jax.ShapeDtypeStruct((1, *config.image_shape, 3), jnp.float32)
    variables = jax.eval_shape(Tokenizer(config).init, jax.random.key(0), image)
    return nn.unbox(variables["params"])


def abstract_transformer(config: TransformerConfig) -> Any:
    """Shapes of the transformer's and its head's parameters, without computing any."""
    return nn.unbox(boxed_transformer(config))


def boxed_transformer(config: TransformerConfig) -> Any:
    """As `abstract_transformer`, with the logical axes of every parameter."""
    shape = jax.ShapeDtypeStruct
    condition: Any = (
        shape((1, config.context_tokens, config.context_dim), jnp.float32),
        shape((1, config.context_tokens), jnp.int32),
    )
    if config.num_classes:
        condition = shape((1,), jnp.int32)
    latent = shape((1, config.num_tokens - 1, config.latent_channels), jnp.float32)
    kept = shape((1, config.sizes[-1]), jnp.int32)
    return jax.eval_shape(Hart(config).init, jax.random.key(0), condition, latent, kept)["params"]


def write_part(folder: Path, config: Settings, params: Any, dtype: str = "float32") -> None:
    """Writes config.json and model.safetensors of one part."""
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(folder / WEIGHTS, params, dtype=dtype)
    (folder / CONFIG).write_text(json.dumps(config.to_dict(), indent=2) + "\n")


def read_tokenizer(folder: Path) -> tuple[TokenizerConfig, Any]:
    """The tokenizer in `folder`; `UserError` if a file is missing, damaged, or of another model."""
    config = TokenizerConfig.read(folder / CONFIG)
    params = load_weights(folder / WEIGHTS)
    check_tree(params, abstract_tokenizer(config), f"tokenizer weights {folder / WEIGHTS}")
    return config, params


def read_transformer(folder: Path) -> tuple[TransformerConfig, Any]:
    """The transformer in `folder`; `UserError` if a file is missing, damaged, or of another model."""
    config = TransformerConfig.read(folder / CONFIG)
    params = load_weights(folder / WEIGHTS)
    check_tree(params, abstract_transformer(config), f"transformer weights {folder / WEIGHTS}")
    return config, params


def read_model(folder: str | Path) -> Model:
    """A whole model folder."""
    folder = local_copy(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such model folder")
    tokenizer_config, tokenizer = read_tokenizer(folder / "tokenizer")
    transformer_config, transformer = read_transformer(folder / "transformer")
    check_fit(tokenizer_config, transformer_config)
    text_encoder = folder / "text_encoder"
    return Model(
        tokenizer_config,
        tokenizer,
        transformer_config,
        transformer,
        text_encoder if text_encoder.is_dir() else None,
        classes=read_classes(folder / "transformer") if transformer_config.num_classes else (),
        sampling=read_sampling(folder, tokenizer_config),
    )


def read_sampling(folder: Path, tokenizer: TokenizerConfig) -> SampleConfig | None:
    """The sampling settings of a model folder, None where it has none; `UserError` where they do not fit the model."""
    path = folder / SAMPLING
    if not path.is_file():
        return None
    settings = SampleConfig.read(path)
    try:
        settings.check_fits(tokenizer)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return settings


def write_model(folder: str | Path, model: Model, dtype: str = "float32") -> None:
    """Writes a whole model folder, or nothing; `UserError` if `folder` exists."""
    folder = as_path(folder)
    if folder.exists():
        raise UserError(f"{folder}: already exists; give a new folder or remove it")
    # Without its settings a part is not taken for a model.
    with atomic_folder(folder, last=CONFIG) as target:
        write_part(target / "tokenizer", model.tokenizer_config, model.tokenizer, dtype)
        write_part(target / "transformer", model.transformer_config, model.transformer, dtype)
        write_classes(target / "transformer", model.classes)
        if model.sampling is not None:
            (target / SAMPLING).write_text(json.dumps(model.sampling.image_settings(), indent=2) + "\n")
        if model.text_encoder is not None:
            shutil.copytree(model.text_encoder, target / "text_encoder")
            if model.system_prompt is not None:
                text = read_system_prompt(model.system_prompt)
                (target / "text_encoder" / SYSTEM_PROMPT_FILE).write_bytes(text.encode())

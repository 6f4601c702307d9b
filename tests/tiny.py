"""A tiny model with random weights, for tests of what sits on top of it."""

from pathlib import Path

import jax
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from hart_jax.checkpoints.model_folder import Model, abstract_tokenizer, abstract_transformer
from hart_jax.config import TokenizerConfig, TransformerConfig

PATCH_NUMS = (1, 2, 4)
TOKENIZER = TokenizerConfig(
    image_size=8,
    patch_nums=PATCH_NUMS,
    channels=32,
    channel_multipliers=(1, 1),
    res_blocks=1,
    latent_channels=4,
    vocab_size=16,
    share_quant_resi=2,
)


def transformer_config(**changes) -> TransformerConfig:
    values = {
        "patch_nums": list(PATCH_NUMS),
        "vocab_size": 16,
        "latent_channels": 4,
        "context_tokens": 4,
        "context_dim": 8,
        "depth": 2,
        "width": 16,
        "heads": 2,
        "diffusion": {"width": 16, "depth": 1, "sampling_steps": 3},
    }
    return TransformerConfig.from_dict({**values, **changes})


def experiment_values(**changes) -> dict:
    """Of an experiment that trains the tiny transformer, `changes` being the transformer's."""
    return {
        "tokenizer": TOKENIZER.to_dict(),
        "transformer": transformer_config(**changes).to_dict(),
        "loss": {"condition_top_k": 8, "min_kept": 4},
        "sample": {"top_k": 8, "top_k_late": 8},
        "mesh": {},
        "data": {},
        "train": {},
    }


def random_like(tree, seed: int = 0):
    """Normal arrays of the shapes in `tree`: large enough that every part of the model matters."""
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: (0.2 * random.normal(size=leaf.shape)).astype(np.float32), tree)


def tiny_model(text_encoder: Path | None = None, **changes) -> Model:
    config = transformer_config(**changes)
    return Model(
        TOKENIZER,
        random_like(abstract_tokenizer(TOKENIZER)),
        config,
        random_like(abstract_transformer(config), seed=1),
        text_encoder,
    )


def mesh_of(platform: str) -> AbstractMesh:
    """One device that need not be here, to trace for."""
    device = AbstractDevice(platform, None, platform)
    return AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device)

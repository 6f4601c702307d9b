"""Settings: of the models, of a training and of a whole experiment."""

from hart_jax.config.experiment import (
    CONFIG_FILE_HELP,
    MIN_DISCRIMINATOR_PX,
    TOKENIZER_MODULES,
    WEIGHTS,
    Experiment,
    HartExperiment,
    SampleConfig,
    TokenizerExperiment,
    experiment_from,
    raised_in,
    read_experiment,
)
from hart_jax.config.model import DiffusionConfig, TokenizerConfig, TransformerConfig, check_fit
from hart_jax.config.settings import Settings
from hart_jax.config.training import (
    ATTENTION,
    DTYPES,
    DataConfig,
    HartLossConfig,
    MeshConfig,
    OptimizerConfig,
    TokenizerLossConfig,
    TrainConfig,
)

__all__ = [
    "ATTENTION",
    "CONFIG_FILE_HELP",
    "DTYPES",
    "MIN_DISCRIMINATOR_PX",
    "TOKENIZER_MODULES",
    "WEIGHTS",
    "DataConfig",
    "DiffusionConfig",
    "Experiment",
    "HartExperiment",
    "HartLossConfig",
    "MeshConfig",
    "OptimizerConfig",
    "SampleConfig",
    "Settings",
    "TokenizerConfig",
    "TokenizerExperiment",
    "TokenizerLossConfig",
    "TrainConfig",
    "TransformerConfig",
    "check_fit",
    "experiment_from",
    "raised_in",
    "read_experiment",
]

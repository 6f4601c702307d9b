"""The real-size configs have the published models' shapes and recipe; nothing of them is computed."""

import math
from pathlib import Path

import jax
import pytest

from hart_jax.checkpoints.model_folder import abstract_tokenizer, abstract_transformer
from hart_jax.config import HartExperiment, TokenizerExperiment, read_experiment
from hart_jax.training.token_subsampling import kept_counts

CONFIGS = Path(__file__).parent.parent / "configs"
# Of SPEC.md section 1, and L.
PUBLISHED_SCALES = {256: (10, 680), 512: (10, 2240), 1024: (14, 9451)}


def experiment(name: str) -> HartExperiment:
    read = read_experiment(CONFIGS / f"{name}.py")
    assert isinstance(read, HartExperiment)
    return read


def millions(params) -> float:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) / 1e6


@pytest.mark.parametrize("size", [256, 512, 1024])
def test_text_to_image_0p7b(size):
    config = experiment(f"hart_0p7b_{size}")
    params = abstract_transformer(config.transformer)
    assert round(millions(params), 2) == 732.40
    assert round(millions(params["diffusion_head"]), 1) == 36.6
    assert config.tokenizer.image_size == size
    assert (len(config.transformer.patch_nums), config.transformer.num_tokens) == PUBLISHED_SCALES[size]


# Published as 649M, 1.0B and 2.0B; the second can only be 1.069B, cut off rather than rounded.
@pytest.mark.parametrize(("name", "count"), [("hart_d20", 649.377), ("hart_d24", 1068.795), ("hart_d30", 2045.466)])
def test_class_conditional(name, count):
    config = experiment(name)
    assert round(millions(abstract_transformer(config.transformer)), 3) == count
    assert config.transformer.adaln == "own"


CURRICULUM = ("hart_0p7b_256", "hart_0p7b_512", "hart_0p7b_1024")
CLASSES = ("hart_d20", "hart_d24", "hart_d30")


@pytest.mark.parametrize("name", [*CURRICULUM, *CLASSES])
def test_kept_tokens_and_learning_rate_follow_their_rules(name):
    """SPEC.md section 5: 32 tokens of the last scale to half of it, and a rate in proportion to the batch."""
    config = experiment(name)
    positions = config.transformer.patch_nums[-1] ** 2
    counts = kept_counts(positions, config.loss)
    assert len(counts) == 4 and (counts[0], counts[-1]) == (32, positions // 2)
    base = 1e-4 if config.transformer.depth < 24 else 8e-5
    assert config.optimizer.learning_rate == pytest.approx(base * config.train.batch_size / 256)
    assert 0 < config.optimizer.warmup_steps <= config.train.steps / 10


def test_every_stage_of_the_curriculum_starts_from_the_one_before():
    before = ["", *(f"runs/{name}" for name in CURRICULUM)]
    assert [experiment(name).init_from for name in CURRICULUM] == before[:-1]
    assert all(experiment(name).tokenizer_from == "runs/hart_tokenizer" for name in (*CURRICULUM, *CLASSES))


def tokenizer_experiment(name: str) -> TokenizerExperiment:
    read = read_experiment(CONFIGS / f"{name}.py")
    assert isinstance(read, TokenizerExperiment)
    return read


def test_tokenizer():
    """SPEC.md section 1: the hybrid one starts from VAR's, whose encoder and codes stay."""
    discrete, hybrid = (tokenizer_experiment(name) for name in ("var_tokenizer", "hart_tokenizer"))
    shared = hybrid.tokenizer
    assert round(millions(abstract_tokenizer(shared)), 2) == 108.95
    for config in (discrete, experiment("hart_0p7b_256"), experiment("hart_d20")):
        assert config.tokenizer == shared
    assert (shared.beta, hybrid.loss.mse, discrete.loss.mse, discrete.loss.vq) == (0.25, 1.0, 1.0, 1.0)
    assert (discrete.init_from, discrete.freeze, discrete.loss.continuous_fraction) == ("", (), 0.0)
    assert hybrid.init_from == "runs/var_tokenizer"
    assert hybrid.freeze == ("encoder", "quant_conv", "quantizer")
    assert hybrid.loss.continuous_fraction == 0.5
    assert hybrid.loss.perceptual > 0 and hybrid.loss.adversarial > 0

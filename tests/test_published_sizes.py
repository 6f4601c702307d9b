"""The real-size configs have the published models' shapes; nothing of them is computed."""

import math
from pathlib import Path

import jax
import pytest

from hart_jax.experiment import HartExperiment, read_experiment
from hart_jax.model_folder import abstract_tokenizer, abstract_transformer

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


def test_learning_rate_follows_batch_and_depth():
    for name, base in {"hart_0p7b_256": 8e-5, "hart_d20": 1e-4, "hart_d24": 8e-5, "hart_d30": 8e-5}.items():
        config = experiment(name)
        assert config.optimizer.learning_rate == pytest.approx(base * config.train.batch_size / 256)


def test_tokenizer():
    shared = read_experiment(CONFIGS / "hart_tokenizer.py").tokenizer
    assert round(millions(abstract_tokenizer(shared)), 2) == 108.95
    for name in ("hart_0p7b_256", "hart_d20"):
        assert experiment(name).tokenizer == shared

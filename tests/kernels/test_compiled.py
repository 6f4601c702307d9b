"""The kernels for TPUs, compiled for every kind of them that there is, and a block; where libtpu is installed."""

import importlib.util
import re

import pytest

from benchmarks.attention_compiled import KINDS, compiled, vmem_of
from benchmarks.block_compiled import block_programs, kind_of
from hart_jax.config import TransformerConfig
from hart_jax.planning.hlo import kernels_of

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")


@pytest.mark.parametrize("topology", KINDS)
@pytest.mark.parametrize(
    ("name", "traced"),
    [
        ("256 half", False),
        ("256 half", True),
        *(pytest.param(name, False, marks=pytest.mark.slow) for name in ("1024 2:3", "1024 16:9")),
    ],
)
def test_compiles(topology, name, traced):
    program, _ = compiled(topology, name, 64, "bfloat16", traced)
    text = program.as_text()
    for kernel in ("forward", "backward"):
        assert len(re.findall(rf"%attention_{kernel}[.\d]* = .*tpu_custom_call", text)) == 1
    used = vmem_of(text)
    # The compiler's default limit on v4, v5e and v6e, with which it does on every kind.
    assert set(used) == {"forward", "backward"} and max(used.values()) < 16 * 2**20, used


def test_rotation_is_fused_into_the_block_around_it():
    """Of what is moved beside products and attention, nothing is halves of queries or keys."""
    config = TransformerConfig()
    texts, _, flops = block_programs(config, "v5e:1x1", 16)
    for text in texts.values():
        kinds = [kind_of(kernel) for kernel in kernels_of(text)]
        assert kinds.count("product") >= 5 and "attention" in kinds
        assert not any("neg" in kind and "silu" not in kind for kind in kinds), kinds
    length = config.context_tokens + sum(config.sizes[1:])
    assert flops["products"] == 2 * 16 * length * (4 * config.width**2 + 3 * config.width * config.mlp_width)

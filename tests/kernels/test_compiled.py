"""The kernels for TPUs, compiled for every kind of them that there is, where libtpu is installed."""

import importlib.util
import re

import pytest

from benchmarks.attention_compiled import KINDS, compiled

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")


@pytest.mark.parametrize("topology", KINDS)
@pytest.mark.parametrize("traced", [False, True])
def test_compiles(topology, traced):
    program, _ = compiled(topology, "256 half", 64, "bfloat16", traced)
    text = program.as_text()
    for kernel in ("forward", "backward"):
        assert len(re.findall(rf"%attention_{kernel}[.\d]* = .*tpu_custom_call", text)) == 1
    used = [int(size) for size in re.findall(r'used_scoped_memory_configs":\[\{[^}]*"size":"(\d+)"', text)]
    # What every kind has, and the compiler's default limit.
    assert len(used) >= 2 and max(used) < 16 * 2**20

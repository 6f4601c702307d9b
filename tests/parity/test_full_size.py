"""The formula's manifest of any configuration is that of the committed cases for theirs."""

import math

import pytest

from tests.parity.full_size import CASES, manifest, published
from tests.parity.materialize import read_manifest


@pytest.mark.parametrize("case", ["tiny", "flags"])
def test_the_manifest_of_a_case_is_found_again(case):
    theirs = read_manifest(CASES / case)
    ours = manifest(theirs["tokenizer_config"], theirs["llm_config"], theirs["seed"])
    assert ours["tensors"].keys() == theirs["tensors"].keys()
    for name, tensor in theirs["tensors"].items():
        same = dict(ours["tensors"][name])
        assert same.pop("shape") == tensor.pop("shape"), name
        assert same == pytest.approx(tensor), name


def test_the_published_size_has_the_published_parameters():
    tensors = manifest(*published(1024), 0)["tensors"]
    count = sum(
        math.prod(tensor["shape"])
        for name, tensor in tensors.items()
        if name.startswith("llm/") and tensor["kind"] == "normal" and not name.endswith("zero_k_bias")
    )
    assert round(count / 1e6, 2) == 732.40

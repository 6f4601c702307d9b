"""Prompts that a classifier of the user's refuses are named and not sampled; without PyTorch it is said so."""

import importlib.util
import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from hart_jax.errors import UserError
from hart_jax.text.prompt_filter import load_prompt_filter
from tests.sample_runs import sample, write_tiny
from tests.tiny_bert import CONFIG, published_tensors, write_published


@pytest.fixture
def classifier(tmp_path):
    """A BERT that finds prompts of dogs unsafe."""
    folder = tmp_path / "classifier"
    config = CONFIG | {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "SAFE", "1": "UNSAFE"}}
    tensors = {f"bert.{name}": value for name, value in published_tensors().items() if "ids" not in name}
    tensors |= {"classifier.weight": np.zeros((2, 24), np.float32), "classifier.bias": np.array([0, 1], np.float32)}
    write_published(folder, tensors, config)
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]"}'
    )
    return folder


def test_labels_must_be_told_apart(classifier):
    with pytest.raises(UserError, match=r"--prompt_filter_allows=FINE: the labels of .* are SAFE, UNSAFE"):
        load_prompt_filter(classifier, ["FINE"])
    config = json.loads((classifier / "config.json").read_text())
    (classifier / "config.json").write_text(json.dumps(config | {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}))
    with pytest.raises(UserError, match="which of LABEL_0, LABEL_1 lets a prompt through"):
        load_prompt_filter(classifier)
    (classifier / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(UserError, match="no id2label"):
        load_prompt_filter(classifier)


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="PyTorch is installed")
def test_without_pytorch(classifier):
    with pytest.raises(UserError, match=r"pip install torch .*, or set --prompt_filter=off"):
        load_prompt_filter(classifier)


@pytest.mark.torch
def test_refused_prompts_are_named_and_the_others_sampled(classifier, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(classifier)
    model = AutoModelForSequenceClassification.from_pretrained(classifier)
    states = {}
    with torch.no_grad():
        for prompt in ("a red apple", "a blue dog"):
            states[prompt] = model.bert(**tokenizer(prompt, return_tensors="pt")).pooler_output[0].numpy()
    # The line between the two.
    apart = states["a blue dog"] - states["a red apple"]
    bias = -apart @ (states["a blue dog"] + states["a red apple"]) / 2
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    weights |= {
        "classifier.weight": np.stack([np.zeros_like(apart), apart]),
        "classifier.bias": np.array([0, bias], np.float32),
    }
    save_file({name: np.ascontiguousarray(value) for name, value in weights.items()}, classifier / "model.safetensors")
    is_allowed = load_prompt_filter(classifier)
    assert is_allowed("a red apple") and not is_allowed("a blue dog")
    allowing = load_prompt_filter(classifier, ["UNSAFE"])
    assert allowing("a blue dog") and not allowing("a red apple")

    folder = write_tiny(tmp_path)
    given = [f"--config={folder / 'tiny.py'}", f"--prompt_filter={classifier}", "--prompt=a blue dog"]
    code, _, err = sample(folder, *given, "--prompt=a red apple", f"--out={tmp_path / 'out'}")
    assert code == 3 and "refused by --prompt_filter, not sampled: 'a blue dog'" in err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["00000-a-red-apple.png"]
    code, _, err = sample(folder, *given, f"--out={tmp_path / 'none'}")
    assert code == 3 and not (tmp_path / "none").exists()

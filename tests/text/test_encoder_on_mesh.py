"""Text encoders over a mesh of eight devices: where their weights lie, what they give, and that training's text stays.

Everything runs in one process of its own, which has eight fake devices; the tests look at what it wrote.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hart_jax.text.encoder import load_text_encoder
from hart_jax.text.minilm import import_minilm
from tests.tiny_bert import write_published
from tests.tiny_qwen2 import CASES, LENGTH, SYSTEM_PROMPT, write_folder
from tests.train_runs import ROOT, quick_environment, write_hart_config

BATCH = 16
WORDS = ["a red apple", "a blue dog", "a dog", "red", "of a dog", "a", "apples", "blue"]
# Positions of each encoder, and where its largest matrices' axes lie by the rules.
LENGTHS = {"minilm": 8, "qwen2": LENGTH}
SPLIT = {
    "minilm": {"layers/mlp_in/kernel": ["fsdp", "tensor"], "word_embedding": ["fsdp", "tensor"]},
    "qwen2": {"layers/up/kernel": ["fsdp", "tensor"], "embedding": ["fsdp", "tensor"]},
}

_ON_EIGHT = """
import dataclasses, json, sys
from pathlib import Path
import jax, numpy as np
from flax.traverse_util import flatten_dict
from hart_jax.config import MeshConfig
from hart_jax.config import read_experiment
from hart_jax.parallel.mesh import MeshLayout, make_global_batch
from hart_jax.parallel.rules import parameter_axes
from hart_jax.text import program
from hart_jax.text.encoder import load_text_encoder
from hart_jax.training.hart_task import HartTask
from tests.text.test_encoder_on_mesh import BATCH, LENGTHS, WORDS

folder, about = Path(sys.argv[1]), {}
layout = MeshLayout.of(MeshConfig(data=2, fsdp=2, tensor=2), BATCH)
for name, length in LENGTHS.items():
    options = {"dtype": "float32"} if name == "qwen2" else {}
    encoder = load_text_encoder(folder / name, layout=layout, **options)
    rows = encoder.tokenize(WORDS * 2, length)[:2]
    states = encoder.encode_batch(*make_global_batch(layout.batch, rows, BATCH))
    assert states.sharding.is_equivalent_to(layout.batch, 3), states.sharding
    program.LOGITS_BYTES, kept = 2 * 4 * 4 * length * length, program.LOGITS_BYTES
    again = load_text_encoder(folder / name, layout=layout, **options)
    in_rounds = again.encode_batch(*make_global_batch(layout.batch, rows, BATCH))
    program.LOGITS_BYTES = kept
    # Three prompts on four parts.
    few = encoder(WORDS[:3], length).states_BTD
    assert few.sharding.is_fully_replicated
    np.savez(folder / f"{name}.npz", split=states, in_rounds=in_rounds, few=few)
    by_rules = layout.state_shardings(encoder.params, parameter_axes(program._boxed(encoder.config)))
    planned = program.encode_program(encoder.config, layout, BATCH, length, prefix_tokens=4)
    assert planned.trace().out_info.shape == states.shape
    params = flatten_dict(encoder.params, sep="/")
    rules, plan = flatten_dict(by_rules, sep="/"), flatten_dict(planned.arguments[0], sep="/")
    for path, array in params.items():
        assert array.sharding.is_equivalent_to(rules[path], array.ndim), path
        assert (plan[path].shape, plan[path].dtype) == (array.shape, array.dtype), path
        assert plan[path].sharding.is_equivalent_to(array.sharding, array.ndim), path
        # What the compiler made of it, beside what it is called.
        of_device = {shard.data.shape for shard in array.addressable_shards}
        assert of_device == {rules[path].shard_shape(array.shape)}, path
    about[name] = {path: sorted(axis for axis in array.sharding.spec if axis) for path, array in params.items()}

experiment = read_experiment(folder / "inputs" / "tiny_hart.py")
task = HartTask(dataclasses.replace(experiment, precompute_text=False), folder, layout)
batches = task.batches()
batch = next(batches)
assert isinstance(batch["text"], jax.Array) and batch["text"].sharding == layout.batch
batches.look_ahead()
assert batches.get_state() == {"next_index": 1}
(folder / "about.json").write_text(json.dumps(about))
"""


@pytest.fixture(scope="module")
def eight(tmp_path_factory) -> Path:
    """The folder in which eight devices worked."""
    folder = tmp_path_factory.mktemp("eight")
    import_minilm(write_published(folder / "published"), folder / "minilm")
    write_folder(folder / "qwen2", next(case for case in CASES.values() if case.system_prompt == SYSTEM_PROMPT))
    (folder / "qwen2" / "system_prompt.txt").write_text(SYSTEM_PROMPT)
    write_hart_config(folder / "inputs")
    command = [sys.executable, "-c", _ON_EIGHT, str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=quick_environment(8), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # XLA says so where it makes an activation whole on every device.
    assert "full rematerialization" not in done.stderr
    return folder


@pytest.mark.parametrize("name", LENGTHS)
def test_states_are_those_of_one_device(eight, name):
    encoder = load_text_encoder(eight / name, **({"dtype": "float32"} if name == "qwen2" else {}))
    expected = np.asarray(encoder(WORDS, LENGTHS[name]).states_BTD)
    found = np.load(eight / f"{name}.npz")
    for how in ("split", "in_rounds"):
        np.testing.assert_allclose(found[how], np.tile(expected, (2, 1, 1)), atol=1e-5, rtol=0, err_msg=how)
    np.testing.assert_allclose(found["few"], expected[:3], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", LENGTHS)
def test_large_matrices_are_split(eight, name):
    lie = json.loads((eight / "about.json").read_text())[name]
    assert {path: lie[path] for path in SPLIT[name]} == SPLIT[name]
    kernels = {path: axes for path, axes in lie.items() if path.endswith("kernel")}
    assert kernels and all("fsdp" in axes for axes in kernels.values())

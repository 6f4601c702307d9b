"""The pod planner: what it refuses, what it prints and advises, and a tiny job compiled for a TPU that is not here."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from benchmarks.pod_plans import fsdp_of, search
from hart_jax.checkpoints.model_folder import abstract_transformer
from hart_jax.config import MeshConfig, read_experiment
from hart_jax.errors import UserError
from hart_jax.parallel.chips import GiB
from hart_jax.parallel.mesh import MeshLayout, make_mesh
from hart_jax.planning.jobs import encoding_job, read_text_config
from hart_jax.planning.plan import MOST_EACH, largest_batch, plan
from hart_jax.planning.plan_report import advice, table
from hart_jax.planning.plans import DECODED_BY_CORE, Plan
from hart_jax.planning.topology import read_topology
from hart_jax.text.qwen2 import QWEN2_1P5B, abstract_params
from tests.in_process import run_here
from tests.sample_runs import QWEN2
from tests.tiny import experiment_values, transformer_config
from tests.tiny_qwen2 import model_tensors, write_folder

SMALL = Plan(
    topology="v5e:16x16",
    what="train",
    chips=256,
    mesh={"data": 16, "fsdp": 16, "tensor": 1},
    batch_size=512,
    remat="full",
    memory=16 * GiB,
    arguments=GiB,
    temporaries=5 * GiB,
    peak=6 * GiB,
    fits=True,
    flops=256 * 100e12,
    device_flops=100e12,
    hbm_bytes=819e9,
    collective_bytes={"all-gather over fsdp": 2e9},
    compute_seconds=0.5,
    memory_seconds=1.0,
    link_seconds=0.25,
    compile_seconds=60.0,
    model_flops=256 * 75e12,
)
BIG = dataclasses.replace(SMALL, temporaries=24 * GiB, peak=25 * GiB, fits=False)


def changed(base: Plan, **changes) -> Plan:
    return dataclasses.replace(base, **changes)


def test_the_table_of_a_job_that_fits():
    assert table(SMALL) == "\n".join(
        [
            "v5e:16x16: 256 chips, mesh data=16 fsdp=16 tensor=1, global batch 512, remat full",
            "memory per chip   6.00 of 16.00 GiB (arguments 1.00, temporaries 5.00)",
            "FLOPs per step    25.60 P in all, 100.00 T per chip",
            "memory traffic    819.0 GB per chip",
            "sent per chip     all-gather over fsdp 2.00 GB",
            "of these          2.00 GB over fast links, 0% beside other work",
            "step, at least    1.000 s: compute 0.500, memory 1.000, links 0.250; mfu at most 38%, hfu at most 50%",
            "compiled in       60 s",
        ]
    )


# Over two slices, with captions that are encoded on the fly.
CAPTIONS = changed(
    SMALL,
    collective_bytes={"all-gather over fsdp": 2e9, "all-reduce over data": 3e9},
    slow_collective_bytes=2e9,
    overlapped=1.5e9,
    overlapped_slowly=2e9,
    slow_link_seconds=0.64,
    text_encoder=GiB // 2,
    text_states=GiB // 4,
    text_temporaries=GiB,
    text_flops=256 * 40e12,
    text_compute_seconds=0.2,
    text_seconds=0.25,
    hosts=64,
    image_size=512,
)


def test_the_table_of_captions_slices_and_hosts():
    lines = table(CAPTIONS).splitlines()
    assert lines[1] == "memory per chip   6.00 of 16.00 GiB (arguments 1.00, temporaries 5.00, text encoder 0.75)"
    rate = 512 / 64 / 1.25
    assert lines[5:9] == [
        "of these          3.00 GB over fast links, 50% beside other work; "
        "2.00 GB over slow links, 100% beside other work",
        "captions          10.24 P in all, 40.00 T per chip, temporaries 1.00 GiB, at least 0.250 s",
        "step, at least    1.250 s: compute 0.500, memory 1.000, links 0.250, slow links 0.640, captions 0.250; "
        "mfu at most 30%, hfu at most 56%",
        f"each host         of 64 gives at most 6 images/s, 5 MB/s of pixels: {rate / DECODED_BY_CORE[512]:.1f} cores "
        "that decode JPEG of 1024 px",
    ]


def test_utilisation_of_the_model_counts_neither_encoders_nor_what_is_computed_again():
    assert CAPTIONS.mfu == pytest.approx(0.5 * 75 / 100 / 1.25)
    assert CAPTIONS.hfu == pytest.approx((0.5 + 0.2) / 1.25)


def test_chips_that_repeat_work_are_reported():
    assert "100% more than an even share" in table(changed(SMALL, device_flops=200e12))
    assert "even share" not in table(changed(SMALL, device_flops=105e12))


@pytest.mark.parametrize(
    ("big", "expected"),
    [
        (changed(BIG, remat="none"), "train.remat=full (it is none)"),
        (changed(BIG, batch_size=1024), "lower train.batch_size to 512 or less"),
        # 15 of 24 GiB are free for 4 images a chip: 2 of them.
        (changed(BIG, batch_size=1024, temporaries=0, peak=0), "lower train.batch_size to 512"),
        (changed(BIG, batch_size=2048, what="sample", remat="none"), "lower --batch_size to 1280"),
        (changed(BIG, batch_size=2048, what="sample", text_encoder=3 * GiB), "lower --batch_size to 1024"),
        (changed(BIG, what="sample", text_encoder=8 * GiB), "--config.sample.weights=int8, or split"),
        (changed(BIG, batch_size=256), "mesh.tensor=2"),
        (changed(BIG, arguments=20 * GiB), "mesh.fsdp=64"),
        (changed(BIG, arguments=300 * GiB), "take more chips, with mesh.fsdp=1024"),
    ],
)
def test_advice_names_the_setting(big, expected):
    assert expected in advice(big)
    assert expected in table(big).splitlines()[-1]


def test_too_big_says_by_how_much_where_the_compiler_does():
    assert table(BIG).splitlines()[-1].startswith("TOO BIG by 9.00 GiB per chip: ")
    refused = table(changed(BIG, temporaries=0, peak=0, device_flops=None, hbm_bytes=None, collective_bytes=None))
    assert "temporaries unknown" in refused and "TOO BIG for the compiler: " in refused


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v5e", r"'' is no shape of v5e; write v5e:16x16"),
        ("v9:2x2", r"unknown kind 'v9'; kinds are v4, v5e"),
        ("v5e:2xtwo", "'2xtwo' is no shape"),
        ("v5e:0x2", "'0x2' is no shape"),
        ("h200:2x4x8", "'2x4x8' is no shape of h200"),
        ("two*v5e:2x2", "'two' is no number of slices"),
        ("0*v5e:2x2", "'0' is no number of slices"),
        ("*v5e:2x2", "'' is no number of slices"),
        ("1٣*v5e:2x2", "'1٣' is no number of slices"),
        ("v5e:2x1٣", "'2x1٣' is no shape"),
    ],
)
def test_topologies_that_are_written_wrongly(topology, message):
    with pytest.raises(UserError, match=message):
        read_topology(topology)


@pytest.mark.parametrize(("each", "largest"), [(1.5, 2048), (7.4, 512), (0.3, 8192), (17, None)])
def test_the_search_finds_the_largest_batch_that_fits(each, largest):
    """And compiles nothing twice, nor what has been compiled before, nor what cannot fit."""
    compiled = []

    def compile_batch(batch: int) -> Plan:
        compiled.append(batch)
        peak = int(each * batch / 256 * GiB)
        sizes = {"arguments": GiB, "temporaries": peak - GiB, "peak": peak}
        return changed(SMALL, batch_size=batch, fits=peak <= 16 * GiB, **sizes)

    known = {8192: compile_batch(8192)}
    batches = [256 * 2**power for power in range(6, -1, -1)]
    best = search(known, [], 16 * GiB, batches, compile_batch)
    assert (best.batch_size if best else None) == largest
    assert len(compiled) == len(set(compiled)) <= 3
    # What other chips needed says that larger batches are in vain.
    alike = [changed(compile_batch(1024), topology="v5p:8x8x4")]
    compiled.clear()
    again = search({}, alike, 16 * GiB, batches, compile_batch)
    assert (again.batch_size if again else None) == largest
    assert all(each * batch / 256 <= 1.25 * 16 + 1 for batch in compiled)


@pytest.mark.parametrize(
    ("weights", "each", "largest"), [(4, 1.5, 8), (4, 0.5, 24), (4, 0.1, 64), (4, 13, 0), (4, 7, 1)]
)
def test_the_search_for_what_a_chip_samples_at_a_time(weights, each, largest):
    """With few compilations, none of them made twice."""
    compiled = []

    def plan_of(batch: int) -> Plan:
        compiled.append(batch)
        temporaries = int(each * GiB * batch / 2)
        peak = weights * GiB + temporaries
        sizes = {"arguments": 3 * GiB, "text_encoder": GiB, "temporaries": temporaries, "peak": peak}
        return changed(SMALL, what="sample", batch_size=batch, fits=peak <= 16 * GiB, **sizes)

    found = largest_batch(plan_of, parts=2)
    assert found.batch_size == 2 * (largest or 1) and found.fits == bool(largest)
    assert len(compiled) == len(set(compiled)) <= 3


def test_sizes_of_the_text_encoder_beside_a_sampler(tmp_path):
    published = read_experiment("configs/hart_0p7b_256.py")
    assert read_text_config(published) == QWEN2_1P5B
    # 1.5B parameters, of which the embedding has 0.23B.
    abstract = nn.unbox(abstract_params(QWEN2_1P5B))
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract)) == 1_543_714_304
    folder = write_folder(tmp_path / "qwen2", QWEN2)
    assert read_text_config(published, str(folder / "config.json")).hidden_size == 24
    assert read_text_config(dataclasses.replace(published, text_encoder=str(folder))).num_hidden_layers == 3
    assert read_text_config(published, "assets/emoji/text_encoder/config.json").hidden_size == 384
    assert read_text_config(read_experiment("configs/emoji_hart.py")) is None
    assert read_text_config(read_experiment("configs/hart_d20.py")) is None
    other = tmp_path / "config.json"
    other.write_text('{"model_type": "t5"}')
    with pytest.raises(UserError, match=r"model_type is 't5'; known are qwen2, qwen2_vl, bert"):
        read_text_config(published, str(other))


def test_captions_are_encoded_for_the_whole_batch_and_prompts_in_parts():
    experiment = read_experiment("configs/hart_0p7b_256.py")
    layout = MeshLayout.of(MeshConfig(), 1)
    config = dataclasses.replace(QWEN2_1P5B, num_hidden_layers=2)
    captions, prompts = (encoding_job(config, experiment, layout, 64, training=on) for on in (True, False))
    assert (captions.batch_size, prompts.batch_size) == (64, 32)
    assert captions.flops.hardware == pytest.approx(2 * prompts.flops.hardware, rel=1e-6) and captions.flops.model == 0
    # Two bytes a weight.
    weights = jax.tree.leaves(captions.arguments[0])
    assert {leaf.dtype for leaf in weights} == {jnp.dtype("bfloat16")}


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "hart_jax.planning.plan", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/emoji_hart.py"], "--topology is missing"),
        (["--config=configs/emoji_tokenizer.py", "--topology=v5e:2x2"], "this config trains a tokenizer"),
        (["--config=configs/emoji_hart.py", "--topology=v5e:2x2", "--batch_size=4"], "is of --what=sample"),
        (["--config=configs/emoji_hart.py", "--what=dream"], "dream"),
        (["--config=configs/emoji_hart.py", "--topology=v5e:2x2", "--what=sample", "--batch_size=all"], "0, or fit"),
        (["--config=configs/emoji_hart.py", "--topology=v5e:2x2", "--what=sample", "--batch_size=²"], "0, or fit"),
    ],
)
def test_wrong_command_lines_end_before_compiling(arguments, message):
    code, _, err = run_here("hart_jax.planning.plan", *arguments)
    assert code == 2 and message in err


@pytest.mark.skipif(importlib.util.find_spec("jax_cuda12_plugin") is not None, reason="the plug-in is installed")
def test_a_missing_compiler_is_named():
    with pytest.raises(UserError, match=r"h200:8: cannot compile for it .*hart_jax\[gpu\]"):
        read_topology("h200:8")


def write_config(folder: Path, text_encoder: Path | None = None, **changes) -> Path:
    values = experiment_values(**changes)
    if text_encoder:
        values |= {"text_encoder": str(text_encoder), "precompute_text": False}
    path = folder / "tiny_hart.py"
    path.write_text(
        f"from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({values!r})\n"
    )
    return path


needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")


@needs_libtpu
@pytest.mark.parametrize("what", ["train", "sample"])
def test_a_tiny_job_for_a_tpu(tmp_path, what):
    config = write_config(tmp_path)
    mesh = ["--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.train.batch_size=8"]
    done = run(f"--config={config}", "--topology=v5e:2x2", f"--what={what}", "--json", *mesh)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    # The sampler is not split as training is.
    sizes = (2, 2, 1) if what == "train" else (4, 1, 1)
    assert found["chips"] == 4 and found["mesh"] == dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))
    assert found["batch_size"] == (8 if what == "train" else 32)
    assert found["peak"] >= found["arguments"] + found["temporaries"] > 0
    assert found["device_flops"] == pytest.approx(found["flops"] / 4, rel=0.5)
    # In training half of the parameters are on each chip, beside two moments and the average.
    parameters = sum(leaf.size for leaf in jax.tree.leaves(abstract_transformer(transformer_config())))
    held = 4 * parameters * (4 / 2 if what == "train" else 1)
    assert found["arguments"] > held and found["hbm_bytes"] > held
    assert any("all-gather over" in kind for kind in found["collective_bytes"]) == (what == "train")


@needs_libtpu
def test_a_tiny_sampler_with_its_text_encoder(tmp_path):
    folder = write_folder(tmp_path / "qwen2", QWEN2)
    config = write_config(tmp_path, context_dim=24)
    given = [f"--config={config}", "--topology=v5e:2x2", "--what=sample", "--config.mesh.tensor=2"]
    done = run(*given, f"--text_encoder_config={folder / 'config.json'}", "--batch_size=fit", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["mesh"] == {"data": 2, "fsdp": 1, "tensor": 2} and found["batch_size"] == 2 * MOST_EACH
    whole = 2 * sum(tensor.size for tensor in model_tensors(QWEN2).values())
    assert whole / 2 < found["text_encoder"] < whole
    assert found["peak"] >= found["arguments"] + found["temporaries"] + found["text_encoder"]


@needs_libtpu
def test_a_tiny_training_with_captions_over_two_slices(tmp_path):
    config = write_config(tmp_path, write_folder(tmp_path / "qwen2", QWEN2), context_dim=24)
    mesh = ["--config.mesh.fsdp=2", "--config.train.batch_size=8"]
    done = run(f"--config={config}", "--topology=2*v5e:2x2", "--json", *mesh)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["mesh"] == {"data": 4, "fsdp": 2, "tensor": 1} and found["chips"] == 8
    # The encoder's weights are shared over fsdp, as far as they can be split.
    whole = 2 * sum(tensor.size for tensor in model_tensors(QWEN2).values())
    assert whole / 2 <= found["text_encoder"] < whole
    # Two samples' states of 4 x 24 floats; the compiler fills them up.
    assert found["text_states"] >= 8 // 8 * 4 * 24 * 4
    assert found["text_flops"] > 0 and found["text_seconds"] >= found["text_compute_seconds"] > 0
    assert found["peak"] >= sum(found[name] for name in ("arguments", "temporaries", "text_encoder", "text_states"))
    # Every gradient crosses once, a part of it from each chip; beside them scalars, filled up to tiles.
    parameters = sum(leaf.size for leaf in jax.tree.leaves(abstract_transformer(transformer_config(context_dim=24))))
    assert 4 * parameters / 4 < found["slow_collective_bytes"] < 4 * parameters / 4 + 2**18
    assert found["slow_collective_bytes"] <= sum(
        size for kind, size in found["collective_bytes"].items() if "all-reduce over data" in kind
    )
    assert 0 <= found["overlapped_slowly"] <= found["slow_collective_bytes"]
    assert found["slow_link_seconds"] == pytest.approx(found["slow_collective_bytes"] / 3.125e9)


@needs_libtpu
def test_attention_kernels_within_the_sharded_step(tmp_path):
    config = write_config(tmp_path, width=128, heads=2)
    mesh = ["--config.mesh.fsdp=2", "--config.mesh.tensor=2", "--config.train.batch_size=8"]
    settings = ["--config.train.attention=tpu", "--config.train.remat=full"]
    done = run(f"--config={config}", "--topology=v5e:2x2", "--json", *mesh, *settings)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    # 8 samples, 2 heads, 2 layers, a tile each: 2 products forward, the same again for the gradients, 5 for them.
    attention = 8 * 2 * 2 * (2 + 2 + 5) * 2 * 64 * 512 * 1024
    assert attention < found["flops"] < 1.1 * attention
    assert found["device_flops"] == pytest.approx(found["flops"] / 4, rel=0.2)


@needs_libtpu
def test_a_batch_that_the_mesh_does_not_divide(tmp_path):
    done = run(f"--config={write_config(tmp_path)}", "--topology=v5e:2x2", "--config.train.batch_size=6")
    assert done.returncode == 2 and "train.batch_size=6: must be a multiple of data*fsdp=4" in done.stderr


def test_the_function_refuses_what_the_command_does():
    with pytest.raises(UserError, match="unknown kind"):
        plan(None, "tpu")  # type: ignore[arg-type]


@needs_libtpu
def test_a_mesh_splits_the_sides_of_a_torus_where_none_multiply_to_its_size():
    devices = read_topology("v5p:4x4x4").devices
    for fsdp in (2, 8, 16):
        mesh = make_mesh(MeshConfig(fsdp=fsdp), batch_size=64, devices=devices)
        assert dict(mesh.shape) == {"data": 64 // fsdp, "fsdp": fsdp, "tensor": 1}
        assert len(set(mesh.devices.flat)) == 64


def test_the_state_is_shared_over_whole_sides_of_a_pod():
    sizes = {"v5e:16x16": 16, "v6e:16x16": 16, "v5p:8x8x4": 8, "v5p:4x4x4": 16, "h200:8": 8, "4*v5e:16x16": 16}
    assert {topology: fsdp_of(topology) for topology in sizes} == sizes

"""What sampling takes: the sum of the parts against the whole, and the published figures; nothing is computed."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from hart_jax.checkpoints.model_folder import abstract_tokenizer, abstract_transformer
from hart_jax.config import HartExperiment, HartLossConfig, SampleConfig, TransformerConfig, read_experiment
from hart_jax.errors import UserError
from hart_jax.nn.flop_counter import flops_of
from hart_jax.parallel.chips import CHIPS, Chip
from hart_jax.planning import cost_model, traced_parts
from hart_jax.planning.cost_model import OpCost, params, passes, read_text_config, sampling_costs, savings
from hart_jax.planning.cost_report import (
    Roofline,
    least_seconds,
    roofline,
    roofline_report,
    work_report,
)
from hart_jax.planning.jobs import at_image_shape
from hart_jax.sampling.noise import KeyedNoise
from hart_jax.sampling.sampler import generate
from hart_jax.text import minilm_model, qwen2
from hart_jax.tokenizer.model import Tokenizer
from hart_jax.transformer.block import KVCache
from hart_jax.transformer.model import Hart
from tests.tiny import TOKENIZER, transformer_config
from tests.tiny_bert import CONFIG as TINY_BERT

ROOT = Path(__file__).parent.parent.parent
TINY = {
    "text": {},
    "own AdaLN, l2 attention": {"disable_aln": False, "attn_l2_norm": True, "sep_aln_pooling_mode": "avg"},
    "shared AdaLN, level table": {"shared_aln": True, "use_timestep_embed": False, "use_context_norm": False},
    "classes": {"num_classes": 3, "context_tokens": 1, "disable_aln": False},
}
PARTS_PUBLISHED = [part for part in cost_model.PARTS if part not in (cost_model.TEXT, cost_model.ADALN)]
BATCH = 3


def tiny(name: str = "text", **sample) -> HartExperiment:
    return HartExperiment(
        tokenizer=TOKENIZER,
        transformer=transformer_config(**TINY[name]),
        loss=HartLossConfig(condition_top_k=16),
        sample=SampleConfig(top_k=0, top_k_late=0, **sample),
    )


def experiment(name: str) -> HartExperiment:
    if name in TINY:
        return tiny(name)
    read = read_experiment(ROOT / "configs" / f"{name}.py")
    assert isinstance(read, HartExperiment)
    return read


def size(*trees) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(trees))


def macs_of(function, *arguments) -> float:
    """MACs of the products in a traced function of arrays or shapes."""
    return flops_of(jax.make_jaxpr(function)(*arguments).jaxpr) / 2


def shape(*sides: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sides, dtype)


def condition_shape(config: TransformerConfig, rows: int):
    if config.num_classes:
        return shape(rows, dtype=jnp.int32)
    mask = shape(rows, config.context_tokens, dtype=jnp.int32)
    return shape(rows, config.context_tokens, config.context_dim), mask


def macs_in(costs: list[OpCost], *parts: str) -> int:
    return sum(one.macs for one in costs if one.part in parts)


SAMPLINGS = {
    **{name: tiny(name) for name in TINY},
    "masked iterations": tiny(masked_iterations=3),
    "smooth, discrete only": tiny(smooth=True, discrete_only=True),
    "rectangle": at_image_shape(tiny(masked_iterations=3), (6, 12)),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "rectangle")) for name in SAMPLINGS]
)
def test_a_whole_sampling_takes_its_parts_less_what_it_saves(name):
    # Embedded levels, of which the sampler shares fewer or more than a report, would blur it.
    model = dataclasses.replace(SAMPLINGS[name].transformer, use_timestep_embed=False)
    config = dataclasses.replace(SAMPLINGS[name], transformer=model)
    hart, tokenizer = Hart(model, attention="reference"), Tokenizer(config.tokenizer)
    weights = {"transformer": abstract_transformer(model), "tokenizer": abstract_tokenizer(config.tokenizer)}

    def sample(weights, condition, indices):
        return generate(hart, tokenizer, weights, condition, KeyedNoise.of(0, indices), config.sample).image

    whole = macs_of(sample, weights, condition_shape(model, BATCH), shape(BATCH, dtype=jnp.int32))
    saved = savings(config, BATCH)
    done = ("the unconditional context", "cond_embed", "the diffusion head's time", "upsampling")
    spared = sum(macs for name, macs in saved.items() if name.startswith(done))
    assert whole == sum(one.macs for one in sampling_costs(config, BATCH)) - spared


@pytest.mark.parametrize("name", TINY)
def test_guidance_doubles_the_transformer_and_images_add_up(name):
    config = experiment(name)
    one, both, many = sampling_costs(config, 1, guided=False), sampling_costs(config, 1), sampling_costs(config, BATCH)
    # The level's embedding is one row for all.
    shared = (cost_model.EMBEDDINGS, cost_model.QUANTIZER, cost_model.DECODER, cost_model.DECODER_ATTENTION)
    for part in set(cost_model.PARTS) - {cost_model.EMBEDDINGS}:
        assert macs_in(both, part) == macs_in(one, part) * (1 if part in shared else 2)
        assert macs_in(many, part) == macs_in(both, part) * BATCH
    assert sum(w.weights for w in both) == sum(w.weights for w in many)
    assert sum(w.cache for w in many) == BATCH * sum(w.cache for w in both)


def test_cache_holds_what_later_passes_see():
    config = tiny()
    positions = config.transformer.context_tokens + config.transformer.num_tokens - 1
    assert [one.keys for one in passes(config.transformer)] == [4, 4 + 4, 4 + 4 + 16]
    assert passes(config.transformer, masked_iterations=3)[-1].keys == positions
    cache = jax.eval_shape(lambda: KVCache.empty(config.transformer, 2 * BATCH, 4 + 4, jnp.dtype(jnp.bfloat16)))
    assert cost_model.full_cache_bytes(config, BATCH) == 2 * size(cache)


def test_a_text_encoder_is_read_and_counted_with_its_prompts():
    config = dataclasses.replace(tiny(), transformer=dataclasses.replace(tiny().transformer, context_tokens=20))
    bert = minilm_model.MiniLMConfig()
    layer = 4 * 384**2 + 2 * 384 * 1536 + 2 * 20 * 384
    [first, *_] = sampling_costs(config, BATCH, text=bert)
    assert (first.part, first.macs) == (cost_model.TEXT, BATCH * 6 * 20 * layer)
    large = params(config, qwen2.QWEN2_1P5B)[cost_model.TEXT]
    assert large == 1_543_714_304
    [first, *_] = sampling_costs(config, BATCH, text=qwen2.QWEN2_1P5B)
    assert first.weights == 2 * (large - 151936 * 1536)
    keys = traced_parts.SYSTEM_PROMPT_TOKENS + 20
    layer = 2 * 1536 * (1536 + 256) + 3 * 1536 * 8960 + 2 * keys * 1536
    assert first.macs == BATCH * 28 * 20 * layer


def test_a_text_encoders_folder(tmp_path):
    assert read_text_config("") is None and read_text_config(str(tmp_path)) is None
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY_BERT))
    assert read_text_config(str(tmp_path)) == minilm_model.MiniLMConfig.from_json(TINY_BERT, "config.json")
    path.write_text(json.dumps({**dataclasses.asdict(qwen2.QWEN2_1P5B), "model_type": "qwen2_vl"}))
    assert read_text_config(str(tmp_path)) == qwen2.QWEN2_1P5B
    path.write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(UserError, match="model_type is 't5'; known are qwen2, qwen2_vl, bert"):
        read_text_config(str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "published"), [("hart_0p7b_512", 3.2e12), ("hart_0p7b_1024", 12.5e12)])
def test_modules_that_hooks_see_make_the_published_macs(name, published):
    """docs/performance.md says why these parts; the paper's figures have two and three digits."""
    seen = (cost_model.EMBEDDINGS, cost_model.OUT, cost_model.MLP, cost_model.TOKEN_HEAD, cost_model.DIFFUSION)
    assert macs_in(sampling_costs(experiment(name), 1), *seen) == pytest.approx(published, rel=0.006)


def rows_of(text: str) -> dict[str, list[str]]:
    """Tables' rows by their first cell; of several alike the first."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line[:1] == "|":
            first, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            found.setdefault(first, cells)
    return found


@pytest.mark.parametrize(("column", "name"), [(1, "hart_0p7b_256"), (2, "hart_0p7b_512"), (3, "hart_0p7b_1024")])
def test_the_published_tables_are_what_the_report_says(column, name):
    page = (ROOT / "docs" / "performance.md").read_text()
    published, report = rows_of(page), rows_of(work_report(experiment(name), 1, None))
    for part in (*PARTS_PUBLISHED, "all"):
        [parameters, *_] = published[part]
        assert [parameters, published[part][column]] == [report[part][0], report[part][3]]
    held = re.search("key-value cache (.*?)B with", work_report(experiment(name), 1, None))
    assert held is not None and held[1] == published["memory: cache with guidance, B"][column]
    bytes_of = {"weights read, B": 5, "key-value cache moved, B": 6, "largest array, B": 7}
    for row, cell in bytes_of.items():
        assert published[row][column] == report["all"][cell]
    chips = {chip: CHIPS[chip] for chip in ("h200", "h100", "v5e", "v6e", "v5p")}
    times = rows_of(roofline_report(experiment(name), 8, chips, None))
    least = zip(times["all steps, ms"], times["images/s at most"], strict=True)
    assert published[f"{name.rsplit('_')[-1]} px, batch 8"] == [", ".join(pair) for pair in least]


def test_roofline():
    chip = Chip(memory=100, flops=10.0, bandwidth=5.0, link=1.0, network=1.0)
    busy, reading = OpCost("a", "x", macs=20, weights=5), OpCost("b", "x", macs=5, weights=5, cache=15)
    assert (roofline([busy], chip), roofline([reading], chip)) == (Roofline(4.0, 1.0), Roofline(1.0, 4.0))
    assert [roofline([one], chip).bound for one in (busy, reading)] == ["compute", "memory"]
    assert roofline([busy, reading], chip).seconds == 5.0
    assert least_seconds([busy, reading], chip) == 8.0


def test_reports():
    config = tiny()
    report = work_report(config, 2, None)
    assert "text encoder not counted: no folder" in report and "| diffusion head |" in report
    chips = {"small": Chip(memory=10, flops=1e9, bandwidth=1e9, link=1.0, network=1.0)}
    assert "| no: 0 GB |" in roofline_report(config, 2, chips, None)


def command(*arguments: str) -> subprocess.CompletedProcess:
    module = [sys.executable, "-m", "hart_jax.planning.cost_report"]
    return subprocess.run([*module, *arguments], cwd=ROOT, capture_output=True, text=True)


def test_command():
    result = command("--config=configs/hart_0p7b_1024.py", "--batch_size=1,8", "--chips=h200", "--json")
    assert result.returncode == 0, result.stderr
    one, eight = json.loads(result.stdout)["batches"]
    assert not one["text_encoder_counted"]
    assert sum(part["macs"] for part in one["work"]) == pytest.approx(27.8e12, rel=1e-3)
    assert 1 < eight["least_seconds"]["h200"] / one["least_seconds"]["h200"] < 8


@pytest.mark.slow
def test_a_rectangle_costs_what_its_tokens_do():
    """And so about as much as a square of as many pixels."""
    report = work_report(at_image_shape(tiny(), (6, 12)), 1, None)
    assert report.startswith("12x6 px, batch 1: 4 context positions and 23 tokens in 3 scales") and "| 3x6 |" in report
    released = experiment("hart_0p7b_1024")
    square, tall = (
        sum(one.macs for one in sampling_costs(each, 1)) for each in (released, at_image_shape(released, (1360, 768)))
    )
    assert tall == pytest.approx(square, rel=0.03)


def test_command_refuses():
    result = command("--config=configs/emoji_hart.py", "--size=64x99")
    assert result.returncode == 2 and "size 64x99: height and width must be multiples of 8 px" in result.stderr
    result = command("--config=configs/emoji_hart.py", "--chips=h200,abacus")
    assert result.returncode == 2 and "'abacus' is unknown; known are v4," in result.stderr

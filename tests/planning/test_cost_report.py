"""Formulas for what sampling takes, against a count of the traced functions; nothing of full size is computed."""

import dataclasses
import functools
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from hart_jax.checkpoints.model_folder import abstract_tokenizer, abstract_transformer
from hart_jax.config import HartExperiment, HartLossConfig, SampleConfig, TransformerConfig, read_experiment
from hart_jax.diffusion.schedule import sample_residual
from hart_jax.errors import UserError
from hart_jax.nn.flop_counter import flops_of
from hart_jax.parallel.chips import Chip
from hart_jax.planning import cost_model
from hart_jax.planning.cost_model import OpCost, TextSize, params, passes, read_text_size, sampling_costs, savings
from hart_jax.planning.cost_report import (
    Roofline,
    least_seconds,
    roofline,
    roofline_report,
    work_report,
)
from hart_jax.sampling.noise import KeyedNoise
from hart_jax.sampling.sampler import generate
from hart_jax.text import minilm, qwen2
from hart_jax.text.minilm_model import MiniLM
from hart_jax.tokenizer.model import Tokenizer
from hart_jax.tokenizer.resize import area
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
FULL = ("hart_0p7b_1024", "hart_d24")
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


@pytest.mark.parametrize("name", [*TINY, *FULL])
def test_parameters(name):
    config = experiment(name)
    count = params(config)
    hart, tokenizer = abstract_transformer(config.transformer), abstract_tokenizer(config.tokenizer)
    blocks = count[cost_model.QKV] + count[cost_model.OUT] + count[cost_model.MLP] + count[cost_model.ADALN]
    assert blocks == size(hart["layers"])
    assert count[cost_model.TOKEN_HEAD] == size(hart["head"])
    assert count[cost_model.DIFFUSION] == size(hart["diffusion_head"])
    heads = count[cost_model.TOKEN_HEAD] + count[cost_model.DIFFUSION]
    assert count[cost_model.EMBEDDINGS] + blocks + heads == size(hart)
    assert count[cost_model.QUANTIZER] == size(tokenizer["quantizer"])
    assert count[cost_model.DECODER] == size(tokenizer["decoder"], tokenizer["post_quant_conv"])


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


def traced_parts(config: HartExperiment, batch: int) -> dict[str, float]:
    """MACs of the modules' methods at the shapes that `generate` gives them, with guidance."""
    model, sides, rows = config.transformer, config.transformer.patch_nums, 2 * batch
    hart, tokenizer = Hart(model, attention="reference"), Tokenizer(config.tokenizer)
    weights, tokenizer_weights = abstract_transformer(model), abstract_tokenizer(config.tokenizer)
    tokens = [model.context_tokens, *(side * side for side in sides[1:])]

    def method(name: str, module=hart, last: str = "", **static):
        """A method as a function of (parameters, arrays), the last array by the name `last`."""

        def call(p, *arrays):
            named = {last: arrays[-1]} if last else {}
            return module.apply({"params": p}, *arrays[: len(arrays) - len(named)], **named, **static, method=name)

        return call

    def hidden(count: int) -> jax.ShapeDtypeStruct:
        return shape(rows, count, model.width)

    condition = condition_shape(model, rows)
    context = jax.eval_shape(method("embed_condition"), weights, condition)
    embeddings = macs_of(method("embed_condition"), weights, condition)
    embeddings += macs_of(method("context_input"), weights, context)
    inputs = [jax.eval_shape(method("context_input"), weights, context)]
    for scale in range(1, len(sides)):
        latent, index = shape(rows, tokens[scale], model.latent_channels), shape(1, tokens[scale], dtype=jnp.int32)

        def scale_input(p, latent, index, context, scale=scale):
            return method("scale_input")(p, latent, scale, index, context)

        embeddings += macs_of(scale_input, weights, latent, index, context)
        inputs.append(jax.eval_shape(scale_input, weights, latent, index, context))
    code = shape(rows, tokens[-1], model.latent_channels)
    embeddings += macs_of(method("residual_condition"), weights, hidden(tokens[-1]), code)

    cache = jax.eval_shape(lambda: KVCache.empty(model, rows, sum(tokens), jnp.dtype(jnp.float32)))
    blocks = 0.0
    for index, (x, positions) in enumerate(inputs):
        run = method("blocks", last="cache", cache_start=sum(tokens[:index]))
        blocks += macs_of(run, weights, x, positions, context.pooled, cache)

    logits = sum(macs_of(method("logits"), weights, hidden(count), context) for count in (1, *tokens[1:]))

    def residual(p, z, noise):
        network = functools.partial(method("denoise"), p)
        return sample_residual(network, z, noise, None, 1.0, model.diffusion.sampling_steps)

    noise = shape(batch * tokens[-1], model.latent_channels)
    diffusion = macs_of(residual, weights, shape(rows * tokens[-1], model.width), noise)

    f_hat, quantizer = shape(batch, sides[-1], sides[-1], model.latent_channels), 0.0
    for scale, (side, following) in enumerate(itertools.pairwise(sides)):
        contribution = method("contribution", tokenizer, scale=scale)
        quantizer += macs_of(contribution, tokenizer_weights, shape(batch, side * side, model.latent_channels))
        quantizer += macs_of(functools.partial(area, side=following), f_hat)
    return {
        "embeddings": embeddings,
        "blocks": blocks,
        "logits": logits,
        "diffusion": diffusion,
        "quantizer": quantizer,
        "decoder": macs_of(method("decode", tokenizer), tokenizer_weights, f_hat),
    }


PARTS_OF = {
    "embeddings": (cost_model.EMBEDDINGS,),
    "blocks": (cost_model.QKV, cost_model.OUT, cost_model.MLP, cost_model.ADALN, cost_model.ATTENTION),
    "logits": (cost_model.TOKEN_HEAD,),
    "diffusion": (cost_model.DIFFUSION,),
    "quantizer": (cost_model.QUANTIZER,),
    "decoder": (cost_model.DECODER, cost_model.DECODER_ATTENTION),
}


def macs_in(costs: list[OpCost], *parts: str) -> int:
    return sum(one.macs for one in costs if one.part in parts)


@pytest.mark.parametrize("name", [*TINY, *FULL])
def test_macs_of_each_part_are_those_traced(name):
    config = experiment(name)
    costs, saved = sampling_costs(config, BATCH), savings(config, BATCH)
    expected = {group: macs_in(costs, *parts) for group, parts in PARTS_OF.items()}
    # What the modules do without.
    expected["diffusion"] -= saved["the diffusion head's time embedding once per step, not per token"]
    expected["decoder"] -= saved["upsampling convolutions as four of 2x2 before doubling"]
    assert expected == traced_parts(config, BATCH)


SAMPLINGS = {
    "text": tiny(),
    "classes": tiny("classes"),
    "masked iterations": tiny(masked_iterations=3),
    "smooth, discrete only": tiny(smooth=True, discrete_only=True),
}


@pytest.mark.parametrize("name", SAMPLINGS)
def test_a_whole_sampling_takes_that_less_what_is_saved(name):
    config = SAMPLINGS[name]
    model = config.transformer
    hart, tokenizer = Hart(model, attention="reference"), Tokenizer(config.tokenizer)
    weights = {"transformer": abstract_transformer(model), "tokenizer": abstract_tokenizer(config.tokenizer)}

    def draw(weights, condition, indices):
        return generate(hart, tokenizer, weights, condition, KeyedNoise.of(0, indices), config.sample).image

    whole = macs_of(draw, weights, condition_shape(model, BATCH), shape(BATCH, dtype=jnp.int32))
    counted = sum(one.macs for one in sampling_costs(config, BATCH))
    assert counted - sum(list(savings(config, BATCH).values())[:-2]) <= whole < counted


@pytest.mark.parametrize("name", [*TINY, "hart_0p7b_1024"])
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


def test_text_encoders():
    bert = minilm.MiniLMConfig()
    tokens = shape(2, 20, dtype=jnp.int32)
    counted = TextSize.of(bert)
    assert counted.params == size(minilm.abstract_params(bert))
    weights = minilm.abstract_params(bert)
    assert 2 * counted.macs(20) == macs_of(MiniLM(bert).apply, {"params": weights}, tokens, tokens)


def test_qwen2():
    counted, tokens, before = TextSize.of(qwen2.QWEN2_1P5B), 20, 7
    weights = qwen2.abstract_params(qwen2.QWEN2_1P5B)
    assert counted.params == size(weights) == 1_543_714_304
    cached = shape(28, 1, before, 2, 128)
    ids = shape(2, tokens, dtype=jnp.int32)
    prefix = qwen2.KeyValues(cached, cached)
    whole = macs_of(qwen2.Qwen2(qwen2.QWEN2_1P5B).apply, {"params": weights}, ids, ids, prefix)
    # Traced with all pairs, also those of later tokens.
    unseen = 28 * 2 * tokens * (tokens - 1) // 2 * 1536
    assert 2 * (counted.macs(tokens, before) + unseen) == whole


def test_a_text_encoders_folder(tmp_path):
    assert read_text_size("") is None and read_text_size(str(tmp_path)) is None
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY_BERT))
    counted = read_text_size(str(tmp_path))
    assert counted is not None and (counted.causal, counted.width, counted.layers) == (False, 24, 3)
    text_sizes = {**dataclasses.asdict(qwen2.QWEN2_1P5B), "model_type": "qwen2_vl"}
    path.write_text(json.dumps(text_sizes))
    assert read_text_size(str(tmp_path)) == TextSize.of(qwen2.QWEN2_1P5B)
    path.write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(UserError, match="'t5' cannot be counted"):
        read_text_size(str(tmp_path))


@pytest.mark.parametrize(("name", "published"), [("hart_0p7b_512", 3.2e12), ("hart_0p7b_1024", 12.5e12)])
def test_modules_that_hooks_see_make_the_published_macs(name, published):
    """docs/performance.md says why these parts; the paper's figures have two and three digits."""
    seen = (cost_model.EMBEDDINGS, cost_model.OUT, cost_model.MLP, cost_model.TOKEN_HEAD, cost_model.DIFFUSION)
    assert macs_in(sampling_costs(experiment(name), 1), *seen) == pytest.approx(published, rel=0.006)


def test_floor():
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


def test_command_refuses():
    result = command("--config=configs/emoji_hart.py", "--chips=h200,abacus")
    assert result.returncode == 2 and "'abacus' is unknown; known are v4," in result.stderr

"""A release of the published size with a golden case's formula as weights, to try the importer and `sample.py` on:

    python -m tests.parity.full_size --size 1024 --out hart-0.7b-1024px

The formula needs the name, shape and scale of every tensor; `manifest` lists them for any configuration.
"""

import argparse
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hart_jax.config import HartExperiment, read_experiment
from hart_jax.errors import UserError, run_cli
from tests.parity.materialize import read_manifest, write_release

CASES = Path(__file__).parent / "cases"
Shapes = Iterator[tuple[str, tuple[int, ...]]]


def published(size: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json of tokenizer and transformer of the released 0.7B model at 256, 512 or 1024 px."""
    experiment = read_experiment(f"configs/hart_0p7b_{size}.py")
    assert isinstance(experiment, HartExperiment)
    ours, tokenizer = experiment.transformer, experiment.tokenizer
    tiny = read_manifest(CASES / "tiny")
    sizes = {
        "ch": tokenizer.channels,
        "ch_mult": list(tokenizer.channel_multipliers),
        "v_patch_nums": list(tokenizer.patch_nums),
        "vocab_size": tokenizer.vocab_size,
        "z_channels": tokenizer.latent_channels,
    }
    llm = {
        "context_token": ours.context_tokens,
        "context_dim": ours.context_dim,
        "depth": ours.depth,
        "embed_dim": ours.width,
        "num_heads": ours.heads,
        "patch_nums": list(ours.patch_nums),
        "diff_width": ours.diffusion.width,
        "diff_depth": ours.diffusion.depth,
    }
    return {**tiny["tokenizer_config"], **sizes}, {**tiny["llm_config"], **llm}


def manifest(tokenizer: dict[str, Any], llm: dict[str, Any], seed: int) -> dict[str, Any]:
    """The manifest of a case with these configurations."""
    named = itertools.chain(
        ((f"tokenizer/{name}", shape) for name, shape in _tokenizer(tokenizer)),
        ((f"llm/{name}", shape) for name, shape in _transformer(llm, tokenizer)),
    )
    tensors = {name: {"shape": list(shape), **_making(name, shape)} for name, shape in named}
    return {"tokenizer_config": tokenizer, "llm_config": llm, "seed": seed, "tensors": tensors}


def _making(name: str, shape: tuple[int, ...]) -> dict[str, Any]:
    last = name.rsplit(".", 1)[-1]
    if last == "num_batches_tracked" or name == "llm/lvl_1L":
        return {"dtype": "int64", "kind": "buffer"}
    if last == "ema_vocab_hit_SV" or name == "llm/attn_bias_for_masking":
        return {"dtype": "float32", "kind": "buffer"}
    scale, offset = _scale(name, last, shape)
    return {"dtype": "float32", "kind": "normal", "scale": scale, "offset": offset}


def _scale(name: str, last: str, shape: tuple[int, ...]) -> tuple[float, float]:
    if last == "zero_k_bias":
        return 0.0, 0.0
    if last == "scale_mul_1H11":
        return 0.1, math.log(4.0)
    if last == "running_var":
        return 0.05, 1.0
    if last in ("bias", "q_bias", "v_bias", "running_mean"):
        return 0.02, 0.0
    if len(shape) == 1:
        return 0.1, 1.0
    if name.endswith("quantize.embedding.weight"):
        return 1.0, 0.0
    fan_in = math.prod(shape[1:])
    # As the cases have them: what is read from a small input is larger, and what modulates smaller.
    factors = {
        "llm/word_embed.weight": 3.0,
        "llm/lvl_embed.mlp.0.weight": 0.3,
        "llm/lvl_embed.mlp.2.weight": 0.3,
        "llm/lvl_embed.weight": 0.3,
        "llm/head_nm.ada_lin.1.weight": 0.2,
        "llm/head.weight": 3.0,
    }
    factor = 0.2 if name.startswith("llm/blocks") and "ada_lin" in name else factors.get(name, 1.0)
    return factor / math.sqrt(fan_in), 0.0


def _both(name: str, weight: tuple[int, ...]) -> Shapes:
    yield f"{name}.weight", weight
    yield f"{name}.bias", weight[:1]


def _conv(name: str, inputs: int, outputs: int, side: int = 3) -> Shapes:
    return _both(name, (outputs, inputs, side, side))


def _res_block(name: str, inputs: int, outputs: int) -> Shapes:
    yield from _both(f"{name}.norm1", (inputs,))
    yield from _conv(f"{name}.conv1", inputs, outputs)
    yield from _both(f"{name}.norm2", (outputs,))
    yield from _conv(f"{name}.conv2", outputs, outputs)
    if inputs != outputs:
        yield from _conv(f"{name}.nin_shortcut", inputs, outputs, 1)


def _attention(name: str, width: int) -> Shapes:
    yield from _both(f"{name}.norm", (width,))
    yield from _conv(f"{name}.qkv", width, 3 * width, 1)
    yield from _conv(f"{name}.proj_out", width, width, 1)


def _middle(name: str, width: int) -> Shapes:
    yield from _res_block(f"{name}.block_1", width, width)
    yield from _attention(f"{name}.attn_1", width)
    yield from _res_block(f"{name}.block_2", width, width)


def _tokenizer(config: dict[str, Any]) -> Shapes:
    widths = [config["ch"] * multiplier for multiplier in config["ch_mult"]]
    latent, last = config["z_channels"], len(widths) - 1
    yield from _conv("vae.encoder.conv_in", 3, config["ch"])
    for part, blocks in (("encoder", 2), ("decoder", 3)):
        way = "down" if part == "encoder" else "up"
        order = range(len(widths)) if part == "encoder" else reversed(range(len(widths)))
        width = config["ch"] if part == "encoder" else widths[-1]
        if part == "decoder":
            yield from _conv("vae.decoder.conv_in", latent, width)
        for level in order:
            for index in range(blocks):
                yield from _res_block(f"vae.{part}.{way}.{level}.block.{index}", width, widths[level])
                width = widths[level]
                if level == last:
                    yield from _attention(f"vae.{part}.{way}.{level}.attn.{index}", width)
            if part == "encoder" and level != last:
                yield from _conv(f"vae.encoder.down.{level}.downsample.conv", width, width)
            if part == "decoder" and level:
                yield from _conv(f"vae.decoder.up.{level}.upsample.conv", width, width)
        yield from _middle(f"vae.{part}.mid", widths[-1])
        yield from _both(f"vae.{part}.norm_out", (width,))
        yield from _conv(f"vae.{part}.conv_out", width, latent if part == "encoder" else 3)
    yield from _conv("vae.quant_conv", latent, latent)
    yield from _conv("vae.post_quant_conv", latent, latent)
    yield "vae.quantize.ema_vocab_hit_SV", (len(config["v_patch_nums"]), config["vocab_size"])
    for index in range(config["share_quant_resi"]):
        yield from _conv(f"vae.quantize.quant_resi.qresi_ls.{index}", latent, latent)
    yield "vae.quantize.embedding.weight", (config["vocab_size"], latent)
    yield from _conv("disc.main.0", 3, 64, 4)
    for index, inputs in ((2, 64), (5, 128), (8, 256)):
        yield f"disc.main.{index}.weight", (2 * inputs, inputs, 4, 4)
        yield from _both(f"disc.main.{index + 1}", (2 * inputs,))
        yield f"disc.main.{index + 1}.running_mean", (2 * inputs,)
        yield f"disc.main.{index + 1}.running_var", (2 * inputs,)
        yield f"disc.main.{index + 1}.num_batches_tracked", ()
    yield from _conv("disc.main.11", 512, 1, 4)


def _transformer(config: dict[str, Any], tokenizer: dict[str, Any]) -> Shapes:
    width, context = config["embed_dim"], config["context_dim"]
    heads, latent, vocab = config["num_heads"], tokenizer["z_channels"], tokenizer["vocab_size"]
    hidden = int(width * config["mlp_ratio"] * 2 / 3 + 255) // 256 * 256
    length = config["context_token"] - 1 + sum(side * side for side in config["patch_nums"])
    yield "lvl_1L", (1, length)
    yield "attn_bias_for_masking", (1, 1, length, length)
    yield from _both("word_embed", (width, latent))
    yield from _both("context_embed", (width, context))
    if config["use_context_norm"]:
        yield "context_norm.weight", (context,)
    if config["use_timestep_embed"]:
        yield from _both("lvl_embed.mlp.0", (width, 256))
        yield from _both("lvl_embed.mlp.2", (width, width))
    else:
        yield "lvl_embed.weight", (len(config["patch_nums"]), width)
    for block in range(config["depth"]):
        name = f"blocks.{block}"
        if config["attn_l2_norm"]:
            yield f"{name}.attn.scale_mul_1H11", (1, heads, 1, 1)
        for bias in ("q_bias", "v_bias", "zero_k_bias"):
            yield f"{name}.attn.{bias}", (width,)
        yield f"{name}.attn.qkv_proj.weight", (3 * width, width)
        yield from _both(f"{name}.attn.proj", (width, width))
        yield f"{name}.ffn.gate_proj.weight", (hidden, width)
        yield f"{name}.ffn.up_proj.weight", (hidden, width)
        yield f"{name}.ffn.down_proj.weight", (width, hidden)
        yield f"{name}.ln_wo_grad.weight", (width,)
        if not config["disable_aln"]:
            yield from _both(f"{name}.ada_lin.1", (6 * width, width))
    yield "head_nm.ln_wo_grad.weight", (width,)
    yield from _both("head_nm.ada_lin.1", (2 * width, width))
    yield from _both("head", (vocab, width))
    yield "decoder_norm.weight", (width,)
    net, inner = "diffloss.net", config["diff_width"]
    yield from _both(f"{net}.time_embed.mlp.0", (inner, 256))
    yield from _both(f"{net}.time_embed.mlp.2", (inner, inner))
    yield from _both(f"{net}.cond_embed", (inner, width))
    yield from _both(f"{net}.input_proj", (inner, latent))
    for index in range(config["diff_depth"]):
        name = f"{net}.res_blocks.{index}"
        yield from _both(f"{name}.in_ln", (inner,))
        yield from _both(f"{name}.mlp.0", (inner, inner))
        yield from _both(f"{name}.mlp.2", (inner, inner))
        yield from _both(f"{name}.adaLN_modulation.1", (3 * inner, inner))
    yield from _both(f"{net}.final_layer.linear", (2 * latent, inner))
    yield from _both(f"{net}.final_layer.adaLN_modulation.1", (2 * inner, inner))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024, choices=(256, 512, 1024), help="Pixels of a side.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="A new folder.")
    arguments = parser.parse_args()
    if arguments.out.exists():
        raise UserError(f"--out={arguments.out}: already exists; give a new folder")
    write_release(manifest(*published(arguments.size), arguments.seed), arguments.out)


if __name__ == "__main__":
    run_cli(main)

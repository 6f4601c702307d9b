"""The released tokenizer (config.json and state dict) in our settings and parameters."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from hart_jax.config import Scale, TokenizerConfig
from hart_jax.config.scales import shape_of
from hart_jax.errors import UserError
from hart_jax.io.state_dict import StateDict, transpose_conv

# Settings of the released config that change the computation, with the one value each that HART uses.
_FIXED = {
    "using_znorm": False,
    "double_decoder": False,
    "disable_quant_resi": False,
    "quantizer_type": "var_hybrid",
    "quant_conv_ks": 3,
    "default_qresi_counts": 0,
}


def tokenizer_config(released: Mapping[str, Any], patch_nums: tuple[Scale, ...] | None = None) -> TokenizerConfig:
    """Our settings from the released config.json; `patch_nums` (from the transformer's config) wins if given."""
    for key, value in _FIXED.items():
        if released.get(key, value) != value:
            raise UserError(f"tokenizer/config.json: {key}={released[key]!r} is not supported, only {value!r}")
    patch_nums = patch_nums or tuple(released["v_patch_nums"])
    multipliers = tuple(released["ch_mult"])
    height, width = (side * 2 ** (len(multipliers) - 1) for side in shape_of(patch_nums[-1]))
    return TokenizerConfig(
        image_size=(height, width),
        patch_nums=patch_nums,
        channels=released["ch"],
        channel_multipliers=multipliers,
        latent_channels=released["z_channels"],
        vocab_size=released["vocab_size"],
        quant_resi=float(released["quant_resi"]),
        share_quant_resi=released["share_quant_resi"],
        beta=float(released["beta"]),
    )


def _res_block(state: StateDict, key: str) -> dict[str, Any]:
    block: dict[str, Any] = {name: state.affine(f"{key}.{name}") for name in ("norm1", "norm2")}
    block |= {name: state.conv(f"{key}.{name}") for name in ("conv1", "conv2")}
    if state.take_any(f"{key}.nin_shortcut.weight") is not None:
        block["nin_shortcut"] = state.conv(f"{key}.nin_shortcut")
    return block


def _attn_block(state: StateDict, key: str) -> dict[str, Any]:
    return {
        "norm": state.affine(f"{key}.norm"),
        "qkv": state.conv(f"{key}.qkv"),
        "proj_out": state.conv(f"{key}.proj_out"),
    }


def _tower(state: StateDict, config: TokenizerConfig, key: str, direction: str, blocks: int, resample: str) -> dict:
    """Encoder (direction "down") or decoder ("up")."""
    last = len(config.channel_multipliers) - 1
    without_resampling = last if direction == "down" else 0
    tower: dict[str, Any] = {name: state.conv(f"{key}.{name}") for name in ("conv_in", "conv_out")}
    tower["norm_out"] = state.affine(f"{key}.norm_out")
    tower["mid"] = {name: _res_block(state, f"{key}.mid.{name}") for name in ("block_1", "block_2")}
    tower["mid"]["attn_1"] = _attn_block(state, f"{key}.mid.attn_1")
    for level in range(last + 1):
        for index in range(blocks):
            tower[f"{direction}_{level}_block_{index}"] = _res_block(state, f"{key}.{direction}.{level}.block.{index}")
            if level == last:
                attn = _attn_block(state, f"{key}.{direction}.{level}.attn.{index}")
                tower[f"{direction}_{level}_attn_{index}"] = attn
        if level != without_resampling:
            tower[f"{direction}_{level}_{resample}"] = state.conv(f"{key}.{direction}.{level}.{resample}.conv")
    return tower


def _phi(state: StateDict, config: TokenizerConfig) -> dict[str, np.ndarray]:
    keys = [f"vae.quantize.quant_resi.qresi_ls.{index}" for index in range(config.num_phi)]
    if config.share_quant_resi == 1:
        keys = ["vae.quantize.quant_resi.qresi"]
    elif config.share_quant_resi == 0:
        keys = [f"vae.quantize.quant_resi.{index}" for index in range(config.num_phi)]
    return {
        "phi_kernel": np.stack([transpose_conv(state.take(f"{key}.weight")) for key in keys]),
        "phi_bias": np.stack([state.take(f"{key}.bias") for key in keys]),
    }


def tokenizer_params(state: StateDict, config: TokenizerConfig) -> dict[str, Any]:
    """Parameters of `Tokenizer` from the released state dict (keys `vae.*`)."""
    params = {
        "encoder": _tower(state, config, "vae.encoder", "down", config.res_blocks, "downsample"),
        "decoder": _tower(state, config, "vae.decoder", "up", config.res_blocks + 1, "upsample"),
        "quant_conv": state.conv("vae.quant_conv"),
        "post_quant_conv": state.conv("vae.post_quant_conv"),
        "quantizer": {"codebook": state.take("vae.quantize.embedding.weight"), **_phi(state, config)},
    }
    state.explain("vae.quantize.ema_vocab_hit_SV")
    return params


def discriminator_variables(state: StateDict) -> dict[str, Any] | None:
    """Parameters and running statistics of `Discriminator` (keys `disc.*`), or None if the release has none."""
    if state.take_any("disc.main.0.weight") is None:
        return None
    params: dict[str, Any] = {"conv_0": state.conv("disc.main.0")}
    stats = {}
    layer, position = 1, 2
    while state.take_any(f"disc.main.{position + 1}.running_mean") is not None:
        norm = f"disc.main.{position + 1}"
        params[f"conv_{layer}"] = state.conv(f"disc.main.{position}")
        params[f"norm_{layer}"] = state.affine(norm)
        stats[f"norm_{layer}"] = {"mean": state.take(f"{norm}.running_mean"), "var": state.take(f"{norm}.running_var")}
        state.explain(f"{norm}.num_batches_tracked")
        layer, position = layer + 1, position + 3
    params[f"conv_{layer}"] = state.conv(f"disc.main.{position}")
    return {"params": params, "batch_stats": stats}

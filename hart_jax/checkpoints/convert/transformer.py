"""The released transformer (config.json and state dict) in our settings and parameters."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from hart_jax.config import DiffusionConfig, TransformerConfig
from hart_jax.errors import UserError
from hart_jax.io.state_dict import StateDict

# Settings of the released config that change the computation, with the one value each that HART uses.
_FIXED = {
    "model_type": "hart_transformer_t2i",
    "mlp_type": "llama",
    "attn_type": "llama",
    "use_cross_attn": False,
    "sampler": "iddpm",
    "diffusion_head_repeats": 1,
}


def transformer_config(released: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> TransformerConfig:
    """Our settings from the released llm/config.json and tokenizer/config.json."""
    for key, value in _FIXED.items():
        if released.get(key, value) != value:
            raise UserError(f"llm/config.json: {key}={released[key]!r} is not supported, only {value!r}")
    return TransformerConfig(
        patch_nums=tuple(released["patch_nums"]),
        vocab_size=tokenizer["vocab_size"],
        latent_channels=tokenizer["z_channels"],
        context_tokens=released["context_token"],
        context_dim=released["context_dim"],
        depth=released["depth"],
        width=released["embed_dim"],
        heads=released["num_heads"],
        mlp_ratio=float(released["mlp_ratio"]),
        attn_l2_norm=released["attn_l2_norm"],
        disable_aln=released["disable_aln"],
        shared_aln=released["shared_aln"],
        use_timestep_embed=released["use_timestep_embed"],
        sep_aln_pooling_mode=released["sep_aln_pooling_mode"],
        use_context_norm=released["use_context_norm"],
        norm_eps=float(released["norm_eps"]),
        diffusion=DiffusionConfig(
            width=released["diff_width"],
            depth=released["diff_depth"],
            sampling_steps=int(released["num_sampling_steps"]),
            batch_mul=released["diffusion_batch_mul"],
        ),
    )


def _stack(trees: list[Any], name: str) -> Any:
    """One tree whose leaves have a leading axis over these."""
    if isinstance(trees[0], dict):
        some = set().union(*trees) - set.intersection(*map(set, trees))
        if some:
            raise UserError(f"{name}: only some blocks have {', '.join(sorted(some))}")
        return {key: _stack([tree[key] for tree in trees], f"{name} {key}") for key in trees[0]}
    shapes = {tree.shape for tree in trees}
    if len(shapes) > 1:
        raise UserError(f"{name}: the blocks differ in shape, {sorted(shapes)}")
    return np.stack(trees)


def _block(state: StateDict, config: TransformerConfig, key: str) -> dict[str, Any]:
    heads, width = config.heads, config.head_dim
    attn = f"{key}.attn"
    qkv = state.take(f"{attn}.qkv_proj.weight").T.reshape(config.width, 3, heads, width)
    attention: dict[str, Any] = {"qkv": qkv, "proj": state.linear(f"{attn}.proj")}
    for name in ("q_bias", "v_bias"):
        attention[name] = state.take(f"{attn}.{name}").reshape(heads, width)
    _explain_zero(state, f"{attn}.zero_k_bias")
    if config.attn_l2_norm:
        attention["scale_mul"] = state.take(f"{attn}.scale_mul_1H11").reshape(heads)
    block: dict[str, Any] = {
        "attn": attention,
        "mlp": {name: state.linear(f"{key}.ffn.{name}_proj") for name in ("gate", "up", "down")},
        "norm_scale": state.take(f"{key}.ln_wo_grad.weight"),
    }
    if config.adaln == "own":
        block["ada_lin"] = state.linear(f"{key}.ada_lin.1")
    if config.adaln == "shared":
        block["scale_shift_table"] = state.take(f"{key}.scale_shift_table")
    return block


def _explain_zero(state: StateDict, key: str) -> None:
    """The key bias is a buffer of zeros; one that is not would be lost."""
    bias = state.take_any(key)
    if bias is not None and np.any(bias):
        raise UserError(f"{key} is not zero: HART's keys have no bias")


def _diffusion_head(state: StateDict, config: DiffusionConfig) -> dict[str, Any]:
    def res_block(key: str) -> dict[str, Any]:
        norm = state.affine(f"{key}.in_ln")
        return {
            "norm_scale": norm["scale"],
            "norm_bias": norm["bias"],
            "linear_1": state.linear(f"{key}.mlp.0"),
            "linear_2": state.linear(f"{key}.mlp.2"),
            "ada_lin": state.linear(f"{key}.adaLN_modulation.1"),
        }

    net = "diffloss.net"
    return {
        "time_embed": _timestep_embed(state, f"{net}.time_embed"),
        "cond_embed": state.linear(f"{net}.cond_embed"),
        "input_proj": state.linear(f"{net}.input_proj"),
        "blocks": _stack([res_block(f"{net}.res_blocks.{index}") for index in range(config.depth)], "res_blocks"),
        "final_ada_lin": state.linear(f"{net}.final_layer.adaLN_modulation.1"),
        "final_linear": state.linear(f"{net}.final_layer.linear"),
    }


def _timestep_embed(state: StateDict, key: str) -> dict[str, Any]:
    return {"linear_1": state.linear(f"{key}.mlp.0"), "linear_2": state.linear(f"{key}.mlp.2")}


def transformer_params(state: StateDict, config: TransformerConfig) -> dict[str, Any]:
    """Parameters of `Hart` from the released state dict."""
    params: dict[str, Any] = {
        "word_embed": state.linear("word_embed"),
        "context_embed": state.linear("context_embed"),
        "layers": _stack([_block(state, config, f"blocks.{index}") for index in range(config.depth)], "blocks"),
        "head_norm": {"scale": state.take("head_nm.ln_wo_grad.weight")},
        "head_ada_lin": state.linear("head_nm.ada_lin.1"),
        "head": state.linear("head"),
        "decoder_norm": {"scale": state.take("decoder_norm.weight")},
        "diffusion_head": _diffusion_head(state, config.diffusion),
    }
    if config.use_context_norm:
        params["context_norm"] = {"scale": state.take("context_norm.weight")}
    if config.use_timestep_embed:
        params["level_embed"] = _timestep_embed(state, "lvl_embed")
    else:
        params["level_table"] = state.take("lvl_embed.weight")
    state.explain("lvl_1L", "attn_bias_for_masking")
    return params

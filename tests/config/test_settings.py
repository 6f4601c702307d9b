"""Settings: built from plain values, every value checked, each error naming the setting and its value."""

import contextlib
import dataclasses
import json

import pytest

from hart_jax.config import (
    DataConfig,
    DiffusionConfig,
    HartLossConfig,
    OptimizerConfig,
    SampleConfig,
    TokenizerConfig,
    TokenizerLossConfig,
    TrainConfig,
    TransformerConfig,
    check_fit,
)
from hart_jax.errors import UserError
from hart_jax.io.files import read_json

ALL = (
    TokenizerConfig,
    DiffusionConfig,
    TransformerConfig,
    OptimizerConfig,
    DataConfig,
    TokenizerLossConfig,
    HartLossConfig,
    TrainConfig,
)


@pytest.mark.parametrize("kind", ALL)
def test_round_trip_through_json(kind):
    settings = kind()
    values = json.loads(json.dumps(settings.to_dict()))
    assert kind.from_dict(values) == settings
    assert kind.from_dict({}) == settings


def test_nested_settings_lists_and_whole_numbers():
    config = TransformerConfig.from_dict({"patch_nums": [1, 4], "mlp_ratio": 3, "diffusion": {"depth": 2}})
    assert config.patch_nums == (1, 4)
    assert config.mlp_ratio == 3.0 and isinstance(config.mlp_ratio, float)
    assert config.diffusion == DiffusionConfig(depth=2)
    assert DataConfig.from_dict({"sources": ["a", "b"], "weights": [3, 0.5]}).weights == (3.0, 0.5)


def test_training_folders():
    assert DataConfig().train_folders == ()
    assert DataConfig(train="a").train_folders == ("a",)
    assert DataConfig(sources=("a", "b")).train_folders == ("a", "b")


@pytest.mark.parametrize("kind", ALL)
def test_unknown_key_is_named_with_the_known_ones(kind):
    first = dataclasses.fields(kind)[0].name
    with pytest.raises(UserError, match=f"{kind.__name__}: unknown key speling; known: {first}"):
        kind.from_dict({"speling": 1})


def test_unknown_nested_key():
    with pytest.raises(UserError, match="DiffusionConfig: unknown key widht"):
        TransformerConfig.from_dict({"diffusion": {"widht": 3}})


@pytest.mark.parametrize(
    ("kind", "name", "value", "expected"),
    [
        (TokenizerConfig, "image_size", "256", "int or (int, int)"),
        (TokenizerConfig, "image_size", 256.0, "int or (int, int)"),
        (TokenizerConfig, "image_size", None, "int or (int, int)"),
        (TokenizerConfig, "image_size", True, "int or (int, int)"),
        (TokenizerConfig, "patch_nums", 16, "tuple"),
        (TokenizerConfig, "patch_nums", (1, "16"), "a tuple of int or (int, int)"),
        (TokenizerConfig, "patch_nums", [1, 16.0], "a tuple of int or (int, int)"),
        (TokenizerConfig, "quant_resi", "0.5", "float"),
        (TokenizerConfig, "quant_resi", False, "float"),
        (TransformerConfig, "attn_l2_norm", 1, "bool"),
        (TransformerConfig, "diffusion", 6, "DiffusionConfig"),
        (DataConfig, "train", 3, "str"),
        (TrainConfig, "dtype", None, "str"),
    ],
)
def test_wrong_types(kind, name, value, expected):
    with pytest.raises(UserError) as error:
        kind.from_dict({name: value})
    assert f"{kind.__name__}.{name}={tuple(value) if isinstance(value, list) else value!r}" in str(error.value)
    assert str(error.value).endswith(f"expected {expected}")


@pytest.mark.parametrize(
    ("kind", "values", "named"),
    [
        (TokenizerConfig, {"patch_nums": (16,)}, "patch_nums"),
        (TokenizerConfig, {"patch_nums": (1, 4, 4, 16)}, "patch_nums"),
        (TokenizerConfig, {"patch_nums": (0, 16)}, "patch_nums"),
        (TokenizerConfig, {"channel_multipliers": ()}, "channel_multipliers"),
        (TokenizerConfig, {"channel_multipliers": (1, 1, 0, 2, 4)}, "channel_multipliers"),
        (TokenizerConfig, {"channels": 48}, "channels"),
        (TokenizerConfig, {"channels": 0}, "channels"),
        (TokenizerConfig, {"res_blocks": 0}, "res_blocks"),
        (TokenizerConfig, {"latent_channels": 0}, "latent_channels"),
        (TokenizerConfig, {"vocab_size": 0}, "vocab_size"),
        (TokenizerConfig, {"quant_resi": -1.5}, "quant_resi"),
        (DiffusionConfig, {"width": 0}, "diffusion.width"),
        (DiffusionConfig, {"depth": 0}, "diffusion.depth"),
        (DiffusionConfig, {"batch_mul": 0}, "diffusion.batch_mul"),
        (DiffusionConfig, {"sampling_steps": 1}, "diffusion.sampling_steps"),
        (DiffusionConfig, {"sampling_steps": 1001}, "diffusion.sampling_steps"),
        (TransformerConfig, {"patch_nums": (2, 1)}, "patch_nums"),
        (TransformerConfig, {"vocab_size": 0}, "vocab_size"),
        (TransformerConfig, {"context_tokens": 0}, "context_tokens"),
        (TransformerConfig, {"context_dim": 0}, "context_dim"),
        (TransformerConfig, {"depth": 0}, "depth"),
        (TransformerConfig, {"heads": 0}, "heads"),
        (TransformerConfig, {"width": 100, "heads": 24}, "width"),
        (TransformerConfig, {"width": 48, "heads": 24}, "width/heads"),
        (TransformerConfig, {"sep_aln_pooling_mode": "mean"}, "sep_aln_pooling_mode"),
        (TransformerConfig, {"shared_aln": True, "disable_aln": False}, "shared_aln"),
        (TransformerConfig, {"num_classes": 10, "context_tokens": 2}, "context_tokens"),
        (OptimizerConfig, {"schedule": "step"}, "schedule"),
        (OptimizerConfig, {"learning_rate": 0.0}, "learning_rate"),
        (OptimizerConfig, {"learning_rate": float("nan")}, "learning_rate"),
        (OptimizerConfig, {"clip_norm": 0.0}, "clip_norm"),
        (OptimizerConfig, {"final_fraction": 1.5}, "final_fraction"),
        (OptimizerConfig, {"b1": 1.0}, "b1"),
        (OptimizerConfig, {"ema_decay": 1.0}, "ema_decay"),
        (DataConfig, {"stage_gib": 1e308}, "data.stage_gib"),
        (DataConfig, {"train": "a", "sources": ("b",)}, "data.sources"),
        (DataConfig, {"train": "a", "weights": (1.0,)}, "data.weights"),
        (DataConfig, {"sources": ("a", "b"), "weights": (1.0,)}, "data.weights"),
        (DataConfig, {"sources": ("a", "b"), "weights": (1.0, 0.0)}, "data.weights"),
        (TokenizerLossConfig, {"continuous_fraction": 1.1}, "loss.continuous_fraction"),
        (TokenizerLossConfig, {"perceptual_layers": 6}, "loss.perceptual_layers"),
        (TokenizerLossConfig, {"restart_below": 1.0}, "loss.restart_below"),
        (HartLossConfig, {"drop_min": 2.0}, "loss.drop_min"),
        (HartLossConfig, {"condition_top_p": 0.0}, "loss.condition_top_p"),
        (HartLossConfig, {"condition_top_k": 0}, "loss.condition_top_k"),
        (HartLossConfig, {"min_kept": 0}, "loss.min_kept"),
        (HartLossConfig, {"keep_counts": 0}, "loss.keep_counts"),
        (HartLossConfig, {"drop_mean": 0.3, "drop_std": 0.0}, "loss.drop_mean"),
        (HartLossConfig, {"drop_mean": 0.0, "drop_std": 0.1}, "loss.drop_mean"),
        (HartLossConfig, {"drop_mean": 0.0, "drop_std": 1e-9}, "loss.drop_mean"),
        (HartLossConfig, {"drop_min": 1.0}, "loss.drop_mean"),
        (TrainConfig, {"steps": 0}, "train.steps"),
        (TrainConfig, {"batch_size": 0}, "train.batch_size"),
        (TrainConfig, {"accumulate": 0}, "train.accumulate"),
        (TrainConfig, {"batch_size": 8, "accumulate": 3}, "train.accumulate"),
        (TrainConfig, {"log_every": 0}, "train.log_every"),
        (TrainConfig, {"keep_checkpoints": 0}, "train.keep_checkpoints"),
        (TrainConfig, {"save_every": 100, "keep_every": 150}, "train.keep_every"),
        (TrainConfig, {"save_every": 75, "keep_best": "loss"}, "train.save_every"),
        (TrainConfig, {"max_skipped": 0}, "train.max_skipped"),
        (TrainConfig, {"profile_steps": (3,)}, "train.profile_steps"),
        (TrainConfig, {"profile_steps": (3, 2)}, "train.profile_steps"),
        (TrainConfig, {"profile_steps": (0, 2)}, "train.profile_steps"),
        (TrainConfig, {"dtype": "float16"}, "train.dtype"),
    ],
)
def test_bad_value_is_named(kind, values, named):
    with pytest.raises(UserError, match=rf"^{named}=") as error:
        kind(**values)
    name = named.rpartition(".")[2]
    if name in values:
        assert f"{name}={values[name]!r}" in str(error.value)


@pytest.mark.parametrize("kind", (*ALL, SampleConfig))
def test_no_number_may_be_negative(kind):
    """But a share of a convolution's output, which may be taken away."""
    numbers = [name for name, value in kind().to_dict().items() if type(value) in (int, float)]
    for name in set(numbers) - {"quant_resi"}:
        with pytest.raises(UserError, match=rf"{name}=-1(\.0)?\b"):
            kind.from_dict({name: -1})


def test_patch_nums_that_do_not_give_the_image_size():
    with pytest.raises(UserError) as error:
        TokenizerConfig(image_size=64, patch_nums=(1, 2, 3, 4, 6), channel_multipliers=(1, 1, 2, 4))
    message = str(error.value)
    assert "patch_nums=(1, 2, 3, 4, 6)" in message and "image_size=64" in message
    assert "48 px" in message and "end patch_nums with 8" in message


def test_derived_sizes():
    assert TokenizerConfig().downsampling == 16
    assert TokenizerConfig().num_phi == 4
    assert TokenizerConfig(share_quant_resi=0).num_phi == 10
    transformer = TransformerConfig()
    assert (transformer.head_dim, transformer.num_tokens, transformer.mlp_width) == (64, 680, 4096)


@pytest.mark.parametrize(
    ("disable", "shared", "expected"), [(True, False, "none"), (True, True, "shared"), (False, False, "own")]
)
def test_modulation(disable, shared, expected):
    assert TransformerConfig(disable_aln=disable, shared_aln=shared).adaln == expected


@pytest.mark.parametrize(("name", "value"), [("patch_nums", (1, 16)), ("vocab_size", 1024), ("latent_channels", 16)])
def test_transformer_of_another_tokenizer(name, value):
    check_fit(TokenizerConfig(), TransformerConfig())
    with pytest.raises(UserError, match=rf"transformer.{name}=.* does not match tokenizer.{name}="):
        check_fit(TokenizerConfig(), TransformerConfig(**{name: value}))


@pytest.mark.parametrize("text", ['{"a": NaN}', '{"a": -Infinity}', '{"a": 1e999}', "[" * 100_000, f'{{"a": {2**63}}}'])
def test_json_of_numbers_that_are_not_finite(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json: not a readable JSON file"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize("value", [None, "x", [], {}, [[1]], [None], 1e308, True, 10**400, -(2**70), {"a": 1}, -1])
@pytest.mark.parametrize("kind", [TokenizerConfig, TransformerConfig, SampleConfig])
def test_whatever_a_setting_is_there_is_an_error_or_none(kind, value):
    """None but ours, that is."""
    for name in kind().to_dict():
        with contextlib.suppress(UserError):
            kind.from_dict({**kind().to_dict(), name: value})


def test_read_json(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        read_json(path)
    path.write_text('{"a": [1]}')
    assert read_json(path) == {"a": [1]}
    for text, message in (("{", "not a readable JSON"), ("[1]", "expected a JSON object")):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            read_json(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_json(tmp_path)

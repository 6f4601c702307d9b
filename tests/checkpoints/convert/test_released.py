"""The released layout: which files are read, every tensor accounted for, every fault one clear error."""

import contextlib
import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hart_jax.checkpoints.convert import released
from hart_jax.checkpoints.convert.cache import read_released_cached
from hart_jax.checkpoints.convert.released import (
    is_released,
    is_released_tokenizer,
    read_released,
    read_released_discriminator,
    read_released_tokenizer,
)
from hart_jax.checkpoints.model_folder import write_part
from hart_jax.checkpoints.workdir import load_tokenizer
from hart_jax.errors import UserError
from hart_jax.tokenizer.discriminator import Discriminator
from tests.checkpoints.convert.conftest import CASES, edit_config, edit_tensors
from tests.parity.materialize import read_manifest, write_release

LLM, TOKENIZER = "llm/model.safetensors", "tokenizer/model.safetensors"


def shifted(tensors):
    """What an EMA file might hold: all weights a little different."""
    return {name: value + np.float32(0.01) if name.endswith("weight") else value for name, value in tensors.items()}


def head_bias_and_kernel(source, **kwargs):
    head = read_released(source, **kwargs).transformer["head"]
    return head["bias"], head["kernel"]


def test_reads_what_was_written(pristine):
    model = read_released(pristine)
    llm, tokenizer = load_file(pristine / LLM), load_file(pristine / TOKENIZER)
    np.testing.assert_array_equal(model.transformer["head"]["kernel"], llm["head.weight"].T)
    np.testing.assert_array_equal(model.tokenizer["quantizer"]["codebook"], tokenizer["vae.quantize.embedding.weight"])
    assert model.transformer_config.adaln == "own" and model.transformer_config.attn_l2_norm
    assert model.tokenizer_config.share_quant_resi == 2 and model.tokenizer_config.quant_resi == 0.3
    assert model.text_encoder is None


def test_layouts_are_told_apart(pristine, tmp_path):
    assert is_released(pristine)
    assert not is_released(tmp_path)
    assert not is_released(tmp_path / "absent")


def test_ema_is_preferred_unless_told_otherwise(release):
    tensors = load_file(release / LLM)
    save_file(shifted(tensors), release / "llm/ema_model.safetensors")
    bias, kernel = head_bias_and_kernel(release)
    np.testing.assert_array_equal(kernel, shifted(tensors)["head.weight"].T)
    np.testing.assert_array_equal(bias, tensors["head.bias"])
    np.testing.assert_array_equal(head_bias_and_kernel(release, weights="model")[1], tensors["head.weight"].T)


def test_ema_alone_is_enough(release):
    (release / LLM).rename(release / "llm/ema_model.safetensors")
    read_released(release)
    with pytest.raises(UserError, match=r"llm: no weight file; looked for model.safetensors"):
        read_released(release, weights="model")


@pytest.mark.torch
def test_pickles(release):
    torch = pytest.importorskip("torch")
    tensors = load_file(release / LLM)
    as_torch = {name: torch.from_numpy(value) for name, value in tensors.items()}
    torch.save(
        {name: torch.from_numpy(value) for name, value in shifted(tensors).items()}, release / "llm/ema_model.bin"
    )
    np.testing.assert_array_equal(head_bias_and_kernel(release)[1], shifted(tensors)["head.weight"].T)

    (release / LLM).unlink()
    torch.save({name: value.bfloat16() if value.is_floating_point() else value for name, value in as_torch.items()},
               release / "llm/pytorch_model.bin")  # fmt: skip
    bfloat16 = as_torch["head.weight"].bfloat16().float().numpy().T
    np.testing.assert_array_equal(head_bias_and_kernel(release, weights="model")[1], bfloat16)

    torch.save({"ema": as_torch, "step": 1}, release / "llm/ema_model.bin")
    with pytest.raises(UserError, match=r"ema_model\.bin: not a plain state dict"):
        read_released(release)
    torch.save([np.zeros(2)], release / "llm/ema_model.bin")
    with pytest.raises(UserError, match=r"ema_model\.bin: damaged, or holds more than tensors"):
        read_released(release)


def test_a_damaged_pickle_is_named(release):
    (release / "llm/ema_model.bin").write_bytes(b"any")
    with pytest.raises(UserError, match=r"ema_model\.bin: damaged, or holds more than tensors"):
        read_released(release)
    read_released(release, weights="model")


def test_several_files(release):
    tensors = load_file(release / LLM)
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, members in parts.items():
        save_file({name: tensors[name] for name in members}, release / "llm" / file)
    weight_map = {name: file for file, members in parts.items() for name in members}
    index = release / "llm/model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (release / LLM).unlink()
    np.testing.assert_array_equal(head_bias_and_kernel(release)[1], tensors["head.weight"].T)

    index.write_text(json.dumps({"weight_map": weight_map | {names[0]: "model-00002-of-00002.safetensors"}}))
    with pytest.raises(UserError, match=f"tensor '{names[0]}' is not in its file model-00002"):
        read_released(release)
    (release / "llm/model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors: no such weight file"):
        read_released(release)


def test_discriminator_is_read_apart(pristine, tmp_path):
    assert read_released_discriminator(pristine) is None
    write_release(read_manifest(CASES / "flags"), tmp_path / "full")
    variables = read_released_discriminator(tmp_path / "full")
    logits = Discriminator().apply(variables, np.zeros((1, 32, 32, 3), np.float32))
    assert logits.shape == (1, 2, 2, 1)
    with_it, without = read_released(tmp_path / "full"), read_released(pristine)
    assert jax.tree.all(jax.tree.map(np.array_equal, with_it.tokenizer, without.tokenizer))


def test_a_tokenizer_alone(pristine, tmp_path):
    model = read_released(pristine)
    # VAR's file: no settings, and names without their first part.
    tensors = load_file(pristine / "tokenizer/model.safetensors")
    bare = {name.removeprefix("vae."): tensor for name, tensor in tensors.items()}
    save_file(bare, tmp_path / "vae.safetensors")
    for source in (pristine, pristine / "tokenizer", tmp_path / "vae.safetensors"):
        assert is_released_tokenizer(source)
        config, params = read_released_tokenizer(source, model.tokenizer_config)
        assert config == model.tokenizer_config
        jax.tree.map(np.testing.assert_array_equal, params, model.tokenizer)
        jax.tree.map(np.testing.assert_array_equal, load_tokenizer(source, config), model.tokenizer)
    write_part(tmp_path / "ours" / "tokenizer", model.tokenizer_config, model.tokenizer)
    assert not any(is_released_tokenizer(source) for source in (tmp_path, tmp_path / "ours", tmp_path / "absent"))


def test_a_tokenizer_file_of_another_size_is_named(pristine, tmp_path):
    config = read_released(pristine).tokenizer_config
    other = dataclasses.replace(config, vocab_size=config.vocab_size + 1)
    tensors = load_file(pristine / "tokenizer/model.safetensors")
    bare = {name.removeprefix("vae."): tensor for name, tensor in tensors.items()}
    save_file(bare, tmp_path / "vae.safetensors")
    with pytest.raises(UserError, match=r"vae\.safetensors: checkpoint of another model: 1 of another shape.*codebook"):
        read_released_tokenizer(tmp_path / "vae.safetensors", other)
    with pytest.raises(UserError, match=r"tokenizer\.vocab_size is .*, the config says"):
        load_tokenizer(pristine, other)
    save_file({**bare, "extra": np.zeros(2, np.float32)}, tmp_path / "vae.safetensors")
    with pytest.raises(UserError, match=r"vae\.safetensors: 1 tensors that this model has no place for: vae.extra"):
        read_released_tokenizer(tmp_path / "vae.safetensors", config)


@pytest.mark.torch
def test_a_tokenizer_in_a_pickle(pristine, tmp_path):
    torch = pytest.importorskip("torch")
    model = read_released(pristine)
    tensors = load_file(pristine / "tokenizer/model.safetensors")
    bare = {name.removeprefix("vae."): torch.from_numpy(tensor) for name, tensor in tensors.items()}
    torch.save(bare, tmp_path / "vae_ch160v4096z32.pth")
    _, params = read_released_tokenizer(tmp_path / "vae_ch160v4096z32.pth", model.tokenizer_config)
    jax.tree.map(np.testing.assert_array_equal, params, model.tokenizer)


def shared_table(manifest):
    manifest["llm_config"] |= {"disable_aln": True, "shared_aln": True}
    tensors, width = manifest["tensors"], manifest["llm_config"]["embed_dim"]
    for index in range(manifest["llm_config"]["depth"]):
        spec = tensors.pop(f"llm/blocks.{index}.ada_lin.1.weight")
        del tensors[f"llm/blocks.{index}.ada_lin.1.bias"]
        tensors[f"llm/blocks.{index}.scale_shift_table"] = spec | {"shape": [6, width]}


def phi(names):
    """A change of the manifest to phi convolutions of these names."""

    def change(manifest):
        tensors = manifest["tensors"]
        old = {key: tensors.pop(key) for key in list(tensors) if ".quant_resi." in key}
        for name in names:
            for kind in ("weight", "bias"):
                spec = old[f"tokenizer/vae.quantize.quant_resi.qresi_ls.0.{kind}"]
                tensors[f"tokenizer/vae.quantize.quant_resi.{name}.{kind}"] = spec
        count = len(names)
        manifest["tokenizer_config"]["share_quant_resi"] = 0 if "0" in names else count

    return change


@pytest.mark.parametrize(
    ("change", "setting", "value"),
    [
        (shared_table, "transformer.adaln", "shared"),
        (phi(["qresi"]), "tokenizer.share_quant_resi", 1),
        (phi([str(index) for index in range(6)]), "tokenizer.share_quant_resi", 0),
        (phi([f"qresi_ls.{index}" for index in range(4)]), "tokenizer.share_quant_resi", 4),
    ],
    ids=["shared AdaLN", "one phi", "a phi for each scale", "four phi"],
)
def test_every_variant_is_accounted_for(changed, tmp_path, change, setting, value):
    change(changed)
    write_release(changed, tmp_path / "release")
    model = read_released(tmp_path / "release")
    part, name = setting.split(".")
    assert getattr(getattr(model, f"{part}_config"), name) == value


def without(name):
    return lambda tensors: tensors.pop(name)


def changed_to(name, make):
    return lambda tensors: tensors.update({name: make(tensors.get(name))})


def shortened(name):
    return changed_to(name, lambda weight: weight[:-1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("blocks.1.ffn.up_proj.weight"), r"llm.*no tensor 'blocks\.1\.ffn\.up_proj\.weight'"),
        (without("head.bias"), r"llm.*1 missing \(head/bias\)"),
        (without("blocks.0.attn.proj.bias"), "blocks attn proj: only some blocks have bias"),
        (changed_to("blocks.7.extra", lambda _: np.zeros(3)), r"1 tensors .* no place for: blocks\.7\.extra"),
        (shortened("head.weight"), r"head/kernel \(48, 95\) instead of \(48, 96\)"),
        (shortened("blocks.0.attn.qkv_proj.weight"), r"'blocks\.0\.attn\.qkv_proj\.weight' does not fit"),
        (shortened("blocks.1.ffn.up_proj.weight"), "blocks mlp up kernel: the blocks differ in shape"),
        (changed_to("blocks.1.attn.zero_k_bias", lambda w: w + 1), r"blocks\.1\.attn\.zero_k_bias is not zero"),
    ],
)
def test_wrong_transformer_tensors(release, change, message):
    edit_tensors(release / LLM, change)
    with pytest.raises(UserError, match=message):
        read_released(release)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("vae.decoder.conv_in.weight"), r"tokenizer.*no tensor 'vae\.decoder\.conv_in\.weight'"),
        (changed_to("vae.quant_conv.weight", lambda w: w[0]), r"tokenizer.*'vae\.quant_conv\.weight' does not fit"),
        (changed_to("vae.other", lambda _: np.zeros(3)), r"tokenizer.*no place for: vae\.other"),
    ],
)
def test_wrong_tokenizer_tensors(release, change, message):
    edit_tensors(release / TOKENIZER, change)
    with pytest.raises(UserError, match=message):
        read_released(release)


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("llm/config.json", {"depth": None}, r"llm/config\.json: no setting 'depth'"),
        ("llm/config.json", {"depth": "three"}, r"a setting in a config\.json has a value of the wrong type"),
        ("llm/config.json", {"mlp_type": "gpt2"}, r"mlp_type='gpt2' is not supported, only 'llama'"),
        ("llm/config.json", {"num_heads": 5}, r"width=48: must be a multiple of heads=5"),
        ("tokenizer/config.json", {"vocab_size": 7}, r"quantizer/codebook \(96, 16\) instead of \(7, 16\)"),
        ("tokenizer/config.json", {"double_decoder": True}, r"double_decoder=True is not supported"),
    ],
)
def test_wrong_settings(release, file, values, message):
    edit_config(release / file, **values)
    with pytest.raises(UserError, match=message):
        read_released(release)


def test_missing_and_damaged_files(release, tmp_path):
    with pytest.raises(UserError, match=r"absent/tokenizer: no such folder"):
        read_released(tmp_path / "absent")
    content = (release / LLM).read_bytes()
    (release / LLM).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"llm/model\.safetensors: cut short or not a safetensors file"):
        read_released(release)
    (release / LLM).unlink()
    with pytest.raises(UserError, match=r"llm: no weight file; looked for ema_model\.safetensors"):
        read_released(release)
    (release / "llm/config.json").write_text("{")
    with pytest.raises(UserError, match=r"llm/config\.json: not a readable JSON file"):
        read_released(release)


def test_a_number_that_is_not_finite_is_named(release):
    def damage(tensors):
        tensors["head.weight"][1, 2] = np.nan

    edit_tensors(release / LLM, damage)
    with pytest.raises(UserError, match=r"model\.safetensors: tensor 'head\.weight' has values that are not finite"):
        read_released(release)
    edit_config(release / "llm/config.json", norm_eps=float("nan"))
    with pytest.raises(UserError, match=r"llm/config\.json: not a readable JSON file \(NaN is no finite number\)"):
        read_released(release)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_that_a_wrapper_in_training_has_lengthened(pristine, release, prefix):
    save_file({prefix + name: tensor for name, tensor in load_file(release / LLM).items()}, release / LLM)
    wrapped, plain = read_released(release), read_released(pristine)
    assert jax.tree.all(jax.tree.map(np.array_equal, wrapped.transformer, plain.transformer))


@pytest.mark.parametrize("name", ["llm/model.safetensors", "tokenizer/config.json"])
def test_a_file_that_git_did_not_fetch_is_named(release, name):
    (release / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(UserError, match=rf"{name}: a git-LFS pointer instead of the .*git lfs pull"):
        read_released(release)


@pytest.mark.parametrize("entry", [3, ["x"], "../x.safetensors", "/x.safetensors", "model.safetensors.index.json"])
def test_an_index_names_files_beside_it_and_nothing_else(release, entry):
    index = release / "llm/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"head.weight": entry}}))
    (release / LLM).unlink()
    for read in (read_released, read_released_cached):
        with pytest.raises(UserError, match=r"index\.json: tensor 'head\.weight' is said to be in .*, which is no"):
            read(release)


@pytest.mark.parametrize("value", [None, "x", [], {"a": 1}, [[1]], 1e308, True, 2**63 - 1, -1])
def test_whatever_a_released_setting_is_there_is_an_error_or_none(release, value):
    """None but ours, that is."""
    for part in ("tokenizer", "llm"):
        path = release / part / "config.json"
        before = path.read_text()
        for name in json.loads(before):
            path.write_text(json.dumps({**json.loads(before), name: value}))
            with contextlib.suppress(UserError):
                released.read_configs(release)
        path.write_text(before)

"""Weight files: what goes in comes out, and a bad file is one clear error."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn
from safetensors.numpy import save_file

from hart_jax.errors import UserError
from hart_jax.evaluation.networks.base import checked_tensors
from hart_jax.io.fingerprint import weights_digest
from hart_jax.io.safetensors import check_tree, load_weights, read_tensors, save_weights
from hart_jax.nn.int8 import quantize


def _params(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "embed": {"word_embedding": rng.normal(size=(300, 64)).astype(np.float32)},
        "layers": {
            "kernel": rng.normal(size=(3, 64, 96)).astype(np.float32),
            "scale": rng.normal(size=(64, 64)).astype(np.float32),
        },
        "conv": {"kernel": rng.normal(size=(3, 3, 8, 96)).astype(np.float32)},
        "bias": np.arange(5, dtype=np.float32),
        "steps": np.array(7, np.int32),
    }


def test_float32_round_trip_is_exact(tmp_path):
    params = _params()
    save_weights(tmp_path / "new" / "m.safetensors", jax.tree.map(jnp.asarray, params))
    loaded = load_weights(tmp_path / "new" / "m.safetensors")
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["m.safetensors"]


def test_transposed_views_keep_their_values(tmp_path):
    view = np.arange(6, dtype=np.float32).reshape(2, 3).T
    save_weights(tmp_path / "m", {"a": view})
    np.testing.assert_array_equal(load_weights(tmp_path / "m")["a"], view)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.004), ("int8", 0.02)])
def test_small_types_come_back_as_close_float32(tmp_path, dtype, tolerance):
    params = _params()
    save_weights(tmp_path / "full", params)
    save_weights(tmp_path / "small", params, dtype=dtype)
    loaded = load_weights(tmp_path / "small")
    for want, got in zip(jax.tree.leaves(params), jax.tree.leaves(loaded), strict=True):
        assert got.dtype == want.dtype
        assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want)
    assert (tmp_path / "small").stat().st_size < (tmp_path / "full").stat().st_size * 0.6
    if dtype == "int8":
        np.testing.assert_array_equal(loaded["layers"]["scale"], params["layers"]["scale"])


def test_int8_follows_rows_of_very_different_size(tmp_path):
    rows = np.geomspace(1e-3, 1e3, 100, dtype=np.float32)[:, None]
    table = rows * np.random.default_rng(0).normal(size=(100, 64)).astype(np.float32)
    save_weights(tmp_path / "m", {"embedding": table, "kernel": np.zeros((64, 64), np.float32)}, dtype="int8")
    loaded = load_weights(tmp_path / "m")
    assert (np.abs(loaded["embedding"] - table) <= 0.02 * np.abs(table).max(1, keepdims=True)).all()
    assert not loaded["kernel"].any()


def test_an_int8_file_has_the_scheme_of_int8_in_memory(tmp_path):
    params = {"mlp": {"kernel": np.random.default_rng(0).normal(size=(2, 5, 7)).astype(np.float32)}}
    save_weights(tmp_path / "m", params, dtype="int8")
    small, stored = quantize(params)["mlp"]["kernel"], read_tensors(tmp_path / "m")
    np.testing.assert_array_equal(stored["mlp/kernel"], small.values)
    np.testing.assert_array_equal(stored["mlp/kernel.int8_scale"], small.scales)
    # So that nothing is lost where such a file is quantized again, in memory.
    again = quantize(load_weights(tmp_path / "m"))["mlp"]["kernel"]
    np.testing.assert_array_equal(again.values, small.values)


def test_int8_files_of_before_are_read_by_the_shapes_of_their_scales(tmp_path):
    rng = np.random.default_rng(0)
    values = rng.integers(-127, 128, (64, 96), np.int8)
    for shape in ((1, 96), (64, 1), (1, 1)):
        scales = rng.uniform(0.1, 1, shape).astype(np.float32)
        save_file({"table": values, "table.int8_scale": scales}, tmp_path / "m")
        np.testing.assert_array_equal(load_weights(tmp_path / "m")["table"], values * scales)
    # The bundled text encoder is one.
    assert weights_digest(load_weights("assets/emoji/text_encoder/model.safetensors")) == "fc496403e131b37f"


def test_a_failed_write_leaves_the_old_file(tmp_path):
    save_weights(tmp_path / "m", {"a": np.ones(3)})
    with pytest.raises(UserError, match="not finite"):
        save_weights(tmp_path / "m", {"kernel": np.full((64, 64), np.nan)}, dtype="int8")
    with pytest.raises(UserError, match="int4"):
        save_weights(tmp_path / "m", {"a": np.ones(3)}, dtype="int4")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    np.testing.assert_array_equal(load_weights(tmp_path / "m")["a"], np.ones(3, np.float32))


def test_missing_cut_or_foreign_files_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="none: no such weight file"):
        load_weights(tmp_path / "none")
    save_weights(tmp_path / "m", _params())
    whole = (tmp_path / "m").read_bytes()
    for content in (whole[: len(whole) // 2], whole[:4], b"", b"PK not this at all" * 10):
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(UserError, match="bad is cut short or not a safetensors file"):
            load_weights(tmp_path / "bad")


def test_check_tree_names_what_differs():
    dense = nn.Dense(4, kernel_init=nn.with_logical_partitioning(nn.initializers.zeros, ("embed", "mlp")))
    expected = jax.eval_shape(dense.init, jax.random.key(0), jnp.zeros((1, 3)))["params"]
    good = {"kernel": np.zeros((3, 4)), "bias": np.zeros(4)}
    check_tree(good, expected, "head")
    with pytest.raises(UserError, match=r"head.*1 missing \(bias\); 1 unexpected \(extra/a\); .*kernel \(4, 3\)"):
        check_tree({"kernel": np.zeros((4, 3)), "extra": {"a": np.zeros(1)}}, expected, "head")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_named(bad):
    tree = {"a": {"kernel": np.ones((3, 4), np.float32)}, "b": np.arange(3)}
    expected = {"a": {"kernel": np.zeros((3, 4))}, "b": np.zeros(3)}
    check_tree(tree, expected, "weights")
    check_tree({**tree, "a": {"kernel": np.full((3, 4), 3e38, np.float32)}}, expected, "weights")
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16, jnp.float32):
        kernel = np.ones((3, 4), dtype)
        kernel[1, 2] = bad
        wrong = jnp.asarray(kernel) if dtype is jnp.float32 else kernel
        with pytest.raises(UserError, match=r"^weights: array a/kernel has values that are not finite"):
            check_tree({**tree, "a": {"kernel": wrong}}, expected, "weights")


def test_feature_networks_are_finite_too():
    tensor = np.array([1, np.inf], np.float32)
    with pytest.raises(UserError, match=r"net\.pth: tensor 'w' has values that are not finite"):
        checked_tensors({"w": tensor}, {"w": (2,)}, [], source="net.pth", network="a net")

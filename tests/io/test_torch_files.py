"""Files of torch.save: two committed ones, the same written live where torch is installed, and what is refused.

python tests/io/test_torch_files.py     writes the committed ones anew (needs torch)
"""

import os
import pickle
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from hart_jax.errors import UserError
from hart_jax.io.tensor_files import open_tensors
from hart_jax.io.torch_files import read_torch

FILES = {kind: Path(__file__).parent / f"state_dict_{kind}.pt" for kind in ("zip", "pickles")}
KINDS = sorted(FILES)
TYPES = ("float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")


def expected():
    base = np.arange(24, dtype=np.float32).reshape(4, 6) / 8 - 1
    views = {"whole": base, "columns": base[1:, 2:4], "turned": base.T, "scalar": base[2, 3]}
    others = {"expanded": np.full((3, 5), 2, np.float32), "none": np.zeros((0, 3), np.float32), "parameter": base[0]}
    of_type = {name: np.arange(8).astype(ml_dtypes.bfloat16 if name == "bfloat16" else name)[:4] for name in TYPES}
    return views | others | of_type


def torch_state(torch):
    """`expected` in PyTorch, where views share a storage."""
    base = torch.arange(24).float().reshape(4, 6) / 8 - 1
    views = {"whole": base, "columns": base[1:, 2:4], "turned": base.T, "scalar": base[2, 3]}
    others = {"expanded": torch.tensor([[2.0]]).expand(3, 5), "none": torch.zeros(0, 3)}
    parameter = {"parameter": torch.nn.Parameter(base[0].clone())}
    of_type = {name: torch.arange(8).to(getattr(torch, name))[:4] for name in TYPES}
    return views | others | parameter | of_type


def save(torch, file, kind):
    torch.save(torch_state(torch), file, _use_new_zipfile_serialization=kind == "zip")


def check(tensors, wanted):
    assert list(tensors) == list(wanted)
    for name, value in wanted.items():
        assert tensors[name].dtype == value.dtype and tensors[name].shape == value.shape, name
        np.testing.assert_array_equal(tensors[name], value, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_committed_files(kind):
    tensors = read_torch(FILES[kind])
    check(tensors, expected())
    assert all(np.shares_memory(tensors["whole"], tensors[name]) for name in ("columns", "turned", "scalar"))
    assert not np.shares_memory(tensors["whole"], tensors["parameter"])
    assert not any(tensor.flags.writeable for tensor in tensors.values())


def test_floats_are_opened_as_float32():
    tensors = open_tensors(FILES["zip"])
    assert {tensors[name].dtype for name in ("whole", "float64", "float16", "bfloat16")} == {np.dtype(np.float32)}
    assert tensors["int16"].dtype == np.int16 and "absent" not in tensors and len(tensors) == len(expected())


@pytest.mark.torch
@pytest.mark.parametrize("kind", KINDS)
def test_files_of_this_torch(kind, tmp_path):
    torch = pytest.importorskip("torch")
    save(torch, tmp_path / "state.pt", kind)
    check(read_torch(tmp_path / "state.pt"), expected())
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 2), torch.nn.BatchNorm2d(5)).to(
        memory_format=torch.channels_last
    )
    torch.save(module.state_dict(), tmp_path / "module.pt", _use_new_zipfile_serialization=kind == "zip")
    check(read_torch(tmp_path / "module.pt"), {name: value.numpy() for name, value in module.state_dict().items()})


def rewritten(file, change, compression=zipfile.ZIP_STORED):
    """The committed archive as `file`, its members changed by `change(name, content)`."""
    with zipfile.ZipFile(FILES["zip"]) as old, zipfile.ZipFile(file, "w", compression) as new:
        for name in old.namelist():
            content = change(name.split("/", 1)[1], old.read(name))
            if content is not None:
                new.writestr(name, content)
    return file


def test_other_byte_order(tmp_path):
    file = rewritten(tmp_path / "big.pt", lambda name, content: b"big" if name == "byteorder" else content)
    tensors = read_torch(file)
    for name in ("whole", "turned", "int64", "uint8"):
        np.testing.assert_array_equal(tensors[name], expected()[name].byteswap())
    bits = expected()["bfloat16"].view(np.uint16).byteswap()
    np.testing.assert_array_equal(tensors["bfloat16"].view(np.uint16), bits)


def test_compressed_archives_and_those_that_name_no_byte_order(tmp_path):
    def change(name, content):
        return None if name == "byteorder" else content

    check(read_torch(rewritten(tmp_path / "small.pt", change, zipfile.ZIP_DEFLATED)), expected())


def test_storages_that_are_parts_of_others(tmp_path):
    # Of the eight float64 numbers, a storage from the third on: the old format's own views.
    part = b"K\x08(X\x01\x00\x00\x00vK\x02K\x04tt"
    content = FILES["pickles"].read_bytes()
    assert content.count(b"K\x08Nt") == len(TYPES)
    (tmp_path / "part.pt").write_bytes(content.replace(b"K\x08Nt", part, 1))
    np.testing.assert_array_equal(read_torch(tmp_path / "part.pt")["float64"], np.arange(2.0, 6))


class Attack:
    def __reduce__(self):
        return os.mkdir, ("attacked",)


# A change of the bytes of a pickle, and what is said of it.
_TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"
DOCTORED = {
    "another function": (_TENSOR, b"cposix\nmkdir\n", r"asks for posix\.mkdir, which is no tensor"),
    "another function of torch": (
        _TENSOR,
        b"ctorch._utils\n_rebuild_tensor_v3\n",
        "asks for .*_v3, which is no tensor",
    ),
    "another storage": (b"ctorch\nDoubleStorage\n", b"ctorch\nload\n", r"asks for torch\.load"),
    "no storage": (b"storage", b"modules", r"refers to \('modules', .* which is no storage"),
    "a larger shape": (b"K\x04K\x06", b"K\x05K\x06", r"shape \(5, 6\) beyond its storage of 24"),
    "a negative offset": (b"QK\x00K\x04K\x06", b"QJ\xff\xff\xff\xffK\x04K\x06", r"a tensor at -1 of shape"),
    "a negative stride": (b"K\x06K\x01\x86", b"K\x06J\xff\xff\xff\xff\x86", r"strides \(6, -1\)"),
    "a float in a shape": (b"K\x04K\x06", b"G@\x10\0\0\0\0\0\0K\x06", "damaged"),
    "other instructions": (b"ctorch._utils", b"\x81torch._utils", "damaged"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", DOCTORED)
def test_doctored_files_are_refused(kind, case, tmp_path, monkeypatch):
    old, new, message = DOCTORED[case]
    monkeypatch.chdir(tmp_path)
    if kind == "zip":
        rewritten(tmp_path / "state.pt", lambda name, was: was.replace(old, new, 1) if name == "data.pkl" else was)
    else:
        (tmp_path / "state.pt").write_bytes(FILES[kind].read_bytes().replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        read_torch(tmp_path / "state.pt")
    assert os.listdir() == ["state.pt"]


def test_any_object_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rewritten(tmp_path / "state.pt", lambda name, old: pickle.dumps({"a": Attack()}) if name == "data.pkl" else old)
    with pytest.raises(UserError, match="which is no tensor"):
        read_torch(tmp_path / "state.pt")
    content = FILES["pickles"].read_bytes()
    (tmp_path / "state.pt").write_bytes(content[:15] + pickle.dumps(Attack()) + content[15:])
    with pytest.raises(UserError, match=r"state\.pt: damaged"):
        read_torch(tmp_path / "state.pt")
    assert os.listdir() == ["state.pt"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {}, "epoch": 3}, r"not a plain state dict.* its 'state_dict' is of another kind"),
        ([1, 2], "not a plain state dict"),
        ({1: 2}, "not a plain state dict"),
    ],
)
def test_more_than_a_state_dict(content, message, tmp_path):
    file = rewritten(tmp_path / "a.pt", lambda name, old: pickle.dumps(content, 2) if name == "data.pkl" else old)
    with pytest.raises(UserError, match=message):
        read_torch(file)


@pytest.mark.parametrize("kind", KINDS)
def test_files_cut_short(kind, tmp_path):
    content = FILES[kind].read_bytes()
    for length in (*range(0, len(content), 61), len(content) - 1):
        (tmp_path / "cut.pt").write_bytes(content[:length])
        with pytest.raises(UserError, match=r"cut\.pt: damaged"):
            read_torch(tmp_path / "cut.pt")


def test_missing_members_and_files_of_another_kind(tmp_path):
    shorter = rewritten(tmp_path / "shorter.pt", lambda name, old: old[:-8] if name == "data/0" else old)
    with pytest.raises(UserError, match="beyond its storage of 22 numbers"):
        read_torch(shorter)
    for absent in ("data/0", "data.pkl"):
        fewer = rewritten(tmp_path / "fewer.pt", lambda name, old, absent=absent: None if name == absent else old)
        with pytest.raises(UserError, match=f"damaged.*{absent}"):
            read_torch(fewer)
    (tmp_path / "other.pt").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(UserError, match=r"other\.pt: damaged.*not a file of torch.save"):
        read_torch(tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"absent\.pt: no such weight file"):
        read_torch(tmp_path / "absent.pt")


if __name__ == "__main__":
    import torch

    for kind, file in FILES.items():
        save(torch, file, kind)

"""The image set, built from packages made here in the layout of the real ones."""

import fnmatch
import hashlib
import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hart_jax.data.emoji import packages
from hart_jax.data.emoji.build import ALWAYS_TRAIN, SOURCES, build, is_test
from hart_jax.data.emoji.clipart_sources import title_stem
from hart_jax.data.emoji.emoji_sources import emoji_images, has_skin_tone, normalise, split_key
from hart_jax.data.emoji.render import SourceImage, is_colourless, render
from hart_jax.data.mjhq import read_folder
from hart_jax.errors import UserError
from hart_jax.io import archives
from hart_jax.io.ownership import owned

LABELS = {
    "1F34E": ("red apple", ["apple", "fruit", "red"], 4, 42),
    "1F436": ("dog face", ["animal", "dog", "face", "pet"], 3, 34),
    "2764-FE0F": ("red heart", ["heart", "love", "red"], 0, 14),
    "1F1EB-1F1F7": ("flag: France", ["FR", "flag"], 9, 98),
    "1F550": ("one o\u2019clock", ["clock"], 5, 58),
    "1F44B": ("waving hand", ["hand", "wave"], 1, 16),
}
# Enough further concepts that some are held out.
LABELS |= {f"{code:X}": (f"thing {code - 0x1F900}", ["object"], 7, 82) for code in range(0x1F900, 0x1F928)}
TONED = "1F44B-1F3FB"


def write_package(folder: Path, package: packages.Package, files: dict[str, bytes]) -> None:
    name = package.file_pattern.replace("*", "1.0_all")
    with tarfile.open(folder / name, "w:gz") as archive:
        for path, data in files.items():
            entry = tarfile.TarInfo(f"package/{path}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


def to_json(content: object) -> bytes:
    return json.dumps(content).encode()


def webp(colour: tuple[int, int, int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGBA", (64, 64), colour).save(file, format="WEBP", lossless=True)
    return file.getvalue()


@pytest.fixture(scope="module")
def package_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("packages")
    groups = {0: "smileys-emotion", 1: "people-body", 3: "animals-nature", 4: "food-drink", 5: "travel-places"}
    groups |= {7: "objects", 9: "flags"}
    subgroups = {14: "heart", 16: "hand-fingers-open", 34: "animal-mammal", 42: "food-fruit", 58: "time"}
    subgroups |= {82: "other-object", 98: "country-flag"}
    messages = {
        "groups": [{"order": order, "key": key} for order, key in groups.items()],
        "subgroups": [{"order": order, "key": key} for order, key in subgroups.items()],
    }
    entries = [
        {"hexcode": code, "label": label, "tags": tags, "group": group, "subgroup": subgroup}
        for code, (label, tags, group, subgroup) in LABELS.items()
    ]
    entries[list(LABELS).index("1F44B")]["skins"] = [{"hexcode": TONED, "label": "waving hand: light skin tone"}]
    emojibase = {"en/data.json": to_json(entries), "en/messages.json": to_json(messages)}
    write_package(folder, packages.EMOJIBASE, emojibase)

    # File names of the 3D set keep fe0f; one image is no image.
    images = {f"assets/{code.lower()}.webp": webp((200, 30, 40, 255)) for code in [*LABELS, TONED]}
    images["assets/1f927.webp"] = b"RIFF but nothing else"
    write_package(folder, packages.FLUENT_3D, images)

    names = {normalise(code): f"icon-{normalise(code)}" for code in [*LABELS, TONED]}
    square = '<rect x="4" y="4" width="24" height="24" fill="#0a0"/>'
    icons = {name: {"body": square} for name in names.values()}
    icons["icon-1f926"] = {"body": "<rect x="}
    content = {"icons.json": to_json({"icons": icons, "width": 32, "height": 32}), "chars.json": to_json(names)}
    write_package(folder, packages.FLUENT_FLAT, content)
    with pytest.MonkeyPatch.context() as patch:
        for path in folder.iterdir():
            patch.setitem(packages.SHA256, path.name, hashlib.sha256(path.read_bytes()).hexdigest())
        yield folder


def test_build_has_the_layout_and_holds_out_concepts(package_folder: Path, tmp_path: Path):
    pytest.importorskip("cairosvg")
    out = tmp_path / "set"
    counts = build(out, folder=package_folder, image_size=32, styles=["fluent3d", "fluentflat"], workers=1)
    assert counts["skipped"] == {"fluent3d": 1, "fluentflat": 1}
    # 46 emoji; flags and clock faces are left out of the flat style.
    assert counts["train"]["fluent3d"] + counts["test"]["fluent3d"] == 45
    assert counts["train"]["fluentflat"] + counts["test"]["fluentflat"] == 43

    concepts = {}
    for split in ("train", "test"):
        examples = read_folder(out / split)
        assert len(examples) == sum(counts[split].values())
        entries = json.loads((out / split / "meta_data.json").read_text())
        concepts[split] = {entry["concept"] for entry in entries.values()}
        for example in examples:
            with Image.open(example.path) as image:
                assert (image.mode, image.size) == ("RGB", (32, 32))
        if split == "train":
            assert entries["fluent3d-1f34e"] == {
                "category": "food-drink",
                "prompt": "a 3D render of a red apple",
                "captions": [
                    "a 3D render of a red apple",
                    "a 3D render of a red apple, fruit",
                    "a 3D render of an apple",
                    "a 3D render of an apple, fruit",
                ],
                "style": "fluent3d",
                "concept": "1f34e",
            }
            assert "a flat icon of a dog" in entries["fluentflat-1f436"]["captions"]
    assert concepts["train"] and concepts["test"] and not concepts["train"] & concepts["test"]
    with Image.open(out / "train" / "food-drink" / "fluentflat-1f34e.png") as image:
        assert image.getpixel((16, 16)) == (0, 170, 0) and image.getpixel((1, 1)) == (255, 255, 255)


def test_build_resumes_and_refuses_other_folders(package_folder: Path, tmp_path: Path):
    out = tmp_path / "set"
    options = {"folder": package_folder, "styles": ["fluent3d"], "workers": 1}
    counts = build(out, image_size=32, **options)
    before = (out / "train" / "meta_data.json").read_bytes()

    record = json.loads((out / "build.json").read_text())
    del record["complete"], record["counts"]
    (out / "build.json").write_text(json.dumps(record))
    (out / "train" / "meta_data.json").unlink()
    (out / "train" / "food-drink" / "fluent3d-1f34e.png").unlink()
    # As a power cut leaves them.
    heart = out / "train" / "smileys-emotion" / "fluent3d-2764.png"
    whole = heart.read_bytes()
    heart.write_bytes(whole[:60])
    assert build(out, image_size=32, **options) == counts
    assert (out / "train" / "meta_data.json").read_bytes() == before
    assert (out / "train" / "food-drink" / "fluent3d-1f34e.png").exists()
    assert heart.read_bytes() == whole
    with owned(out, "another run"), pytest.raises(UserError, match="belongs to another run on host"):
        build(out, image_size=32, **options)

    assert build(out, image_size=32, **options) == counts
    with pytest.raises(UserError, match=r"other settings \(image_size; see"):
        build(out, image_size=64, **options)
    with pytest.raises(UserError, match="not empty"):
        build(package_folder, image_size=32, **options)


def test_skin_tones_are_opt_in_and_share_the_concept(package_folder: Path):
    plain = list(emoji_images("fluent3d", package_folder, skin_tones=False))
    toned = list(emoji_images("fluent3d", package_folder, skin_tones=True))
    extra = {source_image.id: source_image for source_image in toned if source_image not in plain}
    assert list(extra) == ["fluent3d-1f44b-1f3fb"]
    assert extra["fluent3d-1f44b-1f3fb"].concept == "1f44b"
    assert extra["fluent3d-1f44b-1f3fb"].captions[0] == "a 3D render of a waving hand with light skin tone"


def test_missing_package_and_bad_options(package_folder: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"has no iconify-json-noto-1\.2\.9\.tgz"):
        build(tmp_path / "set", folder=package_folder, styles=["noto"])
    with pytest.raises(UserError, match="oil"):
        build(tmp_path / "set", folder=package_folder, styles=["oil"])
    with pytest.raises(UserError, match="image_size 8"):
        build(tmp_path / "set", folder=package_folder, image_size=8)
    assert not (tmp_path / "set").exists()


def test_missing_npm_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    command = [sys.executable, "-m", "hart_jax.data.emoji", "--out", str(tmp_path / "set")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: npm is needed to fetch @lobehub/fluent-emoji-3d")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "set").exists()


def test_failing_download_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho no network >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"npm pack .* failed: no network"):
        packages.locate(packages.NOTO)
    assert not list((tmp_path / "cache").rglob("*.tgz"))


def test_a_package_that_is_not_what_was_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    name = packages.NOTO.file_pattern
    (tmp_path / name).write_bytes(b"something else")
    with pytest.raises(UserError, match=f"{name} is not the one that was published"):
        packages.locate(packages.NOTO, tmp_path)
    # As fetched, it never gets into the cache.
    npm = tmp_path / "npm"
    npm.write_text(f"#!/bin/sh\nprintf else > {name}\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("HART_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="is not the one that was published"):
        packages.locate(packages.NOTO)
    assert not list((tmp_path / "cache" / "packages").iterdir())
    monkeypatch.setitem(packages.SHA256, name, hashlib.sha256(b"else").hexdigest())
    assert packages.locate(packages.NOTO) == tmp_path / "cache" / "packages" / name
    # Debian has other versions, which apt-get verifies.
    (tmp_path / "openclipart-svg_2_all.deb").write_bytes(b"")
    packages.locate(packages.OPENCLIPART, tmp_path)
    assert "no checksum of" in capsys.readouterr().err


def test_all_packages_that_are_fetched_have_a_checksum():
    for package in {packages.EMOJIBASE, *SOURCES.values()}:
        assert any(fnmatch.fnmatch(name, package.file_pattern) for name in packages.SHA256)


def test_a_package_of_which_too_much_would_be_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_package(tmp_path, packages.NOTO, {"a.json": bytes(600), "b.json": bytes(600)})
    path = tmp_path / packages.NOTO.file_pattern
    assert len(list(packages.read_files(packages.NOTO, path, suffixes=(".json",)))) == 2
    monkeypatch.setattr(archives, "MAX_UNPACKED_BYTES", 1000)
    with pytest.raises(UserError, match="unpacked it has 1200 bytes, more than 1000"):
        list(packages.read_files(packages.NOTO, path, suffixes=(".json",)))


def test_packages_without_any_folder_to_keep_them_in(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(packages, "cache_folder", lambda: None)
    with pytest.raises(UserError, match="set HART_CACHE_DIR, or give --packages"):
        packages.locate(packages.NOTO)


def test_damaged_package(tmp_path: Path):
    path = tmp_path / packages.NOTO.file_pattern
    path.write_bytes(b"not a tarball")
    with pytest.raises(UserError, match="cannot be read"):
        list(packages.read_files(packages.NOTO, path, suffixes=(".json",)))


def test_code_points():
    assert normalise("0023-FE0F-20E3") == "23-20e3"
    assert normalise("2764-fe0f") == normalise("2764") == "2764"
    assert has_skin_tone("1f44b-1f3fb") and not has_skin_tone("1f44b")
    woman, man, person = "1f6a3-200d-2640", "1f6a3-200d-2642", "1f6a3"
    assert split_key(woman) == split_key(man) == split_key(person)
    assert split_key("1f469-200d-1f4bb") == split_key("1f9d1-200d-1f4bb") != split_key("1f9d1-200d-1f3a8")


def test_common_things_stay_in_training():
    assert {"1f34e", "1f436", "1f415", "1f3e0"} <= ALWAYS_TRAIN
    assert not any(is_test(concept) for concept in ALWAYS_TRAIN)


def test_about_four_percent_are_held_out_and_the_choice_is_fixed():
    concepts = [f"{code:x}" for code in range(0x1F300, 0x1FA00)]
    held_out = [concept for concept in concepts if is_test(concept)]
    assert 0.02 < len(held_out) / len(concepts) < 0.06
    assert held_out[:3] == ["1f305", "1f32f", "1f366"]


@given(st.text(max_size=30))
def test_title_stems_ignore_numbers_and_plurals(title: str):
    stem = title_stem(title)
    assert title_stem(f"{title} 12") == stem
    assert stem == stem.lower() and " " not in stem


def svg(body: str, width: int = 100, height: int = 100) -> SourceImage:
    data = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}">{body}</svg>'.encode()
    return SourceImage("clipart-x", "clipart", "other", "clipart:x", ("a clip art drawing of x",), data, crop=True)


def test_clip_art_is_cropped_to_its_ink_and_kept_in_proportion():
    pytest.importorskip("cairosvg")
    source_image = svg('<rect x="10" y="10" width="20" height="10" fill="#222"/>', 300, 400)
    image = np.asarray(render(source_image, 100)).min(axis=2)
    rows, columns = np.where((image < 128).any(1))[0], np.where((image < 128).any(0))[0]
    assert abs(len(columns) - 92) <= 1 and abs(len(rows) - 46) <= 1
    assert abs(rows[0] + rows[-1] - 99) <= 1


@pytest.mark.parametrize(("size", "expected"), [((40, 20), (54, 100)), ((10, 80), (100, 50)), ((30, 30), (100, 100))])
def test_clip_art_may_keep_its_shape_up_to_twice_as_long_as_wide(size, expected):
    pytest.importorskip("cairosvg")
    source_image = svg('<rect x="5" y="5" width="{}" height="{}" fill="#222"/>'.format(*size), 300, 300)
    image = np.asarray(render(source_image, 100, keep_shape=True)).min(axis=2)
    assert image.shape == expected
    rows, columns = np.where((image < 128).any(1))[0], np.where((image < 128).any(0))[0]
    assert abs(max(len(rows), len(columns)) - 92) <= 1
    for found, side in ((rows, expected[0]), (columns, expected[1])):
        assert abs(found[0] + found[-1] - side + 1) <= 1


GRADIENT = '<defs><{0} id="g" {1}><stop stop-color="red"/></{0}></defs>'


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            GRADIENT.format(
                "radialGradient",
                'cx="0" cy="0" r="1" gradientUnits="userSpaceOnUse" gradientTransform="translate(9 9)skewY(-90)"',
            )
            + '<path d="M10 10h50v50h-50z" fill="url(#g)"/>',
            "a skew of 90 degrees",
        ),
        (
            GRADIENT.format("linearGradient", "") + '<path d="M10 10A5 5 0 1 1 10 10L50 60z" fill="url(#g)"/>',
            "an arc in it ends where it begins",
        ),
    ],
)
def test_drawings_that_cairo_cannot_render_say_why(body: str, reason: str):
    pytest.importorskip("cairosvg")
    with pytest.raises(ValueError, match=reason):
        render(svg(body), 64)


def test_an_empty_drawing_is_an_error():
    pytest.importorskip("cairosvg")
    with pytest.raises(ValueError, match="empty"):
        render(svg('<rect width="50" height="50" fill="white"/>'), 64)


def test_colourless():
    assert is_colourless(Image.new("RGB", (4, 4), (90, 90, 90)))
    assert not is_colourless(Image.new("RGB", (4, 4), (90, 10, 90)))

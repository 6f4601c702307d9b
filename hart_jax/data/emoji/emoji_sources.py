"""Emoji of five styles as captioned images, joined with names and tags by code point."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from hart_jax.data.emoji import packages
from hart_jax.data.emoji.captions import caption_variants, plain_names, tidy
from hart_jax.data.emoji.packages import Package
from hart_jax.data.emoji.render import SourceImage

SKIN_TONES = frozenset({"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"})
ICONIFY_STYLES = {
    "fluent": packages.FLUENT,
    "fluentflat": packages.FLUENT_FLAT,
    "noto": packages.NOTO,
    "twemoji": packages.TWEMOJI,
}
# National flags and clock faces are many and alike, so only these styles bring them.
STYLES_WITH_FLAGS_AND_CLOCKS = frozenset({"fluent3d", "twemoji"})
_RARE_SUBGROUPS = frozenset({"country-flag", "subdivision-flag"})
_CLOCK_FACES = frozenset(f"{code:x}" for code in range(0x1F550, 0x1F568))
_LEFT_OUT_GROUPS = frozenset({"component"})
_FACE_OF_THING = ("animal-", "cat-face", "monkey-face", "sky-weather")


@dataclass(frozen=True)
class EmojiName:
    """What emojibase says of one emoji; `concept` is its code point without skin tones."""

    label: str
    tags: tuple[str, ...]
    group: str
    subgroup: str
    concept: str


def normalise(code_points: str) -> str:
    """Lower-case code points joined by "-", without variation selectors (fe0f) and leading zeros."""
    parts = (part.lstrip("0") for part in re.split(r"[-_ ]", code_points.lower()))
    return "-".join(part for part in parts if part and part != "fe0f")


def has_skin_tone(code: str) -> bool:
    return not SKIN_TONES.isdisjoint(code.split("-"))


def split_key(concept: str) -> str:
    """The concept that the train/test split hashes: women, men and persons doing the same thing are one concept."""
    parts = ["1f9d1" if part in {"1f468", "1f469"} else part for part in concept.split("-")]
    key = "-".join(part for part in parts if part not in {"2640", "2642"})
    return re.sub(r"(-200d)+(?=-200d|$)", "", key)


def emoji_images(style: str, folder: Path | None, *, skin_tones: bool) -> Iterator[SourceImage]:
    """Yields one style's images: "fluent3d" or a key of `ICONIFY_STYLES`.

    Args:
      style: which set.
      folder: where the packages lie, or None for the download cache.
      skin_tones: whether to include skin-tone variants (their concept is that of the plain emoji).
    """
    names = _emoji_names(folder)
    seen = set()
    for code_points, data in _fluent_3d(folder) if style == "fluent3d" else _iconify(style, folder):
        code = normalise(code_points)
        name = names.get(code)
        if name is None or code in seen or (has_skin_tone(code) and not skin_tones):
            continue
        if style not in STYLES_WITH_FLAGS_AND_CLOCKS and _is_flag_or_clock(name):
            continue
        seen.add(code)
        face_of_thing = name.subgroup.startswith(_FACE_OF_THING)
        other_names = plain_names(name.label, face_of_thing=face_of_thing)
        captions = caption_variants(style, name.label, name.tags, other_names)
        yield SourceImage(f"{style}-{code}", style, name.group, name.concept, tuple(captions), data)


def _is_flag_or_clock(name: EmojiName) -> bool:
    return name.subgroup in _RARE_SUBGROUPS or name.concept in _CLOCK_FACES


def _read_json(package: Package, folder: Path | None, *file_names: str) -> list:
    path = packages.locate(package, folder)
    found = {name: json.loads(data) for name, data in packages.read_files(package, path, suffixes=file_names)}
    return [found[name] for name in file_names]


@cache
def _emoji_names(folder: Path | None) -> dict[str, EmojiName]:
    """Normalised code -> name, for every emoji and skin-tone variant of emojibase that belongs to a group."""
    entries, messages = _read_json(packages.EMOJIBASE, folder, "en/data.json", "en/messages.json")
    groups = {item["order"]: item["key"] for item in messages["groups"]}
    # Two subgroups share an order number in some releases; the later one wins, which only merges their tag counts.
    subgroups = {item["order"]: item["key"] for item in messages["subgroups"]}
    entries = [entry for entry in entries if groups.get(entry.get("group")) not in {None, *_LEFT_OUT_GROUPS}]
    tag_counts: defaultdict[int, Counter] = defaultdict(Counter)
    for entry in entries:
        tag_counts[entry["subgroup"]].update(entry.get("tags", []))
    names = {}
    for entry in entries:
        counts = tag_counts[entry["subgroup"]]
        # What many neighbours share ("fruit", "pet", "building") says most about the image.
        tags = tuple(sorted(entry.get("tags", []), key=lambda tag: (-counts[tag], tag)))
        concept = normalise(entry["hexcode"])
        for form in [entry, *entry.get("skins", [])]:
            names[normalise(form["hexcode"])] = EmojiName(
                _readable(form["label"], subgroups[entry["subgroup"]]),
                tags,
                groups[entry["group"]],
                subgroups[entry["subgroup"]],
                concept,
            )
    return names


def _readable(label: str, subgroup: str) -> str:
    """ "flag: France" -> "the flag of france", "man: red hair" -> "man with red hair", "keycap: 1" -> "keycap 1"."""
    kind, _, rest = (part.strip() for part in label.replace("\u2019", "'").partition(":"))
    if rest and kind == "flag":
        return tidy(f"the flag of {rest}")
    if rest and kind in {"keycap", "family"}:
        return tidy(f"{kind} {rest}" if kind == "keycap" else f"{kind} of {rest}")
    if rest.startswith("facing"):
        return tidy(f"{kind} {rest.replace(': ', ' with ')}")
    if rest:
        return tidy(f"{kind} with {rest.replace(': ', ' and ')}")
    if subgroup == "time" and ("o'clock" in label or label.endswith("-thirty")):
        return tidy(f"clock showing {label}")
    return tidy(label)


def _fluent_3d(folder: Path | None) -> Iterator[tuple[str, bytes]]:
    path = packages.locate(packages.FLUENT_3D, folder)
    for name, data in packages.read_files(packages.FLUENT_3D, path, suffixes=(".webp",)):
        yield Path(name).stem, data


def _iconify(style: str, folder: Path | None) -> Iterator[tuple[str, bytes]]:
    """(code points, SVG) of an Iconify package; the gradient set borrows the code points of the flat one."""
    (icons,) = _read_json(ICONIFY_STYLES[style], folder, "icons.json")
    chars_package = packages.FLUENT_FLAT if style == "fluent" else ICONIFY_STYLES[style]
    (chars,) = _read_json(chars_package, folder, "chars.json")
    for code_points, name in sorted(chars.items()):
        if name in icons["icons"] or name in icons.get("aliases", {}):
            yield code_points, _iconify_svg(icons, name)


def _iconify_svg(icons: dict, name: str) -> bytes:
    alias = icons.get("aliases", {}).get(name, {})
    icon = icons["icons"].get(alias.get("parent", name)) or icons["icons"][name]
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    body = icon["body"]
    if alias.get("hFlip"):
        body = f'<g transform="translate({width} 0) scale(-1 1)">{body}</g>'
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}" width="{width}" height="{height}">{body}</svg>'
    ).encode()

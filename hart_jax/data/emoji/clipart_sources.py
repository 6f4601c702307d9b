"""Public-domain clip art and 3D furniture renders as captioned images."""

import io
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

from hart_jax.data.emoji import packages
from hart_jax.data.emoji.captions import caption_variants, plain_names, tidy, word_set
from hart_jax.data.emoji.render import SourceImage
from hart_jax.errors import UserError
from hart_jax.io.archives import check_unpacked

_CLIPART_ROOT = "usr/share/openclipart/svg/"
_FURNITURE_ROOT = "usr/share/sweethome3d/furniture/"
# Hundreds of near-identical stars, icons, cards and flags; patterns and samples that show no object.
_LEFT_OUT = re.compile(
    r"^(special|unsorted|logos|shapes/stars|computer/icons|recreation/games/cards|signs_and_symbols/flags|"
    r"signs_and_symbols/led|shapes/jigsaw|shapes/flowchart|shapes/callouts|computer/buttons)(/|$)"
)
# Titles of collections, tools and contributors: the file name says more.
_LESS_THAN_A_TITLE = re.compile(
    r"^$|clip ?art|aiga|svg road signs|road signs$|sibmission|submission|untitled|\.svg$|^people$|icons?$|^inkscape|"
    r"icon ?set|australian maps|map symbols|simple arrows|sallite|example|advertising|^illustration"
)
_EMPTY_KEYWORDS = word_set(
    """
    hash unsorted remix clipart clip_art menu icon icons symbol symbols sign signs_and_symbols shape shapes mapsym
    map_symbol networksym webpage work recreation appicon weathersym svg vector image hash11 11 computer_generated
    """
)
# Words that name a kind, good as a hint ("cat, animal") but not as a name ("an animal").
_KINDS = word_set(
    """
    animal animals mammal bird insect fish reptile food fruit vegetable dessert desserts beverage protein
    carbohydrate people person plant tree flower transport transportation vehicle building home tool tools office
    holiday music sports weather computer hardware clothing religion education festive feline canine flourish
    decoration africa europe australia christianity airtravel roadtravel traffic harvest tribal alcohol dairy simple
    green blue red cartoon party game pet city silhouette neon halloween desert hole discordia animali jr pop theme
    creation juice symboldecorationhug place wedge
    """
)
# Common words of the Italian and French contributors, and frequent slips of the pen.
_ENGLISH = {
    "acquila": "eagle",
    "albero": "tree",
    "baloon": "balloon",
    "bussola": "compass",
    "cane": "dog",
    "casa": "house",
    "cavallo": "horse",
    "coniglio": "rabbit",
    "dino": "dinosaur",
    "dinosauro": "dinosaur",
    "elefante": "elephant",
    "farfalla": "butterfly",
    "fiore": "flower",
    "foglia": "leaf",
    "fragola": "strawberry",
    "gatto": "cat",
    "glace": "ice cream",
    "icecream": "ice cream",
    "leone": "lion",
    "mela": "apple",
    "orso": "bear",
    "pecora": "sheep",
    "pesce": "fish",
    "rana": "frog",
    "roadsign": "road sign",
    "scimmia": "monkey",
    "tigre": "tiger",
    "topo": "mouse",
    "vegitable": "vegetable",
}
_CONCRETE_FOLDERS = {"animals", "food", "plants", "transportation", "buildings"}
_FURNITURE_MAKERS = {"blend swap", "scopia", "kator legaz", "reallusion", "katorlegaz", "animated"}
_DC = "{http://purl.org/dc/elements/1.1/}"
_RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"


def title_stem(text: str) -> str:
    """A slug without numbers and a plural's last s, so that "Cat 2" and "cats" are one concept."""
    slug = slugify(re.sub(r"\d+", " ", text))
    return slug[:-1] if slug.endswith("s") and not slug.endswith("ss") else slug


def slugify(text: str) -> str:
    """Lower-case letters and digits joined by single hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "other"


def clipart_images(folder: Path | None) -> Iterator[SourceImage]:
    """Yields the drawings of openclipart-svg that show something and have a usable name."""
    path = packages.locate(packages.OPENCLIPART, folder)
    seen = set()
    for name, data in packages.read_files(packages.OPENCLIPART, path, suffixes=(".svg",), under=_CLIPART_ROOT):
        place = PurePosixPath(name.removeprefix(_CLIPART_ROOT))
        if _LEFT_OUT.match(str(place.parent)) or len(place.parts) < 2:
            continue
        title, keywords = _metadata(data)
        title = _in_english(_clean_title(title) or _title_from_file(place.stem))
        keywords = [_in_english(keyword) for keyword in keywords]
        unique = f"clipart-{slugify(place.stem)}"
        if len(title) < 3 or unique in seen:
            continue
        seen.add(unique)
        captions = caption_variants("clipart", title, keywords, _drawing_names(title, keywords, place))
        category = slugify(place.parts[0])
        yield SourceImage(unique, "clipart", category, f"clipart:{title_stem(title)}", tuple(captions), data, crop=True)


def _metadata(data: bytes) -> tuple[str, list[str]]:
    """Title and keywords of the SVG's Dublin Core metadata; empty where it has none or is not well-formed."""
    try:
        root = ElementTree.fromstring(data)
    except ElementTree.ParseError:
        return "", []
    title = next((element.text or "" for element in root.iter(f"{_DC}title") if (element.text or "").strip()), "")
    words = [item.text or "" for subject in root.iter(f"{_DC}subject") for item in subject.iter(f"{_RDF}li")]
    keywords = [tidy(word) for word in words if "(" not in word]
    return title, [word for word in dict.fromkeys(keywords) if word and word not in _EMPTY_KEYWORDS]


def _in_english(text: str) -> str:
    words = [_ENGLISH.get(word, word) for word in text.split()]
    # "gatto cat" becomes one cat.
    return " ".join(dict.fromkeys(words))


def _clean_title(title: str) -> str:
    title = title.strip()
    if _LESS_THAN_A_TITLE.search(title.lower()) or not title.isascii():
        return ""
    title = re.sub(r"\([^)]*\)|\[[^]]*\]", " ", title)
    title = re.sub(r"([a-z])([A-Z])", r"\1 \2", title).replace("-", " ")
    return tidy(
        re.sub(r"[#\d]+|\b(bw|aj|illustration|body part|clothing|alt|md|remix|rpg map elements?)\b", " ", tidy(title))
    )


def _title_from_file(stem: str) -> str:
    """ "aiga_taxi1" -> "taxi"; author names at the end of a file name are cut off where they are known."""
    stem = re.sub(
        r"(nicu|architetto|architet|benji|gerald|jarno|juliane|ganson|susan_park|sergio).*$", "", stem.lower()
    )
    words = re.sub(r"[_\-.\d]+", " ", stem).split()
    return tidy(" ".join(word for word in words if word not in {"aiga", "bw", "r", "md", "svg", "alt"}))


def _drawing_names(title: str, keywords: list[str], place: PurePosixPath) -> list[str]:
    words = title.split()
    specific = [word for word in keywords if word not in _KINDS and word.count(" ") < 2 and not word.endswith("ing")]
    names = [word for word in specific if word in words and word == words[-1]]
    if place.parts[0] in _CONCRETE_FOLDERS:
        names += specific[:1]
    return plain_names(title) + names


def furniture_images(folder: Path | None) -> Iterator[SourceImage]:
    """Yields the renders of sweethome3d-furniture's catalogues, named, tagged and sorted by room."""
    path = packages.locate(packages.SWEETHOME3D, folder)
    seen = set()
    for name, data in packages.read_files(packages.SWEETHOME3D, path, suffixes=(".sh3f",), under=_FURNITURE_ROOT):
        try:
            catalogue = zipfile.ZipFile(io.BytesIO(data))
            check_unpacked(path, [info.file_size for info in catalogue.infolist()])
        except zipfile.BadZipFile as error:
            raise UserError(f"{name} in {path} is damaged ({error}); fetch the package again") from error
        for entry in _catalogue_entries(catalogue.read("PluginFurnitureCatalog.properties").decode("latin-1")):
            label = tidy(re.sub(r"\d+|\([^)]*\)", " ", entry["name"]))
            icon = entry["icon"].lstrip("/")
            unique = f"furniture-{slugify(icon.removesuffix('.png'))}"
            if not label or unique in seen:
                continue
            seen.add(unique)
            tags = [tag for tag in map(tidy, entry.get("tags", "").split(",")) if tag and tag not in _FURNITURE_MAKERS]
            room = entry.get("category", "Miscellaneous")
            hints = [*tags, *([] if room in {"Miscellaneous", "Doors and windows"} else [tidy(room)])]
            captions = caption_variants("furniture", label, hints, plain_names(label))
            category, concept = slugify(room), f"furniture:{title_stem(label)}"
            yield SourceImage(unique, "furniture", category, concept, tuple(captions), catalogue.read(icon), crop=True)


def _catalogue_entries(text: str) -> list[dict[str, str]]:
    """Groups lines "name#12=Sofa" of a Java properties file by their number."""
    entries: dict[int, dict[str, str]] = {}
    for key, number, value in re.findall(r"^(\w+)#(\d+)=(.*)$", text, re.MULTILINE):
        value = re.sub(r"\\u([0-9a-fA-F]{4})", lambda match: chr(int(match[1], 16)), value.strip())
        entries.setdefault(int(number), {})[key] = value
    return [entry for _, entry in sorted(entries.items()) if entry.get("name") and entry.get("icon")]

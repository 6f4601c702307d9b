"""Captions from a label and its tags: the style first, then the thing ("a flat icon of a dog")."""

import re
from collections.abc import Iterable, Sequence

STYLE_PHRASES = {
    "fluent3d": "a 3D render of",
    "fluentflat": "a flat icon of",
    "fluent": "a glossy icon of",
    "noto": "a cartoon of",
    "twemoji": "a simple emoji of",
    "clipart": "a clip art drawing of",
    "furniture": "a 3D model of",
}
# Instead of the clip art phrase where a drawing has no colour.
COLOURLESS_PHRASE = "a black and white drawing of"
MAX_CAPTIONS = 6


def word_set(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


_MASS_NOUNS = word_set(
    """
    rice bread corn garlic ginger broccoli butter cheese bacon meat honey milk water sake tea coffee fire fog rain
    snow lightning money luggage clothing furniture soap sushi tofu fruit food pizza ice spaghetti bamboo grass wood
    paper thread yarn toast hay sand smoke dna music jewelry scissors chopsticks popcorn zzz chocolate golf lacrosse
    cricket tennis badminton chess aries taurus gemini cancer leo virgo libra scorpio sagittarius capricorn aquarius
    pisces ophiuchus
    """
)
_SINGULAR_WITH_S = word_set(
    """
    bus gas lens cactus octopus walrus rhinoceros hippopotamus glass dress cross princess grass iris canvas compass
    chess tennis oasis yes atlas virus campus citrus lotus abacus asparagus christmas swiss kiss boss class mattress
    cypress ibis bass moss process address cyclops news species brass press
    """
)
_NOUNS_IN_ING = {
    "building",
    "painting",
    "drawing",
    "earring",
    "dumpling",
    "ceiling",
    "railing",
    "duckling",
    "drawstring",
}
_PREPOSITIONS = {"with", "of", "in", "on", "at", "from", "without", "for", "over", "behind", "and", "to", "showing"}
_DETERMINERS = {"a", "an", "the", "one", "two", "three", "four", "five", "some", "no", "my", "your"}
_PLAIN_MODIFIERS = word_set(
    """
    red green blue yellow orange purple pink brown black white grey gray gold golden silver big large small little
    tiny old new young cartoon simple cute funny happy sad smiling grinning sleeping sitting fresh ripe hot cold
    sports racing polar service guide steaming cooked flying running glossy grilled baked modern classic antique
    plain light dark colored coloured single open closed wooden round square
    """
)
_SOUNDS_LIKE_CONSONANT = re.compile(r"^(uni|use|usu|ute|uku|ura|eu|ewe|one|once|u-|ufo|u$)")
_SOUNDS_LIKE_VOWEL = re.compile(r"^(hour|honest|honou?r|heir|[fhlmnrsx]$|[fhlmnrsx]-|x-ray|atm|mri|sos|led|lp|nfl)")


def tidy(text: str) -> str:
    """Lower-case text with plain quotes, no list punctuation and single spaces."""
    text = text.replace("\u2019", "'").replace("\u201c", "").replace("\u201d", "").replace("_", " ").lower()
    return re.sub(r"\s+", " ", text).strip(" .,;:-'\"")


def head_noun(phrase: str) -> str:
    """The word an article would agree with: the last one before a preposition ("house with garden" -> "house")."""
    words = phrase.replace(",", " ,").split()
    for position, word in enumerate(words):
        if position and (word in _PREPOSITIONS or word == ","):
            return words[position - 1]
    return words[-1] if words else ""


def is_plural(word: str) -> bool:
    """Whether a noun is plural by its ending; common singulars in -s are known."""
    if word in _SINGULAR_WITH_S or len(word) < 4:
        return False
    return word in {"people", "children", "feet", "teeth", "mice", "geese"} or (
        word.endswith("s") and not word.endswith(("ss", "us", "is", "'s"))
    )


def with_article(phrase: str) -> str:
    """`phrase` with "a" or "an" in front, where English wants one."""
    first, noun = phrase.split(" ")[0], head_noun(phrase)
    # "bowling", but "a ring" and "a building".
    activity = first == phrase and len(first) > 6 and first.endswith("ing") and first not in _NOUNS_IN_ING
    if first in _DETERMINERS or noun in _MASS_NOUNS or is_plural(noun) or first[0].isdigit() or activity:
        return phrase
    vowel = _SOUNDS_LIKE_VOWEL.match(first) or (first[0] in "aeiou" and not _SOUNDS_LIKE_CONSONANT.match(first))
    return f"{'an' if vowel else 'a'} {phrase}"


def plain_names(label: str, *, face_of_thing: bool = False) -> list[str]:
    """Shorter names of the same thing: "red apple" -> "apple"; with `face_of_thing`, "dog face" -> "dog".

    Only colours, sizes and the like are dropped, so that "hot dog" never becomes a dog: "hot" counts as part of the
    name when nothing else precedes the noun "dog".
    """
    names = []
    words = label.split()
    if face_of_thing and len(words) > 1 and words[-1] == "face":
        words = words[:-1]
        names.append(" ".join(words))
    shorter = list(words)
    while len(shorter) > 1 and shorter[0] in _PLAIN_MODIFIERS and shorter[:2] != ["hot", "dog"]:
        shorter = shorter[1:]
    if shorter != words and shorter[0] not in _PREPOSITIONS | {"face"}:
        names.append(" ".join(shorter))
    return names


def caption_variants(style: str, label: str, tags: Sequence[str] = (), other_names: Iterable[str] = ()) -> list[str]:
    """Three to six captions of one image, the plain one first; without tags or other names there may be fewer.

    Args:
      style: a key of `STYLE_PHRASES`.
      label: what is shown, e.g. "red apple".
      tags: related words, the most telling first; those already in the label are left out.
      other_names: shorter or other names of the same thing, each a caption of its own.

    Returns:
      Distinct captions in a fixed order: label; label and two tags; other names; label and one later tag; the
      first other name (or the label) with its first tag.
    """
    phrase, label = STYLE_PHRASES[style], tidy(label)
    label_words = set(re.findall(r"[\w']+", label))
    fresh = [tag for tag in dict.fromkeys(map(tidy, tags)) if tag and not set(tag.split()) <= label_words]
    names = [name for name in dict.fromkeys(map(tidy, other_names)) if name and name != label]
    thing = with_article(label)
    captions = [f"{phrase} {thing}"]
    if fresh:
        captions.append(", ".join([f"{phrase} {thing}", *fresh[:2]]))
    captions += [f"{phrase} {with_article(name)}" for name in names[:2]]
    captions += [f"{phrase} {thing}, {tag}" for tag in fresh[2:3]]
    if fresh:
        name = names[0] if names else label
        captions += [f"{phrase} {with_article(name)}, {tag}" for tag in fresh[:1] if tag != name]
    if len(captions) < 3:
        captions.append(f"{phrase} {label}")
    return list(dict.fromkeys(captions))[:MAX_CAPTIONS]

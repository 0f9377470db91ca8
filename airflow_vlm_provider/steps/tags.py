"""What a tag is: lowercase words joined by hyphens, of any language, short enough to search by."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

MIN_TAGS = 5
"""An image with fewer tags than this is asked about again."""

MAX_TAGS = 10
"""More tags than this are cut, from the end."""

MAX_TAG_LENGTH = 30
"""Longest tag, in characters (code points)."""

# Long enough for any tag, short enough that the quadratic corners of Unicode normalization don't matter.
_EXAMINED = 240

# The typographic forms of the apostrophe that are not folded by NFKC, or folded to something else.
_APOSTROPHES = str.maketrans(dict.fromkeys("’‘‛ʼ`´", "'"))
_NUMBERING = re.compile(r"[(\[]?\d{1,3}[.)\]:](?!\d)")
# Besides the two that are visible, the zero-width ones: Persian and Indic words are spelt with them.
_JOINERS = frozenset("'&\u200c\u200d")
_NOTHING = frozenset({"none", "null", "nan", "undefined", "n-a"})


def normalize_tags(strings: Iterable[str]) -> list[str]:
    """The distinct tags among some strings, in their order, at most :data:`MAX_TAGS`."""
    tags: dict[str, None] = {}
    for string in strings:
        tag = normalize_tag(string)
        if tag is not None:
            tags[tag] = None
            if len(tags) == MAX_TAGS:
                break
    return list(tags)


def normalize_tag(string: str) -> str | None:
    """One tag in its canonical form, which this function leaves as it is; None when nothing is left of it.

    The text is folded (NFKC) and lowercased; bullets, numbering, quotes and other punctuation are stripped, and
    what stands between two words becomes one hyphen. Letters of every script, apostrophes and ampersands inside
    words (``children's``, ``r&b``) and decimal points stay. A tag that is longer than :data:`MAX_TAG_LENGTH` keeps
    the whole words that fit; when the first does not fit, nothing is left.
    """
    tag = ""
    for word in _words(_without_numbering(_folded(string.strip()[:_EXAMINED]))):
        longer = f"{tag}-{word}" if tag else word
        if len(longer) > MAX_TAG_LENGTH:
            break
        tag = longer
    return tag if tag and tag not in _NOTHING else None


def _folded(text: str) -> str:
    # Before NFKC, which makes a space and an accent of the acute accent that stands for an apostrophe; and after,
    # because NFKC also brings forth apostrophes. Lowercasing in turn can leave what NFKC would compose.
    text = unicodedata.normalize("NFKC", text.translate(_APOSTROPHES)).translate(_APOSTROPHES)
    return unicodedata.normalize("NFKC", text.lower())


def _without_numbering(text: str) -> str:
    start = 0
    while start < len(text):
        if numbering := _NUMBERING.match(text, start):
            start = numbering.end()
        elif not text[start].isalnum():
            start += 1
        else:
            break
    return text[start:]


def _words(text: str) -> list[str]:
    words = [""]
    for index, character in enumerate(text):
        category = unicodedata.category(character)
        # A mark (an accent, a vowel sign) belongs to the letter before it; alone it is what is left of an emoji.
        belongs = category[0] in "LN" or (category[0] == "M" and words[-1] != "")
        if belongs or (words[-1] and _joins(words[-1][-1], character, text[index + 1 : index + 2])):
            words[-1] += character
        elif category != "Cf" and words[-1]:  # format characters (soft hyphen, byte order mark) are invisible
            words.append("")
    # Once more, since an accent may have been kept from its letter by an invisible character.
    return [unicodedata.normalize("NFKC", word) for word in words if word]


def _joins(before: str, character: str, after: str) -> bool:
    if character == ".":
        return before.isdecimal() and after.isdecimal()
    return character in _JOINERS and after.isalnum()

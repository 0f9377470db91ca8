"""Reads lists that are written as plain text, and tells them from prose.

A list is bulleted or numbered lines, hash tags, words between commas, or short lines. The rules err on the side of
prose: a list that is missed costs one more question, a sentence that is taken for a list spoils a data set.
"""

from __future__ import annotations

import re

MAX_WORDS = 3
"""Longest entry of a list that nothing but its commas or line ends gives away."""

MAX_LABELLED_WORDS = 5
"""Longest entry where a bullet, a number or a word like "tags:" says that it is one."""

MIN_ENTRIES = 3
"""Shortest list that nothing announces: "Sorry, no" has two entries."""
_MAX_UNSPACED = 15  # characters, in scripts that don't put spaces between words

# A comma inside a number separates nothing.
_SEPARATOR = re.compile(r"\s*(?:[;，；、|•\n]|(?<!\d),|,(?!\d))\s*")
_MARK = re.compile(
    r"(?:[-*+–—](?=\s)|[•‣◦▪●·]|\(?\d{1,3}\s*[.)．、:](?!\d)|[①-⑳])\s*(?:\[[ xX]?\])?\s*(?=\S)"
)
_NUMBER_IN_LINE = re.compile(r"(?<=\S)[^\S\n]+(?=\d{1,2}[.)][^\S\n])")
_DESCRIPTION = re.compile(r"\s*[:：]\s*|\s+[-–—]\s+")
_HASH_TAG = re.compile(r"(?<![\w#&/])#(?=[^\W\d])([^\s#.,;!?，、；。]+)")
_LABEL = re.compile(r"([^:：]{1,80})[:：]\s*(.*)")
_TAG_WORD = re.compile(r"\b(?:hash)?tags?\b|\blabels?\b|\bkeywords?\b|标签|关键词|关键字", re.IGNORECASE)
_APOLOGY = re.compile(
    r"\b(?:sorry|apologi[sz]e|unfortunately|cannot|can['’ ]?t|can not|could ?n['’]t|unable to|not able to"
    r"|i do(?:n['’]t| not)|i['’]m|i am|as an ai|lo siento|no puedo|désolée?|je ne peux|es tut mir leid|ich kann)\b"
    r"|抱歉|对不起|无法|無法|不能|申し訳|できません|죄송",
    re.IGNORECASE,
)
_SENTENCE_END = (".", "!", "?", ":", "。", "！", "？", "：")
_VERB = re.compile(
    r"\b(?:is|are|was|were|am|be|has|have|had|shows?|depicts?|contains?|features|appears|seems)\b"
)
_SENTENCE_START = re.compile(
    r"(?:an?|the|i|i'd|i'll|i'm|i've|its?|it's|this|that|these|those|there|here|you|we|he|she|they|my|your|our"
    r"|but|because|if|please|certainly|let)(?:\s|$)"
)
_FILLER = re.compile(r"(?:yes|no|sure|ok|okay|well|hello|hi|thanks|sorry|of course)$")


def split(text: str) -> list[str]:
    """The entries between commas (of any script), semicolons, vertical bars, bullets or line ends."""
    hash_tags = _HASH_TAG.findall(text)
    return hash_tags if len(hash_tags) > 1 else [entry for entry in _SEPARATOR.split(text) if entry]


def is_prose(text: str) -> bool:
    """Whether this is a sentence, above all one that declines, and no name of something."""
    words = len(text.split())
    if _APOLOGY.search(text) and (words >= 3 or not text.isascii()):
        return True
    return words > MAX_LABELLED_WORDS and text.rstrip("\"'”’)").endswith(_SENTENCE_END)


def is_entry(text: str, max_words: int = MAX_WORDS) -> bool:
    """Whether this can be an entry of a list in running text."""
    if not 1 <= len(text.split()) <= max_words or not any(character.isalpha() for character in text):
        return False
    if text.endswith(_SENTENCE_END) or any(character in "[]{}<>=:：" for character in text) or is_prose(text):
        return False
    lower = text.lower().replace("’", "'")
    if _SENTENCE_START.match(lower) or _FILLER.match(lower) or _VERB.search(lower):
        return False
    return text.isascii() or max(map(len, text.split())) <= _MAX_UNSPACED


def read_list(text: str, *, cut: bool = False) -> list[str]:
    """The entries of the list in a text; none when it is prose.

    :param cut: The text is incomplete: the last entry is left out.
    """
    numbered = _NUMBER_IN_LINE.sub("\n", text.replace("**", "").replace("`", ""))
    lines = [line.strip() for line in numbered.splitlines() if line.strip()]
    if any(is_prose(line) and _APOLOGY.search(line) for line in lines):
        return []
    entries = _marked(lines) or _hash_tags(lines) or _separated(lines) or _short_lines(lines)
    return entries[:-1] if cut else entries


def _marked(lines: list[str]) -> list[str]:
    contents = [line[mark.end() :] for line in lines if (mark := _MARK.match(line))]
    if len(contents) < 2:
        return []
    entries = [_entries_of(content) for content in contents]
    # Points in an argument look the same; most of them are too long.
    return (
        [entry for found in entries for entry in found] if 2 * sum(map(bool, entries)) > len(entries) else []
    )


def _entries_of(content: str) -> list[str]:
    separator = _DESCRIPTION.search(content)
    name = content[: separator.start()] if separator else content
    values = split(content[separator.end() :]) if separator else []
    if separator and separator[0].strip() in (":", "：") and values and all(map(is_entry, values)):
        return values  # "Colors: red, white"
    return [
        entry for entry in split(name) if len(entry.split()) <= MAX_LABELLED_WORDS and not is_prose(entry)
    ]


def _hash_tags(lines: list[str]) -> list[str]:
    found = _HASH_TAG.findall("\n".join(lines))
    return found if len(found) > 1 else []


def _separated(lines: list[str]) -> list[str]:
    return [entry for line in lines for entry in _separated_in(line)]


def _separated_in(line: str) -> list[str]:
    label = _LABEL.fullmatch(line)
    announced = label is not None and _TAG_WORD.search(label[1]) is not None
    entries = split((label[2] if label else line).rstrip(".。"))
    if entries and entries[-1].lower().startswith(("and ", "or ")):
        entries[-1] = entries[-1].partition(" ")[2]
    if "{" in line or "[" in line or len(entries) < (1 if announced else MIN_ENTRIES):
        return []
    max_words = MAX_LABELLED_WORDS if announced else MAX_WORDS
    return entries if all(is_entry(entry, max_words) for entry in entries) else []


def _short_lines(lines: list[str]) -> list[str]:
    entries: list[str] = []
    for line in lines:
        if is_entry(line):
            entries.append(line)
        elif len(entries) >= MIN_ENTRIES:
            break
        else:
            entries.clear()
    return entries if len(entries) >= MIN_ENTRIES else []

"""From a model's answer to tags, however the answer is dressed up.

What stands in brackets counts first (:mod:`~airflow_vlm_provider.steps.loose_json`): the value of a key like ``tags``
or ``keywords``, else lists of strings. An answer without such data is read as a list in plain text
(:mod:`~airflow_vlm_provider.steps.plain_lists`). A caption or an apology has no tags.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from airflow_vlm_provider.steps.loose_json import Pairs, read_values
from airflow_vlm_provider.steps.plain_lists import (
    MAX_LABELLED_WORDS,
    MIN_ENTRIES,
    is_entry,
    is_prose,
    read_list,
    split,
)
from airflow_vlm_provider.steps.tags import normalize_tags

PARSER_VERSION = 1
"""Raised whenever an answer may give other tags than before."""

# More than a model needs to name ten tags; bounds the time that a runaway answer takes.
_EXAMINED = 100_000

_THOUGHT_END = re.compile(r"</think(?:ing)?>", re.IGNORECASE)
_THOUGHT_START = re.compile(r"<think(?:ing)?>", re.IGNORECASE)
_WRAPPING = re.compile(r"```[\w-]*|</?(?:answer|response|output|tags?)>", re.IGNORECASE)
_ESCAPED = re.compile(r'[^\[{]*[\[{](?:\s|\\n)*\\"')  # JSON that was written as a JSON string
_TAG_KEY = re.compile(r"(?:(?:tag|label|keyword)s?|标签|关键词)[\s_-]*\d*$", re.IGNORECASE)
_NAME_KEYS = frozenset({"name", "value", "text", "title", "word"})
_DATA = re.compile(r"[\[{]\s*[\"'“‘]")


def parse_tags(answer: str, *, cut: bool = False) -> list[str]:
    """The tags in an answer, as :func:`~airflow_vlm_provider.steps.tags.normalize_tags` makes them; never raises.

    :param answer: What the model said.
    :param cut: The answer was cut at its greatest length, so that the last entry of a plain list is incomplete.
    :return: At most 10 tags in the answer's order; none when it holds none.
    """
    text = _WRAPPING.sub("\n", _without_thoughts(answer)[:_EXAMINED])
    if _ESCAPED.match(text):
        text = text.replace("\\n", "\n").replace('\\"', '"')
    return _parse(text, cut=cut)


def _without_thoughts(answer: str) -> str:
    end = 0
    for thought in _THOUGHT_END.finditer(answer):
        end = thought.end()
    unfinished = _THOUGHT_START.search(answer, end)
    return answer[end : unfinished.start()] if unfinished else answer[end:]


def _parse(text: str, *, cut: bool) -> list[str]:
    answers: list[list[str]] = []
    others: list[str] = []
    for value in read_values(text):
        if under_keys := list(_under_tag_keys(value)):
            answers.append(normalize_tags(tag for found in under_keys for tag in _strings(found)))
        else:
            others.extend(_listed(value))
    if any(answers):
        if max(map(len, answers)) == 1:  # {"tag": "red"} {"tag": "circle"}
            return normalize_tags(tag for tags in answers for tag in tags)
        # A model that repeats the form it was told, or drafts, gives its fullest answer last.
        return max(reversed(answers), key=len)
    if others or _DATA.search(text):
        return normalize_tags(others)
    return normalize_tags(read_list(text, cut=cut))


def _under_tag_keys(value: Any) -> Iterator[Any]:
    """The values of the outermost keys that announce tags."""
    if isinstance(value, Pairs):
        found = [item for key, item in value if _TAG_KEY.search(key)]
        if found:
            yield from found
        else:
            for _, item in value:
                yield from _under_tag_keys(item)
    elif isinstance(value, list):
        for item in value:
            yield from _under_tag_keys(item)


def _listed(value: Any) -> list[str]:
    """The strings in a value's lists, when no key announces tags."""
    if isinstance(value, Pairs):
        return [string for _, item in value if isinstance(item, list) for string in _listed(item)]
    strings = list(_strings(value))
    if any(type(leaf) is str for leaf in _leaves(value)):
        return strings
    # Brackets without quotes are also used for remarks and links.
    return strings if len(strings) >= MIN_ENTRIES and all(map(is_entry, strings)) else []


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, list):
        for item in value:
            yield from _leaves(item[1] if isinstance(value, Pairs) else item)
    else:
        yield value


def _strings(value: Any) -> Iterator[str]:
    """The strings in a value that holds tags."""
    if isinstance(value, str):
        yield from _strings_in_text(value)
    elif isinstance(value, Pairs):
        yield from _strings_in_object(value)
    elif isinstance(value, list):
        for item in value:
            if not isinstance(item, str):
                yield from _strings(item)
            elif not is_prose(item):
                yield from split(item)


def _strings_in_text(text: str) -> Iterator[str]:
    if text.lstrip()[:1] in ("[", "{"):
        for value in read_values(text):
            yield from _strings(value)
        return
    entries = split(text)
    if not any(is_prose(entry) or len(entry.split()) > MAX_LABELLED_WORDS for entry in entries):
        yield from entries


def _strings_in_object(pairs: Pairs) -> Iterator[str]:
    names = list(_under_tag_keys(pairs)) or [item for key, item in pairs if key.lower() in _NAME_KEYS]
    if not names and all(isinstance(item, float | bool) for _, item in pairs):
        yield from (key for key, item in pairs if item)  # {"red": 0.9, "dog": false}
    for item in names or [item for _, item in pairs]:
        yield from _strings(item)

"""Reads what was meant to be JSON: whatever stands in brackets in a text, complete or not.

Understood besides JSON: text around it, single and typographic quotes, apostrophes and quotes inside strings,
strings without quotes, missing, doubled and trailing commas, missing brackets and closing quotes, full-width
punctuation, line comments, Python's literals and sets. What the end of the text cuts in two is left out.

One pass over the text, in linear time and without recursion; nothing raises. General repair libraries fall short
here: they keep the string that was cut, take the apostrophe of ``'children's'`` for a quote, and fail on, or need
minutes for, a long answer that went astray.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

MAX_DEPTH = 16
"""What is nested deeper is read as a value of its own, so that no later code can run out of stack."""


class Bare(str):
    """A string that stood without quotes; in running text it is rarely meant as data."""

    __slots__ = ()


class Pairs(list[tuple[str, Any]]):
    """An object's keys and values in their order, repeated keys included."""


# What closes a string, by what opened it; one language's opening quotes are another's closing ones.
_QUOTES = {'"': '"', "'": "'’", "“": '”"', "”": '”"', "„": '“”"', "‘": "’'", "’": "’'", "«": "»", "»": "«"}
# A quote closes only where something can follow a string; anywhere else it is an apostrophe or a slip.
_FOLLOWING = rf"(?=\s*(?:[{''.join(_QUOTES)},;:，；、：\[\]{{}})]|//|\Z))"
_CLOSING = {
    opening: re.compile(rf"\\.|[{closing}]{_FOLLOWING}", re.DOTALL) for opening, closing in _QUOTES.items()
}
_OPEN_BRACKET = re.compile(r"[\[{]")
_CLOSE_BRACKET = re.compile(r"[\]}]")
_BLANK = re.compile(r"(?:\s|//[^\n]*|[uUbBrR](?=['\"]))+")
_BARE_END = re.compile(r"[\[\]{},;:，；、：\n\"“”„]")
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|(.))", re.DOTALL)
_CONTROLS = {"n": "\n", "r": "\r", "t": "\t", "b": "\b", "f": "\f"}
_NUMBER = re.compile(r"[+-]?(?:\d{1,30}(?:\.\d{0,30})?|\.\d{1,30})(?:[eE][+-]?\d{1,3})?", re.ASCII)
_CONSTANTS: dict[str, Any] = {
    **dict.fromkeys(("null", "none", "undefined", "nan", "infinity", "-infinity")),
    "true": True,
    "false": False,
}
_CUT = object()


def read_values(text: str) -> Iterator[Any]:
    """The values in brackets, from left to right: lists, and objects as :class:`Pairs`.

    Scalars inside are ``str``, :class:`Bare`, ``float``, ``bool`` and None.
    """
    reader = _Reader(text)
    while bracket := _OPEN_BRACKET.search(text, reader.position):
        reader.position = bracket.start()
        yield reader.read_value()


@dataclass(slots=True)
class _Frame:
    """A bracket that is open; ``key`` is an object's latest string, which a colon makes a key."""

    is_object: bool
    items: list[Any] = field(default_factory=list)
    pairs: Pairs = field(default_factory=Pairs)
    key: str | None = None
    after_colon: bool = False

    def add(self, value: Any) -> None:
        if not self.is_object:
            self.items.append(value)
        elif self.key is not None and (self.after_colon or not isinstance(value, str)):
            self.pairs.append((self.key, value))
            self.key, self.after_colon = None, False
        elif isinstance(value, str):
            self.comma()
            self.key = value
        else:
            self.items.append(value)

    def comma(self) -> None:
        if self.key is not None and not self.after_colon:
            self.items.append(self.key)
        self.key, self.after_colon = None, False

    def value(self) -> Any:
        # {"a", "b"} is Python's set. A lone string in braces rather is a key that lost its value.
        is_set = not self.pairs and len(self.items) > 1
        return self.items if is_set or not self.is_object else self.pairs


class _Reader:
    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0
        # Quotes that nothing closes from here on; without it, many of them would each search the rest of the text.
        self._unclosed: set[str] = set()

    def read_value(self) -> Any:
        """The value whose opening bracket stands at :attr:`position`, which then is after its end."""
        stack: list[_Frame] = []
        while self.position < len(self.text):
            character = self.text[self.position]
            if character in "[{":
                if len(stack) == MAX_DEPTH:
                    break
                stack.append(_Frame(character == "{"))
                self.position += 1
            elif character in "]}":
                self.position += 1
                root = _close(stack, is_object=character == "}")
                if root is not None:
                    return root.value()
            elif character in ",;，；、":
                stack[-1].comma()
                self.position += 1
            elif character in ":：":
                _colon(stack)
                self.position += 1
            elif blank := _BLANK.match(self.text, self.position):
                self.position = blank.end()
            elif (value := self._read_scalar()) is not _CUT:
                stack[-1].add(value)
        return _unwind(stack, 0).value()

    def _read_scalar(self) -> Any:
        if self.text[self.position] in _QUOTES:
            return self._read_string()
        end = _BARE_END.search(self.text, self.position + 1)
        start, self.position = self.position, end.start() if end else len(self.text)
        if end is None:
            return _CUT
        word = self.text[start : self.position].strip()
        if word.lower() in _CONSTANTS:
            return _CONSTANTS[word.lower()]
        return float(word) if _NUMBER.fullmatch(word) else Bare(word)

    def _read_string(self) -> Any:
        start = self.position + 1
        end = self._closing_quote(self.text[self.position], start)
        if end is not None:
            self.position = end + 1
        elif bracket := _CLOSE_BRACKET.search(self.text, start):
            end = self.position = bracket.start()
        else:
            self.position = len(self.text)
            return _CUT
        return _unescaped(self.text[start:end])

    def _closing_quote(self, opening: str, start: int) -> int | None:
        if opening not in self._unclosed:
            for match in _CLOSING[opening].finditer(self.text, start):
                if not match[0].startswith("\\"):
                    return match.start()
            self._unclosed.add(opening)
        return None


def _close(stack: list[_Frame], *, is_object: bool) -> _Frame | None:
    """Close the innermost bracket of this kind, and those that were left open in it; else the innermost one."""
    top = len(stack) - 1
    depth = next((depth for depth in range(top, -1, -1) if stack[depth].is_object == is_object), top)
    stack[top].comma()
    frame = _unwind(stack, depth)
    if depth == 0:
        return frame
    stack[depth - 1].add(frame.value())
    return None


def _unwind(stack: list[_Frame], depth: int) -> _Frame:
    """Take the frames from ``depth`` on off the stack, each put into the one around it; answer the outermost."""
    while len(stack) > depth + 1:
        inner = stack.pop()
        stack[-1].add(inner.value())
    return stack.pop()


def _colon(stack: list[_Frame]) -> None:
    """A colon makes a key of the string before it; in a list, that list's closing bracket was forgotten."""
    items = stack[-1].items
    in_list = not stack[-1].is_object and len(stack) > 1 and stack[-2].is_object
    if in_list and items and isinstance(items[-1], str):
        key = items.pop()
        _close(stack, is_object=False)
        stack[-1].add(key)
    stack[-1].after_colon = stack[-1].key is not None


def _unescaped(string: str) -> str:
    if "\\" not in string:
        return string
    plain = _ESCAPE.sub(_unescape, string)
    # Characters beyond the first 65,536 are escaped as two halves, which belong together.
    return plain.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _unescape(match: re.Match[str]) -> str:
    if match[1]:
        return chr(int(match[1], 16))
    return _CONTROLS.get(match[2], match[2])

"""A sample's text as chunks: special tokens that stand for media, and captions put behind them.

Invariants:

- Special tokens keep their order, and the chunks theirs; the k-th caption follows the k-th placeholder of its kind.
- What is written is read again as the same chunks: a caption never holds a special token.
- Every chunk that is written ends with the token that ends chunks. Chunks without anything in them are dropped.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from typing import NamedTuple

from airflow_vlm_provider.errors import ConfigError, SampleError
from airflow_vlm_provider.types import MediaKind


class SpecialTokens(NamedTuple):
    """What stands in a text for media, and what ends a chunk of it. The defaults are Data-Juicer's."""

    image: str = "<__dj__image>"
    video: str = "<__dj__video>"
    audio: str = "<__dj__audio>"
    eoc: str = "<|__dj__eoc|>"

    @classmethod
    def of(cls, tokens: Sequence[str]) -> SpecialTokens:
        """The tokens in the order of the fields.

        :raises ConfigError: they are not four strings that can be told apart.
        """
        if (
            not isinstance(tokens, list | tuple)
            or len(tokens) != len(cls._fields)
            or not all(isinstance(token, str) and token for token in tokens)
        ):
            raise ConfigError(
                f"special_tokens is {tokens!r}; give four strings that are not empty: what stands for an image, a video "
                "and a sound, and what ends a chunk."
            )
        for token, other in permutations(tokens, 2):
            if token in other:
                raise ConfigError(
                    f"The special token {token!r} is part of {other!r}; choose tokens that can be told apart."
                )
        return cls(*tokens)

    def placeholder(self, kind: MediaKind) -> str:
        """What stands for a medium of a kind."""
        return self.image if kind == "image" else self.video

    def without(self, text: str) -> str:
        """The text without special tokens, also without those that appear where others are taken out."""
        pattern = _pattern(self)
        while (shorter := pattern.sub("", text)) != text:
            text = shorter
        return text.strip()


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a text about the media in it.

    :param tokens: Its special tokens, in order.
    :param words: Its text without them.
    """

    tokens: tuple[str, ...]
    words: str


def read_chunks(
    text: str,
    *,
    tokens: SpecialTokens,
    kind: MediaKind,
    media: int,
    prepend: bool = False,
) -> list[Chunk]:
    """Split a text into its chunks, so that there is one placeholder for each medium of the kind.

    A text without anything in it is one chunk of as many placeholders as there are media.

    :param media: How many media of the kind the sample has.
    :param prepend: Put the placeholders before a text that has none of the kind, instead of refusing it.
    :raises SampleError: ``malformed_row``: there are more placeholders than media, or fewer.
    """
    placeholder = tokens.placeholder(kind)
    chunks = _split(text, tokens)
    found = sum(chunk.tokens.count(placeholder) for chunk in chunks)
    if not found and (prepend or not chunks):
        first = chunks[0] if chunks else Chunk((), "")
        return [Chunk((placeholder,) * media + first.tokens, first.words), *chunks[1:]]
    if found != media:
        remedy = "" if found else " missing_placeholders='prepend' puts them before such a text."
        raise SampleError(
            "malformed_row",
            f"The text has {found} {'placeholder' if found == 1 else 'placeholders'} {placeholder!r}, but the sample has "
            f"{media} {kind if media == 1 else f'{kind}s'}, and each needs one.{remedy}",
        )
    return chunks


def write_chunks(
    chunks: Sequence[Chunk], captions: Sequence[str | None], *, tokens: SpecialTokens, kind: MediaKind
) -> str:
    """Write chunks again, with captions in place of their words.

    :param captions: One for each placeholder of the kind; None leaves it bare.
    """
    placeholder, left = tokens.placeholder(kind), iter(captions)
    written: list[str] = []
    for chunk in chunks:
        for token in chunk.tokens:
            caption = next(left) if token == placeholder else None
            written.append(token if caption is None else f"{token} {caption} ")
        written.append(tokens.eoc)
    return "".join(written)


def _split(text: str, tokens: SpecialTokens) -> list[Chunk]:
    pattern = _pattern(tokens)
    return [
        Chunk(tuple(pattern.findall(each)), tokens.without(each))
        for each in text.split(tokens.eoc)
        if each.strip()
    ]


@lru_cache(maxsize=16)
def _pattern(tokens: SpecialTokens) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, tokens)))

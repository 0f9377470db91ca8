"""From a row to examples: images and the caption that they share. What gives no example is counted.

The caption is a string, or tags: a list of strings, joined by ``", "``. Both stand for all images of the row. A list
of lists, as tagging writes it, has one list of tags for each image, in the order of the images.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from airflow_vlm_provider.types import Row

# Data-Juicer's, which stand in a text in place of media and at the end of a chunk.
SPECIAL_TOKENS = ("<__dj__image>", "<__dj__video>", "<__dj__audio>", "<|__dj__eoc|>")
TAG_SEPARATOR = ", "

LeftOut = Literal["rows_without_image", "rows_without_caption", "rows_mismatched", "images_without_caption"]
"""Why a row or an image is no part of the export: no image, or one that is no reference; no caption; another number of
lists of tags than of images; or an empty list of tags for one of several images."""

_ABSOLUTE = re.compile(r"/|[A-Za-z][A-Za-z0-9+.-]*://")


@dataclass(frozen=True, slots=True)
class Example:
    """Images and the caption that they share.

    :param name: What the row is called, by its field ``id`` or ``__key__``; None when it has neither.
    :param images: References, at least one.
    :param caption: Not empty, without special tokens.
    """

    name: str | None
    images: tuple[str, ...]
    caption: str


@dataclass(frozen=True, slots=True)
class Examples:
    """What became of a row."""

    examples: tuple[Example, ...] = ()
    left_out: Mapping[LeftOut, int] = field(default_factory=dict)


class ExampleReader:
    """Finds images and captions in rows.

    :param text_field: Where the caption stands: a field's name, or a path of names joined by dots, as in
        ``__dj__meta__.image_tags``.
    :param image_key: Field with the list of image references, or a single one.
    :param image_base: URI or path that is put before relative references; None leaves them relative.
    :param special_tokens: What is taken out of captions.
    """

    def __init__(
        self,
        *,
        text_field: str = "text",
        image_key: str = "images",
        image_base: str | None = None,
        special_tokens: Sequence[str] = SPECIAL_TOKENS,
    ) -> None:
        self._text_field = text_field
        self._image_key = image_key
        self._base = "" if not image_base else image_base.rstrip("/") + "/"
        tokens = "|".join(re.escape(token) for token in special_tokens)
        self._tokens = re.compile(rf"[ \t]*(?:{tokens})[ \t]*")

    def read(self, row: Row, *, folder: str = "") -> Examples:
        """
        Return a row's examples.

        :param folder: Where the row's relative references are relative to, itself relative to the dataset.
        """
        found = row.get(self._image_key)
        images = [found] if isinstance(found, str) else found if isinstance(found, list | tuple) else []
        references = [self._reference(image, folder) for image in images]
        if not references or None in references:
            return Examples(left_out={"rows_without_image": 1})
        names = [name for name in references if name is not None]
        value = _at(row, self._text_field)
        if not _is_by_image(value):
            caption = self._caption(value)
            if not caption:
                return Examples(left_out={"rows_without_caption": 1})
            return Examples((Example(_name(row), tuple(names), caption),))
        if len(value) != len(names):
            return Examples(left_out={"rows_mismatched": 1})
        return self._by_image(row, names, [self._caption(each) for each in value])

    def _by_image(self, row: Row, names: Sequence[str], captions: Sequence[str]) -> Examples:
        if not any(captions):
            return Examples(left_out={"rows_without_caption": 1})
        name, several = _name(row), len(names) > 1
        left_out: Counter[LeftOut] = Counter()
        examples = []
        for number, (image, caption) in enumerate(zip(names, captions, strict=True)):
            if caption:
                own = f"{name}_{number}" if several and name is not None else name
                examples.append(Example(own, (image,), caption))
            else:
                left_out["images_without_caption"] += 1
        return Examples(tuple(examples), left_out)

    def _reference(self, image: Any, folder: str) -> str | None:
        if not isinstance(image, str) or not image or not _is_unicode(image):
            return None
        if _ABSOLUTE.match(image):
            return image
        return self._base + (f"{folder}/{image}" if folder else image)

    def _caption(self, value: Any) -> str:
        if isinstance(value, list | tuple) and all(each is None or isinstance(each, str) for each in value):
            cleaned = [self._caption(each) for each in value]
            return TAG_SEPARATOR.join(each for each in cleaned if each)
        if not isinstance(value, str):
            return ""
        # What a lone surrogate stands for is lost already; no file of UTF-8 can hold it.
        text = value if _is_unicode(value) else value.encode(errors="replace").decode()
        return self._tokens.sub(" ", text).strip()


def _at(row: Any, path: str) -> Any:
    """The value at a path; None where there is none. A field whose own name has dots in it comes first."""
    if not isinstance(row, Mapping):
        return None
    if path in row:
        return row[path]
    first, dot, rest = path.partition(".")
    return _at(row.get(first), rest) if dot else None


def _is_by_image(value: Any) -> bool:
    """Whether a value has a list of its own for each image; null stands for an empty one."""
    return (
        isinstance(value, list | tuple)
        and any(isinstance(each, list | tuple) for each in value)
        and all(each is None or isinstance(each, list | tuple) for each in value)
    )


def _name(row: Row) -> str | None:
    for key in ("id", "__key__"):
        value = row.get(key)
        if isinstance(value, str | int) and not isinstance(value, bool) and value != "":
            return str(value)
    return None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True

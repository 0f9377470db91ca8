"""Plain pairs of image and text, one a line: JSON Lines or tab-separated values.

Of several images with one caption each makes a pair with it. In tab-separated values, which have a header line and
are quoted as the csv module's ``excel-tab`` has it, white space in a text is single spaces.
"""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from airflow_vlm_provider.exporters.base import to_json
from airflow_vlm_provider.exporters.examples import Example


@dataclass(frozen=True)
class JsonLinesPairs:
    """Pairs as ``{"image": ..., "text": ...}``, one a line."""

    suffixes = (".jsonl",)
    reserved = ()

    @contextlib.contextmanager
    def open(self, stream: BinaryIO) -> Iterator[JsonLinesSink]:
        yield JsonLinesSink(stream)


class JsonLinesSink:
    """A file of JSON Lines."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def add(self, examples: Sequence[Example]) -> int:
        lines = [
            to_json({"image": image, "text": example.caption}) + b"\n"
            for example in examples
            for image in example.images
        ]
        self._stream.write(b"".join(lines))
        return len(lines)


@dataclass(frozen=True)
class TabSeparatedPairs:
    """Pairs as tab-separated values under the header ``image``, ``text``."""

    suffixes = (".tsv",)
    reserved = ()

    @contextlib.contextmanager
    def open(self, stream: BinaryIO) -> Iterator[TabSeparatedSink]:
        yield TabSeparatedSink(stream)


class TabSeparatedSink:
    """A file of tab-separated values."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._write([("image", "text")])

    def add(self, examples: Sequence[Example]) -> int:
        pairs = [
            (image, " ".join(example.caption.split())) for example in examples for image in example.images
        ]
        self._write(pairs)
        return len(pairs)

    def _write(self, pairs: Sequence[tuple[str, str]]) -> None:
        text = io.StringIO(newline="")
        for pair in pairs:
            # Quoted only where needed, the module leaves a carriage return bare, which readers take for a line's end.
            csv.writer(
                text,
                dialect="excel-tab",
                lineterminator="\n",
                quoting=csv.QUOTE_ALL if "\r" in pair[0] else csv.QUOTE_MINIMAL,
            ).writerow(pair)
        self._stream.write(text.getvalue().encode())

"""The contract of an exporter, and what the ones that write JSON share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, BinaryIO, Protocol

from airflow_vlm_provider.exporters.examples import Example


class Sink(Protocol):
    """An export that is being written."""

    def add(self, examples: Sequence[Example]) -> int:
        """Add one row's examples and return how many records they became."""


class Exporter(Protocol):
    """A kind of file that training code reads."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """What the file's name has to end in, in lower case."""

    @property
    def reserved(self) -> tuple[str, ...]:
        """What no caption may hold, because the file's readers take it for something else."""

    def open(self, stream: BinaryIO) -> AbstractContextManager[Sink]:
        """
        Begin a file, whose memory does not grow with it.

        :param stream: Takes the file's bytes, which are complete when the context has ended; the caller closes it.
        """


class JsonArray:
    """A JSON array whose items are written one after the other, one a line."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._separator = b"["

    def append(self, item: Any) -> None:
        self._stream.write(self._separator + b"\n" + to_json(item))
        self._separator = b","

    def end(self) -> None:
        self._stream.write(b"[]" if self._separator == b"[" else b"\n]")


def to_json(value: Any) -> bytes:
    """Return a value as UTF-8 JSON on one line."""
    return json.dumps(value, ensure_ascii=False).encode()

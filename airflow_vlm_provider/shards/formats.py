"""Shard formats: how rows lie in a file. The suffix of a shard's name tells the format."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import BinaryIO, Protocol

from airflow_vlm_provider.errors import ConfigError
from airflow_vlm_provider.shards.compression import Gzip, Zstandard
from airflow_vlm_provider.shards.jsonl import JsonLines
from airflow_vlm_provider.types import Row, Sample


class RowWriter(Protocol):
    """Takes the rows of one shard in order."""

    def write(self, row: Row) -> None:
        """
        Write a row.

        :raises TypeError, ValueError: The format cannot hold one of the row's values.
        """

    def write_raw(self, raw: bytes) -> None:
        """Write a row that was not changed: a :attr:`Sample.raw` of a shard of the same format."""


class ShardFormat(Protocol):
    """A way to read and write shards."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """The endings, in lower case, by which a shard's name tells this format."""

    def read(self, stream: BinaryIO) -> Iterator[Sample]:
        """
        Yield the rows in order, holding only a few in memory.

        A row that cannot be parsed is a sample without ``row``; reading goes on with the next.

        :param stream: The shard's bytes; the caller closes it.
        :raises ShardError: The shard as a whole is truncated or corrupt.
        """

    def writer(self, stream: BinaryIO) -> AbstractContextManager[RowWriter]:
        """
        Write a shard in the same format and compression as is read.

        :param stream: Takes the shard's bytes, which are complete when the context has ended; the caller
            closes it.
        """


FORMATS: tuple[ShardFormat, ...] = (
    JsonLines(suffixes=(".jsonl", ".ndjson")),
    JsonLines(suffixes=(".jsonl.gz", ".ndjson.gz"), codec=Gzip()),
    JsonLines(suffixes=(".jsonl.zst", ".ndjson.zst"), codec=Zstandard()),
)


def shard_format(name: str) -> ShardFormat:
    """
    Return the format of a shard by its name.

    :raises ConfigError: The suffix is none of a supported format.
    """
    found = _find(name)
    if found is None:
        supported = ", ".join(suffix for each in FORMATS for suffix in each.suffixes)
        raise ConfigError(
            f"{name!r} is not a shard of a supported format; its name must end in one of {supported}."
        )
    return found


def is_shard(name: str) -> bool:
    """Tell whether a name is that of a shard in a supported format."""
    return _find(name) is not None


def _find(name: str) -> ShardFormat | None:
    lowered = name.lower()
    return next((each for each in FORMATS if lowered.endswith(each.suffixes)), None)

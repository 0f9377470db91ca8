"""Shard formats: how rows lie in a file. The suffix of a shard's name tells the format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

from airflow_vlm_provider.errors import ConfigError
from airflow_vlm_provider.shards.compression import Gzip, Zstandard
from airflow_vlm_provider.shards.jsonl import JsonLines
from airflow_vlm_provider.shards.parquet import Parquet
from airflow_vlm_provider.shards.webdataset import WebDataset
from airflow_vlm_provider.types import Row, Sample


@dataclass(frozen=True, slots=True)
class RowKeys:
    """What the fields of a row are called, for formats that can't tell by themselves what a field is for.

    :param objects: Fields whose values are objects, also where a shard can only hold them as JSON text.
    """

    text: str = "text"
    image: str = "images"
    video: str = "videos"
    objects: frozenset[str] = frozenset()


class RowWriter(Protocol):
    """Takes the samples of one shard in order, each in one call of one of the two."""

    def write(self, sample: Sample, rows: Sequence[Row]) -> None:
        """
        Write what a step made of a sample in its place: no row, one or several.

        A field that a row shares with ``sample.row`` (the very same object) is written as it stood in the shard.

        :raises TypeError, ValueError: The format cannot hold one of the values.
        """

    def write_unchanged(self, sample: Sample) -> None:
        """Write a sample back as it was."""


class ShardReader(Protocol):
    """An open shard."""

    @property
    def embeds_media(self) -> bool:
        """Whether the shard holds media itself, so that writing it again copies them."""

    @property
    def sidecar_of(self) -> str | None:
        """The name of the shard that this is only the sidecar of; None when it is a shard."""

    def __iter__(self) -> Iterator[Sample]:
        """
        Yield the samples in order, once, holding only a few in memory.

        A row that cannot be parsed is a sample without ``row``; reading goes on with the next.

        :raises ShardError: The shard as a whole is truncated or corrupt.
        """

    def writer(self, stream: BinaryIO, *, generated: Mapping[str, Any]) -> AbstractContextManager[RowWriter]:
        """
        Write a shard like this one: same format, compression, types and metadata.

        :param stream: Takes the shard's bytes, which are complete when the context has ended; the caller closes it.
        :param generated: The fields that are added, each with the JSON schema of its values.
        """


class ShardFormat(Protocol):
    """A way to read and write shards."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """The endings, in lower case, by which a shard's name tells this format."""

    @property
    def seekable(self) -> bool:
        """Whether :meth:`open` needs a stream that can be read here and there, and not only to its end."""

    @property
    def always_embeds(self) -> bool:
        """Whether every shard of the format holds its media itself."""

    def open(self, stream: BinaryIO, *, keys: RowKeys) -> AbstractContextManager[ShardReader]:
        """
        Open a shard.

        :param stream: The shard's bytes; the caller closes it, after the context.
        :raises ShardError: It is no shard of this format.
        """


FORMATS: tuple[ShardFormat, ...] = (
    JsonLines(suffixes=(".jsonl", ".ndjson")),
    JsonLines(suffixes=(".jsonl.gz", ".ndjson.gz"), codec=Gzip()),
    JsonLines(suffixes=(".jsonl.zst", ".ndjson.zst"), codec=Zstandard()),
    WebDataset(suffixes=(".tar",)),
    WebDataset(suffixes=(".tar.gz", ".tgz"), codec=Gzip()),
    WebDataset(suffixes=(".tar.zst",), codec=Zstandard()),
    Parquet(),
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


def shard_stem(name: str) -> str:
    """
    Return a shard's name without the suffix of its format.

    :raises ConfigError: The suffix is none of a supported format.
    """
    lowered = name.lower()
    suffix = max(
        (suffix for suffix in shard_format(name).suffixes if lowered.endswith(suffix)),
        key=len,
    )
    return name[: -len(suffix)]


def _find(name: str) -> ShardFormat | None:
    lowered = name.lower()
    return next((each for each in FORMATS if lowered.endswith(each.suffixes)), None)

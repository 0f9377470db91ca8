"""Parquet shards, read in small batches and written back in the same types.

Media lie in columns (see :mod:`~airflow_vlm_provider.shards.parquet_media`) or are referred to by strings, as in JSON
Lines. What Python has no value for (a timestamp in the year 20000, text that is no UTF-8) stands in the row as Arrow's
scalar: steps that need it refuse it, and it is written back as it was.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, BinaryIO

from airflow_vlm_provider.errors import ShardError
from airflow_vlm_provider.shards.arrow_types import is_list, is_text
from airflow_vlm_provider.shards.parquet_input import ParquetInput
from airflow_vlm_provider.shards.parquet_media import (
    EmbeddedMedia,
    first_bytes,
    is_file_struct,
    looks_like_media,
    may_hold_media,
    media_of,
)
from airflow_vlm_provider.shards.parquet_schema import sidecar_of
from airflow_vlm_provider.shards.parquet_writer import Origin, ParquetShardWriter
from airflow_vlm_provider.types import Row, Sample

if TYPE_CHECKING:
    import pyarrow as pa

    from airflow_vlm_provider.shards.formats import RowKeys

# pyarrow's own buffer of each column; the input reads ahead.
BUFFER_BYTES = 64 * 1024
BATCH_BYTES = 4 * 1024 * 1024
BATCH_ROWS = 1024
# A dictionary page can make large values of few bytes, so that a row group's size says little about a batch's.
MEDIA_BATCH_ROWS = 64
# Where the first medium is looked for.
PEEKED_ROWS = 16
PEEKED_BATCHES = 64


@dataclass(frozen=True)
class Parquet:
    """Apache Parquet.

    A sample's ``line`` is its place among the rows, from 1.
    """

    suffixes: tuple[str, ...] = (".parquet",)
    seekable = True
    always_embeds = False

    @contextlib.contextmanager
    def open(self, stream: BinaryIO, *, keys: RowKeys) -> Iterator[ParquetReader]:
        """See :class:`~airflow_vlm_provider.shards.formats.ShardFormat`."""
        yield ParquetReader(ParquetInput(stream), objects=keys.objects)


class ParquetReader:
    """An open Parquet shard.

    :param objects: Columns whose values are wanted as objects; where they are strings, they are read as JSON.
    :raises ShardError: The file is no Parquet, or two of its columns have one name.
    """

    def __init__(self, source: ParquetInput, *, objects: frozenset[str] = frozenset()) -> None:
        import pyarrow.parquet as pq

        self._source = source
        with source.faults():
            # Read ahead, pyarrow would hold a row group of any size, and read in threads of its own, whose errors and
            # end nobody sees. Buffered, it holds a page of each column, which is the least that can be decoded.
            self._file = pq.ParquetFile(
                source, pre_buffer=False, buffer_size=BUFFER_BYTES, page_checksum_verification=True
            )
            self._schema: pa.Schema = self._file.schema_arrow
            source.expect(self._file.metadata.num_columns)
        twice = [name for name, times in Counter(self._schema.names).items() if times > 1]
        if twice:
            raise ShardError(
                f"The shard has several columns named {twice[0]!r}. Write it with names that differ."
            )
        self._media = [field.name for field in self._schema if may_hold_media(field.type)]
        self._json = {field.name for field in self._schema if field.name in objects and is_text(field.type)}
        with source.faults():
            self._embeds_media = any(self._embeds(name) for name in self._media)

    @property
    def embeds_media(self) -> bool:
        """See :class:`~airflow_vlm_provider.shards.formats.ShardReader`."""
        return self._embeds_media

    @property
    def sidecar_of(self) -> str | None:
        """See :class:`~airflow_vlm_provider.shards.formats.ShardReader`."""
        return sidecar_of(self._schema)

    def __iter__(self) -> Iterator[Sample]:
        index = 0
        for group in range(self._file.metadata.num_row_groups):
            for batch in self._batches(group):
                yield from self._samples(batch, group, index)
                index += batch.num_rows

    def writer(self, stream: BinaryIO, *, generated: Mapping[str, Any]) -> ParquetShardWriter:
        """See :class:`~airflow_vlm_provider.shards.formats.ShardReader`.

        :raises ConfigError: A generated field has no column type, or does not fit into the column of its name.
        """
        return ParquetShardWriter(stream, schema=self._schema, about=self._file.metadata, generated=generated)

    def _batches(self, group: int) -> Iterator[pa.RecordBatch]:
        """Read a row group, a few megabytes at a time."""
        with self._source.faults():
            about = self._file.metadata.row_group(group)
            rows = about.num_rows
            if not rows:
                return
            row_bytes = max(1, about.total_byte_size // rows)
            most = MEDIA_BATCH_ROWS if self._media else BATCH_ROWS
            batches = self._file.iter_batches(
                batch_size=max(1, min(BATCH_BYTES // row_bytes, most)), row_groups=[group], use_threads=False
            )
        while True:
            with self._source.faults():
                batch = next(batches, None)
            if batch is None:
                break
            rows -= batch.num_rows
            yield batch
        if rows:
            raise ShardError(
                f"The shard's row group {group} lacks {rows} rows. Write it again, or take it out."
            )

    def _samples(self, batch: pa.RecordBatch, group: int, first: int) -> Iterator[Sample]:
        columns = {name: batch.column(i) for i, name in enumerate(self._schema.names)}
        media = {name: columns.pop(name) for name in self._media}
        values = {name: self._values(name, column) for name, column in columns.items()}
        # Once in Arrow's memory, once as Python's objects.
        share = 2 * sum(column.nbytes for column in columns.values()) // batch.num_rows
        embedded = EmbeddedMedia({})
        for i in range(batch.num_rows):
            row: Row = {}
            if media:
                references, embedded = media_of({name: column[i] for name, column in media.items()})
                row = {
                    name: references[name] if name in media else values[name][i]
                    for name in self._schema.names
                }
            else:
                row = {name: column[i] for name, column in values.items()}
            yield Sample(
                index=first + i,
                line=first + i + 1,
                row=row,
                embedded=embedded,
                origin=Origin(batch, i, group),
                memory=share + embedded.size,
            )

    def _values(self, name: str, column: pa.Array) -> list[Any]:
        try:
            values: list[Any] = column.to_pylist()
        except Exception:
            values = [_value(scalar) for scalar in column]
        return [_parsed(value) for value in values] if name in self._json else values

    def _embeds(self, name: str) -> bool:
        """Whether a column holds media, told by the first value: structs of files do, bytes when they look like it."""
        if not self._file.metadata.num_row_groups:
            return False
        kind = self._schema.field(name).type
        while is_list(kind):
            kind = kind.value_type
        batches = self._file.iter_batches(
            batch_size=PEEKED_ROWS, row_groups=[0], columns=[name], use_threads=False
        )
        for batch in islice(batches, PEEKED_BATCHES):
            data = first_bytes(batch.column(0))
            if data is not None:
                return is_file_struct(kind) or looks_like_media(data)
        return False


def _value(scalar: pa.Scalar) -> Any:
    """A scalar's value, or itself when Python has none for it. Libraries for dates raise whatever they like."""
    try:
        return scalar.as_py()
    except Exception:
        return scalar


def _parsed(text: Any) -> Any:
    """The object that a text of JSON is, null for a blank one; any other text stays."""
    if not isinstance(text, str):
        return text
    if not text.strip():
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text

"""Writes a Parquet shard again: what did not change straight from Arrow's memory, and what is generated besides.

Row groups are those of the source. A group that grew too large, because a step multiplied its rows, becomes several.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from airflow_vlm_provider.shards.arrow_columns import ColumnBuilder
from airflow_vlm_provider.shards.arrow_types import to_arrow
from airflow_vlm_provider.shards.parquet_layout import writer_options
from airflow_vlm_provider.shards.parquet_media import EmbeddedMedia, may_hold_media
from airflow_vlm_provider.shards.parquet_output import ParquetOutput, RowGroups
from airflow_vlm_provider.shards.parquet_schema import extended_schema, file_metadata
from airflow_vlm_provider.types import Row, Sample

if TYPE_CHECKING:
    import pyarrow as pa

# Held in memory until a row group is complete.
ROW_GROUP_BYTES = 32 * 1024 * 1024
ROW_GROUP_ROWS = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a sample stands.

    :param group: The row group that the batch is of.
    """

    batch: pa.RecordBatch
    index: int
    group: int


class ParquetShardWriter(RowGroups):
    """A :class:`~airflow_vlm_provider.shards.formats.RowWriter` for samples of one Parquet shard.

    :param stream: Takes the file's bytes, which are complete when the context has ended; the caller closes it.
    :param schema: The source's schema.
    :param about: The source file's metadata.
    :param generated: The generated fields, each with the JSON schema of its values.
    :raises ConfigError: A generated field has no column type, or does not fit into the column of its name.
    """

    def __init__(
        self,
        stream: BinaryIO,
        *,
        schema: pa.Schema,
        about: pa.FileMetaData,
        generated: Mapping[str, Any],
    ) -> None:
        import pyarrow as pa

        extended = extended_schema(schema, generated)
        known = len(schema)
        self._media = {field.name for field in schema if may_hold_media(field.type)}
        self._fields: list[pa.Field] = list(extended)
        self._names = set(extended.names)
        self._nulls = [pa.nulls(1, field.type) for field in self._fields[known:]]
        self._known = known
        self._group = 0
        output = ParquetOutput(
            stream,
            extended,
            metadata=file_metadata(about.metadata or {}, schema),
            options=lambda: writer_options(about, schema, extended),
        )
        columns = [ColumnBuilder(field, i if i < known else None) for i, field in enumerate(extended)]
        super().__init__(output, columns)

    def write(self, sample: Sample, rows: Sequence[Row]) -> None:
        """See :class:`~airflow_vlm_provider.shards.formats.RowWriter`.

        :raises TypeError, ValueError: A value does not fit its column, or its field has no column.
        """
        # All are converted before the first is appended: a sample is written whole or not at all.
        lines = [self._changes(sample, row) for row in rows]
        for line in lines:
            self._append(sample, line)

    def write_unchanged(self, sample: Sample) -> None:
        """See :class:`~airflow_vlm_provider.shards.formats.RowWriter`."""
        self._append(sample, [None] * self._known + self._nulls)

    def _changes(self, sample: Sample, row: Row) -> list[pa.Array | None]:
        """A row's values as arrays of one value; None where the source's stays."""
        was = sample.row or {}
        for name in row:
            if name not in self._names:
                raise TypeError(
                    f"The shard has no column {name!r}; a step must name every field that it generates."
                )
        line: list[pa.Array | None] = []
        for field in self._fields:
            value = row.get(field.name)
            if field.name in was and field.name in row and value is was[field.name]:
                line.append(None)
                continue
            if field.name in self._media and isinstance(sample.embedded, EmbeddedMedia):
                value = sample.embedded.restored(value, field.type)
            line.append(to_arrow(value, field))
        return line

    def _append(self, sample: Sample, line: Sequence[pa.Array | None]) -> None:
        origin: Origin = sample.origin
        if origin.group != self._group:
            self._flush()
            self._group = origin.group
        size = sample.size
        for column, single in zip(self._columns, line, strict=True):
            if single is None:
                column.take(origin.batch, origin.index)
            else:
                column.put(single)
                size += single.nbytes
        self._row_added(size, most_rows=ROW_GROUP_ROWS, most_bytes=ROW_GROUP_BYTES)

"""Sidecars: what a step generated, without the shard itself, in a Parquet file beside it.

One line for each row that a shard written in full would have: the sample's key, its place in the shard and the
generated fields. A sample that was skipped or failed has one line of nulls; several lines with one place are one
sample that a step multiplied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

from airflow_vlm_provider.errors import ConfigError
from airflow_vlm_provider.shards.arrow_columns import ColumnBuilder
from airflow_vlm_provider.shards.arrow_types import arrow_type, to_arrow
from airflow_vlm_provider.shards.formats import shard_stem
from airflow_vlm_provider.shards.parquet_output import ParquetOutput, RowGroups
from airflow_vlm_provider.shards.parquet_schema import sidecar_metadata
from airflow_vlm_provider.types import Row, Sample

if TYPE_CHECKING:
    import pyarrow as pa

KEY, PLACE = "key", "row"
SUFFIX = ".parquet"
_OPTIONS = {"compression": "zstd"}
ROW_GROUP_ROWS = 16 * 1024
ROW_GROUP_BYTES = 16 * 1024 * 1024


def sidecar_name(shard_name: str) -> str:
    """
    Return the name of a shard's sidecar: the shard's, with the suffix ``.parquet``.

    :raises ConfigError: It is no name of a shard in a supported format.
    """
    return shard_stem(shard_name) + SUFFIX


class SidecarWriter(RowGroups):
    """Writes a shard's sidecar; a :class:`~airflow_vlm_provider.shards.formats.RowWriter`.

    The columns are ``key`` (string, null where samples have none), ``row`` (int64, from 0) and the generated fields;
    of objects only the generated properties.

    :param stream: Takes the file's bytes, which are complete when the context has ended; the caller closes it.
    :param generated: The generated fields, each with the JSON schema of its values.
    :param shard: The shard's name, for the file's metadata.
    :raises ConfigError: A generated field has a name of the sidecar's own, or no column type.
    """

    def __init__(self, stream: BinaryIO, *, generated: Mapping[str, Any], shard: str) -> None:
        import pyarrow as pa

        for name in (KEY, PLACE):
            if name in generated:
                raise ConfigError(
                    f"A sidecar has a column {name!r} of its own; give the generated field another name, or set "
                    "output='full'."
                )
        self._generated = [pa.field(name, arrow_type(schema)) for name, schema in generated.items()]
        fields = [pa.field(KEY, pa.string()), pa.field(PLACE, pa.int64(), nullable=False), *self._generated]
        about = sidecar_metadata(shard)
        self._nulls = [pa.nulls(1, field.type) for field in self._generated]
        output = ParquetOutput(stream, pa.schema(fields, metadata=about), options=lambda: _OPTIONS)
        super().__init__(output, [ColumnBuilder(field) for field in fields])

    def write(self, sample: Sample, rows: Sequence[Row]) -> None:
        """See :class:`~airflow_vlm_provider.shards.formats.RowWriter`.

        :raises TypeError, ValueError: A value does not fit its schema, or a field changed that is not generated.
        """
        lines = [self._line(sample, row) for row in rows]
        for line in lines:
            self._append(sample, line)

    def write_unchanged(self, sample: Sample) -> None:
        """See :class:`~airflow_vlm_provider.shards.formats.RowWriter`."""
        self._append(sample, self._nulls)

    def _line(self, sample: Sample, row: Row) -> list[pa.Array]:
        was = sample.row or {}
        names = {field.name for field in self._generated}
        for name, value in row.items():
            if name not in names and (name not in was or value is not was[name]):
                raise TypeError(
                    f"The field {name!r} changed, but a sidecar holds only what a step says it generates."
                )
        return [to_arrow(_only(row.get(field.name), field.type), field) for field in self._generated]

    def _append(self, sample: Sample, line: Sequence[pa.Array]) -> None:
        import pyarrow as pa

        own = (pa.array([sample.key], pa.string()), pa.array([sample.index], pa.int64()))
        singles = (*own, *line)
        for column, single in zip(self._columns, singles, strict=True):
            column.put(single)
        size = sum(single.nbytes for single in singles)
        self._row_added(size, most_rows=ROW_GROUP_ROWS, most_bytes=ROW_GROUP_BYTES)


def _only(value: Any, kind: pa.DataType) -> Any:
    """A value without the properties that are not the generated ones."""
    import pyarrow as pa

    if pa.types.is_struct(kind) and isinstance(value, Mapping):
        return {field.name: _only(value.get(field.name), field.type) for field in kind}
    if pa.types.is_list(kind) and isinstance(value, list | tuple):
        return [_only(each, kind.value_type) for each in value]
    return value

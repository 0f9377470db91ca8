"""A Parquet file being written to a stream, row group by row group, and rows on their way into one."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

from airflow_vlm_provider.shards.arrow_columns import ColumnBuilder

if TYPE_CHECKING:
    import pyarrow as pa
    from _typeshed import ReadableBuffer
    from typing_extensions import Self


class ParquetOutput:
    """Writes a Parquet file; a context manager. The same row groups give the same bytes.

    Pages carry checksums, so that whoever reads the file notices damage. The file is begun by its first row group.

    :param stream: Takes the file's bytes, which are complete when the context has ended; it is left open.
    :param metadata: Entries of the file's metadata besides the schema's.
    :param options: Gives the options of :class:`pyarrow.parquet.ParquetWriter` when the file is begun.
    """

    def __init__(
        self,
        stream: BinaryIO,
        schema: pa.Schema,
        *,
        options: Callable[[], Mapping[str, Any]],
        metadata: Mapping[bytes, bytes] | None = None,
    ) -> None:
        self._sink = _Sink(stream)
        self._schema = schema
        self._metadata = dict(metadata or {})
        self._options = options
        self._writer: Any = None

    def __enter__(self) -> ParquetOutput:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            writer = self._begun()
            if self._metadata:
                writer.add_key_value_metadata(self._metadata)
            writer.close()
        elif self._writer is not None:
            self._sink.abandoned = True
            self._writer.close()

    def write(self, columns: Sequence[pa.ChunkedArray]) -> None:
        """Write a row group."""
        import pyarrow as pa

        table = pa.Table.from_arrays(list(columns), schema=self._schema)
        self._begun().write_table(table, row_group_size=max(1, table.num_rows))

    def _begun(self) -> Any:
        import pyarrow.parquet as pq

        if self._writer is None:
            self._writer = pq.ParquetWriter(
                self._sink, self._schema, write_page_checksum=True, **self._options()
            )
        return self._writer


class RowGroups:
    """Rows on their way into a Parquet file: gathered in columns until they make a row group; a context manager.

    :param output: The file. It is closed with this.
    :param columns: A builder for each of its columns.
    """

    def __init__(self, output: ParquetOutput, columns: Sequence[ColumnBuilder]) -> None:
        self._output = output
        self._columns = columns
        self._rows = 0
        self._bytes = 0

    def __enter__(self) -> Self:
        self._output.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._flush()
        finally:
            self._output.__exit__(kind, error, trace)

    def _row_added(self, size: int, *, most_rows: int, most_bytes: int) -> None:
        """Count a row that every column has taken, and write what there is when it is enough."""
        self._rows += 1
        self._bytes += size
        if self._rows >= most_rows or self._bytes >= most_bytes:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._output.write([column.finish() for column in self._columns])
        self._rows = self._bytes = 0


class _Sink(io.RawIOBase):
    """The stream as pyarrow sees it: whole writes, no close.

    pyarrow ends the file also when it is dropped. After an error there must be no end, and the stream may be closed.
    """

    def __init__(self, stream: BinaryIO) -> None:
        super().__init__()
        self._stream = stream
        self.abandoned = False

    def writable(self) -> bool:
        return True

    def write(self, data: ReadableBuffer) -> int:
        view = memoryview(data).cast("B")
        if not self.abandoned:
            self._stream.write(view)
        return len(view)

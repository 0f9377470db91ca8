"""A Parquet file being written to a stream, row group by row group."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    import pyarrow as pa
    from _typeshed import ReadableBuffer


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

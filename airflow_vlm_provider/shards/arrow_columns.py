"""Columns that grow row by row: from rows of record batches as they are, and from single values."""

from __future__ import annotations

from typing import TYPE_CHECKING

from airflow_vlm_provider.shards.arrow_types import adapted

if TYPE_CHECKING:
    import pyarrow as pa

# An array of one value takes hundreds of bytes; so many of them are made one array.
SINGLES = 1024


class ColumnBuilder:
    """The values of one column between two row groups. Neighbours in a batch stay together and are not copied.

    :param field: The column.
    :param source: Its place in the batches that :meth:`take` is given.
    """

    def __init__(self, field: pa.Field, source: int | None = None) -> None:
        self.field = field
        self._source = source
        self._chunks: list[pa.Array] = []
        self._singles: list[pa.Array] = []
        self._batch: pa.RecordBatch | None = None
        self._start = 0
        self._length = 0

    def take(self, batch: pa.RecordBatch, index: int) -> None:
        """Append the value that stands in a row of a batch."""
        if batch is self._batch and index == self._start + self._length:
            self._length += 1
            return
        self._settle()
        self._batch, self._start, self._length = batch, index, 1

    def put(self, single: pa.Array) -> None:
        """Append an array of one value."""
        if self._batch is not None or len(self._singles) >= SINGLES:
            self._settle()
        self._singles.append(single)

    def finish(self) -> pa.ChunkedArray:
        """Return the column, and begin the next."""
        import pyarrow as pa

        self._settle()
        chunks, self._chunks = self._chunks, []
        return pa.chunked_array(chunks, type=self.field.type)

    def _settle(self) -> None:
        """Make arrays of what is pending."""
        import pyarrow as pa

        if self._batch is not None:
            piece = self._batch.column(self._source).slice(self._start, self._length)
            self._chunks.append(adapted(piece, self.field.type))
            self._batch = None
        if self._singles:
            # Dictionaries of different values don't become one array everywhere.
            is_dictionary = pa.types.is_dictionary(self.field.type)
            self._chunks += self._singles if is_dictionary else [pa.concat_arrays(self._singles)]
            self._singles = []

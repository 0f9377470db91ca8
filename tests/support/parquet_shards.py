"""Parquet shards in memory: made, read and written again."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from airflow_vlm_provider.shards.formats import RowKeys, RowWriter, ShardReader, shard_format
from airflow_vlm_provider.types import Row, Sample

TAGS: Mapping[str, Any] = {"type": "array", "items": {"type": "array", "items": {"type": "string"}}}
META = "__dj__meta__"
GENERATED: Mapping[str, Any] = {META: {"type": "object", "properties": {"image_tags": TAGS}}}
KEYS = RowKeys(objects=frozenset({META}))

Rewrite = Callable[[Sample], Sequence[Row] | None]


def parquet(table: pa.Table | Mapping[str, Any], **options: Any) -> bytes:
    """The table as a Parquet file."""
    stream = io.BytesIO()
    pq.write_table(table if isinstance(table, pa.Table) else pa.table(dict(table)), stream, **options)
    return stream.getvalue()


@contextlib.contextmanager
def opened(shard: bytes | BinaryIO, keys: RowKeys = KEYS) -> Iterator[ShardReader]:
    stream = io.BytesIO(shard) if isinstance(shard, bytes) else shard
    with shard_format("a.parquet").open(stream, keys=keys) as reader:
        yield reader


def samples_of(shard: bytes | BinaryIO, keys: RowKeys = KEYS) -> list[Sample]:
    with opened(shard, keys) as reader:
        return list(reader)


def rewritten(
    shard: bytes,
    generated: Mapping[str, Any] | None = None,
    rewrite: Rewrite = lambda sample: None,
) -> bytes:
    """The shard written again, each sample as the rows that ``rewrite`` makes of it, or unchanged where that is None."""
    stream = io.BytesIO()
    with opened(shard) as reader, reader.writer(stream, generated=generated or {}) as writer:
        for sample in reader:
            put(writer, sample, rewrite(sample))
    return stream.getvalue()


def put(writer: RowWriter, sample: Sample, rows: Sequence[Row] | None) -> None:
    if rows is None:
        writer.write_unchanged(sample)
    else:
        writer.write(sample, rows)


def table_of(shard: bytes) -> pa.Table:
    return pq.read_table(io.BytesIO(shard))


def with_field(sample: Sample, name: str, value: Any) -> Row:
    assert sample.row is not None
    return {**sample.row, name: value}

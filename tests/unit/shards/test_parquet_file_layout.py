"""How a written Parquet file lies: row groups, codecs, pages and notes, in little memory, also when writing fails."""

from __future__ import annotations

import contextlib
import io
from typing import Any, BinaryIO, cast

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from airflow_vlm_provider.shards import parquet_writer
from tests.support.parquet_rewriting import CAPTION, metadata_of, tagged
from tests.support.parquet_shards import (
    GENERATED,
    META,
    opened,
    parquet,
    rewritten,
    table_of,
    with_field,
)


def test_row_groups_codecs_and_dictionaries_are_the_sources() -> None:
    table = pa.table(
        {
            "a.b": ["x"] * 90,
            "s": pa.array([{"p": "x", "q": [1, 2]}] * 90),
            "l": pa.array([["x"]] * 90),
            META: pa.array([{"n": 1}] * 90),
            "m": pa.array([[("k", 1)]] * 90, pa.map_(pa.string(), pa.int64())),
        }
    )
    codecs = {
        "a.b": "gzip",
        "s.p": "zstd",
        "s.q.list.element": "none",
        "l.list.element": "brotli",
        f"{META}.n": "lz4",
    }
    codecs |= {"m.key_value.key": "zstd", "m.key_value.value": "zstd"}
    shard = parquet(table, row_group_size=40, compression=codecs, use_dictionary=["s.p", "m.key_value.key"])

    def lie(data: bytes) -> Any:
        about = metadata_of(data)
        leaves = {}
        for i in range(about.num_columns):
            chunk = about.row_group(0).column(i)
            leaves[chunk.path_in_schema] = (chunk.compression, chunk.has_dictionary_page)
        return leaves, [about.row_group(i).num_rows for i in range(about.num_row_groups)]

    before, groups = lie(shard)
    again = rewritten(shard, {**GENERATED, **CAPTION}, tagged)
    after, groups_after = lie(again)
    assert groups_after == groups == [40, 40, 10]
    assert {path: after[path] for path in before} == before
    assert after["caption"] == ("ZSTD", True)
    assert after[f"{META}.image_tags.list.element.list.element"] == ("ZSTD", True)


def test_spark_gets_its_timestamps_back_in_96_bits() -> None:
    table = pa.table({"when": pa.array([0, None], pa.timestamp("ns")), "n": [1, 2]})
    shard = parquet(table, use_deprecated_int96_timestamps=True, store_schema=False)
    again = rewritten(shard, CAPTION)
    assert metadata_of(again).row_group(0).column(0).physical_type == "INT96"
    assert table_of(again).column("when").equals(table_of(shard).column("when"))


def test_notes_in_the_metadata_stay_but_for_those_that_would_hide_the_new_columns() -> None:
    frame = pd.DataFrame({"n": [1, 2]}, index=pd.Index(["a", "b"], name="name"))
    spark = b"org.apache.spark.sql.parquet.row.metadata"
    table = pa.Table.from_pandas(frame)
    table = table.replace_schema_metadata({**table.schema.metadata, spark: b"{}", b"mine": b"\xff"})
    stream = io.BytesIO()
    with pq.ParquetWriter(stream, table.schema) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({"of the file": "kept"})
    again = rewritten(stream.getvalue(), CAPTION, lambda sample: [with_field(sample, "caption", "c")])
    assert table_of(again).schema.metadata == {
        key: table.schema.metadata[key] for key in (b"pandas", b"mine")
    }
    assert metadata_of(again).metadata[b"of the file"] == b"kept"
    after = pd.read_parquet(io.BytesIO(again))
    assert after.index.equals(frame.index)
    assert after["caption"].tolist() == ["c", "c"]
    assert after[["n"]].equals(frame)
    assert table_of(rewritten(stream.getvalue())).schema.metadata[spark] == b"{}"


def test_the_same_samples_give_the_same_bytes() -> None:
    shard = parquet({"id": range(100), "image": [b"x" * 1000] * 100}, row_group_size=30)
    assert rewritten(shard, GENERATED, tagged) == rewritten(shard, GENERATED, tagged)


def test_damage_in_what_was_written_is_noticed() -> None:
    again = bytearray(rewritten(parquet({"image": [bytes(range(256))] * 3}, compression="none"), CAPTION))
    again[again.index(bytes(range(50, 60)))] ^= 1
    with pytest.raises(OSError, match="CRC"):
        pq.read_table(io.BytesIO(bytes(again)), page_checksum_verification=True)


def test_a_row_group_that_grows_too_large_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_writer, "ROW_GROUP_BYTES", 100_000)
    shard = parquet(
        {"id": range(100), "image": [b"x%d" % i * 5000 for i in range(100)]}, use_dictionary=False
    )
    again = rewritten(shard)
    about = metadata_of(again)
    assert about.num_row_groups > 5
    assert max(about.row_group(i).total_byte_size for i in range(about.num_row_groups)) < 150_000
    assert table_of(again).equals(table_of(shard))


def test_pages_of_large_rows_are_small() -> None:
    # What is written is read again in less memory than the row group takes.
    rows = [b"%03d" % index * 100_000 for index in range(60)]
    shard = parquet({"image": rows}, compression="none", use_dictionary=False)
    stream = io.BytesIO(rewritten(shard))
    before = pa.total_allocated_bytes()
    peak = 0
    with opened(cast("BinaryIO", stream)) as reader:
        for _ in reader:
            peak = max(peak, pa.total_allocated_bytes() - before)
    assert peak < 8 * 2**20 < len(shard) / 2


def test_memory_does_not_grow_with_the_shard() -> None:
    class Counting(io.RawIOBase):
        written = 0

        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int:
            self.written += len(data)
            return len(data)

    rows = [np.random.default_rng(index).bytes(100_000) for index in range(100)]
    shard = parquet({"image": rows * 10}, use_dictionary=False, row_group_size=100)
    target = Counting()
    before = pa.total_allocated_bytes()
    peak = 0
    with opened(shard) as reader, reader.writer(cast("BinaryIO", target), generated=GENERATED) as writer:
        for sample in reader:
            writer.write(sample, tagged(sample))
            peak = max(peak, pa.total_allocated_bytes() - before)
    assert target.written > 90 * 2**20
    assert peak < 50 * 2**20


def test_after_an_error_nothing_more_is_written_and_the_stream_may_be_closed() -> None:
    stream = io.BytesIO()
    with opened(parquet({"id": range(10)}, row_group_size=2)) as reader:
        samples = list(reader)
        with contextlib.suppress(KeyError), reader.writer(stream, generated={}) as writer:
            for sample in samples[:5]:
                writer.write_unchanged(sample)
            written = stream.getvalue()
            raise KeyError
    assert len(written) > 4
    assert stream.getvalue() == written
    stream.close()


class Full(io.RawIOBase):
    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        raise OSError(28, "No space left on device")


def test_an_error_of_the_target_comes_as_it_was() -> None:
    def copy() -> None:
        with (
            opened(parquet({"id": range(10)})) as reader,
            reader.writer(cast("BinaryIO", Full()), generated={}) as writer,
        ):
            for sample in reader:
                writer.write_unchanged(sample)

    with pytest.raises(OSError, match="No space left") as caught:
        copy()
    assert caught.value.errno == 28

from __future__ import annotations

import datetime
import io
import random
import tracemalloc
from collections.abc import Callable
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from airflow_vlm_provider.errors import ShardError
from airflow_vlm_provider.shards.formats import RowKeys, is_shard, shard_format, shard_stem
from tests.support.images import encode, quarters
from tests.support.parquet_shards import META, opened, parquet, samples_of

FILE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


class Disk(io.RawIOBase):
    """A seekable stream that notes what is read of it, and gives few bytes at a time where told to."""

    def __init__(self, data: bytes, at_most: int | None = None) -> None:
        self.source = io.BytesIO(data)
        self.at_most = at_most
        self.reads: list[tuple[int, int]] = []

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self.source.seek(offset, whence)

    def tell(self) -> int:
        return self.source.tell()

    def readinto(self, buffer: Any) -> int:
        start = self.source.tell()
        count = self.source.readinto(memoryview(buffer)[: self.at_most])
        self.reads.append((start, count))
        return count


def test_rows_are_python_values_by_column_in_order() -> None:
    when = datetime.datetime(2024, 5, 6, tzinfo=datetime.timezone.utc)
    rows = [
        {
            "text": "a",
            "images": ["x.jpg", "y.jpg"],
            "n": 1,
            "meta": {"a": 1, "b": None},
            "when": when,
            "none": None,
        },
        {"text": None, "images": None, "n": None, "meta": None, "when": None, "none": None},
    ]
    samples = samples_of(parquet(pa.Table.from_pylist(rows)))
    assert [sample.row for sample in samples] == rows
    assert [list(sample.row or {}) for sample in samples] == [list(rows[0])] * 2
    assert [(sample.index, sample.line) for sample in samples] == [(0, 1), (1, 2)]
    assert [dict(sample.embedded) for sample in samples] == [{}, {}]


def test_places_count_on_over_row_groups_and_batches() -> None:
    table = pa.table({"n": range(5000)})
    samples = samples_of(parquet(table, row_group_size=1500))
    assert [sample.index for sample in samples] == list(range(5000))
    assert [sample.row for sample in samples] == table.to_pylist()


@pytest.mark.parametrize(
    "table", [pa.table({"a": pa.array([], pa.int64())}), pa.table({"a": pa.array([], FILE)})]
)
@pytest.mark.parametrize("groups", [0, 1])
def test_a_shard_without_rows_has_none(table: pa.Table, groups: int) -> None:
    stream = io.BytesIO()
    with pq.ParquetWriter(stream, table.schema) as writer:
        for _ in range(groups):
            writer.write_table(table)
    assert samples_of(stream.getvalue()) == []


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary(3)])
def test_bytes_are_referred_to_by_column_and_place(kind: pa.DataType) -> None:
    shard = parquet(
        {
            "image": pa.array([b"abc", None], kind),
            "more": pa.array([[b"def", None, b"ghi"], None], pa.list_(kind)),
        }
    )
    first, second = samples_of(shard)
    assert first.row == {"image": "image/0", "more": ["more/0", None, "more/2"]}
    assert dict(first.embedded) == {"image/0": b"abc", "more/0": b"def", "more/2": b"ghi"}
    assert second.row == {"image": None, "more": None}
    assert dict(second.embedded) == {}


def test_a_struct_whose_bytes_have_no_type_holds_references_and_is_written_back() -> None:
    table = pa.table(
        {"image": pa.array([{"bytes": None, "path": "a.jpg"}, {"bytes": None, "path": "b.jpg"}])}
    )
    assert pa.types.is_null(table.schema.field("image").type.field("bytes").type)
    stream = io.BytesIO()
    pq.write_table(table, stream)
    with opened(stream.getvalue()) as reader:
        assert not reader.embeds_media
        copy = io.BytesIO()
        with reader.writer(copy, generated={"caption": {"type": "string"}}) as writer:
            for sample, name in zip(reader, ("a.jpg", "b.jpg"), strict=True):
                assert (sample.row["image"], dict(sample.embedded)) == (name, {})
                writer.write_unchanged(sample)
    assert pq.read_table(copy).column("image").to_pylist() == table.column("image").to_pylist()


def test_a_structs_path_is_the_reference() -> None:
    shard = parquet(
        {
            "image": pa.array(
                [
                    {"bytes": b"abc", "path": "a.jpg"},
                    {"bytes": b"def", "path": None},
                    {"bytes": b"", "path": ""},
                ],
                FILE,
            )
        }
    )
    samples = samples_of(shard)
    assert [sample.row for sample in samples] == [
        {"image": "a.jpg"},
        {"image": "image/0"},
        {"image": "image/0"},
    ]
    assert [dict(sample.embedded) for sample in samples] == [
        {"a.jpg": b"abc"},
        {"image/0": b"def"},
        {"image/0": b""},
    ]


def test_a_struct_without_bytes_refers_to_a_medium_outside() -> None:
    shard = parquet(
        {"image": pa.array([{"bytes": None, "path": "a.jpg"}, {"bytes": None, "path": None}, None], FILE)}
    )
    samples = samples_of(shard)
    assert [sample.row for sample in samples] == [{"image": "a.jpg"}, {"image": None}, {"image": None}]
    assert [dict(sample.embedded) for sample in samples] == [{}, {}, {}]


def test_references_of_one_sample_differ() -> None:
    images = [
        {"bytes": b"1", "path": "same.jpg"},
        {"bytes": b"2", "path": "same.jpg"},
        {"bytes": b"3", "path": "images/0"},
        {"bytes": b"4", "path": "own.jpg"},
        {"bytes": b"5", "path": "outside.jpg"},
        {"bytes": None, "path": "outside.jpg"},
    ]
    shard = parquet({"images": pa.array([images], pa.list_(FILE)), "images/0": pa.array([b"6"])})
    (sample,) = samples_of(shard)
    assert sample.row == {
        "images": ["images/0'", "images/1", "images/0", "own.jpg", "images/4", "outside.jpg"],
        "images/0": "images/0/0",
    }
    assert sample.embedded["images/0'"] == b"1"
    assert sorted(sample.embedded.values()) == [b"1", b"2", b"3", b"4", b"5", b"6"]


def test_lists_keep_their_shape() -> None:
    videos = [[[{"bytes": b"1", "path": None}], None, []], None]
    shard = parquet({"videos": pa.array(videos, pa.list_(pa.large_list(FILE)))})
    first, second = samples_of(shard)
    assert first.row == {"videos": [["videos/0"], None, []]}
    assert second.row == {"videos": None}


def test_a_struct_of_other_fields_is_no_medium() -> None:
    rows = [{"image": {"bytes": b"abc", "path": "a", "width": 1}, "other": {"bytes": 1, "path": "a"}}]
    (sample,) = samples_of(parquet(pa.Table.from_pylist(rows)))
    assert (sample.row, dict(sample.embedded)) == (rows[0], {})


def test_json_text_is_an_object_where_objects_are_wanted() -> None:
    texts = ['{"a": [1, null]}', None, " ", "[1]", "no JSON", "{" * 100_000]
    for kind in (pa.string(), pa.large_string()):
        shard = parquet({META: pa.array(texts, kind), "other": texts})
        rows = [sample.row or {} for sample in samples_of(shard)]
        assert [row[META] for row in rows] == [{"a": [1, None]}, None, None, *texts[3:]]
        assert [row["other"] for row in rows] == texts
        assert [(sample.row or {})[META] for sample in samples_of(shard, RowKeys())] == texts


def test_what_python_has_no_value_for_stays_arrows() -> None:
    no_text = pa.StringArray.from_buffers(
        2, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"\xffa")
    )
    year_20000 = pa.array([568_971_820_800_000, 0], pa.timestamp("ms"))
    first, second = samples_of(parquet({"text": no_text, "when": year_20000}))
    assert first.row is not None
    assert [type(value) for value in first.row.values()] == [pa.StringScalar, pa.TimestampScalar]
    assert second.row == {"text": "a", "when": datetime.datetime(1970, 1, 1)}


def test_media_are_copied_when_asked_for_and_count_for_the_samples_size() -> None:
    shard = parquet({"image": [b"x" * 1000, None], "text": ["a" * 10, "b" * 10]})
    first, second = samples_of(shard)
    assert 1000 <= first.size < 1500
    assert 10 <= second.size < 500
    assert "image/0" in first.embedded
    assert "image/1" not in first.embedded
    assert type(first.embedded["image/0"]) is bytes
    with pytest.raises(KeyError):
        first.embedded["image/1"]


PNG = encode(quarters(), "PNG")
MP4 = b"\0\0\0\x18ftypmp42" + b"\0" * 12


@pytest.mark.parametrize(
    ("column", "embeds"),
    [
        pytest.param(pa.array([None, {"bytes": b"?", "path": None}], FILE), True, id="files"),
        pytest.param(
            pa.array([[], [{"bytes": b"?", "path": None}]], pa.list_(FILE)), True, id="lists of files"
        ),
        pytest.param(pa.array([{"bytes": None, "path": "a.png"}] * 2, FILE), False, id="paths alone"),
        pytest.param(pa.array([None, PNG]), True, id="pictures"),
        pytest.param(pa.array([[None], [PNG]]), True, id="lists of pictures"),
        pytest.param(pa.array([MP4]), True, id="videos"),
        pytest.param(pa.array([b"\x01\x02hash"]), False, id="other bytes"),
        pytest.param(pa.array([None, None], pa.binary()), False, id="no bytes"),
        pytest.param(pa.array([], FILE), False, id="no rows"),
        pytest.param(pa.array(["a.png"]), False, id="strings"),
        pytest.param(pa.array([None] * 500 + [PNG]), True, id="pictures further down"),
    ],
)
def test_whether_a_shard_embeds_media_is_told_by_its_content(column: pa.Array, embeds: bool) -> None:
    with opened(parquet({"text": ["a"] * len(column), "media": column})) as reader:
        assert reader.embeds_media is embeds


# ---- What is read, and what is held.


def pictures(count: int, size: int, **options: Any) -> bytes:
    random.seed(count)
    files = [{"bytes": random.randbytes(size), "path": f"{index}.jpg"} for index in range(count)]
    texts = [random.randbytes(size // 100).hex() for _ in range(count)]
    table = pa.table({"id": range(count), "image": pa.array(files, FILE), "text": texts})
    return parquet(table, **options)


@pytest.mark.parametrize("rows_in_group", [480, 100])
def test_a_row_group_is_not_held_nor_read_piece_by_piece_nor_twice(rows_in_group: int) -> None:
    shard = pictures(480, 100_000, row_group_size=rows_in_group, write_batch_size=4)
    disk = Disk(shard)
    before = pa.total_allocated_bytes()
    peak = 0
    tracemalloc.start()
    try:
        with opened(cast("BinaryIO", disk)) as reader:
            for sample in reader:
                assert len(sample.embedded) == 1
                peak = max(peak, pa.total_allocated_bytes() - before)
        _, peak_of_python = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sample.index == 479
    assert peak < 10 * 2**20
    assert peak_of_python < 26 * 2**20 < len(shard) / 1.5
    assert sum(count for _, count in disk.reads) < 1.03 * len(shard)
    assert len(disk.reads) < 30
    assert max(count for _, count in disk.reads) <= 4 * 2**20


def test_many_columns_are_read_side_by_side_in_few_reads() -> None:
    random.seed(0)
    columns = {f"c{i}": pa.array([random.randbytes(500).hex() for _ in range(2000)]) for i in range(24)}
    shard = parquet(columns, use_dictionary=False, data_page_size=20_000, write_batch_size=10)
    disk = Disk(shard)
    assert len(samples_of(cast("BinaryIO", disk))) == 2000
    assert sum(count for _, count in disk.reads) < 1.5 * len(shard)
    assert len(disk.reads) < 24 * 5


def test_a_stream_that_gives_little_at_a_time_is_read_all_the_same() -> None:
    shard = pictures(50, 5000)
    slow = samples_of(cast("BinaryIO", Disk(shard, at_most=1000)))
    assert [dict(sample.embedded) for sample in slow] == [
        dict(sample.embedded) for sample in samples_of(shard)
    ]


def test_the_stream_stays_the_callers() -> None:
    stream = io.BytesIO(pictures(3, 10))
    with opened(stream) as reader:
        samples = iter(reader)
        next(samples)
        del samples
    del reader
    assert not stream.closed


# ---- Faults.


def damaged(shard: bytes) -> ShardError:
    with pytest.raises(ShardError, match="Write it again, or take it out") as caught:
        samples_of(shard)
    return caught.value


@pytest.mark.parametrize("data", [b"", b"PAR1", b'{"a": 1}\n', b"PAR1" + b"\0" * 100 + b"PAR1"])
def test_what_is_no_parquet_is_told(data: bytes) -> None:
    assert "no Parquet file" in str(damaged(data))


def test_a_file_cut_anywhere_is_an_error_and_never_a_shorter_shard() -> None:
    shard = pictures(60, 300, row_group_size=20)
    for length in range(0, len(shard), 61):
        with pytest.raises(ShardError):
            samples_of(shard[:length])


def test_a_damaged_page_is_an_error() -> None:
    shard = bytearray(pictures(60, 300, write_page_checksum=True))
    start = shard.index(random_bytes_of(bytes(shard)))
    shard[start + 100] ^= 1
    assert "CRC" in str(damaged(bytes(shard)))


def random_bytes_of(shard: bytes) -> bytes:
    return samples_of(shard)[30].embedded["30.jpg"]


def test_damage_anywhere_never_ends_the_process_nor_shortens_the_shard() -> None:
    shard = pictures(60, 30, row_group_size=20, write_page_checksum=True)
    chance = random.Random(7)
    told = 0
    for _ in range(400):
        broken = bytearray(shard)
        broken[chance.randrange(len(shard))] ^= 1 << chance.randrange(8)
        try:
            assert len(samples_of(bytes(broken))) == 60
        except ShardError:
            told += 1
    assert told > 100


def test_a_row_group_that_ends_early_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    batches: Callable[..., Any] = pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile, "iter_batches", lambda *args, **kwargs: iter(list(batches(*args, **kwargs))[:-1])
    )
    assert "lacks 76 rows" in str(damaged(parquet({"n": range(1100)})))


class GoneError(Exception):
    pass


@pytest.mark.parametrize(
    "error", [ConnectionResetError("reset"), OSError("gone"), ValueError("?"), GoneError()]
)
def test_the_streams_own_errors_come_as_they_were(error: Exception) -> None:
    class Breaking(Disk):
        broken = False

        def readinto(self, buffer: Any) -> int:
            if self.broken:
                raise error
            return super().readinto(buffer)

    disk = Breaking(pictures(480, 30_000, write_batch_size=4))
    with opened(cast("BinaryIO", disk)) as reader:
        samples = iter(reader)
        next(samples)
        disk.broken = True
        with pytest.raises(type(error)) as caught:
            list(samples)
    assert caught.value is error


def test_columns_of_one_name_are_refused() -> None:
    table = pa.table([pa.array([1]), pa.array([2])], names=["a", "a"])
    with pytest.raises(ShardError, match="several columns named 'a'"):
        samples_of(parquet(table))


def test_the_suffix_tells_the_format() -> None:
    assert shard_format("x/Y.PARQUET").seekable
    assert shard_stem("x/y.parquet") == "x/y"
    assert not is_shard("x.pq")

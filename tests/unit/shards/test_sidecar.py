from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from airflow_vlm_provider.errors import ConfigError
from airflow_vlm_provider.shards import sidecar
from airflow_vlm_provider.shards.sidecar import SidecarWriter, sidecar_name
from airflow_vlm_provider.types import Sample
from tests.support.parquet_shards import GENERATED, META, table_of, with_field

CAPTION = {"caption": {"type": "string"}}


def sample_of(index: int, row: dict[str, Any] | None = None, key: str | None = None) -> Sample:
    return Sample(index=index, line=index + 1, row={"text": "t"} if row is None else row, key=key)


@contextlib.contextmanager
def writing(stream: io.BytesIO, **generated: Any) -> Iterator[SidecarWriter]:
    with SidecarWriter(stream, generated=generated or CAPTION, shard="x/a.tar") as writer:
        yield writer


@pytest.mark.parametrize(
    ("shard", "name"),
    [
        ("x/a.tar.gz", "x/a.parquet"),
        ("a.jsonl", "a.parquet"),
        ("A.PARQUET", "A.parquet"),
        ("a.b.tar", "a.b.parquet"),
    ],
)
def test_a_sidecar_has_the_shards_stem(shard: str, name: str) -> None:
    assert sidecar_name(shard) == name


def test_lines_are_key_place_and_generated_fields_one_for_each_row_of_the_output() -> None:
    stream = io.BytesIO()
    with writing(stream) as writer:
        for index, count in enumerate([1, 0, 2]):
            sample = sample_of(index, key=f"k{index}")
            writer.write(sample, [with_field(sample, "caption", f"{index}.{i}") for i in range(count)])
        writer.write_unchanged(sample_of(3))
        writer.write_unchanged(Sample(index=4, line=5, row=None, error="broken"))
    table = table_of(stream.getvalue())
    assert table.to_pylist() == [
        {"key": "k0", "row": 0, "caption": "0.0"},
        {"key": "k2", "row": 2, "caption": "2.0"},
        {"key": "k2", "row": 2, "caption": "2.1"},
        {"key": None, "row": 3, "caption": None},
        {"key": None, "row": 4, "caption": None},
    ]
    assert [field.type for field in table.schema] == [pa.string(), pa.int64(), pa.string()]
    assert table.schema.metadata == {
        b"format": b"airflow_vlm_provider.sidecar",
        b"version": b"1",
        b"shard": b"x/a.tar",
    }


def test_of_objects_only_what_is_generated_is_kept() -> None:
    stream = io.BytesIO()
    with writing(stream, **GENERATED) as writer:
        first = sample_of(0, {META: {"width": 1}})
        writer.write(first, [with_field(first, META, {"width": 1, "image_tags": [["a"]]})])
        second = sample_of(1, {META: {"width": 1}})
        writer.write(second, [second.row or {}])
        third = sample_of(2, {})
        writer.write(third, [{}])
    assert [line[META] for line in table_of(stream.getvalue()).to_pylist()] == [
        {"image_tags": [["a"]]},
        {"image_tags": None},
        None,
    ]


@pytest.mark.parametrize(
    ("row", "error"),
    [({"caption": 1}, "str|bytes"), ({"text": "changed"}, "'text' changed"), ({"new": 1}, "'new' changed")],
)
def test_what_a_sidecar_cannot_hold_is_refused_and_nothing_of_the_sample_written(
    row: dict[str, Any], error: str
) -> None:
    stream = io.BytesIO()
    with writing(stream) as writer:
        sample = sample_of(0)
        with pytest.raises(TypeError, match=error):
            writer.write(sample, [with_field(sample, "caption", "c"), {**(sample.row or {}), **row}])
        writer.write_unchanged(sample)
    assert table_of(stream.getvalue()).to_pylist() == [{"key": None, "row": 0, "caption": None}]


@pytest.mark.parametrize("name", ["key", "row"])
def test_a_generated_field_may_not_be_called_like_a_sidecars_own(name: str) -> None:
    with pytest.raises(ConfigError, match=f"column '{name}' of its own"):
        SidecarWriter(io.BytesIO(), generated={name: {"type": "string"}}, shard="a.tar")


def test_many_lines_are_several_row_groups_and_the_same_bytes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sidecar, "ROW_GROUP_ROWS", 3000)

    def written() -> bytes:
        stream = io.BytesIO()
        with writing(stream) as writer:
            for index in range(10_000):
                sample = sample_of(index)
                writer.write(sample, [with_field(sample, "caption", str(index))])
        return stream.getvalue()

    data = written()
    about = pq.read_metadata(io.BytesIO(data))
    assert [about.row_group(i).num_rows for i in range(about.num_row_groups)] == [3000, 3000, 3000, 1000]
    assert table_of(data).column("caption").to_pylist() == [str(index) for index in range(10_000)]
    assert written() == data


def test_memory_is_bounded_by_the_bytes_of_a_row_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sidecar, "ROW_GROUP_BYTES", 100_000)
    stream = io.BytesIO()
    with writing(stream) as writer:
        for index in range(100):
            writer.write(sample_of(index), [with_field(sample_of(index), "caption", str(index) * 10_000)])
    assert pq.read_metadata(io.BytesIO(stream.getvalue())).num_row_groups > 5


def test_pandas_and_datasets_read_it(tmp_path: Any) -> None:
    stream = io.BytesIO()
    with writing(stream, **GENERATED, **CAPTION) as writer:
        sample = sample_of(0, key="k")
        writer.write(sample, [{**(sample.row or {}), META: {"image_tags": [["a"], []]}, "caption": "c"}])
        writer.write_unchanged(sample_of(1))
    path = tmp_path / "a.parquet"
    path.write_bytes(stream.getvalue())
    assert pd.read_parquet(path)["row"].tolist() == [0, 1]
    read = datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))
    assert list(read) == [
        {"key": "k", "row": 0, META: {"image_tags": [["a"], []]}, "caption": "c"},
        {"key": None, "row": 1, META: None, "caption": None},
    ]


def test_an_empty_sidecar_has_its_columns() -> None:
    stream = io.BytesIO()
    with writing(stream):
        pass
    assert table_of(stream.getvalue()).schema.names == ["key", "row", "caption"]

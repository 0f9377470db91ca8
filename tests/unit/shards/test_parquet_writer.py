"""What a step changes in a Parquet shard: new and changed columns have fit types, and all else stays."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from airflow_vlm_provider.errors import ConfigError
from airflow_vlm_provider.types import Row, Sample
from tests.support.parquet_rewriting import CAPTION, metadata_of, tagged
from tests.support.parquet_shards import (
    GENERATED,
    META,
    opened,
    parquet,
    rewritten,
    samples_of,
    table_of,
    with_field,
)

FILE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
EVERY = {
    "s": {"type": "string"},
    "i": {"type": "integer"},
    "n": {"type": "number"},
    "b": {"type": ["boolean", "null"]},
    "a": {"type": "array", "items": {"type": "array", "items": {"type": "string"}}},
    "o": {
        "type": "object",
        "properties": {"x": {"type": "integer"}, "y": {"type": "array", "items": {"type": "number"}}},
    },
}


def test_new_columns_have_the_types_of_their_schemas_and_may_be_null() -> None:
    values = {"s": "é", "i": 2**62, "n": 0.5, "b": True, "a": [["x"], []], "o": {"x": 1, "y": [1.0]}}
    again = rewritten(
        parquet({"id": [0, 1, 2]}),
        EVERY,
        lambda sample: [None, [{**(sample.row or {}), **values}], [{**(sample.row or {}), "s": "t"}]][
            sample.index
        ],
    )
    table = table_of(again)
    assert {field.name: field.type for field in table.schema} == {
        "id": pa.int64(),
        "s": pa.string(),
        "i": pa.int64(),
        "n": pa.float64(),
        "b": pa.bool_(),
        "a": pa.list_(pa.list_(pa.string())),
        "o": pa.struct([("x", pa.int64()), ("y", pa.list_(pa.float64()))]),
    }
    nulls = dict.fromkeys(EVERY)
    assert table.to_pylist() == [{"id": 0, **nulls}, {"id": 1, **values}, {"id": 2, **nulls, "s": "t"}]
    assert pd.read_parquet(io.BytesIO(again))["s"].tolist()[1:] == ["é", "t"]


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {"type": "object"},
        {"type": "array"},
        {"type": ["string", "integer"]},
        {"type": "object", "properties": {"a": {}}},
    ],
)
def test_a_generated_field_without_a_type_is_the_authors_fault(schema: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="has no column type; make it a string"):
        rewritten(parquet({"id": [0]}), {"new": schema})


def test_an_existing_struct_is_extended_and_keeps_its_other_fields() -> None:
    field = pa.field("n", pa.int8(), nullable=False, metadata={"unit": "m"})
    kind = pa.struct([field, pa.field("s", pa.struct([("deep", pa.int8())]))])
    values = [{"n": 1, "s": {"deep": 1}}, None, {"n": 3, "s": None}]
    shard = parquet(pa.table({META: pa.array(values, kind)}))
    generated = {
        META: {
            "type": "object",
            "properties": {
                "s": {"type": "object", "properties": {"new": {"type": "string"}}},
                "t": {"type": "string"},
            },
        }
    }

    def change(sample: Sample) -> Sequence[Row] | None:
        meta = (sample.row or {})[META]
        return (
            [with_field(sample, META, {**meta, "s": {"deep": 1, "new": "x"}})] if sample.index == 0 else None
        )

    table = table_of(rewritten(shard, generated, change))
    extended = table.schema.field(META).type
    assert [each.name for each in extended] == ["n", "s", "t"]
    assert extended.field("n").equals(field, check_metadata=True)
    assert table.to_pylist() == [
        {META: {"n": 1, "s": {"deep": 1, "new": "x"}, "t": None}},
        {META: None},
        {META: {"n": 3, "s": None, "t": None}},
    ]


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (pa.null(), [None, None]),
        (pa.struct([("image_tags", pa.null())]), [{"image_tags": None}, None]),
        (pa.struct([("image_tags", pa.list_(pa.null()))]), [{"image_tags": []}, {"image_tags": None}]),
        (pa.struct([("image_tags", pa.list_(pa.list_(pa.null())))]), [{"image_tags": [[]]}, None]),
        (pa.struct([("image_tags", pa.list_(pa.list_(pa.string())))]), [{"image_tags": [["old"]]}, None]),
        (
            pa.struct([("image_tags", pa.large_list(pa.list_(pa.large_string())))]),
            [{"image_tags": [["old"]]}, None],
        ),
        (
            pa.struct([("image_tags", pa.list_(pa.list_(pa.dictionary(pa.int32(), pa.string()))))]),
            [None, None],
        ),
    ],
)
def test_what_is_null_or_empty_becomes_the_generated_type_and_like_types_stay(
    kind: pa.DataType, values: list[Any]
) -> None:
    shard = parquet({META: pa.array(values, kind)})
    was = table_of(shard).schema.field(META).type
    table = table_of(rewritten(shard, GENERATED, lambda sample: tagged(sample) if sample.index else None))
    assert table.to_pylist()[1] == {META: {"image_tags": [["a", "b"], []]}}
    kept = table.to_pylist()[0][META]
    assert kept == values[0]
    if "null" not in str(was):
        assert table.schema.field(META).type == was
    else:
        assert table.schema.field(META).type == pa.struct([("image_tags", pa.list_(pa.list_(pa.string())))])


@pytest.mark.parametrize(
    ("column", "generated"),
    [
        ([1], {"type": "string"}),
        (["a"], {"type": "integer"}),
        ([1], {"type": "number"}),
        ([1], {"type": "boolean"}),
        ([b"a"], {"type": "string"}),
        (["a"], {"type": "array", "items": {"type": "string"}}),
        ([[1]], {"type": "array", "items": {"type": "string"}}),
        ([{"x": "a"}], {"type": "object", "properties": {"x": {"type": "integer"}}}),
        (
            [[{"x": "a"}]],
            {"type": "array", "items": {"type": "object", "properties": {"y": {"type": "string"}}}},
        ),
        ([1], {"type": "object", "properties": {"x": {"type": "integer"}}}),
    ],
)
def test_a_generated_field_that_does_not_fit_into_its_column_is_refused_before_anything_is_read(
    column: list[Any], generated: dict[str, Any]
) -> None:
    shard = parquet({"x": column})
    kind = table_of(shard).schema.field("x").type
    with opened(shard) as reader, pytest.raises(ConfigError) as caught:
        reader.writer(io.BytesIO(), generated={"x": generated})
    assert f"'x' of the shard has the type {kind}, which can't take the generated values of type " in str(
        caught.value
    )


@pytest.mark.parametrize(
    ("kind", "generated", "value"),
    [
        (pa.int16(), "integer", 7),
        (pa.uint64(), "integer", 2**63),
        (pa.float32(), "integer", 7),
        (pa.float32(), "number", 0.5),
        (pa.large_string(), "string", "é"),
        (pa.dictionary(pa.int32(), pa.string()), "string", "new"),
        (pa.bool_(), "boolean", True),
    ],
)
def test_an_existing_column_of_a_like_type_keeps_it(kind: pa.DataType, generated: str, value: Any) -> None:
    shard = parquet({"x": pa.array([None, None], kind)})
    table = table_of(
        rewritten(shard, {"x": {"type": generated}}, lambda sample: [{"x": value}] if sample.index else None)
    )
    assert table.schema.field("x").type == kind
    assert table.to_pylist() == [{"x": None}, {"x": value}]


def test_meta_data_in_json_text_stay_json_text() -> None:
    texts = ['{ "a":1.50 }', None, '{"b": "é"}']
    shard = parquet({META: texts})
    table = table_of(
        rewritten(shard, GENERATED, lambda sample: None if sample.index == 0 else tagged(sample))
    )
    first, second, third = table.column(META).to_pylist()
    assert first == texts[0]
    assert json.loads(second) == {"image_tags": [["a", "b"], []]}
    assert third == '{"b": "é", "image_tags": [["a", "b"], []]}'
    captioned = rewritten(shard, CAPTION, lambda sample: [with_field(sample, "caption", "c")])
    assert table_of(captioned).column(META).to_pylist() == texts


def test_rows_are_dropped_and_multiplied_in_place() -> None:
    shard = parquet({"id": range(6), "image": [b"x%d" % i for i in range(6)]}, row_group_size=4)
    again = rewritten(
        shard,
        CAPTION,
        lambda sample: [with_field(sample, "caption", str(i)) for i in range(sample.index % 3)],
    )
    table = table_of(again)
    assert table.to_pylist() == [
        {"id": index, "image": b"x%d" % index, "caption": caption}
        for index, caption in [(1, "0"), (2, "0"), (2, "1"), (4, "0"), (5, "0"), (5, "1")]
    ]
    assert [metadata_of(again).row_group(i).num_rows for i in range(2)] == [3, 3]
    assert table_of(rewritten(shard, CAPTION, lambda sample: [])).num_rows == 0


def test_changed_and_unchanged_values_of_one_column_keep_their_order() -> None:
    shard = parquet({"text": ["a", "b", "c"]})
    again = rewritten(shard, {}, lambda sample: [sample.row or {}, {"text": f"{sample.index}"}])
    assert table_of(again).column("text").to_pylist() == ["a", "0", "b", "1", "c", "2"]


def test_a_dictionarys_column_takes_new_values_among_many_batches() -> None:
    values = [f"v{index % 24}" for index in range(5000)]
    shard = parquet({"tag": pa.array(values).dictionary_encode()})
    again = rewritten(
        shard,
        {"tag": {"type": "string"}},
        lambda sample: None if sample.index % 7 else [with_field(sample, "tag", f"new {sample.index}")],
    )
    column = table_of(again).column("tag")
    assert pa.types.is_dictionary(column.type)
    assert column.to_pylist() == [
        value if index % 7 else f"new {index}" for index, value in enumerate(values)
    ]


def test_what_a_row_shares_with_the_sample_is_written_as_it_stood() -> None:
    nan = np.frombuffer(b"\x01\0\0\0\0\0\xf8\x7f", np.float64)
    no_text = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff"))
    year_20000 = pa.array([568_971_820_800_000], pa.timestamp("ms"))
    table = pa.table({"nan": pa.array(nan), "text": no_text, "when": year_20000, "image": [b"\0" * 50]})
    after = table_of(rewritten(parquet(table), CAPTION, lambda sample: [with_field(sample, "caption", "c")]))
    assert after.column("caption").to_pylist() == ["c"]
    assert after.column("nan").to_numpy().tobytes() == nan.tobytes()
    assert after.drop_columns(["caption", "nan"]).equals(table.drop_columns(["nan"]))


def test_changed_columns_keep_their_types_and_missing_ones_are_null() -> None:
    table = pa.table({"f": pa.array([1.5], pa.float32()), "s": ["a"], "n": pa.array([1], pa.int8())})
    after = table_of(rewritten(parquet(table), {}, lambda sample: [{"f": 2, "s": "b"}]))
    assert after.schema == table.schema
    assert after.to_pylist() == [{"f": 2.0, "s": "b", "n": None}]


def test_references_that_a_step_puts_together_anew_are_media_again() -> None:
    files = [{"bytes": b"1", "path": "a"}, {"bytes": b"2", "path": None}, {"bytes": None, "path": "c"}, None]
    table = pa.table({"images": pa.array([files], pa.list_(FILE)), "raw": pa.array([[b"3", b"4"]])})

    def reverse(sample: Sample) -> Sequence[Row]:
        row = sample.row or {}
        return [{name: list(reversed(row[name])) for name in row}]

    (row,) = table_of(rewritten(parquet(table), {}, reverse)).to_pylist()
    assert row == {"images": files[::-1], "raw": [b"4", b"3"]}
    with pytest.raises(ValueError, match="'raw/9' names no medium of this sample"):
        rewritten(parquet(table), {}, lambda sample: [with_field(sample, "raw", ["raw/9"])])


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("caption", 1, TypeError),
        ("caption", "\ud800", ValueError),
        ("n", 1.5, ValueError),
        ("n", 2**70, ValueError),
        ("n", "1", ValueError),
        ("must", None, ValueError),
        (META, {"image_tags": [["a"]], "other": 1}, TypeError),
        (META, {"image_tags": ["ab"]}, TypeError),
        (META, {"image_tags": [[1]]}, TypeError),
        ("unknown", 1, TypeError),
    ],
)
def test_a_sample_that_does_not_fit_is_refused_whole_and_nothing_of_it_written(
    field: str, value: Any, error: type[Exception]
) -> None:
    must = pa.field("must", pa.int8(), nullable=False)
    table = pa.table(
        [pa.array([1, 2], pa.int8()), pa.array([1, 2])], schema=pa.schema([must, ("n", pa.int64())])
    )
    stream = io.BytesIO()
    with (
        opened(parquet(table)) as reader,
        reader.writer(stream, generated={**GENERATED, **CAPTION}) as writer,
    ):
        first, second = list(reader)
        writer.write(first, [with_field(first, "caption", "fits")])
        with pytest.raises(error):
            writer.write(second, [with_field(second, "caption", "fits"), with_field(second, field, value)])
        writer.write_unchanged(second)
    after = table_of(stream.getvalue())
    assert after.column("caption").to_pylist() == ["fits", None]
    assert after.column("must").to_pylist() == [1, 2]


def test_a_shard_without_rows_gets_its_columns() -> None:
    again = rewritten(parquet({"id": pa.array([], pa.int8())}), GENERATED)
    assert table_of(again).num_rows == 0
    assert table_of(again).schema.names == ["id", META]
    assert samples_of(again) == []


def test_nan_is_a_number_and_no_whole_one() -> None:
    shard = parquet({"id": [1]})
    after = rewritten(shard, {"x": {"type": "number"}}, lambda sample: [with_field(sample, "x", math.nan)])
    assert math.isnan(table_of(after).column("x").to_pylist()[0])
    with pytest.raises(ValueError, match="whole numbers"):
        rewritten(shard, {"x": {"type": "integer"}}, lambda sample: [with_field(sample, "x", math.nan)])

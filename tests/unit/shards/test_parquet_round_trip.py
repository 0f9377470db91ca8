"""A shard of any schema that nothing is done to comes out as the same table."""

from __future__ import annotations

import datetime
import decimal
import io
import string
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.parquet_shards import parquet, rewritten, table_of

# A busy machine is no failure.
untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])

Kind = tuple[pa.DataType, st.SearchStrategy[Any]]

names = st.text(string.ascii_letters + ". é", min_size=1, max_size=4)
dates = st.dates(datetime.date(1700, 1, 1), datetime.date(2200, 1, 1))
times = st.datetimes(datetime.datetime(1700, 1, 1), datetime.datetime(2200, 1, 1))


def integers(kind: pa.DataType, *, signed: bool) -> Kind:
    bits = kind.bit_width - signed
    return kind, st.integers(-(2**bits) if signed else 0, 2**bits - 1)


def decimals(kind: pa.DataType) -> Kind:
    scale = decimal.Decimal(1).scaleb(-kind.scale)
    whole = st.integers(-(10**kind.precision) + 1, 10**kind.precision - 1)
    context = decimal.Context(prec=80)
    return kind, whole.map(lambda number: context.multiply(decimal.Decimal(number), scale))


def aware(zone: datetime.timezone) -> st.SearchStrategy[Any]:
    return times.map(lambda time: time.replace(tzinfo=zone))


SIMPLE: list[Kind] = [
    (pa.null(), st.none()),
    (pa.bool_(), st.booleans()),
    *(integers(kind, signed=True) for kind in (pa.int8(), pa.int16(), pa.int32(), pa.int64())),
    *(integers(kind, signed=False) for kind in (pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64())),
    (pa.float32(), st.floats(width=32)),
    (pa.float64(), st.floats()),
    *(decimals(kind) for kind in (pa.decimal128(5, 2), pa.decimal128(38, 10), pa.decimal256(60, 7))),
    (pa.string(), st.text(max_size=5)),
    (pa.large_string(), st.text(max_size=5)),
    (pa.binary(), st.binary(max_size=5)),
    (pa.large_binary(), st.binary(max_size=5)),
    (pa.binary(3), st.binary(min_size=3, max_size=3)),
    (pa.date32(), dates),
    (pa.date64(), dates),
    (pa.time32("ms"), st.integers(0, 86_399_999)),
    (pa.time64("ns"), st.integers(0, 86_399_999_999_999)),
    (pa.duration("us"), st.timedeltas(datetime.timedelta(-9999), datetime.timedelta(9999))),
    *((pa.timestamp(unit), times) for unit in ("s", "ms", "us", "ns")),
    (pa.timestamp("us", "UTC"), aware(datetime.timezone.utc)),
    (pa.timestamp("ns", "+07:30"), aware(datetime.timezone(datetime.timedelta(hours=7, minutes=30)))),
    # Far out of what Python's datetime can be.
    (pa.timestamp("ms"), st.integers(-(2**60), 2**60)),
    (pa.dictionary(pa.int32(), pa.string()), st.sampled_from(["a", "b", "é"])),
]


def nested(inner: st.SearchStrategy[Kind]) -> st.SearchStrategy[Kind]:
    return st.one_of(
        inner.map(lambda kind: (pa.list_(kind[0]), st.lists(optional(kind), max_size=3))),
        inner.map(lambda kind: (pa.large_list(kind[0]), st.lists(optional(kind), max_size=3))),
        inner.map(lambda kind: (pa.list_(kind[0], 2), st.lists(optional(kind), min_size=2, max_size=2))),
        st.dictionaries(names, inner, min_size=1, max_size=3).map(struct),
        inner.map(
            lambda kind: (
                pa.map_(pa.string(), kind[0]),
                st.lists(st.tuples(st.text(max_size=3), optional(kind)), max_size=3),
            )
        ),
        inner.map(
            lambda kind: (
                pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
                st.fixed_dictionaries(
                    {
                        "bytes": st.none() | st.binary(max_size=5),
                        "path": st.none() | st.text(max_size=2),
                    }
                ),
            )
        ),
    )


def struct(kinds: dict[str, Kind]) -> Kind:
    values = {name: optional(kind) for name, kind in kinds.items()}
    return pa.struct([(name, kind[0]) for name, kind in kinds.items()]), st.fixed_dictionaries(values)


def optional(kind: Kind) -> st.SearchStrategy[Any]:
    return st.none() | kind[1]


kinds = st.recursive(st.sampled_from(SIMPLE), nested, max_leaves=4)
metadata = st.none() | st.dictionaries(
    st.text(string.ascii_letters, min_size=1), st.text(max_size=5), max_size=2
)


@st.composite
def tables(draw: st.DrawFn) -> pa.Table:
    columns = draw(st.dictionaries(names, kinds, min_size=1, max_size=5))
    rows = draw(st.integers(0, 6))
    fields, arrays = [], []
    for name, kind in columns.items():
        nullable = kind[0] == pa.null() or draw(st.booleans())
        values = optional(kind) if nullable else kind[1]
        fields.append(pa.field(name, kind[0], nullable=nullable, metadata=draw(metadata)))
        arrays.append(pa.array(draw(st.lists(values, min_size=rows, max_size=rows)), type=kind[0]))
    return pa.table(arrays, schema=pa.schema(fields, metadata=draw(metadata)))


def exactly(table: pa.Table) -> bytes:
    """The table's content: unlike a comparison, its bytes as a file tell 0.0 from -0.0, and find NaN equal to NaN."""
    decoded = [
        pa.chunked_array([chunk.dictionary_decode() for chunk in column.chunks], column.type.value_type)
        if pa.types.is_dictionary(column.type)
        else column
        for column in table.combine_chunks().columns
    ]
    return parquet(pa.table(decoded, names=table.column_names))


@untimed
@given(table=tables(), rows_in_group=st.integers(1, 7))
def test_an_unchanged_shard_of_any_schema_is_the_same_table(table: pa.Table, rows_in_group: int) -> None:
    shard = parquet(table, row_group_size=rows_in_group)
    again = rewritten(shard)
    before, after = table_of(shard), table_of(again)
    assert after.schema.equals(before.schema, check_metadata=True)
    assert str(after.schema) == str(before.schema)
    assert exactly(after) == exactly(before)
    assert rewritten(shard) == again
    # A row that shares all of its values with the sample is no other.
    assert rewritten(shard, {}, lambda sample: [dict(sample.row or {})]) == again
    groups = [pq.read_metadata(io.BytesIO(data)) for data in (shard, again)]
    assert [groups[1].row_group(i).num_rows for i in range(groups[1].num_row_groups)] == [
        groups[0].row_group(i).num_rows for i in range(groups[0].num_row_groups) if table.num_rows
    ]

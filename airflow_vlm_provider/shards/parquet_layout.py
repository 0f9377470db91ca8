"""How columns lie in a Parquet file: compression and encodings, taken from one file to write another like it.

Parquet knows only leaves: a struct, a list or a map is the columns of what it holds.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from airflow_vlm_provider.shards.arrow_types import is_list

if TYPE_CHECKING:
    import pyarrow as pa

# By the names that a file's metadata have for them. LZO can only be read.
_CODECS = {
    "UNCOMPRESSED": "none",
    "SNAPPY": "snappy",
    "GZIP": "gzip",
    "BROTLI": "brotli",
    "ZSTD": "zstd",
    "LZ4": "lz4",
    "LZ4_RAW": "lz4",
}
_DEFAULT_CODEC = "snappy"
# Spark's timestamps, which it wants back like that.
_INT96 = "INT96"


@dataclass(frozen=True)
class ColumnLayout:
    """A column's leaves, each with its codec, whether it has a dictionary, whether it is INT96, and whether all of its
    values are known to be null."""

    codecs: tuple[str, ...] = ()
    dictionaries: tuple[bool, ...] = ()
    int96_leaves: tuple[bool, ...] = ()
    null_leaves: tuple[bool, ...] = ()


def column_layouts(metadata: pa.FileMetaData, schema: pa.Schema) -> dict[str, ColumnLayout]:
    """Return how the columns lie in a file's first row group; nothing where it has none."""
    leaves = [leaf_count(field.type) for field in schema]
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    if not groups or sum(leaves) != metadata.num_columns:
        return {}
    layouts, start = {}, 0
    for field, number in zip(schema, leaves, strict=True):
        chunks = [groups[0].column(i) for i in range(start, start + number)]
        layouts[field.name] = ColumnLayout(
            codecs=tuple(_CODECS.get(chunk.compression, _DEFAULT_CODEC) for chunk in chunks),
            dictionaries=tuple(bool(chunk.has_dictionary_page) for chunk in chunks),
            int96_leaves=tuple(chunk.physical_type == _INT96 for chunk in chunks),
            null_leaves=tuple(
                all(_is_null(group.column(i)) for group in groups) for i in range(start, start + number)
            ),
        )
        start += number
    return layouts


def writer_options(layouts: Mapping[str, ColumnLayout], schema: pa.Schema) -> dict[str, Any]:
    """Return the options for a file of the schema whose columns lie as they did; new ones as most others do."""
    if not layouts:
        return {"compression": _DEFAULT_CODEC}
    all_codecs = [codec for layout in layouts.values() for codec in layout.codecs]
    codec = max(sorted(set(all_codecs)), key=all_codecs.count)
    paths = iter(_leaf_paths(schema))
    codecs: dict[str, str] = {}
    dictionaries: list[str] = []
    for field in schema:
        layout = layouts.get(field.name, ColumnLayout())
        for leaf in range(leaf_count(field.type)):
            path = next(paths)
            # Fields that were added to a struct stand at its end, but that may be amid the leaves.
            known = leaf < len(layout.codecs)
            codecs[path] = layout.codecs[leaf] if known else codec
            if not known or layout.dictionaries[leaf]:
                dictionaries.append(path)
    return {
        "compression": codecs,
        "use_dictionary": dictionaries or False,
        "use_deprecated_int96_timestamps": any(any(layout.int96_leaves) for layout in layouts.values()),
    }


def leaf_count(kind: pa.DataType) -> int:
    """How many columns Parquet makes of one of a type."""
    import pyarrow as pa

    if isinstance(kind, pa.BaseExtensionType):
        return leaf_count(kind.storage_type)
    if pa.types.is_struct(kind):
        return sum(leaf_count(field.type) for field in kind)
    if pa.types.is_map(kind):
        return leaf_count(kind.key_type) + leaf_count(kind.item_type)
    return leaf_count(kind.value_type) if is_list(kind) else 1


def _leaf_paths(schema: pa.Schema) -> list[str]:
    """What the leaves are called in a file of the schema, in order."""
    import pyarrow.parquet as pq

    empty = io.BytesIO()
    pq.ParquetWriter(empty, schema).close()
    leaves = pq.ParquetFile(empty).schema
    return [leaves.column(i).path for i in range(len(leaves.names))]


def _is_null(chunk: pa.ColumnChunkMetaData) -> bool:
    """Whether a chunk says that it has no value."""
    statistics = chunk.statistics
    return bool(
        statistics is not None and statistics.has_null_count and statistics.null_count == chunk.num_values
    )

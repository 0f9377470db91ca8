"""How columns lie in a Parquet file: compression and encodings, taken from one file to write another like it.

Parquet knows only leaves: a struct, a list or a map is the columns of what it holds.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from itertools import islice
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
class _Leaf:
    codec: str
    dictionary: bool


def writer_options(about: pa.FileMetaData, schema: pa.Schema, extended: pa.Schema) -> dict[str, Any]:
    """
    Return the options for a file in which columns lie as in the first row group of another; new ones as most others.

    That row group has to have been read: of damaged metadata, pyarrow's reader raises an error, but asking for it
    here ends the process.

    :param about: The other file's metadata.
    :param schema: The other file's schema.
    :param extended: The schema of the file to be written.
    """
    numbers = [leaf_count(field.type) for field in schema]
    if not about.num_row_groups or sum(numbers) != about.num_columns:
        return {"compression": _DEFAULT_CODEC}
    chunks = [about.row_group(0).column(i) for i in range(about.num_columns)]
    leaves = [
        _Leaf(_CODECS.get(each.compression, _DEFAULT_CODEC), each.has_dictionary_page) for each in chunks
    ]
    all_codecs = [leaf.codec for leaf in leaves]
    new = _Leaf(max(sorted(set(all_codecs)), key=all_codecs.count), True)
    rest = iter(leaves)
    of_columns = {
        field.name: list(islice(rest, number)) for field, number in zip(schema, numbers, strict=True)
    }
    written: list[_Leaf] = []
    for field in extended:
        known = of_columns.get(field.name, [])
        written += [*known, *[new] * (leaf_count(field.type) - len(known))]
    paths = _leaf_paths(extended)
    return {
        "compression": {path: leaf.codec for path, leaf in zip(paths, written, strict=True)},
        "use_dictionary": [path for path, leaf in zip(paths, written, strict=True) if leaf.dictionary]
        or False,
        "use_deprecated_int96_timestamps": any(each.physical_type == _INT96 for each in chunks),
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

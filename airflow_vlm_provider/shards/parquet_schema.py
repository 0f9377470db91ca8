"""The schema of a shard that is written again: the source's with what is generated, metadata included.

Other tools keep notes of their own about the columns there. Hugging Face's are extended, or left out where that can't
be done soundly; Spark's would hide the new columns, and are left out. All others stay as they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from airflow_vlm_provider.shards.arrow_types import arrow_type, merged_field

if TYPE_CHECKING:
    import pyarrow as pa

HUGGING_FACE = b"huggingface"
SPARK = b"org.apache.spark.sql.parquet.row.metadata"
# What a sidecar's schema says that it is.
SIDECAR_FORMAT = "airflow_vlm_provider.sidecar"
# Of the file and not of its schema: the schema itself, and how the writer cut its pages.
OF_THE_WRITER = frozenset({b"ARROW:schema", b"content_defined_chunking"})


def extended_schema(schema: pa.Schema, generated: Mapping[str, Any]) -> pa.Schema:
    """
    Return the schema with the generated fields, each given by the JSON schema of its values.

    :raises ConfigError: A field has no column type, or does not fit into the column of its name.
    """
    import pyarrow as pa

    fields = {field.name: field for field in schema}
    for name, values in generated.items():
        fields[name] = (
            merged_field(fields[name], values) if name in fields else pa.field(name, arrow_type(values))
        )
    extended = pa.schema(list(fields.values()))
    metadata = dict(schema.metadata or {})
    if not extended.equals(schema):
        metadata.pop(SPARK, None)
        if HUGGING_FACE in metadata:
            features = _extended_features(metadata.pop(HUGGING_FACE), schema, extended)
            metadata |= {} if features is None else {HUGGING_FACE: features}
    return extended.with_metadata(metadata or None)


def file_metadata(metadata: Mapping[bytes, bytes], schema: pa.Schema) -> dict[bytes, bytes]:
    """Return the entries of a file's metadata that are not in its schema's, and belong to the rows all the same."""
    return {
        key: value
        for key, value in metadata.items()
        if key not in OF_THE_WRITER and key not in (schema.metadata or {})
    }


def sidecar_metadata(shard: str) -> dict[str, str]:
    """Return what the schema of a shard's sidecar says of itself."""
    return {"format": SIDECAR_FORMAT, "version": "1", "shard": shard}


def sidecar_of(schema: pa.Schema) -> str | None:
    """Return the name of the shard that a file is the sidecar of; None when it is none."""
    metadata = schema.metadata or {}
    if metadata.get(b"format") != SIDECAR_FORMAT.encode():
        return None
    return bytes(metadata.get(b"shard", b"")).decode(errors="replace")


def _extended_features(text: bytes, before: pa.Schema, after: pa.Schema) -> bytes | None:
    """Hugging Face's features with the new fields; None when they are not as expected."""
    try:
        notes = json.loads(text)
        features = notes["info"]["features"]
        if features is None:
            return text
        for field in after:
            if before.get_field_index(field.name) < 0:
                features[field.name] = _feature(field.type)
            elif field.name in features:
                was = before.field(field.name).type
                features[field.name] = _extended_feature(features[field.name], was, field.type)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return json.dumps(notes).encode()


def _extended_feature(feature: Any, before: pa.DataType, after: pa.DataType) -> Any:
    """
    Return the feature for a column's type as it is now.

    :raises ValueError: It is not known how.
    """
    import pyarrow as pa

    if before == after:
        return feature
    if pa.types.is_null(before):
        return _feature(after)
    if (
        not pa.types.is_struct(before)
        or not isinstance(feature, dict)
        or isinstance(feature.get("_type"), str)
    ):
        raise ValueError(f"{feature} is not the feature of a struct.")
    known = {field.name: field.type for field in before}
    return {
        field.name: _extended_feature(feature[field.name], known[field.name], field.type)
        if field.name in known
        else _feature(field.type)
        for field in after
    }


def _feature(kind: pa.DataType) -> Any:
    """The feature of a generated type. Lists are written as lists, which every version of datasets reads."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return {field.name: _feature(field.type) for field in kind}
    if pa.types.is_list(kind):
        return [_feature(kind.value_type)]
    names = {pa.string(): "string", pa.int64(): "int64", pa.float64(): "float64", pa.bool_(): "bool"}
    return {"dtype": names[kind], "_type": "Value"}

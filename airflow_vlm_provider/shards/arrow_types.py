"""Generated values in Arrow's types: which type a JSON schema asks for, and values and columns brought into a type.

Arrow converts generously: 1.5 to the integer 1, a string to a list of its letters, and a struct's unknown fields to
nothing. Nothing of a step's answer may be lost that way, so values are checked before Arrow sees them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from airflow_vlm_provider.errors import ConfigError

if TYPE_CHECKING:
    import pyarrow as pa


def arrow_type(schema: Mapping[str, Any]) -> pa.DataType:
    """
    Return the type for values of a JSON schema: ``string``, ``integer`` (int64), ``number`` (double), ``boolean``,
    ``array`` with ``items`` (list) and ``object`` with ``properties`` (struct).

    :raises ConfigError: The schema is none of these.
    """
    import pyarrow as pa

    kinds = schema.get("type")
    kinds = [kind for kind in kinds if kind != "null"] if isinstance(kinds, list | tuple) else [kinds]
    kind = kinds[0] if len(kinds) == 1 else None
    simple = {"string": pa.string, "integer": pa.int64, "number": pa.float64, "boolean": pa.bool_}
    if kind in simple:
        return simple[kind]()
    if kind == "array" and isinstance(schema.get("items"), Mapping):
        return pa.list_(arrow_type(schema["items"]))
    if kind == "object" and schema.get("properties"):
        return pa.struct([(name, arrow_type(each)) for name, each in schema["properties"].items()])
    raise ConfigError(
        f"A generated field with the JSON schema {json.dumps(schema, default=repr)} has no column type; make it a "
        "string, integer, number, boolean, an array with items, or an object with properties."
    )


def merged_field(field: pa.Field, schema: Mapping[str, Any]) -> pa.Field:
    """
    Return the column that holds what an existing column holds and the values of a JSON schema besides.

    A struct gets the properties that it lacks, a column of nulls the generated type; any other type stays. A column
    of strings takes objects too, as JSON text.

    :raises ConfigError: The values don't fit into the column.
    """
    generated = arrow_type(schema)
    if schema_is_object(schema) and is_text(field.type):
        return field
    merged = _merged(field.type, generated)
    if merged is None:
        raise ConfigError(
            f"The column {field.name!r} of the shard has the type {field.type}, which can't take the generated values "
            f"of type {generated}. Give the generated field another name, or convert the column."
        )
    return field.with_type(merged)


def adapted(array: pa.Array, to: pa.DataType) -> pa.Array:
    """Return a column's values in the type that :func:`merged_field` made of the column's; what is new is null."""
    import pyarrow as pa

    if array.type == to:
        return array
    if pa.types.is_null(array.type):
        return pa.nulls(len(array), to)
    if pa.types.is_struct(to):
        known = {array.type.field(i).name: i for i in range(array.type.num_fields)}
        children = [
            adapted(array.field(known[each.name]), each.type)
            if each.name in known
            else pa.nulls(len(array), each.type)
            for each in to
        ]
        return pa.StructArray.from_arrays(children, fields=list(to), mask=array.is_null())
    return array.cast(to)


def to_arrow(value: Any, field: pa.Field) -> pa.Array:
    """
    Return an array of one value in a column's type.

    :raises TypeError, ValueError: The column cannot hold the value.
    """
    import pyarrow as pa

    if value is None and not field.nullable:
        raise ValueError(f"The column {field.name!r} can't be null.")
    if isinstance(value, dict) and is_text(field.type):
        value = json.dumps(value, ensure_ascii=False, allow_nan=False)
    _check(value, field.type, field.name)
    extension = isinstance(field.type, pa.BaseExtensionType)
    try:
        array = pa.array([value], type=field.type.storage_type if extension else field.type)
    except OverflowError as error:
        raise ValueError(f"The column {field.name!r}: {error}") from None
    except NotImplementedError as error:
        raise TypeError(f"The column {field.name!r}: {error}") from None
    return pa.ExtensionArray.from_storage(field.type, array) if extension else array


def schema_is_object(schema: Mapping[str, Any]) -> bool:
    """Whether a JSON schema's values are objects."""
    kinds = schema.get("type")
    return kinds == "object" or (isinstance(kinds, list | tuple) and "object" in kinds)


def is_text(kind: pa.DataType) -> bool:
    """Whether a type holds strings."""
    import pyarrow as pa

    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def is_bytes(kind: pa.DataType) -> bool:
    """Whether a type holds bytes."""
    import pyarrow as pa

    return bool(
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
        or pa.types.is_binary_view(kind)
    )


def is_list(kind: pa.DataType) -> bool:
    """Whether a type holds lists (maps are none)."""
    import pyarrow as pa

    return bool(
        pa.types.is_list(kind)
        or pa.types.is_large_list(kind)
        or pa.types.is_fixed_size_list(kind)
        or pa.types.is_list_view(kind)
        or pa.types.is_large_list_view(kind)
    )


def _merged(old: pa.DataType, new: pa.DataType) -> pa.DataType | None:
    """The type for values of both; None when there is none."""
    import pyarrow as pa

    types = pa.types
    if types.is_null(old):
        return new
    if isinstance(old, pa.BaseExtensionType):
        return old if _merged(old.storage_type, new) == old.storage_type else None
    if types.is_dictionary(old):
        return old if _merged(old.value_type, new) == old.value_type else None
    if types.is_struct(old) and types.is_struct(new):
        return _merged_struct(old, new)
    if is_list(old) and types.is_list(new):
        item = _merged(old.value_type, new.value_type)
        if item == old.value_type:
            return old
        # Arrow casts lists of nothing to any lists, but lists of structs not to lists of larger structs.
        return pa.list_(item) if types.is_list(old) and _is_empty(old.value_type) else None
    fits = (
        (types.is_string(new) and is_text(old))
        or (types.is_int64(new) and (types.is_integer(old) or types.is_floating(old)))
        or (types.is_float64(new) and types.is_floating(old))
        or (types.is_boolean(new) and types.is_boolean(old))
    )
    return old if fits else None


def _merged_struct(old: pa.DataType, new: pa.DataType) -> pa.DataType | None:
    import pyarrow as pa

    merged = {field.name: field for field in old}
    if len(merged) < old.num_fields:
        return None
    for field in new:
        known = merged.get(field.name)
        kind = field.type if known is None else _merged(known.type, field.type)
        if kind is None:
            return None
        merged[field.name] = field if known is None else known.with_type(kind)
    return pa.struct(list(merged.values()))


def _is_empty(kind: pa.DataType) -> bool:
    """Whether a type holds nothing but nulls, or lists of them."""
    import pyarrow as pa

    return bool(pa.types.is_null(kind) or (pa.types.is_list(kind) and _is_empty(kind.value_type)))


def _check(value: Any, kind: pa.DataType, where: str) -> None:
    """
    Refuse what Arrow would convert by leaving something out.

    :raises TypeError, ValueError: The value is such a one.
    """
    import pyarrow as pa

    if value is None:
        return
    if pa.types.is_struct(kind) and isinstance(value, Mapping):
        fields = {kind.field(i).name: kind.field(i) for i in range(kind.num_fields)}
        for name, each in value.items():
            if name not in fields:
                raise TypeError(
                    f"{where!r} has no field {name!r}; a step must name every field that it generates."
                )
            _check(each, fields[name].type, f"{where}.{name}")
    elif is_list(kind):
        if not isinstance(value, list | tuple):
            raise TypeError(f"{where!r} takes lists, and this is {type(value).__name__}.")
        for each in value:
            _check(each, kind.value_type, where)
    elif pa.types.is_integer(kind) and isinstance(value, float) and not value.is_integer():
        raise ValueError(f"{where!r} takes whole numbers, and this is {value}.")

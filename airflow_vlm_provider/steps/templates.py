"""Prompts with places in them that each row fills: ``{text}``, ``{meta.title}``."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from airflow_vlm_provider.errors import SampleError
from airflow_vlm_provider.steps.rows import excerpt
from airflow_vlm_provider.types import Row

# What else stands in braces, like an example of JSON, is not meant.
_FIELD = re.compile(r"\{([^\W\d][\w-]*(?:\.[\w-]+)*)\}")


def fill(template: str, row: Row) -> str:
    """
    Put a row's values where the template names their fields; what they hold is not looked through for more names.

    Text stands as it is, null is empty, everything else is JSON. A name with dots is a field of just that name, or
    else a path through objects.

    :raises SampleError: ``malformed_row``: the row lacks a field, or it holds what is no text.
    """
    return _FIELD.sub(lambda found: _as_text(found[1], _value(row, found[1])), template)


def _value(row: Row, name: str) -> Any:
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        if value is None:
            return None
        if not isinstance(value, Mapping) or part not in value:
            raise SampleError(
                "malformed_row",
                f"The prompt names the field {name!r}, which the row does not have. Where it may be missing, take a "
                "function for the prompt.",
            )
        value = value[part]
    return value


def _as_text(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int | float | list | tuple | Mapping):
        return json.dumps(value, ensure_ascii=False, default=lambda each: _plain(name, each))
    return _plain(name, value)


def _plain(name: str, value: Any) -> str:
    """What a format with types has besides JSON's: dates and decimals."""
    if isinstance(value, bytes | bytearray | memoryview):
        raise SampleError(
            "malformed_row", f"The prompt names the field {name!r}, which holds bytes: {excerpt(value)}."
        )
    return str(value)

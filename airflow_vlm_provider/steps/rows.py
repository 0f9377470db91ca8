"""What steps read from a row, and how they say what is wrong with it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from airflow_vlm_provider.errors import SampleError
from airflow_vlm_provider.types import Row

_EXCERPT = 200


def read_references(row: Row, key: str) -> Sequence[str]:
    """The media references in a field: a list, a single one, or none where the field is null or missing.

    :raises SampleError: ``malformed_row``: it holds something else.
    """
    references = row.get(key)
    if references is None:
        return []
    if isinstance(references, str):
        references = [references]
    if not isinstance(references, list | tuple):
        raise malformed(key, references, "a list of references")
    for reference in references:
        if not isinstance(reference, str) or not reference:
            raise malformed(key, reference, "references that are strings and not empty")
    return references


def read_text(row: Row, key: str) -> str:
    """The text in a field; empty where the field is null or missing.

    :raises SampleError: ``malformed_row``: it holds something else.
    """
    text = row.get(key)
    if text is not None and not isinstance(text, str):
        raise malformed(key, text, "a string or null")
    return text or ""


def malformed(key: str, value: object, expected: str) -> SampleError:
    """The error of a row whose field holds something else than expected."""
    return SampleError("malformed_row", f"Field {key!r} holds {excerpt(value)}; expected {expected}.")


def excerpt(value: object) -> str:
    """A value as a person can read it in one line of a log."""
    text = re.sub(r"\s+", " ", value) if isinstance(value, str) else repr(value)
    text = text if len(text) <= _EXCERPT else f"{text[: _EXCERPT - 1]}…"
    return repr(text) if isinstance(value, str) else text

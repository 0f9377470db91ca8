"""Rows of nothing but text."""

from __future__ import annotations

from typing import Any


def texts(*names: str) -> list[dict[str, Any]]:
    """A row for each name, with the name for its text."""
    return [{"text": name} for name in names]

"""One spelling for every JSON value, so that equal ones hash alike wherever they come from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def canonical(value: Any) -> bytes:
    """Spell a JSON value so that two values are equal exactly when their spellings are.

    JSON with sorted keys and without spaces, in ASCII, and 1.0 as 1.

    :raises TypeError: it is no JSON value.
    """
    text = json.dumps(_without_spellings(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return text.encode()


def _without_spellings(value: Any) -> Any:
    """The same value, with whole floats as integers: a temperature of 0.0 must not cost what one of 0 has paid."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, Mapping):
        return {key: _without_spellings(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_spellings(each) for each in value]
    return value
